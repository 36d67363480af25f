# SPDX-License-Identifier: MIT
"""A training job by name: data, configuration and model of ``fastdiff train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import Dataset

from ...data_files import MalformedError, malformed_in_one_sentence, read_document
from ...errors import error_message
from ...json_fields import parsed_object
from ..config import DiffusionConfig
from ..data.datasets import ImageFolder, digits_dataset, fashion_mnist_dataset
from ..data.order import seeded_draws

#: The packaged digits' model and how it is trained: `fastdiff.digits.train` has the same recipe in plain torch.
DIGITS: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 1,
    "beta_schedule": "cosine",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "learning_rate": 1e-3,
    "ema_decay": 0.999,
    "guidance_scale": 2.0,
}
_FASHION_CLASSES = (
    "T-shirt or top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class Job(NamedTuple):
    """What a training job is made of.

    Attributes:
        config: the configuration.
        model: an untrained model.
        train_data, held_out: data sets; None where nothing is held out.
        null_label: for a model that takes labels.
    """

    config: DiffusionConfig
    model: nn.Module
    train_data: Dataset[Any]
    held_out: Dataset[Any] | None
    null_label: int | None


class PromptedImages(Dataset[Any]):
    """Images with a prompt each: the name of their class.

    Args:
        dataset: gives ``(image, label)``.
        classes: names by label.
    """

    def __init__(self, dataset: Any, classes: tuple[str, ...] | list[str]) -> None:
        self._dataset, self._classes = dataset, classes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``{"images": image, "prompts": name}``."""
        image, label = self._dataset[index]
        return {"images": image, "prompts": self._classes[int(label)]}


class _ImagesAlone(Dataset[Any]):
    """Images without their labels, for a model without a condition."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index][0]


def prepare_job(data: str, config_file: Path | None, overrides: Mapping[str, Any]) -> Job:
    """Make data sets and an untrained model.

    Without a configuration ``digits`` trains the class-conditional `DigitUNet`; everything else trains an
    `AdvancedUNet`, whose prompts are the names of the classes where the configuration has ``use_spatial_transformer``.

    Args:
        data: ``digits``; a folder with the idx files of Fashion-MNIST (or MNIST); or a folder of images, whose
            subfolders are classes.
        config_file: JSON of `DiffusionConfig`, or None.
        overrides: fields of the configuration that replace those of the file.

    Raises:
        OSError, ValueError, TypeError: the data or the configuration cannot be read, or do not fit.
    """
    digits = data == "digits" and config_file is None
    fields = {**(DIGITS if digits else {}), **(_read_config(config_file) if config_file else {})}
    steps = overrides.get("max_train_steps", fields.get("max_train_steps"))
    if isinstance(steps, int) and "lr_warmup_steps" not in fields:
        fields["lr_warmup_steps"] = min(1000, steps // 10)
    config = replace(DiffusionConfig.from_dict(fields), **overrides)
    settled = config.validate()
    train, held_out, classes = _datasets(data, settled)
    if digits:
        from ...digits import NULL_CLASS, DigitUNet

        with seeded_draws(settled.seed):
            return Job(config, DigitUNet(dropout=settled.dropout), train, held_out, NULL_CLASS)
    if settled.use_spatial_transformer and classes:
        train, held_out = PromptedImages(train, classes), held_out and PromptedImages(held_out, classes)
    elif classes:
        train, held_out = _ImagesAlone(train), held_out and _ImagesAlone(held_out)
    from ..model.diffusion_model import AdvancedUNet

    with seeded_draws(settled.seed):
        return Job(config, AdvancedUNet(config), train, held_out, None)


def _datasets(data: str, config: DiffusionConfig) -> tuple[Any, Any, list[str]]:
    """Return the data for training, the held-out data or None, and the names of the classes."""
    if data == "digits":
        _check_shape(config, 8, 1)
        return digits_dataset(), digits_dataset(train=False), [str(digit) for digit in range(10)]
    folder = Path(data)
    if any(folder.glob("train-images-idx3-ubyte*")):
        train, held_out = fashion_mnist_dataset(folder), None
        if any(folder.glob("t10k-images-idx3-ubyte*")):
            held_out = fashion_mnist_dataset(folder, train=False)
        _check_shape(config, train.tensors[0].shape[-1], 1)
        return train, held_out, list(_FASHION_CLASSES)
    labels = config.use_spatial_transformer
    images = ImageFolder(folder, config.image_size, config.in_channels, labels=labels)
    return images, None, images.classes


def _check_shape(config: DiffusionConfig, size: int, channels: int) -> None:
    for name, value in (("image_size", size), ("in_channels", channels)):
        if getattr(config, name) != value:
            got = f"is {getattr(config, name)}"
            raise ValueError(
                error_message("train", name, got, f"{value} for these data", "set it in the configuration")
            )


def _read_config(path: Path) -> dict[str, Any]:
    """Return the fields of a configuration's file."""
    with malformed_in_one_sentence("train", path, "a JSON object with fields of DiffusionConfig"):
        text = read_document(path, operation="train")
        try:
            return dict(parsed_object("train", text.decode()))
        except ValueError as error:
            raise MalformedError(str(error)) from None
