# SPDX-License-Identifier: MIT
"""A noise level for each part: pyramids, first frames and rolling chunks against parts that are sampled alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.editing import FINISHED, WAITING, part_timesteps, pyramid_rows, reconstruct, rolling_rows, sample_parts
from support.gaussian_model import GaussianModel, sampler_of
from support.oracle import assert_same_bits

B, T, INNER = 2, 3, (5,)


@pytest.mark.parametrize(("method", "fields"), [("ddim", {}), ("dpm_solver", {"solver_order": 3})], ids=str)
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_pyramid_gives_each_part_its_whole_loop(method: str, fields: dict[str, Any], delay: int) -> None:
    sampler = sampler_of(method, 6, **fields)
    model, x = GaussianModel(sampler), torch.randn(B, T, *INNER)
    rows = pyramid_rows(6, T, delay=delay)
    assert len(rows) == 6 + 2 * delay
    got = sample_parts(sampler.table, model, x, rows)
    # The model looks at elements alone, so parts that begin later have the same result.
    assert_same_bits([got], [reconstruct(sampler, model, x)])


def test_known_first_frame_stays_and_model_is_told() -> None:
    sampler = sampler_of("ddim", 4)
    own, x, seen = GaussianModel(sampler), torch.randn(B, T, *INNER), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return own(x, t)

    before = x.clone()
    got = sample_parts(sampler.table, model, x, pyramid_rows(4, T, delay=0, known=1))
    assert_same_bits([got[:, :1], x], [x[:, :1], before])
    assert_same_bits([got[:, 1:]], [reconstruct(sampler, own, x)[:, 1:]])
    times = torch.stack(seen)
    assert times.shape == (4, B, T)
    assert not times[..., 0].any()
    assert times[:, 0, 1].tolist() == list(sampler.table.timesteps)


@pytest.mark.parametrize("method", ["ddim", "dpm_solver"])
def test_rolling_window_equals_parts_sampled_alone(method: str) -> None:
    sampler = sampler_of(method, 6)
    table, model = sampler.table, GaussianModel(sampler)
    noise = torch.randn(B, T + 4, *INNER)
    # The window begins with parts at levels 1/T, 2/T ... from the end: each has taken the rows before.
    stride = 6 // T
    begun = torch.stack([torch.arange(6 - stride)] * T, 1)
    begun = torch.where(begun < 6 - stride * (torch.arange(T) + 1), begun, WAITING)
    history: list[Tensor | None] = [torch.zeros(B, T, *INNER), torch.zeros(B, T, *INNER), None, None]
    window = sample_parts(table, model, noise[:, :T], begun, history=history)
    finished = []
    for move in range(4):
        window = sample_parts(table, model, window, rolling_rows(6, T), history=history)
        finished.append(window[:, 0])
        window = torch.cat([window[:, 1:], noise[:, T + move : T + move + 1]], 1)
        history = [None if h is None else torch.cat([h[:, 1:], torch.zeros_like(h[:, :1])], 1) for h in history]
    expected = reconstruct(sampler, model, noise[:, :4])
    assert_same_bits([torch.stack(finished, 1)], [expected])


def test_parts_draw_their_own_noise_of_the_sample() -> None:
    sampler = sampler_of("ddim", 4, eta=1.0)
    model, x = GaussianModel(sampler), torch.randn(B, T, *INNER)
    rows = torch.stack([pyramid_rows(4, T, delay=1), pyramid_rows(4, T, delay=1).flip(1)], 1)
    got = sample_parts(sampler.table, model, x, rows, seeds=[3, 4], first_draw=10)
    alone = sample_parts(sampler.table, model, x[1:], rows[:, 1:], seeds=[4], first_draw=10)
    assert_same_bits([got[1:]], [alone])
    noise = torch.stack([fastdiff.randn(x.shape, [3, 4], step=10 + k, purpose=1) for k in range(len(rows))])
    one = x[:, 2].clone()
    stepper = sampler.stepper()
    for k in range(2, 6):  # the last part of the first sample begins two iterations late
        t = torch.full((B,), sampler.table.timesteps[k - 2])
        one = stepper.step(one, model(one, t), noise=noise[k, :, 2])
    assert_same_bits([got[:1, 2]], [one[:1]])


def test_malformed_parts_are_refused() -> None:
    sampler = sampler_of("ddim", 4)
    model, x = GaussianModel(sampler), torch.zeros(B, T, *INNER)
    for rows, message in (
        (torch.zeros(4, B, dtype=torch.int64), r"rows is torch.int64 of shape \[4, 2\]"),
        (torch.zeros(4, T), "rows is torch.float32"),
        (torch.full((1, T), 4), "rows holds 4 to 4, expected -2 to 3"),
    ):
        with pytest.raises(ValueError, match="^sample_parts: " + message):
            sample_parts(sampler.table, model, x, rows)
    with pytest.raises(ValueError, match=r"^rolling_rows: num_rows is 5, expected a multiple of the 3 parts"):
        rolling_rows(5, 3)
    with pytest.raises(ValueError, match=r"^pyramid_rows: known is 3"):
        pyramid_rows(4, 3, known=3)
    assert model.calls == 0
    times = part_timesteps(sampler.table, torch.tensor([WAITING, 2, FINISHED]), finished=-1.0)
    assert times.tolist() == [sampler.table.timesteps[0], sampler.table.timesteps[2], -1.0]
