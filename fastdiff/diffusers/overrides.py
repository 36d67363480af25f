# SPDX-License-Identifier: MIT
"""What a diffusers class defines, and who overrides it: a step is traced only through code that is diffusers' own."""

from __future__ import annotations

import functools
from types import CodeType, FunctionType
from typing import Any

from .environment import ABSENT


@functools.cache
def pristine(original: Any) -> dict[str, Any]:
    """What a diffusers class and its bases define, as it was when it was first asked for."""
    return {name: value for base in reversed(original.__mro__) for name, value in vars(base).items()}


@functools.cache
def names_in_code(original: Any) -> frozenset[str]:
    """All names that a diffusers class's own code mentions: an attribute of another name is no concern of its steps."""
    found: set[str] = set()
    codes = [function.__code__ for value in pristine(original).values() for function in _functions_of(value)]
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, str):
                found.add(constant)  # as getattr takes it
            elif isinstance(constant, CodeType):
                codes.append(constant)
    return frozenset(found)


def _functions_of(value: Any) -> list[Any]:
    """The Python functions behind a class attribute, those that decorators wrap among them."""
    parts = [value.fget, value.fset] if isinstance(value, property) else [getattr(value, "__func__", value)]
    found = []
    for part in parts:
        while part is not None:
            if isinstance(part, FunctionType):
                found.append(part)
            part = getattr(part, "__wrapped__", None)
    return found


#: Classes that fastdiff puts before diffusers' own, each with what it defines itself.
HOUSE: dict[type, dict[str, Any]] = {}


def overriding_class(scheduler_class: type, original: type, name: str) -> type | None:
    """The class because of which an attribute is not what the diffusers class had; None where it is."""
    expected = pristine(original).get(name, ABSENT)
    for base in scheduler_class.__mro__:
        defined = vars(base)
        if name not in defined:
            continue
        house = HOUSE.get(base)
        if house is None:
            return None if defined[name] is expected else base
        if house.get(name, ABSENT) is not defined[name]:
            return base
    return None if expected is ABSENT else original
