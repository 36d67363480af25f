# SPDX-License-Identifier: MIT
"""Film strips: the samples of a trajectory from noise to data, side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import checked_integer, error_message, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def visualize_trajectory(
    trajectory: Sequence[Tensor], title: str = "Denoising Process", *, frames: int = 8, samples: int = 4
) -> Figure:
    """Draw a trajectory: a column a frame, from the first to the last; a row an image, or a cloud of points a frame.

    Args:
        trajectory: tensors of one shape: images ``[B, 1 or 3, H, W]`` in [−1, 1] (values outside are clamped), or
            points ``[B, 2]``.
        title: above the picture.
        frames: at most so many columns, evenly spaced in the trajectory; its first and its last frame are among them.
        samples: at most so many images of the batch.

    Returns:
        A matplotlib figure that belongs to no window: ``figure.savefig("strip.png")`` writes it, a notebook shows it.

    Raises:
        TypeError, ValueError: the trajectory is empty or holds something else.
        ImportError: matplotlib is missing.
    """
    operation = "visualize_trajectory"
    checked_integer(operation, "frames", frames, 1)
    checked_integer(operation, "samples", samples, 1)
    shapes = {tuple(getattr(frame, "shape", ())) for frame in trajectory}
    images = len(shapes) == 1 and all(len(s) == 4 and s[1] in (1, 3) and 0 not in s for s in shapes)
    points = len(shapes) == 1 and all(len(s) == 2 and s[1] == 2 and s[0] > 0 for s in shapes)
    if not (images or points):
        got = f"holds {len(trajectory)} frames of the shapes {sorted(map(list, shapes))}"
        expected = "tensors of one shape, [B, 1 or 3, H, W] or [B, 2]"
        raise ValueError(
            error_message(operation, "trajectory", got, expected, "pass the list of return_trajectory=True")
        )
    figure_class = require("matplotlib.figure", "plots", operation).Figure
    count = min(frames, len(trajectory))
    chosen = torch.linspace(0, len(trajectory) - 1, count).round().int().tolist()
    shown = [trajectory[index].detach().float().cpu() for index in chosen]
    rows = min(samples, len(shown[0])) if images else 1
    figure: Any = figure_class(figsize=(1.5 * count + 0.4, 1.5 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False)
    for column, (index, frame) in enumerate(zip(chosen, shown, strict=True)):
        axes[0][column].set_title("start" if index == 0 else f"step {index}", fontsize=9)
        if images:
            _draw_images(axes, column, frame)
        else:
            _draw_points(axes[0][column], frame, limit=max(float(f.abs().quantile(0.99)) for f in shown) * 1.2 or 1.0)
    figure.suptitle(title)
    return figure  # type: ignore[no-any-return]


def _draw_images(axes: Any, column: int, frame: Tensor) -> None:
    pixels = (frame.clamp(-1.0, 1.0) + 1.0) / 2.0
    for row in range(len(axes)):
        image = pixels[row].permute(1, 2, 0).tolist()
        grey = len(pixels[row]) == 1
        axes[row][column].imshow(
            [[pixel[0] for pixel in line] for line in image] if grey else image,
            cmap="gray" if grey else None,
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
        )
        axes[row][column].set_axis_off()


def _draw_points(axis: Any, frame: Tensor, limit: float) -> None:
    axis.scatter(frame[:, 0].tolist(), frame[:, 1].tolist(), s=2.0, alpha=0.6, linewidths=0)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
