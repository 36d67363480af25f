# SPDX-License-Identifier: MIT
"""Memory for the inputs of a graph's replays: tensors, and tensors in dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message

#: Keys and indices that lead to a value, from the outside in.
Path = tuple[Any, ...]

#: Values that are compared by value; a graph holds them.
COMPARED = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class StaticInput:
    """One tensor's memory.

    Args:
        name: of the argument, for messages.
        tensor: an example; its shape, dtype, device and strides are kept, as far as they are dense.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.buffer = tensor.detach().clone()

    def check(self, tensor: object) -> None:
        """Refuse a value that cannot be copied into this memory.

        Raises:
            TypeError, ValueError: it is no tensor, or one of another shape, dtype or device.
        """
        held = self.buffer
        if not isinstance(tensor, Tensor):
            raise TypeError(self._refusal(f"is a {type(tensor).__name__}", "a tensor"))
        if tensor.shape != held.shape or tensor.dtype != held.dtype or tensor.device != held.device:
            raise ValueError(self._refusal(_described(tensor), _described(held)))

    def _refusal(self, got: str, expected: str) -> str:
        return error_message("replay", self.name, got, f"{expected} as captured", "make it so, or capture another loop")


class StaticTree:
    """The memory of all tensors among named arguments; other values are fixed.

    Args:
        arguments: by name; dicts, lists and tuples are looked into.
        device: where the tensors have to be.
        prefix: of the names in messages.

    Raises:
        ValueError: a tensor is on another device; a graph would hold its value, or a copy that the host waits for.
    """

    def __init__(self, arguments: dict[str, Any], device: torch.device, prefix: str = "") -> None:
        self._arguments = arguments
        self._prefix = prefix
        self._inputs: dict[Path, StaticInput] = {}
        self._fixed: dict[Path, Any] = {}
        for path, leaf in leaves(arguments):
            if not isinstance(leaf, Tensor):
                self._fixed[path] = leaf
                continue
            name = self._name(path)
            if leaf.device != device:
                raise ValueError(
                    error_message(
                        "sample", name, f"is on {leaf.device}", f"{device} like latents", f"move it to {device}"
                    )
                )
            self._inputs[path] = StaticInput(name, leaf)

    def buffers(self) -> dict[str, Any]:
        """The arguments with their tensors' memory in place of the tensors."""
        rebuilt = _rebuilt(self._arguments, (), {path: one.buffer for path, one in self._inputs.items()})
        self._arguments = {}  # they are the caller's
        assert isinstance(rebuilt, dict)
        return rebuilt

    def tensors(self) -> list[Tensor]:
        return [one.buffer for one in self._inputs.values()]

    def given(self, name: str) -> bool:
        """Return True where there is a tensor of this name."""
        return (name,) in self._inputs

    def move(self, name: str, buffer: Tensor) -> None:
        """Fill another tensor of the same shape from now on."""
        self._inputs[(name,)].buffer = buffer

    def check(self, arguments: dict[str, Any]) -> None:
        """Refuse arguments of another form than those captured, or with other fixed values.

        Raises:
            TypeError, ValueError: which one it is, and what was expected.
        """
        given = dict(leaves(arguments))
        for path in {**self._fixed, **self._inputs, **given}:
            if path not in given:
                raise ValueError(self._refusal(path, "is missing", "what was captured"))
            if path in self._inputs:
                self._inputs[path].check(given[path])
            elif path not in self._fixed:
                raise ValueError(self._refusal(path, "is given", "none"))
            elif not _same(given[path], self._fixed[path]):
                got = _described(given[path]) if isinstance(given[path], Tensor) else f"is {_short(given[path])}"
                raise ValueError(self._refusal(path, got, f"{_short(self._fixed[path])}, which the graph holds,"))

    def fill(self, arguments: dict[str, Any]) -> None:
        """Copy the tensors of checked arguments to their memory."""
        given = dict(leaves(arguments))
        for path, one in self._inputs.items():
            one.buffer.copy_(given[path])

    def _name(self, path: Path) -> str:
        first, *rest = (self._prefix, *path) if self._prefix else path
        return f"{first}{''.join(f'[{key!r}]' for key in rest)}"

    def _refusal(self, path: Path, got: str, expected: str) -> str:
        return error_message("replay", self._name(path), got, f"{expected} as captured", "capture another loop for it")


class Container:
    """A dict, list or tuple without its contents: two of a type and a size are equal."""

    def __init__(self, value: Any) -> None:
        self.form = type(value), len(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Container) and self.form == other.form

    def __hash__(self) -> int:
        return hash(self.form)

    def __repr__(self) -> str:
        return f"a {self.form[0].__name__} of {self.form[1]}"


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every value in nested dicts, lists and tuples with its path; these themselves as `Container`."""
    if type(value) not in (dict, list, tuple):
        yield path, value
        return
    if path:
        yield path, Container(value)
    for key, inner in value.items() if type(value) is dict else enumerate(value):
        yield from leaves(inner, (*path, key))


def signature(value: Any) -> Any:
    """Return a key that is equal for values that one graph can serve: a tensor's form, anything else itself.

    Values that are compared by identity have to be kept alive by the owner of the key.
    """
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (*COMPARED, Container)):
        return type(value), value
    return type(value), id(value)


def _rebuilt(value: Any, path: Path, buffers: dict[Path, Tensor]) -> Any:
    if path in buffers:
        return buffers[path]
    if type(value) is dict:
        return {key: _rebuilt(inner, (*path, key), buffers) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(inner, (*path, i), buffers) for i, inner in enumerate(value))
    return value


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (*COMPARED, Container)) and bool(a == b))


def _described(tensor: Tensor) -> str:
    return f"has shape {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (*COMPARED, Container)) else f"another {type(value).__name__}"
