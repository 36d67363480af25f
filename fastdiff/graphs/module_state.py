# SPDX-License-Identifier: MIT
"""State of a module that its graph depends on beside its inputs: a graph knows addresses, and runs no Python again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import eq, is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_COLLECTIONS = (dict, list, set)
#: Objects whose attributes are not looked at.
_OPAQUE = (
    *_COLLECTIONS, bool, int, float, complex, str, bytes, tuple, type, FunctionType, BuiltinFunctionType, MethodType,
    ModuleType, Tensor, nn.Module,
)  # fmt: skip
#: A module's own collections that no forward depends on: hooks of gradients and of state dicts.
_WITHOUT_EFFECT = frozenset(vars(nn.Module())) - {
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"
}  # fmt: skip


class ModuleState:
    """A module as it is now: its submodules, the addresses of its weights, and all attributes.

    Attributes are those of every submodule and of the objects that these hold (attention processors, for example), with
    the contents of dicts, lists and sets among them, hooks included.  Numbers and strings are compared by value, other
    objects by identity.  A comparison takes one to two microseconds a submodule.

    Args:
        module: the module.
        ignored: an object whose attributes do not matter.
    """

    def __init__(self, module: nn.Module, ignored: object = None) -> None:
        self._modules = list(module.modules())
        self._classes = [type(each) for each in self._modules]
        self._tensors = [*module.parameters(), *module.buffers()]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        seen = {id(ignored)}
        found = [each for m in self._modules for each in _collections(vars(m), seen, attributes=True)]
        # Collections with tensors are compared entry by entry: `==` of two tensors is a tensor.
        self._by_identity = [each for each in found if any(isinstance(v, Tensor) for v in _values(each))]
        self._entries = list(chain.from_iterable(map(_values, self._by_identity)))
        taken = {id(each) for each in self._by_identity}
        self._by_value = [each for each in found if id(each) not in taken]
        self._copies = [each.copy() for each in self._by_value]

    def weights_in_place(self) -> bool:
        """Return True if every weight is at the address where it was."""
        return [tensor.data_ptr() for tensor in self._tensors] == self._addresses

    def unchanged(self) -> bool:
        """Return True if submodules and attributes are as they were; the contents of tensors do not matter."""
        entries = list(chain.from_iterable(map(_values, self._by_identity)))
        if len(entries) != len(self._entries) or not all(map(_same, entries, self._entries)):
            return False
        try:
            return all(map(is_, map(type, self._modules), self._classes)) and all(map(eq, self._by_value, self._copies))
        except (RuntimeError, ValueError):
            return False  # a number has become a tensor or an array


def _values(collection: Any) -> Any:
    return collection.values() if isinstance(collection, dict) else collection


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def _collections(value: Any, seen: set[int], *, attributes: bool) -> Iterator[Any]:
    """Yield a collection and those within it; with `attributes` also the attributes of the objects in it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    entries = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for name, item in list(entries):
        if isinstance(item, _COLLECTIONS):
            if name not in _WITHOUT_EFFECT:
                yield from _collections(item, seen, attributes=attributes)
        elif attributes and not isinstance(item, _OPAQUE) and hasattr(item, "__dict__") and id(item) not in seen:
            seen.add(id(item))
            yield from _collections(vars(item), seen, attributes=False)
