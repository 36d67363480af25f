# SPDX-License-Identifier: MIT
"""Weights of the loss over timesteps, against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdiff
from fastdiff.training import (
    debiased_weights,
    min_snr_weights,
    p2_weights,
    signal_to_noise_ratio,
    weight_table,
)

TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
EXACT = {"rtol": 1e-12, "atol": 0.0}  # a few float64 roundings


@given(snr=st.floats(1e-8, 1e8), gamma=st.floats(0.1, 20), k=st.floats(0.1, 3))
def test_weights_follow_the_papers(snr: float, gamma: float, k: float) -> None:
    s = torch.tensor([snr], dtype=torch.float64)
    low = min(snr, gamma)
    assert float(min_snr_weights(s, "epsilon", gamma)) == pytest.approx(low / snr, rel=1e-12)
    assert float(min_snr_weights(s, "v_prediction", gamma)) == pytest.approx(low / (snr + 1), rel=1e-12)
    assert float(min_snr_weights(s, "sample", gamma)) == pytest.approx(low, rel=1e-12)
    assert float(p2_weights(s, "epsilon", gamma, k)) == pytest.approx((k + snr) ** -gamma, rel=1e-9)
    assert float(debiased_weights(s)) == pytest.approx(snr**-0.5, rel=1e-12)


@pytest.mark.parametrize("weights", [min_snr_weights, p2_weights, debiased_weights])
def test_weighted_errors_of_all_predictions_agree(weights: object) -> None:
    """One guess of x0 makes one guess of ε, v and the velocity: its weighted error is the same for each."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    x0, noise, guess = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    signal = 0.3
    alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
    x = alpha * x0 + sigma * noise
    noise_guess = (x - alpha * guess) / sigma
    errors = {
        "epsilon": noise - noise_guess,
        "sample": x0 - guess,
        "v_prediction": (alpha * noise - sigma * x0) - (alpha * noise_guess - sigma * guess),
        "flow_prediction": (noise - x0) - (noise_guess - guess),
    }
    snr = torch.tensor(signal / (1 - signal), dtype=torch.float64)
    found = [weights(snr, kind) * (errors[kind] ** 2).mean() for kind in TYPES]  # type: ignore[operator]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], **EXACT)


def test_ends_of_the_schedule() -> None:
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert min_snr_weights(ends, "epsilon").tolist() == [1.0, 0.0]
    assert min_snr_weights(ends, "v_prediction").tolist() == [0.0, 0.0]
    assert min_snr_weights(ends, "sample").tolist() == [0.0, 5.0]
    assert debiased_weights(ends, "v_prediction").tolist() == [0.0, 0.0]
    assert debiased_weights(ends, "flow_prediction").tolist() == [0.0, 0.0]
    for gamma, last in ((1.0, 1.0), (2.0, 0.0)):  # S/(k + S)^γ
        assert p2_weights(ends, "sample", gamma).tolist() == [0.0, last]
    rescaled = fastdiff.create_noise_scheduler("linear", rescale_betas_zero_snr=True)
    table = weight_table(rescaled, "debiased", "v_prediction")
    assert table is not None
    assert float(table[-1]) == 0.0
    with pytest.raises(ValueError, match="weighting gives inf at timestep 999"):
        weight_table(rescaled, "debiased", "epsilon")


def test_signal_to_noise_ratio_of_schedules() -> None:
    schedule = fastdiff.create_noise_scheduler("cosine")
    expected = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    torch.testing.assert_close(signal_to_noise_ratio(schedule), expected, **EXACT)
    t = torch.tensor([3, 999, 3])
    torch.testing.assert_close(signal_to_noise_ratio(schedule.alphas_cumprod, t), expected[t], rtol=1e-9, atol=0)
    flow = fastdiff.create_noise_scheduler("flow", shift=3.0)
    torch.testing.assert_close(signal_to_noise_ratio(flow), ((1 - flow.times) / flow.times) ** 2, **EXACT)
    times = torch.tensor([0.25, 0.5])
    assert signal_to_noise_ratio(flow, times).tolist() == [9.0, 1.0]
    short = torch.tensor([3, 255, 3], dtype=torch.uint8)  # torch reads uint8 indices as a mask
    assert torch.equal(signal_to_noise_ratio(schedule, short), signal_to_noise_ratio(schedule, short.long()))
    for kind, bad in ((schedule, [-1, 3]), (schedule, [1000]), (flow, [1000]), (flow, [-0.5, 1.0])):
        with pytest.raises(ValueError, match="signal_to_noise_ratio: t spans"):
            signal_to_noise_ratio(kind, torch.tensor(bad))
    with pytest.raises(TypeError, match="signal_to_noise_ratio: t is a int"):
        signal_to_noise_ratio(schedule, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"t has dtype torch\.float32, expected integers"):
        signal_to_noise_ratio(schedule, times)


@pytest.mark.parametrize("kind", TYPES)
def test_tables_are_the_weights_of_all_timesteps(kind: str) -> None:
    schedule = fastdiff.create_noise_scheduler("linear", num_train_timesteps=50)
    snr = signal_to_noise_ratio(schedule)
    for name, expected in (
        ("min_snr", min_snr_weights(snr, kind, 3.0)),
        ("p2", p2_weights(snr, kind, 0.5, 2.0)),
        ("debiased", debiased_weights(snr, kind)),
    ):
        table = weight_table(schedule, name, kind, snr_gamma=3.0, p2_gamma=0.5, p2_k=2.0)
        assert table is not None
        assert (table.dtype, table.shape) == (torch.float64, (50,))
        assert torch.equal(table, expected)
    assert weight_table(schedule, "uniform", kind) is None
    with pytest.raises(ValueError, match="weight_table: weighting is 'snr'"):
        weight_table(schedule, "snr", kind)


def test_fused_loss_takes_the_table() -> None:
    schedule = fastdiff.create_noise_scheduler("linear")
    table = weight_table(schedule, "min_snr")
    output, x0, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, 400, 998])
    options = {"seeds": torch.arange(3)}
    by_table = fastdiff.ops.diffusion_loss(output, x0, t, schedule, weights=table, **options)
    assert table is not None
    by_sample = fastdiff.ops.diffusion_loss(output, x0, t, schedule, weights=table[t], **options)
    assert torch.equal(by_table, by_sample)
