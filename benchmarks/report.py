# SPDX-License-Identifier: MIT
"""Table of a run, with notes on its columns and the conditions."""

from __future__ import annotations

from typing import Any

from fastdiff.errors import require

#: Notes on the columns; the last two are about k-diffusion.
NOTES = (
    "µs/step: median of the rounds, in brackets the quantiles at 20 and 80 %. A peer's column: its time over ours.",
    "bytes: each tensor that a step uses read once and each output written once, the mean of the loop's steps.",
    "% of copy: against a vectorised copy of as many bytes on as many threads, the better of ordinary and streaming.",
    "A step in place reads and writes the same tensor, a copy does not: in a cache a step may be above 100 %.",
    "cold: so many sets of all tensors take turns that none is in a cache.",
    "k-diffusion's loops do not stop between steps: cold, its model's outputs take turns and its samples stay warm.",
    "k-diffusion's Euler and Heun draw noise at every step, though nothing uses it here.",
)


def render(report: dict[str, Any], *, peers: list[str]) -> None:
    """Print a run's table, its conditions and the notes."""
    rows = [
        (*_case(line), f"{line['bytes']:,.0f}", _percent(line["share_of_copy"]))
        + tuple(_times(line["over_fastdiff"].get(peer)) for peer in peers)
        for line in report["results"]
    ]
    heads = ["op", "shape", "dtype", "threads", "cache", "µs/step", "bytes", "% of copy", *peers]
    _print("what a step costs", heads, rows, report)
    _print_notes(NOTES if "k-diffusion" in peers else NOTES[:5])


def render_base(report: dict[str, Any]) -> None:
    """Print the table of a comparison of two commits."""
    rows = []
    for line in report["results"]:
        last = f"absent: {line['absent']}" if "absent" in line else _times(line["base_over_this"])
        rows.append((*_case(line), _us(line["microseconds"].get("base")), last))
    heads = ["op", "shape", "dtype", "threads", "cache", "this, µs/step", f"{report['base']}, µs/step", "base / this"]
    _print(f"this code beside {report['base']}", heads, rows, report)
    _print_notes(("base / this: above 1 this code is quicker; in brackets the quantiles at 20 and 80 %.",))


def _print(title: str, heads: list[str], rows: list[tuple[str, ...]], report: dict[str, Any]) -> None:
    table = require("rich.table", "cli", "fastdiff bench").Table(*heads, title=title, title_justify="left")
    plain = require("rich.text", "cli", "fastdiff bench").Text  # square brackets are markup otherwise
    for column in table.columns[3:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    console = require("rich.console", "cli", "fastdiff bench").Console()
    # Print the whole table even if the terminal is narrower.
    console.width = max(console.width, table.__rich_measure__(console, console.options.update(max_width=1000)).maximum)
    console.print(table)
    for peer, reason in report["absent"].items():
        console.print(plain(f"absent: {peer}: {reason}"))
    console.print(plain(", ".join(f"{name} {value}" for name, value in report["conditions"].items())))


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(note)


def _case(line: dict[str, Any]) -> tuple[str, ...]:
    shape = "x".join(str(size) for size in line["shape"])
    ours = line["microseconds"].get("fastdiff") or line["microseconds"].get("this")
    return line["op"], shape, line["dtype"], str(line["threads"]), line["cache"], _us(ours)


def _us(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "–"
    digits = 2 if figure["median"] < 10 else 1 if figure["median"] < 1000 else 0
    return f"{figure['median']:.{digits}f} [{figure['p20']:.{digits}f}–{figure['p80']:.{digits}f}]"


def _times(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "–"
    digits = 2 if figure["median"] < 10 else 1
    return f"{figure['median']:.{digits}f}x [{figure['p20']:.{digits}f}–{figure['p80']:.{digits}f}]"


def _percent(figure: dict[str, float] | None) -> str:
    return (
        "–" if figure is None else f"{100 * figure['median']:.0f} [{100 * figure['p20']:.0f}–{100 * figure['p80']:.0f}]"
    )
