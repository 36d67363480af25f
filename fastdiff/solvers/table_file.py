# SPDX-License-Identifier: MIT
"""Step tables as files, JSON or safetensors: data alone, versioned, with the bits of every float64.

A JSON file holds a row a line, each coefficient by the name of its column, and leaves out what is 0 or the default::

    {"format": "fastdiff-step-table", "version": 1, "initial_scale": 1.0, "variance": "fixed", "thresholding": false,
     "rows": [{"timestep": 999.0, "prediction": [157.4, -157.4], "prev_sample": {"sample": 1.1, "noise": 0.1},
               "kept": [{"slot": 0, "terms": {"prediction": 1.0}}]}, ...]}

A safetensors file holds ``coefficients``, float64 ``[R, 32]`` in the layout of `fastdiff.row_layout`, ``timesteps``,
float64 ``[R]``, and the other fields as metadata.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data_files import (
    MalformedError,
    brief,
    finite_number,
    listed,
    malformed_in_one_sentence,
    object_fields,
    one_line,
    parse_json,
    read_document,
    write_json,
)
from ..errors import error_message, require
from ..files import write_whole
from ..row_layout import (
    CLIP,
    COLUMNS,
    KEEP_0,
    KEEP_1,
    MODEL_INPUT_SCALE,
    NUM_REGISTERS,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    ROW_WIDTH,
    STORE_0,
    STORE_1,
    VARIANCE_OFFSET,
    VARIANCE_SLOPE,
    Variance,
    blank_row,
)

FORMAT, VERSION = "fastdiff-step-table", 1

_EXPECTED = f"a step table of version {VERSION}"
_HEAD = {"initial_scale", "variance", "thresholding"}
#: Scalars of a row that a file may leave out, with their positions.
_OPTIONAL = {
    "clip": CLIP,
    "variance_offset": VARIANCE_OFFSET,
    "variance_slope": VARIANCE_SLOPE,
    "model_input_scale": MODEL_INPUT_SCALE,
}
_KEPT = ((STORE_0, KEEP_0), (STORE_1, KEEP_1))


@dataclass(frozen=True)
class StoredTable:
    """The content of a table file.

    Args:
        rows: R lists of `ROW_WIDTH` numbers, in the layout of `fastdiff.row_layout`.
        timesteps: R numbers.
        initial_scale, variance, thresholding: of `fastdiff.StepTable`.
    """

    rows: list[list[float]]
    timesteps: list[float]
    initial_scale: float
    variance: Variance
    thresholding: bool


def write_table(path: str | Path, table: StoredTable) -> None:
    """Write a table; the ending of the path, ``.json`` or ``.safetensors``, chooses the form.

    Raises:
        ValueError: another ending.
        OSError: the file cannot be written; an existing one is then unchanged.
        ImportError: safetensors is missing.
    """
    head = {
        "initial_scale": float(table.initial_scale),
        "variance": table.variance.name.lower(),
        "thresholding": table.thresholding,
    }
    if _ending("StepTable.save", path) == ".json":
        rows = [_row_object(row, t) for row, t in zip(table.rows, table.timesteps, strict=True)]
        write_json(path, FORMAT, VERSION, {**head, "rows": rows}, operation="StepTable.save")
        return
    safetensors = require("safetensors.torch", "cli", "StepTable.save")
    tensors = {
        "coefficients": torch.tensor(table.rows, dtype=torch.float64, device="cpu"),
        "timesteps": torch.tensor(table.timesteps, dtype=torch.float64, device="cpu"),
    }
    metadata = {"format": FORMAT, "version": VERSION, **head}
    data = safetensors.save(tensors, {name: _text(value) for name, value in metadata.items()})
    write_whole(path, data, operation="StepTable.save", argument="path")


def read_table(path: str | Path) -> StoredTable:
    """Read a table file and check it: its form and version, each field, and that its numbers are finite.

    Raises:
        ValueError: another ending than ``.json`` and ``.safetensors``, or a malformed file, in one sentence.
        OSError: the file cannot be read.
        ImportError: safetensors is missing.
    """
    ending = _ending("StepTable.load", path)
    with malformed_in_one_sentence("StepTable.load", path, _EXPECTED):
        data = read_document(path, operation="StepTable.load")
        return _from_json(data) if ending == ".json" else _from_safetensors(data)


def _ending(operation: str, path: str | Path) -> str:
    ending = Path(path).suffix.lower()
    if ending not in (".json", ".safetensors"):
        got, remedy = f"is {str(path)!r}", "choose .json to read it, .safetensors for many rows"
        raise ValueError(error_message(operation, "path", got, "an ending .json or .safetensors", remedy))
    return ending


def _from_json(data: bytes) -> StoredTable:
    fields = object_fields(parse_json(data, FORMAT, VERSION), "the file", {"rows", *_HEAD}, set())
    rows, timesteps = [], []
    for i, value in enumerate(listed(fields["rows"], "rows")):
        row, timestep = _row(value, f"rows[{i}]")
        rows.append(row)
        timesteps.append(timestep)
    return _stored(rows, timesteps, fields)


def _from_safetensors(data: bytes) -> StoredTable:
    safetensors = require("safetensors.torch", "cli", "StepTable.load")
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # safetensors raises errors of its own, of torch and of its header's parser
        raise MalformedError(f"the file is no safetensors file ({one_line(error)})") from None
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        got = f"{brief(metadata.get('format'))} and {brief(metadata.get('version'))}"
        raise MalformedError(f"format and version are {got}, expected '{FORMAT}' and '{VERSION}'")
    object_fields(tensors, "the file", {"coefficients", "timesteps"}, set())
    object_fields(metadata, "the metadata", {"format", "version", *_HEAD}, set())
    for name, shape in (("coefficients", (ROW_WIDTH,)), ("timesteps", ())):
        found = tensors[name]
        if found.dtype != torch.float64 or tuple(found.shape[1:]) != shape or found.dim() == 0:
            raise MalformedError(f"{name} is {found.dtype} {list(found.shape)}, expected float64 {['R', *shape]}")
    try:
        head = {**metadata, **{name: json.loads(metadata[name]) for name in ("initial_scale", "thresholding")}}
    except (ValueError, RecursionError):
        raise MalformedError("initial_scale or thresholding is no JSON value") from None
    return _stored(tensors["coefficients"].tolist(), tensors["timesteps"].tolist(), head)


def _stored(rows: list[list[float]], timesteps: list[float], head: dict[str, Any]) -> StoredTable:
    """Check what both forms share."""
    if not rows or len(rows) != len(timesteps):
        raise MalformedError(f"there are {len(rows)} rows and {len(timesteps)} timesteps, expected one or more of each")
    variances = {kind.name.lower(): kind for kind in Variance}
    if not isinstance(head["variance"], str) or head["variance"] not in variances:
        raise MalformedError(f"variance is {brief(head['variance'])}, expected one of {', '.join(variances)}")
    if not isinstance(head["thresholding"], bool):
        raise MalformedError(f"thresholding is {brief(head['thresholding'])}, expected true or false")
    scale = finite_number(head["initial_scale"], "initial_scale")
    for i, (row, timestep) in enumerate(zip(rows, timesteps, strict=True)):
        finite_number(timestep, f"rows[{i}].timestep")
        for j, value in enumerate(row):
            if j == CLIP and value > 0.0:
                continue
            finite_number(value, f"rows[{i}], number {j},")
        if not row[CLIP] > 0.0:
            raise MalformedError(f"rows[{i}].clip is {row[CLIP]}, expected a number above 0")
        _check_kept(row, i)
    return StoredTable(rows, timesteps, scale, variances[head["variance"]], head["thresholding"])


def _check_kept(row: list[float], i: int) -> None:
    """Refuse slots that there are none of, and an output that is kept without a slot."""
    slots = [row[store] for store, _ in _KEPT]
    if any(slot not in range(-1, NUM_REGISTERS) for slot in slots) or (slots[0] == -1 and slots[1] != -1):
        expected = f"0 to {NUM_REGISTERS - 1}, or −1 for none"
        raise MalformedError(f"rows[{i}] keeps outputs in the slots {slots}, expected {expected}")
    for slot, (_, keep) in zip(slots, _KEPT, strict=True):
        if slot == -1 and any(row[keep : keep + len(COLUMNS)]):
            raise MalformedError(f"rows[{i}] keeps an output without a slot")


def _row_object(row: list[float], timestep: float) -> dict[str, Any]:
    usual = blank_row()
    found: dict[str, Any] = {
        "timestep": float(timestep),
        "prediction": [row[PREDICTION_SAMPLE], row[PREDICTION_OUTPUT]],
        "prev_sample": _terms(row, PREV_SAMPLE),
    }
    found |= {name: row[at] for name, at in _OPTIONAL.items() if row[at] != usual[at] or _is_minus_zero(row[at])}
    kept = [{"slot": int(row[store]), "terms": _terms(row, keep)} for store, keep in _KEPT if row[store] >= 0]
    return {**found, "kept": kept} if kept else found


def _row(value: object, where: str) -> tuple[list[float], float]:
    fields = object_fields(value, where, {"timestep", "prediction", "prev_sample"}, {"kept", *_OPTIONAL})
    row = blank_row()
    prediction = listed(fields["prediction"], f"{where}.prediction", 2)
    for at, number in zip((PREDICTION_SAMPLE, PREDICTION_OUTPUT), prediction, strict=True):
        row[at] = finite_number(number, f"{where}.prediction")
    for name, at in _OPTIONAL.items():
        if name in fields:
            row[at] = finite_number(fields[name], f"{where}.{name}")
    _set_terms(row, PREV_SAMPLE, fields["prev_sample"], f"{where}.prev_sample")
    kept = listed(fields.get("kept", []), f"{where}.kept")
    if len(kept) > len(_KEPT):
        raise MalformedError(f"{where}.kept is a list of {len(kept)}, expected {len(_KEPT)} at most")
    for j, item in enumerate(kept):
        store, keep = _KEPT[j]
        kept_fields = object_fields(item, f"{where}.kept[{j}]", {"slot", "terms"}, set())
        if type(kept_fields["slot"]) is not int or kept_fields["slot"] < 0:
            raise MalformedError(f"{where}.kept[{j}].slot is {brief(kept_fields['slot'])}, expected an integer from 0")
        row[store] = finite_number(kept_fields["slot"], f"{where}.kept[{j}].slot")
        _set_terms(row, keep, kept_fields["terms"], f"{where}.kept[{j}].terms")
    return row, finite_number(fields["timestep"], f"{where}.timestep")


def _terms(row: list[float], first: int) -> dict[str, float]:
    values = row[first : first + len(COLUMNS)]
    return {name: value for name, value in zip(COLUMNS, values, strict=True) if value or _is_minus_zero(value)}


def _set_terms(row: list[float], first: int, value: object, where: str) -> None:
    for name, number in object_fields(value, where, set(), set(COLUMNS)).items():
        row[first + COLUMNS.index(name)] = finite_number(number, f"{where}.{name}")


def _is_minus_zero(value: float) -> bool:
    return value == 0.0 and math.copysign(1.0, value) < 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
