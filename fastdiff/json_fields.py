# SPDX-License-Identifier: MIT
"""The fields of a configuration as standard JSON (RFC 8259), which has no infinity, enumeration or tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from .errors import checked_type, error_message, unknown_name

#: JSON has no number for these.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_json_value(value: object) -> Any:
    """Return a value as standard JSON.

    An enumeration's value, a tensor's lists, a path's text, a number of NumPy as Python's, infinity as ``"inf"``.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Tensor):
        return to_json_value(value.tolist())
    if isinstance(value, (tuple, list, range)):
        return [to_json_value(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else repr(number)
    return value


def fields_to_json(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as standard JSON values."""
    return {field.name: to_json_value(getattr(config, field.name)) for field in fields(config)}


def fields_from_json(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for a dataclass from what `fields_to_json` gave.

    Raises:
        TypeError: the values are no mapping.
        ValueError: a field is unknown.
    """
    name = kind.__name__
    checked_type(name, "values", values, Mapping, "a dict of fields", "pass what to_dict gave")
    known = {field.name: field for field in fields(kind)}
    for given in values:
        if given not in known:
            raise unknown_name(name, "field", given, known)
    return {
        given: _NOT_FINITE.get(value, value) if isinstance(value, str) and "float" in str(known[given].type) else value
        for given, value in values.items()
    }


def parsed_object(operation: str, text: str) -> Mapping[str, Any]:
    """Parse one JSON object.

    Raises:
        TypeError, ValueError: the text is no JSON object.
    """
    checked_type(operation, "text", text, str, "a JSON object as a string", "pass what to_json gave")
    remedy = "pass what to_json gave"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(error_message(operation, "text", f"is no JSON ({error})", "a JSON object", remedy)) from None
    if not isinstance(found, dict):
        got = f"holds a {type(found).__name__}"
        raise ValueError(error_message(operation, "text", got, "a JSON object", remedy))
    return found
