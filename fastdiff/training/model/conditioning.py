# SPDX-License-Identifier: MIT
"""Conditions of the model: prompts, labels and embeddings, with condition dropout, and the modules that are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...device_copy import to_device
from ...errors import error_message
from ...philox import Purpose
from ...row_layout import compute_dtype
from ..data.batches import RawBatch
from ..seeded_uniforms import seeded_uniforms


def output_tensor(output: Any) -> Tensor:
    """Return the tensor of a model's output: itself, a dict's or an object's ``sample``, or a tuple's first."""
    if isinstance(output, Mapping):
        output = output["sample"]
    elif isinstance(output, (tuple, list)):
        output = output[0]
    elif not isinstance(output, Tensor):
        output = output.sample
    assert isinstance(output, Tensor)
    return output


class TrainedModules(nn.Module):
    """The model and the text encoder that is trained with it, as one module for wrappers such as DDP.

    Args:
        model: called with ``(sample, timestep)`` or ``(sample, timestep, condition)``.
        text_encoder: gets tokens ``[B, length]``, where it is trained.

    Attributes:
        data_dtype: of images and embeddings: float32, or float64 for a model with parameters of it.
    """

    def __init__(self, model: nn.Module, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.text_encoder = model, text_encoder
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        self.data_dtype = compute_dtype(*dtypes)
        # A model of half precision throughout computes in it; others take the dtype of the data.
        self._input_dtype = dtypes.pop() if len(dtypes) == 1 else self.data_dtype

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the model's output ``[B, C, ...]``.

        Args:
            sample: noisy samples ``[B, C, ...]``.
            timestep: ``[B]``.
            condition: None; labels ``[B]``; tokens ``[B, length]`` int64; or embeddings ``[B, tokens, width]``.
        """
        sample = sample.to(self._input_dtype)
        if condition is None:
            return output_tensor(self.model(sample, timestep))
        if condition.dim() == 2 and not condition.is_floating_point() and self.text_encoder is not None:
            condition = self.text_encoder(condition)
        if condition.is_floating_point():
            condition = condition.to(self._input_dtype)
        return output_tensor(self.model(sample, timestep, condition))


class Conditioning:
    """Turns the conditions of a batch into what the model takes, and replaces a share of them by the null condition.

    Args:
        text_encoder: a module with ``tokens(prompts)``, or a callable from prompts to ``[B, tokens, width]``; or None.
        null_label: the label that means no class.  Labels are passed to the model only where it is given.
        dropout: share of null conditions.
        device: where conditions are put.
        always: the model has cross-attention: batches without a condition get empty prompts, where there is a text
            encoder.
    """

    def __init__(
        self,
        text_encoder: Callable[[Sequence[str]], Tensor] | None,
        null_label: int | None,
        dropout: float,
        device: torch.device,
        *,
        always: bool = False,
    ) -> None:
        self.text_encoder, self.null_label = text_encoder, null_label
        self.dropout, self.device, self.always = dropout, device, always

    def __call__(self, raw: RawBatch, seeds: Tensor, operation: str) -> Tensor | None:
        """Return the condition of a batch on the device, or None.

        Args:
            raw: the batch.
            seeds: of the samples, ``[B]`` on the CPU, so that a prompt can be replaced without a host sync.
            operation: for messages.

        Raises:
            ValueError: there are prompts and no text encoder.
        """
        dropped = torch.zeros(len(seeds), dtype=torch.bool)
        if self.dropout > 0:
            dropped = seeded_uniforms(seeds, Purpose.CONDITION_DROPOUT, 1)[:, 0] < self.dropout
        if raw.embeddings is not None:
            mask = to_device(dropped, self.device)[:, None, None]
            return to_device(raw.embeddings, self.device).masked_fill(mask, 0.0)
        prompts = raw.prompts
        if prompts is None and self.always and self.text_encoder is not None and self.null_label is None:
            prompts = [""] * len(seeds)
        if prompts is not None:
            kept = ["" if gone else prompt for prompt, gone in zip(prompts, dropped.tolist(), strict=True)]
            return self.encode(kept, operation)
        if raw.labels is not None and self.null_label is not None:
            labels = raw.labels.to(torch.int64).cpu()
            return to_device(torch.where(dropped, self.null_label, labels), self.device)
        return None

    def encode(self, prompts: Sequence[str], operation: str) -> Tensor:
        """Return prompts as the model takes them: tokens for a trained text encoder, else embeddings without gradients.

        Raises:
            ValueError: there is no text encoder.
        """
        if self.text_encoder is None:
            got, remedy = "are given to a model without a text encoder", "pass text_encoder= to the trainer"
            raise ValueError(error_message(operation, "prompts", got, "images alone, or embeddings", remedy))
        tokens = getattr(self.text_encoder, "tokens", None)
        if tokens is not None:
            return to_device(tokens(prompts), self.device)
        with torch.no_grad():
            return self.text_encoder(prompts).to(self.device)
