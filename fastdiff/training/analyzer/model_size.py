# SPDX-License-Identifier: MIT
"""Sizes of tensors and models in memory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; of a quantized tensor, those of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(inner) for name in names if isinstance(inner := getattr(tensor, name), Tensor))
    return tensor.numel() * tensor.element_size()


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the sum of `tensor_bytes` over tensors, each once."""
    return sum(tensor_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return total_bytes([*model.parameters(), *model.buffers()])
