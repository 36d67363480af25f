# SPDX-License-Identifier: MIT
"""Diversity and sharpness of samples, and the film strip of a trajectory."""

from __future__ import annotations

import io
import math

import pytest
import torch

from fastdiff.analysis.film_strip import visualize_trajectory
from fastdiff.analysis.sample_statistics import compute_sample_variance, compute_sharpness


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sample_variance_is_the_mean_of_elementwise_variances(dtype: torch.dtype) -> None:
    samples = torch.randn(5, 3, 4, 2).to(dtype)
    x = samples.double().reshape(5, -1)
    expected = float((((x - x.sum(0) / 5) ** 2).sum(0) / 4).sum() / x.shape[1])
    assert compute_sample_variance(samples) == pytest.approx(expected, rel=1e-12)  # both in float64


def test_sample_variance_of_copies_is_zero_and_scales_with_the_square() -> None:
    assert compute_sample_variance(torch.randn(1, 7).expand(4, 7)) == 0.0
    samples = torch.randn(6, 8, dtype=torch.float64)
    assert compute_sample_variance(3 * samples) == pytest.approx(9 * compute_sample_variance(samples))


@pytest.mark.parametrize("shape", [(6, 7), (2, 6, 7), (3, 2, 6, 7)])
def test_sharpness_of_a_ramp_is_its_slope(shape: tuple[int, ...]) -> None:
    down, across = torch.rand(2, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    image = (down * rows + across * columns).double().expand(shape)
    assert compute_sharpness(image) == pytest.approx(math.hypot(float(down), float(across)))


def test_sharpness_falls_when_an_image_is_blurred_and_is_zero_without_contrast() -> None:
    image = torch.rand(1, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    assert compute_sharpness(blurred) < 0.7 * compute_sharpness(image)
    assert compute_sharpness(torch.full((3, 8, 8), 0.3)) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compute_sample_variance(torch.randn(1, 3)), "one alone has no variance"),
        (lambda: compute_sample_variance(torch.zeros(3, 3, dtype=torch.int64)), r"convert it with samples\.float"),
        (lambda: compute_sharpness(torch.randn(2, 9)), "3 by 3 pixels"),
        (lambda: compute_sharpness([1.0]), "floating-point tensor"),  # type: ignore[arg-type]
        (lambda: visualize_trajectory([]), "holds 0 frames"),
        (lambda: visualize_trajectory([torch.zeros(2, 2), torch.zeros(3, 2)]), r"shapes \[\[2, 2\], \[3, 2\]\]"),
        (lambda: visualize_trajectory([torch.zeros(2, 5)]), r"shapes \[\[2, 5\]\]"),
    ],
)
def test_refusals_are_one_sentence(call: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        call()  # type: ignore[operator]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (1, 3, 4, 6), (50, 2)])
def test_film_strip_shows_the_first_and_the_last_frame(shape: tuple[int, ...]) -> None:
    trajectory = [torch.randn(shape) * (11 - i) for i in range(11)]
    figure = visualize_trajectory(trajectory, title="From noise", frames=4)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["start", "step 3", "step 7", "step 10"]
    assert figure.get_suptitle() == "From noise"
    assert len(figure.axes) == 4 * (min(shape[0], 4) if len(shape) == 4 else 1)
    drawn = figure.axes[-1]
    if len(shape) == 4:
        row = min(shape[0], 4) - 1
        expected = (trajectory[-1][row].clamp(-1, 1) + 1) / 2
        shown = torch.as_tensor(drawn.get_images()[0].get_array().tolist())
        torch.testing.assert_close(shown.squeeze(), expected.permute(1, 2, 0).squeeze())
    else:
        torch.testing.assert_close(torch.as_tensor(drawn.collections[0].get_offsets().tolist()), trajectory[-1])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
