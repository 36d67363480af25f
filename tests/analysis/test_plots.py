# SPDX-License-Identifier: MIT
"""Pictures: the numbers that they draw, labels, and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff import create_noise_scheduler
from fastdiff.analysis import compare_methods, measure_convergence
from fastdiff.schedules.timesteps import timestep_schedule
from support.analysis_cases import points_workload

pytest.importorskip("matplotlib")
from fastdiff.analysis.plots import (
    figure_bytes,
    plot_cloud,
    plot_convergence,
    plot_quality,
    plot_schedules,
    plot_spacings,
    save_figure,
)
from fastdiff.analysis.plots.figures import new_figure, plain_numbers


def test_schedules_draw_their_numbers() -> None:
    scheduler = create_noise_scheduler("cosine", num_train_timesteps=30)
    figure = plot_schedules({"mine": scheduler, "other": create_noise_scheduler("linear", num_train_timesteps=20)})
    expected = (
        scheduler.betas,
        scheduler.alphas_cumprod,
        scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod),
        scheduler.sigmas,
    )
    for axis, values in zip(figure.axes, expected, strict=True):
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), values.numpy())
        assert len(axis.lines) == 2
        assert axis.get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine", "other"]
    with pytest.raises(ValueError, match=r"^plot_schedules: schedules is empty"):
        plot_schedules([])


def test_infinite_levels_are_left_out() -> None:
    scheduler = create_noise_scheduler("linear", num_train_timesteps=20, rescale_betas_zero_snr=True)
    axis = plot_schedules({"zero SNR": scheduler}).axes[3]
    assert np.isnan(axis.lines[0].get_ydata()).tolist() == [False] * 19 + [True]


@pytest.mark.parametrize(("low", "high"), [(4.3, 4.95), (2.1, 4.9), (11.0, 18.0), (8.0, 420.0), (0.003, 0.2)])
def test_logarithmic_axis_has_plain_labels(low: float, high: float) -> None:
    figure = new_figure(5.0, 4.0, "test")
    axis = figure.subplots()
    axis.plot([1, 2], [low, high])
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    figure_bytes(figure)  # places ticks
    bottom, top = axis.get_ylim()
    labels = [label.get_text() for which in ("major", "minor") for label in axis.yaxis.get_ticklabels(which=which)]
    inside = [text for text in labels if text and bottom <= float(text) <= top]
    assert len(inside) >= 2, labels


def test_spacings_draw_the_timesteps_of_a_loop() -> None:
    scheduler = create_noise_scheduler("cosine")
    figure = plot_spacings(scheduler, 7, ["trailing", "karras"])
    times, levels = figure.axes
    assert list(times.lines[0].get_xdata()) == timestep_schedule("trailing", 7, 1000).tolist()
    sigmas = levels.lines[1].get_xdata()
    assert (sigmas[0], sigmas[-1]) == pytest.approx((float(scheduler.sigmas[-1]), float(scheduler.sigmas[0])))
    assert [label.get_text() for label in times.get_yticklabels()] == ["trailing", "karras"]
    with pytest.raises(ValueError, match="spacings is 'nope'"):
        plot_spacings(scheduler, 7, ["nope"])


def test_cloud_draws_frames_paths_and_data() -> None:
    trajectory = [torch.randn(30, 2) * (i + 1) for i in range(9)]
    figure = plot_cloud(trajectory, data=torch.randn(12, 2), frames=3, paths=4, title="t")
    assert [axis.get_title() for axis in figure.axes] == ["noise", "step 4 of 8", "step 8 of 8", "data"]
    last = figure.axes[2]
    np.testing.assert_allclose(last.collections[0].get_offsets(), trajectory[-1].numpy(), rtol=1e-6)
    assert len(last.lines) == 4
    np.testing.assert_allclose(last.lines[1].get_xdata(), [float(frame[1, 0]) for frame in trajectory], rtol=1e-6)
    for bad in ([], [torch.randn(3, 3)], [torch.randn(1, 1, 2, 2)]):
        with pytest.raises(ValueError, match=r"^plot_cloud: trajectory holds"):
            plot_cloud(bad)


def test_quality_draws_deterministic_methods_by_calls_and_time() -> None:
    found = compare_methods(points_workload(), ["ddim", "heun", "ddpm"], [3, 6], reference_steps=12, progress=False)
    figure = plot_quality(found)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ddim", "heun"], "samples with noise have no distance"
    calls, times = figure.axes
    drawn = {tuple(line.get_xdata()) for line in calls.lines if len(line.get_xdata()) == 2}
    assert drawn >= {(3, 6), (5, 11)}
    rows = [found.row("heun", steps) for steps in (3, 6)]
    ours = [line for line in times.lines if list(line.get_xdata()) == [row.milliseconds_per_image for row in rows]]
    np.testing.assert_array_equal(ours[0].get_ydata(), [row.distance.mean for row in rows])
    assert len(plot_quality(found, "variance").legends[0].get_texts()) == 3
    with pytest.raises(ValueError, match=r"^plot_quality: metric is 'frechet', which no row has"):
        plot_quality(found, "frechet")
    with pytest.raises(ValueError, match="metric is 'nope', expected one of distance"):
        plot_quality(found, "nope")


def test_convergence_shows_slopes() -> None:
    curves = measure_convergence(["ddim"], (20, 40), points=8, progress=False)
    figure = plot_convergence(curves)
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == f"ddim: order {curves[0].slope:.2f}"
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), curves[0].errors)
    with pytest.raises(ValueError, match="curves is empty"):
        plot_convergence([])


def test_figures_are_written_whole_or_refused(tmp_path: Path) -> None:
    figure = plot_schedules({"s": create_noise_scheduler("linear", num_train_timesteps=5)})
    assert figure_bytes(figure).startswith(b"\x89PNG")
    for name, head in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)
    with pytest.raises(ValueError, match=r"^save_figure: path is .*a\.gif.*an ending of \.png"):
        save_figure(figure, tmp_path / "a.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg"]
