# SPDX-License-Identifier: MIT
"""Picture of convergence: error against steps, with the slope of each method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import error_message
from ..convergence import Convergence
from .figures import legend_beside, new_figure, series_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_convergence(curves: Sequence[Convergence]) -> Figure:
    """Draw the errors of `measure_convergence` on logarithmic axes; the legend has the slope of each method
    between its last two numbers of steps.

    Raises:
        ValueError: there is no curve.
        ImportError: matplotlib is missing.
    """
    operation = "plot_convergence"
    if not curves:
        raise ValueError(
            error_message(operation, "curves", "is empty", "one curve or more", "measure them with measure_convergence")
        )
    figure = new_figure(8.5, 5.0, operation)
    axis: Any = figure.subplots()
    for i, curve in enumerate(curves):
        label = f"{curve.method}: order {curve.slope:.2f}"
        axis.plot(curve.steps, curve.errors, label=label, **series_style(i))
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="root mean square error at the end")
    axis.set_title("probability-flow ODE of a mixture of Gaussians", fontsize=10)
    axis.set_xticks(curves[0].steps, [str(count) for count in curves[0].steps])
    axis.minorticks_off()
    axis.grid(alpha=0.3, which="both")
    legend_beside(figure, axis)
    return figure
