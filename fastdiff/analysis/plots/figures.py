# SPDX-License-Identifier: MIT
"""New figures, the look of series, and figures as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import error_message, require
from ...files import check_writable, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))


def new_figure(width: float, height: float, operation: str) -> Figure:
    """Return an empty figure of a size in inches, laid out so that no label is cut off.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class = require("matplotlib.figure", "plots", operation).Figure
    return figure_class(figsize=(width, height), layout="constrained")  # type: ignore[no-any-return]


def series_style(index: int) -> dict[str, Any]:
    """Return colour, marker and dashes of a series, told apart without colour too."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],
        "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def legend_beside(figure: Figure, axis: Any) -> None:
    """Place an axis' legend to the right of the figure, where it hides no data."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, ncols=1 + len(labels) // 25)


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers instead of powers of ten: 1, 2 and 5 of each, all on a short axis."""

    def label(value: float, _: int) -> str:
        low, high = axis.get_view_interval()  # between 1, 2 and 5 there may be a factor of 2.5
        return f"{value:g}" if high < 3 * low or f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(label)
    axis.set_tick_params(which="minor", labelsize=7)


def figure_bytes(figure: Figure, file_format: str = "png", dpi: int = 120) -> bytes:
    """Return a figure as the bytes of a file: ``png``, ``svg`` or ``pdf``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=dpi)
    return buffer.getvalue()


def check_figure_path(path: str | Path, operation: str, argument: str) -> None:
    """Refuse a path that `save_figure` could not write to, before there is a figure.

    Raises:
        ValueError: its ending is no format of `FORMATS`, or it cannot be written.
    """
    if Path(path).suffix.lower() not in FORMATS:
        got, expected = f"is {str(path)!r}", f"an ending of {', '.join(FORMATS)}"
        raise ValueError(error_message(operation, argument, got, expected, "choose .png"))
    check_writable(path, operation=operation, argument=argument)


def save_figure(figure: Figure, path: str | Path, *, operation: str = "save_figure", argument: str = "path") -> None:
    """Write a figure whole; the ending chooses the format.

    Raises:
        ValueError: the ending is no format of `FORMATS`.
        OSError: the file cannot be written; one that was there is as it was.
    """
    check_figure_path(path, operation, argument)
    data = figure_bytes(figure, Path(path).suffix.lower()[1:])
    write_whole(path, data, operation=operation, argument=argument)
