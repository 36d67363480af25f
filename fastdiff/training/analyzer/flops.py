# SPDX-License-Identifier: MIT
"""Floating-point operations of a model by module, and what autograd keeps of a forward call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...sampling.model_mode import evaluating
from .model_size import tensor_bytes


def count_flops(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[int, dict[str, int], dict[str, Any]]:
    """Call a model once, in evaluation mode and without gradients.

    The model is as it was afterwards, its buffers and torch's generators too.

    Returns:
        the floating-point operations of the call, as torch's `FlopCounterMode` counts them: a multiplication and an
        addition are two; those of each module without the modules called within it, by name ("" is the model); and the
        shapes of the modules' outputs, for those that return one tensor.
    """
    shapes: dict[str, Any] = {}
    own: dict[str, int] = {}
    hooks = []
    # The counter knows no fused attention kernel of the CPU: plain products count the same everywhere.
    counter = FlopCounterMode(display=False)
    #: Of each call in progress: the count at its start, and the operations of the calls within it.
    calls: list[list[int]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        calls.append([counter.get_total_flops(), 0])

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            start, within = calls.pop()
            whole = counter.get_total_flops() - start
            own[name] = own.get(name, 0) + whole - within
            if calls:
                calls[-1][1] += whole
            if isinstance(output, Tensor):
                shapes[name] = list(output.shape)

        return hook

    try:
        for name, module in model.named_modules():
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(name))]
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            _call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops(), own, shapes


def _call(model: nn.Module, buffers: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a model with buffers in the place of its own; torch's generators are as they were afterwards."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        return torch.func.functional_call(model, dict(buffers), tuple(args), dict(kwargs))


def bytes_kept_for_backward(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes that autograd keeps of one forward call in training mode, parameters and buffers left out.

    The model is as it was afterwards, its buffers and torch's generators too.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = {_storage(tensor) for tensor in (*model.parameters(), *buffers.values()) if _has_storage(tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not _has_storage(tensor):
            kept[id(tensor)] = tensor_bytes(tensor)
        elif _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        _training(model),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        # The output keeps what was saved alive, so that no two tensors have one address.
        output = _call(model, buffers, args, kwargs)
        del output
    return sum(kept.values())


def _has_storage(tensor: Tensor) -> bool:
    """Return False for tensors made of other tensors, such as quantized ones."""
    return not hasattr(tensor, "__tensor_flatten__")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Run a block with a model in training mode, then put each of its modules back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
