# SPDX-License-Identifier: MIT
"""Pictures of points in two dimensions on their way from noise to data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import checked_integer, error_message
from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_cloud(
    trajectory: Sequence[Tensor], *, data: Tensor | None = None, frames: int = 5, paths: int = 24, title: str = ""
) -> Figure:
    """Draw a cloud of points at several frames, with the paths of a few points, and the data beside its end.

    Args:
        trajectory: points ``[B, 2]`` a frame, from noise to the end.
        data: points ``[M, 2]`` of the data, drawn as a last panel; None for none.
        frames: panels of the trajectory, evenly spaced, its first and last among them.
        paths: points whose path from the first to the last frame is drawn in the last of these panels.
        title: above the picture.

    Raises:
        TypeError, ValueError: the trajectory is empty or holds something else.
        ImportError: matplotlib is missing.
    """
    operation = "plot_cloud"
    count = min(checked_integer(operation, "frames", frames, 1), len(trajectory))
    drawn = checked_integer(operation, "paths", paths, 0)
    every = [*trajectory, *([] if data is None else [data])]
    shapes = [list(getattr(frame, "shape", ())) for frame in every]
    if not trajectory or any(len(shape) != 2 or shape[0] == 0 or shape[1] != 2 for shape in shapes):
        got, expected = f"holds the shapes {shapes[:4]}", "frames [B, 2]"
        raise ValueError(error_message(operation, "trajectory", got, expected, "pass points in two dimensions"))
    chosen = torch.linspace(0, len(trajectory) - 1, count).round().int().tolist()
    points = [trajectory[i].detach().float().cpu() for i in chosen]
    limit = 1.15 * max(float(frame.abs().quantile(0.995)) for frame in points)
    panels = count + (data is not None)
    figure = new_figure(2.3 * panels + 0.3, 2.9 if title else 2.6, operation)
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    for axis, index, frame in zip(axes, chosen, points, strict=False):
        _scatter(axis, frame, "#0072b2")
        axis.set_title("noise" if index == 0 else f"step {index} of {len(trajectory) - 1}", fontsize=10)
    if drawn and count > 1:
        lines = torch.stack([frame.detach().float().cpu()[:drawn] for frame in trajectory])
        for i in range(lines.shape[1]):
            axes[count - 1].plot(lines[:, i, 0].tolist(), lines[:, i, 1].tolist(), color="#d55e00", lw=0.7, alpha=0.7)
    if data is not None:
        _scatter(axes[-1], data.detach().float().cpu(), "#009e73")
        axes[-1].set_title("data", fontsize=10)
    for axis in axes:
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _scatter(axis: Any, points: Tensor, colour: str) -> None:
    axis.scatter(points[:, 0].tolist(), points[:, 1].tolist(), s=3.0, alpha=0.5, linewidths=0, color=colour)
