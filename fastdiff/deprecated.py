# SPDX-License-Identifier: MIT
"""Old names of attributes and arguments, each with a warning for one release; those of modules are in `_moved`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import error_message

T = TypeVar("T")


def renamed_attribute(old: str, new: str) -> Any:
    """Return a property that reads the attribute `new`; `old` is its former name with its class, for the warning."""

    def read(self: object) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)

    return property(read, doc=f"The former name of `{new}`.")


def renamed_fields(**renamed: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass be made with former names of its fields: ``old="new"``."""

    def decorate(cls: type[T]) -> type[T]:
        make = vars(cls)["__init__"]

        @functools.wraps(make)
        def make_by_old_names(self: T, *args: Any, **fields: Any) -> None:
            for old in renamed.keys() & fields.keys():
                warn_renamed(f"{cls.__name__}({old}=)", f"{renamed[old]}=")
                fields[renamed[old]] = fields.pop(old)
            make(self, *args, **fields)

        type.__setattr__(cls, "__init__", make_by_old_names)
        return cls

    return decorate


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn about the line that uses the old name, `stacklevel` frames above."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel)


def renamed_argument(operation: str, old: str, value: Any, new: str, given: Any) -> Any:
    """Return the value of a renamed argument, with a warning where its former name was used.

    Args:
        value: what was passed by the former name, or None.
        given: what was passed by the present name, or None.

    Raises:
        TypeError: both are given.
    """
    if value is None:
        return given
    if given is not None:
        raise TypeError(error_message(operation, old, f"is given beside {new}", "one of the two", f"pass {new}= alone"))
    message = f"{operation}: {old} is renamed to {new} and will be removed in the next release; pass {new}="
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return value
