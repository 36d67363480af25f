# SPDX-License-Identifier: MIT
"""CUDA graph capture, emulated on CPU tensors, so that captured loops can be tested without a GPU.

`EmulatedGraph` records every operator of a body with its argument tensors, and replays them into the memory of their
results.  Python code between operators runs once, as in a capture, so a number that it reads is constant.  The emulator
refuses what a capture refuses: reading values, tensors whose shape depends on values, copies from or to the host, and
draws from a generator.
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

_READS_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_HOST_CALLS = {
    getattr(owner, name)
    for owner, names in (
        (Tensor, ("item", "tolist", "numpy", "cpu", "pin_memory", "__bool__", "__int__", "__float__", "__index__")),
        (torch, ("tensor", "from_numpy")),
    )
    for name in names
}


class RefusedError(RuntimeError):
    """A capture would fail here; a RuntimeError like torch's."""


class RefuseSyncs(TorchDispatchMode):
    """Refuses operators whose result would make the host wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The size of an index by numbers is known; a mask has to be counted.
        numbers = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        if not numbers and any(tag in func.tags for tag in _READS_VALUES):
            raise RefusedError(f"operation not permitted: {func} waits for the device")
        return func(*args, **(kwargs or {}))


class _RefuseHostCalls(TorchFunctionMode):
    """Refuses conversions between tensors and Python values, some of which bypass the dispatcher on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HOST_CALLS:
            raise RefusedError(f"operation not permitted when stream is capturing: {func.__name__} is a host's affair")
        return func(*args, **(kwargs or {}))


class _Recording(RefuseSyncs):
    """Runs operators and records them."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _draws(func, args, kwargs):
            raise RefusedError(f"operation not permitted when stream is capturing: {func} draws from a generator")
        if "lift_fresh" in str(func):
            raise RefusedError(f"operation not permitted when stream is capturing: {func} brings values from the host")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._calls.append(_Call(func, args, kwargs, result))
        return result


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True for an operator that draws from a generator; attention does for a dropout alone."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0)
    return True


class _Call:
    """Recorded operator with its arguments and the memory of its results."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def inputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def replay(self) -> None:
        values = [leaf for leaf in tree_leaves(self.func(*self.args, **self.kwargs)) if isinstance(leaf, Tensor)]
        for result, value in zip(self.results, values, strict=True):
            assert result.shape == value.shape
            # A view, or a tensor written in place, needs no copy.
            if _storage(result) != _storage(value):
                result.copy_(value)


class EmulatedGraph:
    """A `fastdiff.graphs.recorder.Recorder` on the CPU."""

    #: All instances, for inspection by tests.
    made: list[EmulatedGraph] = []  # noqa: RUF012 (a fixture empties it)

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.calls: list[_Call] = []
        self.replays = 0
        self.made.append(self)

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def capture(self, body: Callable[[], None]) -> None:
        with values_unreadable(), _RefuseHostCalls(), _Recording(self.calls):
            body()
        self.poison()  # a capture computes nothing

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for call in self.calls:
                call.replay()

    def turn(self, buffers: Sequence[Tensor]) -> nullcontext[None]:
        return nullcontext()

    def reads(self) -> list[Tensor]:
        """Return the tensors that the recorded operators read or write without having made them."""
        made: set[int] = set()
        found: dict[int, Tensor] = {}
        for call in self.calls:
            for tensor in call.inputs():
                if _storage(tensor) not in made:
                    found[_storage(tensor)] = tensor
            made.update(_storage(result) for result in call.results if _storage(result) not in found)
        return list(found.values())

    def poison(self) -> None:
        """Fill the results' memory that belongs to the graph with NaN or, for integers, with 1."""
        outside = {_storage(tensor) for tensor in self.reads()}
        for call in self.calls:
            for result in call.results:
                if _storage(result) not in outside and result.numel() > 0:
                    poison(result)


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor's memory with values that reveal a read."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    flat.fill_(float("nan") if tensor.is_floating_point() else 1)


def storages(tensors: Iterator[Tensor] | Sequence[Tensor]) -> set[int]:
    """Return the addresses of the tensors' storages."""
    return {_storage(tensor) for tensor in tensors}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def values_unreadable() -> Iterator[None]:
    """Make the step's checks skip values, as on a GPU, where reading them would be a synchronization."""
    with mock.patch.object(checks, "readable_without_sync", return_value=False):
        yield
