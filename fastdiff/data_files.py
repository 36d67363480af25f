# SPDX-License-Identifier: MIT
"""JSON documents that hold data, read strictly: no code, no unknown field, no number that is not finite.

`malformed_in_one_sentence` turns what is found wrong in a document into one error that names its file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import error_message
from .files import read_whole, write_whole

#: Bytes of the largest document that is read.
LARGEST = 64 * 2**20


class MalformedError(ValueError):
    """The reason why a document is refused: "rows[3].clip is -1, expected a number above 0"."""


@contextmanager
def malformed_in_one_sentence(operation: str, path: str | Path, expected: str) -> Iterator[None]:
    """Raise a `MalformedError` of the block again as a ValueError that names the operation, the file and a remedy."""
    try:
        yield
    except MalformedError as error:
        got, remedy = f"is {str(path)!r}, where {error}", "correct the file, or write it again"
        raise ValueError(error_message(operation, "path", got, expected, remedy)) from error


def read_document(path: str | Path, *, operation: str) -> bytes:
    """Return the bytes of a document.

    Raises:
        OSError: it cannot be read.
        MalformedError: it is too large.
    """
    data = read_whole(path, LARGEST + 1, operation=operation, argument="path")
    if len(data) > LARGEST:
        raise MalformedError(f"the file has more than {LARGEST // 2**20} MiB")
    return data


def parse_json(data: bytes, form: str, version: int) -> dict[str, Any]:
    """Return the fields of a JSON document of one form and version, both checked and left out.

    Raises:
        MalformedError: it is no JSON object, holds a key twice or a number that is not finite, or is of another form.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise MalformedError("the file is nested too deeply") from None
    except MalformedError:
        raise
    except ValueError as error:  # malformed JSON, another encoding, an integer of thousands of digits
        raise MalformedError(f"the file is no JSON ({one_line(error)})") from None
    if not isinstance(document, dict) or document.get("format") != form:
        raise MalformedError(f"the field format is missing or other than {form!r}")
    if type(document.get("version")) is not int or document["version"] != version:
        raise MalformedError(f"version is {brief(document.get('version'))}, and this fastdiff reads {version}")
    return {name: value for name, value in document.items() if name not in ("format", "version")}


def write_json(path: str | Path, form: str, version: int, fields: Mapping[str, Any], *, operation: str) -> None:
    """Write a JSON document whole, one line a field, and one line an element of a list of objects.

    Raises:
        OSError: it cannot be written; an existing file is then unchanged.
    """
    lines = []
    for name, value in {"format": form, "version": version, **fields}.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(item, allow_nan=False)}" for item in value) + "\n  ]"
        lines.append(f"  {json.dumps(name)}: {text}")
    write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode(), operation=operation, argument="path")


def object_fields(value: object, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    """Return an object's fields.

    Raises:
        MalformedError: it is no object, a required field is missing, or there is an unknown one.
    """
    if not isinstance(value, dict):
        raise MalformedError(f"{where} is {brief(value)}, expected an object")
    for name in sorted(required - value.keys()):
        raise MalformedError(f"{where} has no field {name!r}")
    for name in sorted(value.keys() - required - optional):
        raise MalformedError(f"{where} has an unknown field {brief(name)}")
    return value


def finite_number(value: object, where: str) -> float:
    """Return a finite number.

    Raises:
        MalformedError: it is something else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise MalformedError(f"{where} is {brief(value)}, expected a finite number")


def listed(value: object, where: str, length: int | None = None) -> list[Any]:
    """Return a list; of a length where one is asked for.

    Raises:
        MalformedError: it is something else.
    """
    if not isinstance(value, list) or (length is not None and len(value) != length):
        of = "" if length is None else f" of {length}"
        raise MalformedError(f"{where} is {brief(value)}, expected a list{of}")
    return value


def brief(value: object) -> str:
    """Return a short repr in one line."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 120 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedError(f"the field {brief(twice)} is there twice")
    return found


def _refuse_constant(name: str) -> float:
    raise MalformedError(f"a number is {name}, expected finite numbers")
