# SPDX-License-Identifier: MIT
"""Find overrides of diffusers' own methods: a step is traced only through code that is diffusers' own.

In: a scheduler's class and an attribute name.  Out: the class that overrides it, if any.
"""

from __future__ import annotations

import functools
from types import CodeType, FunctionType
from typing import Any

from .inputs import ABSENT


@functools.cache
def pristine(original: Any) -> dict[str, Any]:
    """Return what a diffusers class and its bases define, as at the first call."""
    return {name: value for base in reversed(original.__mro__) for name, value in vars(base).items()}


@functools.cache
def names_in_code(original: Any) -> frozenset[str]:
    """Return all names in a diffusers class's own code: its steps use no attribute of another name."""
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
    """Return the Python functions behind a class attribute, including those that decorators wrap."""
    parts = [value.fget, value.fset] if isinstance(value, property) else [getattr(value, "__func__", value)]
    found = []
    for part in parts:
        while part is not None:
            if isinstance(part, FunctionType):
                found.append(part)
            part = getattr(part, "__wrapped__", None)
    return found


#: Classes that fastdiff puts before diffusers' own, each with what it defines itself.
OWN_CLASSES: dict[type, dict[str, Any]] = {}


def overriding_class(scheduler_class: type, original: type, name: str) -> type | None:
    """Return the class that makes an attribute differ from the diffusers class's; None if none does."""
    expected = pristine(original).get(name, ABSENT)
    for base in scheduler_class.__mro__:
        defined = vars(base)
        if name not in defined:
            continue
        own = OWN_CLASSES.get(base)
        if own is None:
            return None if defined[name] is expected else base
        if own.get(name, ABSENT) is not defined[name]:
            return base
    return None if expected is ABSENT else original
