# SPDX-License-Identifier: MIT
"""One picture of a run: how many times longer the peers take, and the share of the machine's copy bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.errors import require


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``fastdiff bench`` into `path`: a panel for each peer and one for the copy.

    A panel has a group of bars for each sampler and a bar for each line of the table, with its quantiles.
    """
    matplotlib = require("matplotlib", "plots", "fastdiff bench --plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "plots", "fastdiff bench --plot")
    results = report["results"]
    panels = _panels(results)
    ops = list(dict.fromkeys(line["op"] for line in results))
    series = list(dict.fromkeys(_series(line) for line in results))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 2.4 * len(panels)), sharex=True, squeeze=False)
    width = 0.8 / len(series)
    for axis, (title, pick) in zip(axes[:, 0], panels.items(), strict=True):
        for i, name in enumerate(series):
            found = [(ops.index(line["op"]), pick(line)) for line in results if _series(line) == name and pick(line)]
            places = [place + (i - len(series) / 2 + 0.5) * width for place, _ in found]
            heights = [figure["median"] for _, figure in found]
            spread = [
                [max(0.0, figure["median"] - figure["p20"]) for _, figure in found],
                [max(0.0, figure["p80"] - figure["median"]) for _, figure in found],
            ]
            axis.bar(places, heights, width, yerr=spread, label=name, error_kw={"linewidth": 0.6})
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel(title, fontsize=8)
        if title != COPY:
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
    axes[-1, 0].set_xticks(range(len(ops)), ops, fontsize=8)
    about = report["conditions"]
    axes[0, 0].set_title(
        f"One guided step: {about['cpu']} ({about['cpu_build']}), torch {about['torch']}, "
        f"diffusers {about['diffusers']}, k-diffusion {about['k-diffusion']}, {about['date']}",
        fontsize=8,
    )
    figure.tight_layout()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncol=2, fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


COPY = "share of copy bandwidth"


def _panels(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What each panel shows, by its axis: functions from a line to a figure, or to None where there is none."""
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
    return f"{shape} {line['dtype']}, {line['threads']} thread(s), {line['cache']}"
