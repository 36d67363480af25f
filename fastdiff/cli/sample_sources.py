# SPDX-License-Identifier: MIT
"""Models of ``fastdiff sample``, with their defaults: the packaged digits, or a run of ``fastdiff train``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..digits import IMAGE_SHAPE, NUM_CLASSES
from ..digits.batches import DigitBatches
from ..errors import error_message
from ..sharding.sampler_batches import SamplerBatches
from .samplers import sampler_fields

if TYPE_CHECKING:
    from ..training.pictures.batches import CheckpointModel

#: Sampler, steps and guidance scale for the packaged model.
_SAMPLER, _STEPS, _GUIDANCE_SCALE = "dpmsolver++", 20, 3.0


class SampleSource(NamedTuple):
    """A model and how it is sampled.

    Attributes:
        make_batches: returns the batches of a job of n images; takes `device`, `backend` and `threads` by name.
        shape: of an image, ``(C, H, W)``.
        options: what decides the bits, beside device, backend, threads and versions.
        columns: returns the images a row of a picture of n images.
    """

    make_batches: Callable[..., SamplerBatches]
    shape: tuple[int, int, int]
    options: dict[str, Any]
    columns: Callable[[int], int]


def packaged_source(
    sampler: str | None, steps: int | None, guidance_scale: float | None, more: Mapping[str, Any], classes: str | None
) -> SampleSource:
    """Return the packaged model of digits.

    Args:
        sampler, steps, guidance_scale: those of the command; None for the defaults.
        more: further fields of `fastdiff.SamplingConfig`.
        classes: text of `parse_classes`; None for all.

    Raises:
        ValueError: an option does not fit.
    """
    fields = {**sampler_fields(sampler or _SAMPLER), "num_inference_steps": _STEPS if steps is None else steps, **more}
    labels = parse_classes("0-9" if classes is None else classes, NUM_CLASSES)
    return digits_source(fields, _GUIDANCE_SCALE if guidance_scale is None else guidance_scale, labels)


def trained_source(
    weights: Path,
    sampler: str | None,
    steps: int | None,
    guidance_scale: float | None,
    more: Mapping[str, Any],
    *,
    classes: str | None,
    prompt: str | None,
    negative_prompt: str | None,
) -> SampleSource:
    """Return a run of ``fastdiff train``; options that are None are those of its configuration.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, or an option does not fit its model.
    """
    from ..training.pictures.batches import CheckpointModel

    model = CheckpointModel(weights)
    config = model.config
    fields = {**sampler_fields(sampler or config.sampling_method), **more}
    fields["num_inference_steps"] = config.num_inference_steps if steps is None else steps
    if fields["method"] == "ddim" and fields.get("eta") is None:
        fields["eta"] = config.eta
    for name, value, fits, kind in (
        ("--classes", classes, model.takes_labels, "without labels"),
        ("--prompt", prompt, model.takes_prompts, "without a text encoder"),
        ("--negative-prompt", negative_prompt, model.takes_prompts, "without a text encoder"),
        ("--guidance-scale", guidance_scale, model.takes_labels or model.takes_prompts, "without a condition"),
    ):
        if value is not None and not fits:
            raise _refused(name, f"is given for a model {kind}", "none", "leave it out")
    scale = config.guidance_scale if model.takes_labels or model.takes_prompts else 1.0
    scale = scale if guidance_scale is None else guidance_scale
    if negative_prompt is not None and scale == 1.0:
        remedy = "leave it out, or pass another --guidance-scale"
        raise _refused("--negative-prompt", "is given at guidance scale 1", "guidance", remedy)
    if model.takes_labels:
        return digits_source(fields, scale, parse_classes("0-9" if classes is None else classes, NUM_CLASSES), model)
    prompts: dict[str, Any] = {}
    if model.takes_prompts:
        prompts = {"prompt": prompt or "", "negative_prompt": negative_prompt or ""}

    def make_batches(n: int, **own: Any) -> SamplerBatches:
        from ..training.pictures.batches import ModelBatches

        return ModelBatches(model, fields, guidance_scale=scale, **prompts, **own)

    return SampleSource(
        make_batches,
        (config.in_channels, config.image_size, config.image_size),
        {**_json_fields(fields), "guidance_scale": scale, **prompts, "weights": model.digest},
        lambda n: math.ceil(math.sqrt(n)),
    )


def digits_source(
    sampling: Mapping[str, Any], guidance_scale: float, labels: Sequence[int], weights: CheckpointModel | None = None
) -> SampleSource:
    """Return a class-conditional model of digits.

    Args:
        sampling: fields of `fastdiff.SamplingConfig`.
        guidance_scale: of classifier-free guidance.
        labels: classes to draw.
        weights: of a training; None for the packaged model.
    """
    options = {
        **_json_fields(sampling),
        "guidance_scale": guidance_scale,
        "classes": ",".join(map(str, labels)),
    }
    trained: dict[str, Any] = {}
    fields = dict(sampling)
    if weights is not None:
        options["weights"] = weights.digest
        fields["prediction_type"] = weights.config.prediction_type
        trained = {"load": weights.network, "schedule": weights.config.noise_scheduler_config()}

    def make_batches(n: int, **own: Any) -> SamplerBatches:
        return DigitBatches(labels, n, fields, guidance_scale=guidance_scale, **trained, **own)

    def columns(n: int) -> int:
        # Rows of one class: each class its share, the first ones one more where n does not divide.
        return n // len(labels) + bool(n % len(labels)) if n >= len(labels) else n

    return SampleSource(make_batches, IMAGE_SHAPE, options, columns)


def parse_classes(text: str, count: int) -> list[int]:
    """Return class labels from text such as ``"0-9"``, ``"3"`` or ``"1,4,7-9"``, in order, each once."""
    labels: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        first, last = (0, -1) if found is None else (int(found[1]), int(found[2] or found[1]))
        if last < first:
            raise _refused("--classes", f"is {text!r}", "labels and ranges such as 0-9 or 1,4", "write it so")
        if last >= count:
            raise _refused("--classes", f"asks for {last}", f"0 to {count - 1}", "stay within the classes")
        labels += range(first, last + 1)
    return list(dict.fromkeys(labels))


def _json_fields(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with the names of enumerations as values."""
    return {name: getattr(value, "value", value) for name, value in sampling.items()}


def _refused(argument: str, got: str, expected: str, remedy: str) -> ValueError:
    return ValueError(error_message("sample", argument, got, expected, remedy))
