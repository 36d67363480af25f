# SPDX-License-Identifier: MIT
"""Terms of the variational bound against torch.distributions and the schedule's own arrays, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fastdiff
from fastdiff.training import discretized_log_likelihood, gaussian_kl, prior_term, vlb_loss, vlb_terms

SCHEDULE = fastdiff.create_noise_scheduler("cosine", num_train_timesteps=100)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; the difference of the two cdfs keeps at least ten digits here


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 on 256 levels, x_t, an output with a variance in [−1, 1], and timesteps with 0 and T − 1 among them."""
    t = torch.tensor([0, 1, 40, 99, 0])
    x0 = torch.randint(0, 256, (5, 2, 3, 3)).double() / 127.5 - 1
    x0[0, 0, 0, 0], x0[0, 0, 0, 1] = -1.0, 1.0  # the open bins
    x_t, noise = SCHEDULE.add_noise(x0, t)
    prediction = noise + 0.3 * torch.randn_like(noise)
    output = torch.cat([prediction, torch.rand_like(noise) * 2 - 1], dim=1)
    return x0.to(dtype), x_t.to(dtype), output.to(dtype), t


def expected_terms(x0: Tensor, x_t: Tensor, output: Tensor, t: Tensor, unit: bool = False) -> Tensor:
    """arXiv 2006.11239, eq. 5, 7 and 13, and arXiv 2102.09672, eq. 15, sample by sample."""
    betas, bars = SCHEDULE.betas, SCHEDULE.alphas_cumprod
    posterior_variance = SCHEDULE.posterior_variance.clone()
    posterior_variance[0] = posterior_variance[1]
    found = []
    for i, time in enumerate(t.tolist()):
        beta, bar = betas[time], bars[time]
        before = bars[time - 1] if time else torch.tensor(1.0, dtype=torch.float64)
        epsilon, v = output[i].chunk(2)
        guess = (x_t[i] - (1 - bar).sqrt() * epsilon) / bar.sqrt()

        def mean(clean: Tensor, bar: Tensor = bar, before: Tensor = before, beta: Tensor = beta, i: int = i) -> Tensor:
            return before.sqrt() * beta / (1 - bar) * clean + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t[i]

        share = v if unit else (v + 1) / 2
        std = (beta**share * posterior_variance[time] ** (1 - share)).sqrt()
        model = Normal(mean(guess), std)
        if time:
            nats = kl_divergence(Normal(mean(x0[i]), posterior_variance[time].sqrt()), model)
        else:
            upper = torch.where(x0[i] > 0.999, torch.ones_like(x0[i]), model.cdf(x0[i] + 1 / 255))
            lower = torch.where(x0[i] < -0.999, torch.zeros_like(x0[i]), model.cdf(x0[i] - 1 / 255))
            nats = -(upper - lower).log()
        found.append(nats.mean() / math.log(2))
    return torch.stack(found)


@pytest.mark.parametrize("variance_type", ["learned_range", "learned_unit_range"])
def test_terms_follow_the_papers(variance_type: str) -> None:
    x0, x_t, output, t = drawn()
    unit = variance_type == "learned_unit_range"
    if unit:
        output[:, 2:] = (output[:, 2:] + 1) / 2
    found = vlb_terms(output, x0, x_t, t, SCHEDULE, variance_type=variance_type)
    torch.testing.assert_close(found, expected_terms(x0, x_t, output, t, unit), **EXACT)
    if not unit:
        # v of ±1 are the fixed variances.
        for v, fixed in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
            output[:, 2:] = v
            one = vlb_terms(output, x0, x_t, t, SCHEDULE)
            torch.testing.assert_close(
                vlb_terms(output[:, :2], x0, x_t, t, SCHEDULE, variance_type=fixed), one, **EXACT
            )


def test_prediction_types_agree() -> None:
    x0, x_t, output, t = drawn()
    bar = SCHEDULE.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    epsilon, v = output.chunk(2, dim=1)
    guess = (x_t - sigma * epsilon) / alpha
    expected = vlb_terms(output, x0, x_t, t, SCHEDULE)
    for kind, prediction in (
        ("sample", guess),
        ("v_prediction", alpha * epsilon - sigma * guess),
        ("flow_prediction", epsilon - guess),
    ):
        found = vlb_terms(torch.cat([prediction, v], 1), x0, x_t, t, SCHEDULE.alphas_cumprod, kind)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # σ and α amplify the guess's rounding
    clipped = vlb_terms(output, x0, x_t, t, SCHEDULE, clip_denoised=True)
    by_hand = vlb_terms(torch.cat([guess.clamp(-1, 1), v], 1), x0, x_t, t, SCHEDULE, "sample")
    torch.testing.assert_close(clipped, by_hand, rtol=1e-6, atol=1e-9)


def test_float32_is_near_float64() -> None:
    x0, x_t, output, t = drawn(torch.float32)
    found = vlb_terms(output, x0, x_t, t, SCHEDULE)
    assert found.dtype == torch.float32
    expected = expected_terms(x0.double(), x_t.double(), output.double(), t)
    # x0's guess divides x_t − σ·ε, with a rounding of 6e-8, by an α of 5e-4 at the last timestep.
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-5)


def test_hybrid_loss_trains_the_variance_alone() -> None:
    x0, x_t, output, t = drawn()
    output.requires_grad_()
    found = vlb_loss(output, x0, x_t, t, SCHEDULE)
    terms = vlb_terms(output, x0, x_t, t, SCHEDULE)
    torch.testing.assert_close(found, 100 * terms.mean())  # T times the mean estimates the sum over timesteps
    (gradient,) = torch.autograd.grad(found, output)
    assert bool((gradient[:, :2] == 0).all())
    (whole,) = torch.autograd.grad(100 * terms.mean(), output)
    torch.testing.assert_close(gradient[:, 2:], whole[:, 2:])
    assert bool((whole[:, :2] != 0).any())
    torch.testing.assert_close(vlb_loss(output, x0, x_t, t, SCHEDULE, reduction="none"), 100 * terms)


def test_gradient_is_finite_where_the_other_term_overflows() -> None:
    x0, x_t, output, _ = drawn(torch.float32)
    output[:, :2] = 1e3  # far from x0: in float32 no bin holds any probability under the narrow normal of t = 1
    output.requires_grad_()
    terms = vlb_terms(output, x0, x_t, torch.tensor([1, 2, 40, 99, 1]), SCHEDULE, "sample")
    (gradient,) = torch.autograd.grad(terms.sum(), output)
    assert bool(terms.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_prior_term() -> None:
    x0 = torch.randn(3, 2, 4, dtype=torch.float64)
    bar = SCHEDULE.alphas_cumprod[-1]
    unit = Normal(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    expected = kl_divergence(Normal(bar.sqrt() * x0, (1 - bar).sqrt()), unit).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_term(x0, SCHEDULE), expected, rtol=1e-6, atol=1e-12)


def test_gaussian_kl_matches_torch() -> None:
    means, logs = torch.randn(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(means[0], (logs[0] / 2).exp()), Normal(means[1], (logs[1] / 2).exp()))
    torch.testing.assert_close(gaussian_kl(means[0], logs[0], means[1], logs[1]), expected, **EXACT)
    assert float(gaussian_kl(means[0], logs[0], means[0], logs[0]).abs().max()) == 0.0


def test_bins_hold_all_probability_far_and_near() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_std in ((0.1, -1.0), (-3.0, 0.5), (0.9, -4.0)):
        each = discretized_log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(log_std).double())
        assert float(each.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    # Forty deviations away the cdf itself is 0; its logarithm is not.
    far = discretized_log_likelihood(torch.zeros(1), torch.tensor([2.0]), torch.tensor([math.log(0.05)]))
    # log Φ(−z) ≈ −z²/2 − log(z·√2π) at the bin's near edge, z = (2 − 1/255)/0.05.
    z = (2 - 1 / 255) / 0.05
    assert float(far) == pytest.approx(-(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-3)
    mean = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([-2.0, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_log_likelihood(torch.tensor([-1.0, 1.0]).double(), m, s), (mean, scale)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(5, 2, 3, 3)}, r"output has shape \[5, 2, 3, 3\], expected \[5, 4, 3, 3\]"),
        ({"x_t": torch.zeros(5, 2, 3, 2)}, "x_t has shape"),
        ({"t": torch.tensor([0, 1, 2, 3])}, r"t has dtype torch.int64 and shape \[4\]"),
        ({"t": torch.tensor([0, 1, 2, 3, 100])}, "t spans 0 to 100, expected 0 to 99"),
        ({"t": 3}, "vlb_terms: t is a int"),
        ({"t": torch.tensor([True] * 5)}, "vlb_terms: t has dtype torch.bool"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    x0, x_t, output, t = drawn()
    arguments = {"output": output, "x0": x0, "x_t": x_t, "t": t, "schedule": SCHEDULE, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        vlb_terms(**arguments)  # type: ignore[arg-type]
