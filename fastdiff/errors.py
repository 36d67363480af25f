# SPDX-License-Identifier: MIT
"""Error messages: one sentence with the operation, the argument, what it got, what was expected, and a remedy.

All checks of the library use these functions, so that messages have one form, for example::

    step: row is 20, expected 0 to 19; the loop has run out of rows: start again
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Real
from types import ModuleType
from typing import Any, TypeVar

_Choice = TypeVar("_Choice", bound=Enum)


def error_message(operation: str, argument: str, got: str, expected: str, remedy: str) -> str:
    """Compose an error message.

    Args:
        operation: the public name that was called (``"step"``, ``"NoiseSchedulerConfig"``).
        argument: the name of the argument at fault.
        got: a verb phrase about the value, ``"has shape [2, 4]"`` or ``"is -1"``.
        expected: the accepted values, ``"[4, 4] like sample"``.
        remedy: the way to correct the call, in the imperative.
    """
    return f"{operation}: {argument} {got}, expected {expected}; {remedy}"


def unknown_name(operation: str, argument: str, got: object, known: Iterable[str]) -> ValueError:
    """Make the error for a name that is not among the known ones; the message lists these."""
    names = ", ".join(sorted(known))
    return ValueError(
        error_message(operation, argument, f"is {got!r}", f"one of {names}", "pick a name from that list")
    )


def parse_choice(
    kind: type[_Choice], operation: str, argument: str, value: object, aliases: Mapping[str, str] | None = None
) -> _Choice:
    """Return the member of an enumeration that has a value, or is it; `aliases` gives values by other names.

    Raises:
        ValueError: there is no such member; the message lists the values and the aliases.
    """
    others = aliases or {}
    try:
        return kind(others.get(value, value) if isinstance(value, str) else value)
    except ValueError:
        known = [str(member.value) for member in kind]
        raise unknown_name(operation, argument, value, [*known, *others]) from None


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        ImportError: the package is not installed; the message names the extra of fastdiff that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            error_message(
                purpose,
                f"the package {package!r}",
                f"cannot be imported ({error})",
                "it to be installed",
                f"run: pip install 'fastdiff-kernels[{extra}]'",
            )
        ) from error


def shown(value: object) -> str:
    """Return a value's repr for a message; for an integer of hundreds of digits, its size in bits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def checked_integer(operation: str, argument: str, value: object, minimum: int) -> int:
    """Return ``value`` as an ``int`` that is at least ``minimum``.

    Raises:
        TypeError: it is not an integer (a bool is not accepted).
        ValueError: it is below ``minimum``.
    """
    expected = f"an integer of at least {minimum}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            error_message(
                operation, argument, f"has type {type(value).__name__}", expected, f"pass {argument} as an int"
            )
        )
    number = operator.index(value)
    if number < minimum:
        raise ValueError(
            error_message(
                operation, argument, f"is {shown(number)}", expected, f"raise {argument} to {minimum} or more"
            )
        )
    return number


def as_float(operation: str, argument: str, value: object, expected: str = "a number") -> float:
    """Return a real number as a ``float``; NaN and infinity are accepted.

    Raises:
        TypeError: it is not a real number (a bool is not accepted).
        ValueError: it is beyond the range of a float.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            error_message(
                operation, argument, f"has type {type(value).__name__}", expected, f"pass {argument} as a float"
            )
        )
    try:
        return float(value)
    except OverflowError:
        got = f"is {shown(value)}, beyond the range of a float"
        raise ValueError(error_message(operation, argument, got, expected, f"pass {argument} in that range")) from None


def checked_float(operation: str, argument: str, value: object, minimum: float, *, strict: bool = False) -> float:
    """Return ``value`` as a finite ``float`` that is at least ``minimum``, or above it if ``strict``.

    Raises:
        TypeError: it is not a real number (a bool is not accepted).
        ValueError: it is NaN, infinite, or too small.
    """
    bound = f" {'above' if strict else 'of at least'} {minimum:g}" if math.isfinite(minimum) else ""
    expected = f"a finite number{bound}"
    number = as_float(operation, argument, value, expected)
    if not math.isfinite(number) or number < minimum or (strict and number == minimum):
        raise ValueError(
            error_message(operation, argument, f"is {number!r}", expected, f"pass {argument} in that range")
        )
    return number


def checked_bool(operation: str, argument: str, value: object) -> bool:
    """Return ``value`` if it is a bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        got, remedy = f"has type {type(value).__name__}", f"pass {argument}=True or {argument}=False"
        raise TypeError(error_message(operation, argument, got, "a bool", remedy))
    return value


def checked_callable(operation: str, argument: str, value: object, expected: str, remedy: str) -> None:
    """Check that a value is callable.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(value):
        raise TypeError(error_message(operation, argument, f"is a {type(value).__name__}", expected, remedy))


def checked_type(
    operation: str, argument: str, value: object, kind: type[Any] | tuple[type[Any], ...], expected: str, remedy: str
) -> None:
    """Check the type of a value.

    Raises:
        TypeError: it is not of the type `kind`, or of one of several.
    """
    if not isinstance(value, kind):
        raise TypeError(error_message(operation, argument, f"is a {type(value).__name__}", expected, remedy))
