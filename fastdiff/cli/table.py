# SPDX-License-Identifier: MIT
"""``fastdiff table``: print step tables and schedules that are files, and the differences between two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data_files import read_document
from ..errors import error_message, require
from ..row_layout import COLUMNS
from ..schedules.schedule_file import FORMAT as SCHEDULE_FORMAT
from ..schedules.schedule_file import ScheduleValues
from ..solvers.affine import Affine
from ..solvers.table import Row, StepTable
from .app import app

table_app = typer.Typer(no_args_is_help=True, help="Print step tables and schedules that are files.")
app.add_typer(table_app, name="table")

#: Exit code of `diff` for files that differ, like that of diff(1).
DIFFERENT = 1


@table_app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A file of StepTable.save or ScheduleValues.save.")],
    digits: Annotated[int, typer.Option(min=1, max=17, help="Significant digits; 17 tell any two numbers apart.")] = 6,
) -> None:
    """Print a table row by row: its timestep, its prediction of x0, its step and what it keeps."""
    data = _load(path)
    columns, rows = _cells(data, digits)
    _print(f"{path}: {_summary(data)}", ["", *columns], [[str(i), *row] for i, row in enumerate(rows)])


@table_app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A file of StepTable.save or ScheduleValues.save.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same kind.")],
    digits: Annotated[int, typer.Option(min=1, max=17, help="Significant digits that are compared.")] = 17,
) -> None:
    """Print the cells in which two tables differ.  The exit code is 0 where there are none, and 1 otherwise."""
    one, other = _load(first), _load(second)
    if type(one) is not type(other):
        got, remedy = f"is a {_kind(other)}, and first a {_kind(one)}", "compare two of a kind"
        raise ValueError(error_message("diff", "second", got, f"a {_kind(one)}", remedy))
    (columns, rows), (_, others) = _cells(one, digits), _cells(other, digits)
    found = [] if _summary(one) == _summary(other) else [["", "file", _summary(one), _summary(other)]]
    blank = [""] * len(columns)
    for i in range(max(len(rows), len(others))):
        pair = zip(columns, rows[i] if i < len(rows) else blank, others[i] if i < len(others) else blank, strict=True)
        found += [[str(i), column, a, b] for column, a, b in pair if a != b]
    if not found:
        typer.echo(f"{first} and {second} are equal in {digits} digits")
        return
    _print(f"{len(found)} differences", ["", "cell", str(first), str(second)], found)
    raise typer.Exit(DIFFERENT)


def _load(path: Path) -> StepTable | ScheduleValues:
    """Read a file of either kind."""
    if path.suffix.lower() == ".json":
        try:
            document = json.loads(read_document(path, operation="table"))
        except (OSError, ValueError, RecursionError):
            document = None  # StepTable.load says what is wrong
        if isinstance(document, dict) and document.get("format") == SCHEDULE_FORMAT:
            return ScheduleValues.load(path)
    return StepTable.load(path)


def _kind(data: StepTable | ScheduleValues) -> str:
    return "step table" if isinstance(data, StepTable) else "schedule"


def _summary(data: StepTable | ScheduleValues) -> str:
    if isinstance(data, ScheduleValues):
        source = f", {data.source}" if data.source else ""
        return f"{len(tuple(data.values))} {data.kind.value}{source}"  # type: ignore[union-attr]
    thresholding = ", dynamic thresholding" if data.thresholding else ""
    variance = data.variance.name.lower().replace("_", " ")
    return f"{len(data)} rows, {variance} variance, initial scale {data.initial_scale!r}{thresholding}"


def _cells(data: StepTable | ScheduleValues, digits: int) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns and the text of the cells."""
    if isinstance(data, ScheduleValues):
        return ["value"], [[f"{value:.{digits}g}"] for value in data.values]
    columns = ["timestep", "x0", "clip", "step", "kept"]
    rows = [_row_cells(row, digits) for row in data]
    learned = any(row.variance_offset or row.variance_slope for row in data)
    scaled = any(row.model_input_scale != 1.0 for row in data)
    shown = [*range(len(columns)), *[5] * learned, *[6] * scaled]
    titles = [*columns, "log std", "model input"]
    return [titles[i] for i in shown], [[cells[i] for i in shown] for cells in rows]


def _row_cells(row: Row, digits: int) -> list[str]:
    p, q = row.prediction
    kept = [f"{slot}: {_sum(form, digits)}" for slot, form in zip(row.slots, row.kept, strict=True)]
    prediction = Affine([p, q, *[0.0] * (len(COLUMNS) - 2)])
    log_std = f"{row.variance_offset:.{digits}g} {row.variance_slope:+.{digits}g}·v"
    clip = "" if row.clip == float("inf") else f"±{row.clip:.{digits}g}"
    step = _sum(row.prev_sample, digits)
    numbers = f"{row.timestep:.{digits}g}", f"{row.model_input_scale:.{digits}g}"
    return [numbers[0], _sum(prediction, digits), clip, step, "; ".join(kept), log_std, numbers[1]]


def _sum(form: Affine, digits: int) -> str:
    short = {"sample": "x", "model_output": "m", "prediction": "d", "noise": "z"}
    names = [short.get(name, name.replace("history_", "h")) for name in COLUMNS]
    return " ".join(f"{a:+.{digits}g}·{name}" for a, name in zip(form.coefficients, names, strict=True) if a) or "0"


def _print(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    plain = require("rich.text", "cli", "fastdiff table").Text  # a path such as 'x[1].json' is no markup
    console = require("rich.console", "cli", "fastdiff table").Console()
    table = require("rich.table", "cli", "fastdiff table").Table()
    for column in columns:
        table.add_column(plain(column), overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    console.print(plain(title))
    console.print(table)
