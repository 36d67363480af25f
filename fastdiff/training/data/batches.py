# SPDX-License-Identifier: MIT
"""Batches: what a data loader may give, and what an objective gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import error_message, unknown_name

_KEYS = ("images", "labels", "prompts", "encoder_hidden_states")
_EXPECTED = "a tensor [B, C, ...], (images, labels), or a dict of " + ", ".join(_KEYS)


class RawBatch(NamedTuple):
    """A batch of a data loader, read.

    Attributes:
        images: clean samples ``[B, C, ...]``, floating, in the range that the model learns, usually [−1, 1].
        labels: classes ``[B]`` integer, or None.
        prompts: B strings, or None.
        embeddings: of a text encoder, ``[B, tokens, width]``, or None.
    """

    images: Tensor
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    embeddings: Tensor | None = None

    def to_dtype(self, dtype: torch.dtype) -> RawBatch:
        """Return the batch with images and embeddings of a dtype."""
        embeddings = None if self.embeddings is None else self.embeddings.to(dtype)
        return self._replace(images=self.images.to(dtype), embeddings=embeddings)


@dataclass(frozen=True)
class TrainingBatch:
    """A batch as an objective gets it, on the device.

    Attributes:
        images: clean samples ``[B, C, ...]``.
        condition: labels, tokens or embeddings of the samples after condition dropout; or None.
        seeds: ``[B]`` int64, one a sample: a function of (seed, sample id, epoch).  Draws that follow from them alone
            are those of the sample in any batch, process or resumed run.
        sample_ids: numbers of the samples, ``[B]`` int64, on the CPU.
        epoch: passes over the data before this one.
        step: optimizer steps before this one.
    """

    images: Tensor
    condition: Tensor | None
    seeds: Tensor
    sample_ids: Tensor
    epoch: int
    step: int


def read_batch(batch: Any, operation: str, channels: int | None = None) -> RawBatch:
    """Read a batch: a tensor of images, ``(images, labels)``, or a dict.

    Args:
        batch: a tensor ``[B, C, ...]``; a tuple or list of it and labels; or a dict with ``images`` and any of
            ``labels``, ``prompts`` and ``encoder_hidden_states``.
        operation: for messages.
        channels: C, where it is known.

    Raises:
        TypeError: it is something else, or the images are not floating.
        ValueError: shapes or lengths do not fit, or a key is unknown.
    """
    if isinstance(batch, Tensor):
        raw = RawBatch(batch)
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        raw = RawBatch(*batch)
    elif isinstance(batch, Mapping):
        for key in batch:
            if key not in _KEYS:
                raise unknown_name(operation, "a key of the batch", key, _KEYS)
        if "images" not in batch:
            remedy = "name the clean samples images"
            raise ValueError(error_message(operation, "batch", f"has keys {sorted(batch)}", "a key 'images'", remedy))
        raw = RawBatch(batch["images"], batch.get("labels"), batch.get("prompts"), batch.get("encoder_hidden_states"))
    else:
        got = f"is a {type(batch).__name__}"
        raise TypeError(error_message(operation, "batch", got, _EXPECTED, "collate samples to such batches"))
    _check(raw, operation, channels)
    return raw


def _check(raw: Any, operation: str, channels: int | None) -> None:
    """Check a batch whose fields may have any type."""
    images = raw.images
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = f"have dtype {images.dtype}" if isinstance(images, Tensor) else f"are a {type(images).__name__}"
        remedy = "convert pixels of 0 to 255 with images.float() / 127.5 - 1"
        raise TypeError(error_message(operation, "images", got, "a floating tensor", remedy))
    if images.dim() < 2 or not len(images):
        got = f"have shape {list(images.shape)}"
        raise ValueError(
            error_message(operation, "images", got, "[B, C, ...] with B of 1 or more", "add a batch dimension")
        )
    if channels is not None and images.shape[1] != channels:
        got, expected = f"have {images.shape[1]} channels", f"{channels}, in_channels of the configuration"
        raise ValueError(error_message(operation, "images", got, expected, "convert them, or set in_channels"))
    count = len(images)
    if raw.labels is not None and (
        not isinstance(raw.labels, Tensor)
        or raw.labels.shape != (count,)
        or raw.labels.is_floating_point()
        or raw.labels.dtype == torch.bool
    ):
        got = (
            f"have shape {list(raw.labels.shape)} and dtype {raw.labels.dtype}"
            if isinstance(raw.labels, Tensor)
            else f"are a {type(raw.labels).__name__}"
        )
        raise ValueError(error_message(operation, "labels", got, f"[{count}] integers", "give one class a sample"))
    if raw.prompts is not None and (
        isinstance(raw.prompts, str)
        or len(raw.prompts) != count
        or not all(isinstance(prompt, str) for prompt in raw.prompts)
    ):
        got = "are one string" if isinstance(raw.prompts, str) else f"are {len(raw.prompts)} values"
        raise ValueError(error_message(operation, "prompts", got, f"a list of {count} strings", "give one a sample"))
    if raw.embeddings is not None and (
        not isinstance(raw.embeddings, Tensor) or raw.embeddings.dim() != 3 or len(raw.embeddings) != count
    ):
        got = f"have shape {list(getattr(raw.embeddings, 'shape', []))}"
        expected = f"[{count}, tokens, width]"
        raise ValueError(error_message(operation, "encoder_hidden_states", got, expected, "give one a sample"))
    if raw.prompts is not None and raw.embeddings is not None:
        got, remedy = "are given beside encoder_hidden_states", "leave one of the two out"
        raise ValueError(error_message(operation, "prompts", got, "one condition", remedy))
