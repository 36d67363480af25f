# SPDX-License-Identifier: MIT
"""Steps without the C++ extension: a call like an earlier one is launched without a second look at its arguments.

`step` stands for the extension's function of that name and keeps its contract.  `remember` keeps the launch of a call
that was checked and ran as it was given, with no tensor copied, by everything that the checks and the launch depend on:
each tensor's type, dtype, shape, strides, device and alignment, and every option.  Numbers that differ from step to
step (row, noise step, guidance scale) are arguments of the launch.  Whatever can differ behind the same key is compared
in each call: memory that was freed, tensors that overlap, gradients, modes of torch, launch hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

import triton

from . import config, launch
from .philox import as_int32
from .step import Arguments, arguments, bits_of

if TYPE_CHECKING:
    from fastdiff.ops.call import StepCall

#: Launches kept; beyond that all are forgotten.
_MOST = 4096
_KINDS = (Tensor, torch.nn.Parameter)
_NUMBERS = (float, int)
_LISTS = (list, tuple)
#: Integers of the kernel that differ from step to step, by position.
_ROW, _NOISE_STEP, _GUIDANCE_BITS = 0, 2, 6
_MOST_WORD = 2**32 - 1


class _Prepared(NamedTuple):
    """The launch of a kind of call.

    Attributes:
        run, function, metadata: Triton's runner of the compiled kernel and what it takes.
        arguments: of the launch that was remembered; its tensors are not kept.
        needed: bytes of each tensor from its first element to its last; 0 where it is absent.
        new: shape, strides and dtype of each output that is a new tensor, None for those given.
    """

    run: Any
    function: Any
    metadata: Any
    arguments: Arguments
    needed: tuple[int, ...]
    new: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]


_prepared: dict[tuple[Any, ...], _Prepared] = {}


class _Given(NamedTuple):
    """A call's tensors in the kernel's order, their addresses, where their storages end, and the key of its kind."""

    tensors: list[Tensor | None]
    addresses: list[int]
    ends: list[int]
    key: tuple[Any, ...]


def step(
    *,
    sample: Any,
    model_output: Any,
    table: Any,
    row_index: Any,
    uncond: Any = None,
    guidance_scale: Any = None,
    history: Any = (),
    noise: Any = None,
    variance: Any = None,
    mask: Any = None,
    threshold: Any = None,
    variance_kind: Any = 0,
    keeps: Any = 0,
    seeds: Any = None,
    noise_step: Any = 0,
    purpose: Any = 1,
    model_input: Any = None,
    write_history: bool = False,
    out: Any = None,
    triton: bool = False,
) -> tuple[Tensor, ...] | str:
    """Launch a call of a kind that `remember` has kept.

    Returns:
        The outputs, or, with nothing written, why the call was declined.
    """
    if _observed():
        return "modes"
    given = _given(
        sample, model_output, table, row_index, uncond, guidance_scale, history, noise, variance, mask,
        threshold, variance_kind, keeps, seeds, noise_step, purpose, model_input, write_history, out,
    )  # fmt: skip
    if isinstance(given, str):
        return given
    prepared = _prepared.get(given.key)
    if prepared is None:
        return "kernel"
    integers = list(prepared.arguments.integers)
    if type(row_index) is int:
        if not 0 <= row_index < integers[1]:
            return "value"
        integers[_ROW] = row_index
    if seeds is not None and type(noise_step) is int:
        if not 0 <= noise_step <= _MOST_WORD:
            return "value"
        integers[_NOISE_STEP] = as_int32(noise_step)
    if type(guidance_scale) in _NUMBERS:
        integers[_GUIDANCE_BITS] = bits_of(guidance_scale, table.dtype)
    return _launched(prepared, given, integers, write_history)


def _observed() -> bool:
    """Return whether anything has to see operators, or Triton's JIT has to launch."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or launch._through_jit
        or config._overridden
        or launch._interfered_with()
    )


def _given(
    sample: Any, model_output: Any, table: Any, row_index: Any, uncond: Any, guidance_scale: Any, history: Any,
    noise: Any, variance: Any, mask: Any, threshold: Any, variance_kind: Any, keeps: Any, seeds: Any, noise_step: Any,
    purpose: Any, model_input: Any, write_history: bool, out: Any,
) -> _Given | str:  # fmt: skip
    """Return a call's tensors and key, or why it is declined."""
    if not (
        type(keeps) is int and isinstance(variance_kind, int) and isinstance(purpose, int)
        and (history is None or (type(history) in _LISTS and len(history) <= 4))
        and (out is None or (type(out) in _LISTS and len(out) == keeps + 1 <= 3))
    ):  # fmt: skip
        return "argument"
    slots = (*(history or ()), None, None, None, None)[:4]
    targets = (*((None,) * (keeps + 1) if out is None else out), None, None)[:3]
    number = type(guidance_scale) in _NUMBERS
    tensors = [
        sample,
        model_output,
        table,
        None if type(row_index) is int else row_index,
        uncond,
        None if number else guidance_scale,
        *slots,
        noise,
        variance,
        mask,
        threshold,
        seeds,
        None if seeds is None or type(noise_step) is int else noise_step,
        *(target if isinstance(target, Tensor) else None for target in targets),
        model_input,
    ]
    grad = torch.is_grad_enabled()
    key: list[Any] = [
        number, variance_kind, keeps, write_history, None if seeds is None else purpose,
        *(None if isinstance(target, Tensor) else target for target in targets),
    ]  # fmt: skip
    addresses: list[int] = []
    ends: list[int] = []
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            addresses.append(0)
            ends.append(0)
            continue
        if type(tensor) not in _KINDS or tensor.layout is not torch.strided or tensor.is_neg():
            return "wrapper"
        if grad and tensor.requires_grad:
            return "autograd"
        address = tensor.data_ptr()
        held = tensor.untyped_storage()
        key.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device(), address % 16 == 0))
        addresses.append(address)
        ends.append(held.data_ptr() + held.nbytes())
    return _Given(tensors, addresses, ends, tuple(key))


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements from a tensor's first to its last in memory, both counted; 0 where it has none."""
    if 0 in shape:
        return 0
    return 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])


def _launched(prepared: _Prepared, given: _Given, integers: list[int], write_history: bool) -> tuple[Tensor, ...] | str:
    tensors, addresses = given.tensors, given.addresses
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    sample = tensors[0]
    assert sample is not None
    if sample.get_device() not in (device, -1):  # -1: the tests launch CPU tensors
        return "device"
    written = [i for i in _OUTPUTS if tensors[i] is not None]
    if write_history:
        written += [i for i in _HISTORY if tensors[i] is not None]
    needed = prepared.needed
    for address, bytes_read, end in zip(addresses, needed, given.ends, strict=True):
        if address + bytes_read > end:
            return "storage"
    if written and _overlap(tensors, addresses, needed, written):
        return "overlap"
    results = []
    for i, new in zip(_OUTPUTS, prepared.new, strict=False):
        result = tensors[i]
        if new is not None:
            shape, strides, dtype = new
            result = torch.empty_strided(shape, strides, dtype=dtype, device=sample.device)
            addresses[i] = result.data_ptr()
        results.append(result)
    first = addresses[0]
    stream = driver.get_current_stream(device)
    prepared.run(
        prepared.arguments.programs, 1, 1, stream, prepared.function, prepared.metadata, None, None, None,
        *[address or first for address in addresses], *integers, *prepared.arguments.constants,
    )  # fmt: skip
    if written:
        changed = [tensors[i] for i in written]
        torch.autograd.graph.increment_version([t for t in changed if t is not None and not t.is_inference()])
    return tuple(results)  # type: ignore[arg-type]


#: Positions of the kernel's tensors.
_SAMPLES = (0, 1, 4, 6, 7, 8, 9, 10, 11)  # the mask is not among them: no output may lie on it
_HISTORY = (6, 7, 8, 9)
_OUTPUTS = (16, 17, 18, 19)


def _overlap(
    tensors: Sequence[Tensor | None], addresses: Sequence[int], needed: Sequence[int], written: Sequence[int]
) -> bool:
    """Return whether a written tensor has memory in common with another one, other than element by element."""
    ends = [address + size for address, size in zip(addresses, needed, strict=True)]
    for w in written:
        target = tensors[w]
        assert target is not None
        for i, other in enumerate(tensors):
            if other is None or i == w or addresses[w] >= ends[i] or addresses[i] >= ends[w]:
                continue
            same = addresses[w] == addresses[i] and target.dtype is other.dtype and target.stride() == other.stride()
            if not (same and i in _SAMPLES and i not in written and w != _OUTPUTS[3]):
                return True
    return False


def remember(call: StepCall, canonical: StepCall, kernel: Any) -> None:
    """Keep the launch of a checked call, where the kernel took its tensors as they were given."""
    as_given = all(
        getattr(call, name) is getattr(canonical, name)
        for name in (
            "sample",
            "model_output",
            "table",
            "uncond",
            "guidance_scale",
            "noise",
            "variance",
            "mask",
            "model_input",
        )
    )
    as_given = as_given and all(a is b for a, b in zip(call.history, canonical.history, strict=True))
    for name in ("row_index", "threshold", *(("seeds", "noise_step") if call.seeds is not None else ())):
        before, after = getattr(call, name), getattr(canonical, name)
        if isinstance(before, Tensor) and (before.dim() != 1 or before.data_ptr() != after.data_ptr()):
            as_given = False
    targets = list(zip(call.targets, canonical.out or (), strict=True))
    as_given = as_given and all(a is b for a, b in targets if isinstance(a, Tensor))
    # A skipped sample's kept outputs are 0 where they are new.
    zeroed = isinstance(call.row_index, Tensor) and any(not isinstance(a, Tensor) for a, _ in targets[1:])
    if not as_given or zeroed or call.parts != 1 or any(b.stride() != call.sample.stride() for _, b in targets):
        return
    given = _given(*(getattr(call, name) for name in _FIELDS))
    if isinstance(given, str):
        return
    new = tuple(None if isinstance(a, Tensor) else (b.shape, b.stride(), b.dtype) for a, b in targets)
    if len(_prepared) >= _MOST:
        _prepared.clear()
    needed = tuple(0 if t is None else t.element_size() * _extent(t.shape, t.stride()) for t in given.tensors)
    launched = arguments(canonical)._replace(tensors=[])
    _prepared[given.key] = _Prepared(kernel.run, kernel.function, kernel.packed_metadata, launched, needed, new)


#: The arguments of `_given`.
_FIELDS = _given.__code__.co_varnames[: _given.__code__.co_argcount]
