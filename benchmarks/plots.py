# SPDX-License-Identifier: MIT
"""One picture of a run: how many times longer the peers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.errors import require


def plot_ratios(report: dict[str, Any], path: Path) -> None:
    """Bars of diffusers' time over fastdiff's, a group for each shape; written to `path`."""
    matplotlib = require("matplotlib", "plots", "plot_ratios")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "plots", "plot_ratios")
    results = report["results"]
    shapes = list(dict.fromkeys(result["shape"] for result in results))
    samplers = list(dict.fromkeys(result["sampler"] for result in results))
    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(samplers)
    for i, sampler in enumerate(samplers):
        ratios = {r["shape"]: r["diffusers_over_fastdiff"] for r in results if r["sampler"] == sampler}
        places = [shapes.index(shape) + (i - len(samplers) / 2 + 0.5) * width for shape in ratios]
        axes.bar(places, list(ratios.values()), width, label=sampler)
    labels = {result["shape"]: result["case"].split()[1] for result in results}
    axes.set_xticks(range(len(shapes)), [f"{shape}\n{labels[shape]}" for shape in shapes])
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("diffusers' time / fastdiff's")
    about = report["conditions"]
    axes.set_title(
        f"One guided step in float32, {about['threads']} thread(s) of {about['cpu']} ({about['cpu_build']}), "
        f"diffusers {about['diffusers']}, torch {about['torch']}, {about['date']}",
        fontsize=8,
    )
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncol=len(samplers), fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
