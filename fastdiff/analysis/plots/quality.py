# SPDX-License-Identifier: MIT
"""Pictures of a comparison: a metric against model calls and against time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...errors import error_message, unknown_name
from ..compare import Comparison, ComparisonRow
from .figures import legend_beside, new_figure, plain_numbers, series_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Labels of the metrics that can be drawn; the arrow says which direction is better, where one is.
METRICS = {
    "distance": "distance to the reference ↓",
    "frechet": "Fréchet distance ↓",
    "inception": "inception-style score ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "variance": "sample variance",
    "sharpness": "sharpness",
}


def plot_quality(comparison: Comparison, metric: str = "distance") -> Figure:
    """Draw a metric against the number of model calls, and against milliseconds an image.

    Distances have bars of one standard error, and a grey line at the resolution of the reference.  Methods that draw
    noise are left out of the distances, and are in all other metrics.

    Args:
        comparison: of `compare_methods`.
        metric: a name of `METRICS`.

    Raises:
        ValueError: an unknown metric, or one that no row has.
        ImportError: matplotlib is missing.
    """
    operation = "plot_quality"
    if metric not in METRICS:
        raise unknown_name(operation, "metric", metric, METRICS)
    shown = [row for row in comparison.rows if _value(row, metric) is not None]
    if not shown:
        got, remedy = f"is {metric!r}, which no row has", "pass a workload with an encoder, or deterministic methods"
        raise ValueError(error_message(operation, "metric", got, "a metric that was measured", remedy))
    figure = new_figure(11.0, 4.2, operation)
    axes: Any = figure.subplots(1, 2, sharey=True)
    for i, method in enumerate(comparison.methods):
        rows = [row for row in shown if row.method == method]
        if not rows:
            continue
        values = [_value(row, metric) for row in rows]
        style = series_style(i)
        if metric == "distance" and not any(math.isnan(row.distance.error) for row in rows):
            bars = {"yerr": [row.distance.error for row in rows], "capsize": 2, "elinewidth": 0.8}
            axes[0].errorbar([row.model_calls for row in rows], values, label=method, **style, **bars)
        else:
            axes[0].plot([row.model_calls for row in rows], values, label=method, **style)
        axes[1].plot([row.milliseconds_per_image for row in rows], values, **style)
    if metric == "distance":
        for axis in axes:
            axis.axhline(comparison.resolution, color="0.6", linewidth=1.0, linestyle=":")
        across = axes[1].get_yaxis_transform()  # x as a share of the axis, y in data
        axes[1].text(0.01, comparison.resolution, " resolution of the reference", transform=across, fontsize=7)
    for axis, label in zip(axes, ("model calls", "milliseconds an image"), strict=True):
        axis.set(xscale="log", xlabel=label, yscale="log" if metric in ("distance", "frechet") else "linear")
        axis.grid(alpha=0.3, which="both")
    plain_numbers(axes[1].xaxis)
    if metric == "frechet":
        plain_numbers(axes[0].yaxis)
    calls = sorted({row.model_calls for row in shown})
    ticks = [call for i, call in enumerate(calls) if i == 0 or call >= 1.25 * calls[i - 1]]
    axes[0].set_xticks(ticks, [str(call) for call in ticks])
    axes[0].xaxis.minorticks_off()
    axes[0].set_ylabel(METRICS[metric])
    legend_beside(figure, axes[0])
    return figure


def _value(row: ComparisonRow, metric: str) -> float | None:
    if metric == "distance":
        return None if row.stochastic else row.distance.mean
    value: float | None = getattr(row, metric)
    return value
