# SPDX-License-Identifier: MIT
"""CUDA graph capture, emulated on CPU tensors, so that captured loops can be tested without a GPU.

`EmulatedGraph` records every operator of a body with its very argument tensors, and replays them into the memory that
their results had.  What Python does in between happens once, as in a capture: a number that was read then stays.  It
refuses what a capture refuses: looking at values, tensors whose shape depends on values, what comes from the host or
goes there, and draws from a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.ops import checks

_LOOKS_AT_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_HOST_CALLS = {
    getattr(owner, name)
    for owner, names in (
        (Tensor, ("item", "tolist", "numpy", "cpu", "pin_memory", "__bool__", "__int__", "__float__", "__index__")),
        (torch, ("tensor", "from_numpy")),
    )
    for name in names
}


class RefusedError(RuntimeError):
    """A capture would have ended here; RuntimeError as torch's own."""


class RefuseSyncs(TorchDispatchMode):
    """Refuses operators for whose result the host would wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Indices that are numbers say themselves how many there are; masks have to be counted.
        numbers = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        if not numbers and any(tag in func.tags for tag in _LOOKS_AT_VALUES):
            raise RefusedError(f"operation not permitted: {func} waits for the device")
        return func(*args, **(kwargs or {}))


class _RefuseHostCalls(TorchFunctionMode):
    """Refuses calls that lead from tensors to Python or back, some of which no dispatcher sees on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HOST_CALLS:
            raise RefusedError(f"operation not permitted when stream is capturing: {func.__name__} is a host's affair")
        return func(*args, **(kwargs or {}))


class _Recording(RefuseSyncs):
    """Runs operators and notes them down."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RefusedError(f"operation not permitted when stream is capturing: {func} draws from a generator")
        if "lift_fresh" in str(func):
            raise RefusedError(f"operation not permitted when stream is capturing: {func} brings values from the host")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._calls.append(_Call(func, args, kwargs, result))
        return result


class _Call:
    """An operator with its arguments, and its results' memory."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def inputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def again(self) -> None:
        anew = [leaf for leaf in tree_leaves(self.func(*self.args, **self.kwargs)) if isinstance(leaf, Tensor)]
        for held, value in zip(self.results, anew, strict=True):
            assert held.shape == value.shape
            # A view, or what was written in place, is there already.
            if _storage(held) != _storage(value):
                held.copy_(value)


class EmulatedGraph:
    """A `fastdiff.graphs.recorder.Recorder` on the CPU."""

    #: All that were made, for tests to look into.
    made: list[EmulatedGraph] = []  # noqa: RUF012 (a fixture empties it)

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.calls: list[_Call] = []
        self.replays = 0
        self.made.append(self)

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def capture(self, body: Callable[[], None]) -> None:
        with looked_at_as_a_gpu(), _RefuseHostCalls(), _Recording(self.calls):
            body()
        self.poison()  # a capture computes nothing

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for call in self.calls:
                call.again()

    def turn(self, buffers: Sequence[Tensor]) -> nullcontext[None]:
        return nullcontext()

    def reads(self) -> list[Tensor]:
        """The tensors that the recorded operators read, or write, and that none of them has made."""
        made: set[int] = set()
        found: dict[int, Tensor] = {}
        for call in self.calls:
            for tensor in call.inputs():
                if _storage(tensor) not in made:
                    found[_storage(tensor)] = tensor
            made.update(_storage(result) for result in call.results if _storage(result) not in found)
        return list(found.values())

    def poison(self) -> None:
        """Fill the results' memory, as far as it is the graph's own, with NaN or, for integers, with 1."""
        outside = {_storage(tensor) for tensor in self.reads()}
        for call in self.calls:
            for result in call.results:
                if _storage(result) not in outside and result.numel() > 0:
                    poison(result)


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor's memory with what shows if it is read."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    flat.fill_(float("nan") if tensor.is_floating_point() else 1)


def storages(tensors: Iterator[Tensor] | Sequence[Tensor]) -> set[int]:
    """Where the memory of tensors begins."""
    return {_storage(tensor) for tensor in tensors}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def looked_at_as_a_gpu() -> Iterator[None]:
    """Let the step's checks leave values alone, as they do where looking would be a sync."""
    with mock.patch.object(checks, "readable_without_sync", return_value=False):
        yield
