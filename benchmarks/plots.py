# SPDX-License-Identifier: MIT
"""Picture of a run: the peers' times relative to fastdiff's, and the share of the machine's copy bandwidth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastdiff.errors import require
from fastdiff.files import write_whole


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``fastdiff bench`` into a file.

    The picture has a row of panels per peer and one for the copy, and a column per number of threads and cache state.
    A panel has a group of bars per sampler, with a bar per shape and dtype and its quantiles.
    """
    matplotlib = require("matplotlib", "plots", "fastdiff bench --plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "plots", "fastdiff bench --plot")
    results = report["results"]
    panels = _panels(results)
    columns = list(dict.fromkeys((line["threads"], line["cache"]) for line in results))
    ops = list(dict.fromkeys(line["op"] for line in results))
    series = list(dict.fromkeys(_series(line) for line in results))
    figure, axes = pyplot.subplots(
        len(panels),
        len(columns),
        figsize=(4.6 * len(columns), 2.1 * len(panels)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row, (title, pick) in zip(axes, panels.items(), strict=True):
        for axis, column in zip(row, columns, strict=True):
            lines = [line for line in results if (line["threads"], line["cache"]) == column and pick(line)]
            _bars(axis, lines, pick, ops, series)
            if title != COPY:
                axis.set_yscale("log", base=2)
                axis.yaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel(title, fontsize=8)
    for axis, (threads, cache) in zip(axes[0], columns, strict=True):
        axis.set_title(f"{threads} thread{'s' * (threads > 1)}, {cache} cache", fontsize=9)
    for axis in axes[-1]:
        axis.set_xticks(range(len(ops)), ops, fontsize=7, rotation=40, ha="right")
    about = report["conditions"]
    figure.suptitle(
        f"One guided step: {about['cpu']} ({about['cpu_build']}), torch {about['torch']}, "
        f"diffusers {about['diffusers']}, k-diffusion {about['k-diffusion']}, {about['date']}",
        fontsize=8,
    )
    figure.tight_layout()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncol=len(series), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150, bbox_inches="tight")
    write_whole(path, buffer.getvalue(), operation="bench", argument="--plot")
    pyplot.close(figure)


def _bars(axis: Any, lines: list[dict[str, Any]], pick: Any, ops: list[str], series: list[str]) -> None:
    """Draw a panel's bars, and the line of ratio 1."""
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        found = [(ops.index(line["op"]), pick(line)) for line in lines if _series(line) == name]
        positions = [group + (i - len(series) / 2 + 0.5) * width for group, _ in found]
        heights = [figure["median"] for _, figure in found]
        spread = [
            [max(0.0, figure["median"] - figure["p20"]) for _, figure in found],
            [max(0.0, figure["p80"] - figure["median"]) for _, figure in found],
        ]
        axis.bar(positions, heights, width, yerr=spread, label=name, error_kw={"linewidth": 0.6})
    axis.axhline(1.0, color="black", linewidth=0.8)


COPY = "share of copy bandwidth"


def _panels(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for each panel, by axis label, a function from a line to its figure, or to None if it has none."""
    if any("base_over_this" in line for line in results):
        return {"base / this": lambda line: line.get("base_over_this")}
    peers = dict.fromkeys(peer for line in results for peer in line["over_fastdiff"])
    panels: dict[str, Any] = {
        f"{peer} / fastdiff": lambda line, peer=peer: line["over_fastdiff"].get(peer) for peer in peers
    }
    if any(line["share_of_copy"] for line in results):
        panels[COPY] = lambda line: line["share_of_copy"]
    return panels or {"nothing to compare": lambda line: None}


def _series(line: dict[str, Any]) -> str:
    shape = "x".join(str(size) for size in line["shape"])
    return f"{shape} {line['dtype']}"
