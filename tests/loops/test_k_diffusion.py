# SPDX-License-Identifier: MIT
"""Whole loops against k-diffusion's functions: the same model, levels and noise, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from fastdiff import loops
from support.loop_cases import SIGMAS, LevelNoise, k_diffusion, mixture, start
from support.seeds import TEST_SEED

#: Name and options. 2M SDE with r = ½ … are k-diffusion's defaults.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("euler", {"s_churn": 3.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.6, "s_noise": 1.1}),
    ("heun", {}),
    ("heun", {"s_churn": 3.0, "s_noise": 1.05}),
    ("dpm_2", {}),
    ("dpm_2", {"s_churn": 3.0}),
    ("dpm_2_ancestral", {}),
    ("dpm_2_ancestral", {"eta": 0.6}),
    ("lms", {}),
    ("lms", {"order": 3}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.7, "s_noise": 0.9, "r": 0.6}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
]
#: k-diffusion computes scalars in float32, with rounding errors of about 1e-6 of numbers that the loop brings from 14.6
#: down to 1; the promise is 1e-5.
TOLERANCE = 1e-5


def _noise(x: torch.Tensor) -> LevelNoise:
    return LevelNoise(TEST_SEED, tuple(x.shape), x.dtype)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make k-diffusion compute its scalars in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "options", "ends_at_zero"),
    [(*case, True) for case in CASES] + [(name, options, False) for name, options in CASES if not options],
    ids=str,
)
def test_whole_loop_equals_k_diffusion(
    name: str, options: dict[str, Any], ends_at_zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, sigmas = start(TEST_SEED), SIGMAS if ends_at_zero else SIGMAS[:-1]
    ours, theirs = getattr(loops, f"sample_{name}"), getattr(k_diffusion(), f"sample_{name}")
    if "s_churn" in options:
        # k-diffusion draws these with torch.randn_like at every step: the same draws, one after another.
        draws = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(TEST_SEED + i)) for i in range(len(sigmas))
        ]
        noises, others = iter(draws), iter(draws)
        mine = ours(mixture, x, sigmas, disable=True, noise_sampler=lambda a, b: next(noises), **options)
        monkeypatch.setattr(torch, "randn_like", lambda tensor: next(others))
        want = theirs(mixture, x, sigmas, disable=True, **options)
    else:
        stochastic = "ancestral" in name or "sde" in name
        first, second = ({"noise_sampler": noise} if stochastic else {} for noise in (_noise(x), _noise(x)))
        mine = ours(mixture, x, sigmas, disable=True, **first, **options)
        want = theirs(mixture, x, sigmas, disable=True, **second, **options)
        if stochastic:
            drawn = first["noise_sampler"].calls
            expected = second["noise_sampler"].calls
            # No draw where its coefficient is 0.
            assert [pytest.approx(call, rel=1e-5) for call in drawn] == (expected if options.get("eta", 1.0) else [])
    torch.testing.assert_close(mine, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("calls", [1, 5, 6, 7])
@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_dpm_fast_equals_k_diffusion(calls: int, eta: float, float64: None) -> None:
    x, options = start(TEST_SEED, dtype=torch.float64), {"eta": 0.0 if calls == 1 else eta}
    mine, want = (
        module.sample_dpm_fast(mixture, x, 0.05, 14.6, calls, disable=True, noise_sampler=_noise(x), **options)
        for module in (loops, k_diffusion())
    )
    # Rounding errors of 1e-16 of numbers up to 60, with slopes up to 1e3.
    torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"order": 2, "rtol": 0.02}, {"eta": 0.5, "rtol": 0.1}], ids=str)
def test_dpm_adaptive_equals_k_diffusion(options: dict[str, Any], float64: None) -> None:
    """The steps, their number, their errors and the result, in float64.

    In float32 the error of a short step is mostly rounding error, and the next step size follows it.
    """
    x = start(TEST_SEED, (1, 3, 4, 5), dtype=torch.float64)
    mine, want = (_adaptive(module, x, **options) for module in (loops, k_diffusion()))
    assert mine.counts == want.counts
    # The step size is the error to the power of 1/order: it multiplies rounding errors of 1e-16 by up to 1e5 (measured
    # over 300 seeds: 8e-12 of a level, 3e-11 of an error, 3e-9 of a sample after noise).
    assert mine.levels == pytest.approx(want.levels, rel=1e-9)
    assert mine.errors == pytest.approx(want.errors, rel=1e-8, abs=1e-9)
    torch.testing.assert_close(mine.samples, want.samples, rtol=1e-7, atol=1e-7)


def test_dpm_adaptive_in_float32_stays_near_float64() -> None:
    """Step sizes differ by rounding, so the results do by less than the solver's own tolerance."""
    x = start(TEST_SEED, (1, 3, 4, 5))
    rtol = 0.02
    single, double = (_adaptive(loops, start_of, order=2, rtol=rtol) for start_of in (x, x.double()))
    assert single.samples.dtype == torch.float32
    torch.testing.assert_close(single.samples.double(), double.samples, rtol=rtol, atol=rtol)


class _Adaptive(NamedTuple):
    samples: torch.Tensor
    counts: dict[str, int]
    levels: list[float]
    errors: list[float]


def _adaptive(module: Any, x: torch.Tensor, **options: Any) -> _Adaptive:
    """Return what `sample_dpm_adaptive` of a module gives, with the level and the error after each step."""
    levels: list[float] = []
    errors: list[float] = []

    def record(info: dict[str, Any]) -> None:
        levels.append(float(info["sigma"]))
        errors.append(float(info["error"]))

    generator = torch.Generator().manual_seed(TEST_SEED)
    samples, info = module.sample_dpm_adaptive(
        mixture, x, 0.05, 14.6, callback=record, disable=True, return_info=True,
        noise_sampler=lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype), **options,
    )  # fmt: skip
    return _Adaptive(samples, {key: info[key] for key in ("steps", "nfe", "n_accept", "n_reject")}, levels, errors)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2_ancestral", "dpmpp_2m"])
def test_callback_gets_k_diffusions_dict(name: str) -> None:
    x = start(TEST_SEED)
    dicts: list[list[dict[str, Any]]] = []
    for module in (loops, k_diffusion()):
        seen: list[dict[str, Any]] = []
        options = {"noise_sampler": _noise(x)} if "ancestral" in name else {}
        getattr(module, f"sample_{name}")(mixture, x, SIGMAS, callback=seen.append, disable=True, **options)
        dicts.append(seen)
    assert len(dicts[0]) == len(dicts[1]) == len(SIGMAS) - 1
    for mine, want in zip(*dicts, strict=True):
        assert set(mine) == set(want) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        for key, value in want.items():
            torch.testing.assert_close(
                torch.as_tensor(mine[key]), torch.as_tensor(value), rtol=TOLERANCE, atol=TOLERANCE
            )


@pytest.mark.parametrize("kind", ["epsilon", "v", "continuous v"])
@pytest.mark.parametrize("quantize", [False, True])
def test_denoisers_equal_k_diffusions(kind: str, quantize: bool) -> None:
    alphas = (1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x) + 0.001 * t.view(-1, 1, 1, 1)

    inner = Inner()
    external = k_diffusion("external")
    if kind == "continuous v":
        mine, want = loops.ContinuousVDenoiser(inner), external.VDenoiser(inner)
    else:
        mine = (loops.EpsilonDenoiser if kind == "epsilon" else loops.VDenoiser)(inner, alphas, quantize)
        wrapper = external.DiscreteEpsDDPMDenoiser if kind == "epsilon" else external.DiscreteVDDPMDenoiser
        want = wrapper(inner, alphas, quantize)
        torch.testing.assert_close(mine.get_sigmas(9), want.get_sigmas(9).double(), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(mine.get_sigmas(), want.get_sigmas().double(), rtol=1e-5, atol=0.0)
    x = start(TEST_SEED)
    for sigma in (0.02, 0.9, 14.0):
        level = torch.full((2,), sigma)
        # t is interpolated between levels in float32: 1000 steps of 1e-7 relative error.
        torch.testing.assert_close(mine(x, level), want(x, level).float(), rtol=1e-4, atol=1e-4)
    # The loop folds the wrapper into its rows; as a plain function it is called.
    folded = loops.sample_dpmpp_2m(mine, x, SIGMAS, disable=True)
    called = loops.sample_dpmpp_2m(lambda x, sigma: mine(x, sigma), x, SIGMAS, disable=True)
    torch.testing.assert_close(folded, called, rtol=TOLERANCE, atol=TOLERANCE)
    theirs = k_diffusion().sample_dpmpp_2m(want, x, SIGMAS, disable=True)
    torch.testing.assert_close(folded, theirs.float(), rtol=2e-4, atol=2e-4)
