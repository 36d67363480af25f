# SPDX-License-Identifier: MIT
"""Schedules, tables and loops with another default device or dtype: the same numbers, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import NoiseScheduleType, ops, sampling
from fastdiff.philox import philox_words
from fastdiff.sampling import single_steps
from fastdiff.schedules.timesteps import SIGMA_SPACINGS, TIMESTEP_SPACINGS
from support.oracle import assert_same_bits
from support.solver_cases import METHODS

SHAPE = (2, 3, 4, 4)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
BETAS = {"custom_betas": torch.linspace(0.001, 0.02, 50).tolist()}
CUSTOM = {
    "custom": BETAS,
    "custom_betas": BETAS,
    "custom_alphas_cumprod": {"custom_alphas_cumprod": torch.linspace(0.99, 0.01, 50).tolist()},
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _other_defaults() -> Iterator[None]:
    with _default_device(), _default_dtype(torch.bfloat16):
        yield


#: One by one, for what every table and loop is made of; these take both at once.
DEFAULTS: dict[str, Callable[[], Any]] = {
    "device context": lambda: torch.device("meta"),
    "default device": _default_device,
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
}


def _same(make: Callable[[], list[Tensor]], default: Callable[[], Any] = _other_defaults) -> None:
    expected = make()
    with default():
        found = make()
    assert all(tensor.device.type == "cpu" for tensor in found)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", [member.value for member in NoiseScheduleType])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedule_is_independent_of_defaults(kind: str, zero_snr: bool) -> None:
    if kind == "custom_alphas_cumprod" and zero_snr:
        zero_snr = False

    def make() -> list[Tensor]:
        scheduler = fastdiff.create_noise_scheduler(kind, rescale_betas_zero_snr=zero_snr, **CUSTOM.get(kind, {}))
        return [scheduler.alphas_cumprod, scheduler.betas]

    _same(make)


#: The spacings choose the levels, and the methods make rows of any levels.
TABLES = [(method, TIMESTEP_SPACINGS[0]) for method in METHODS]
TABLES += [("dpm_solver", spacing) for spacing in (*TIMESTEP_SPACINGS[1:], *SIGMA_SPACINGS)]


@pytest.mark.parametrize(("method", "spacing"), TABLES)
def test_table_is_independent_of_defaults(method: str, spacing: str) -> None:
    name = "timestep_spacing" if spacing in TIMESTEP_SPACINGS else "sigma_spacing"
    if spacing == "beta":
        pytest.importorskip("scipy")

    def make() -> list[Tensor]:
        sampler = fastdiff.create_sampler("linear", method, num_inference_steps=6, **{name: spacing})
        return [sampler.table.coefficients, sampler.table.coefficients_as(torch.float32), sampler.timesteps]

    _same(make)


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in METHODS), ("ddim", {"thresholding": True}), ("heun", {"thresholding": True})],
    ids=str,
)
def test_loop_is_independent_of_defaults(method: str, options: dict[str, Any]) -> None:
    condition, negative = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)

    def make() -> list[Tensor]:
        sampler = fastdiff.create_sampler("linear", method, num_inference_steps=6, guidance_scale=3.0, **options)
        loops = [{"seeds": [1, 2]}, {"generator": torch.Generator("cpu").manual_seed(0)}]
        loops += [{"seeds": [1, 2], "model_dtype": torch.bfloat16, "backend": "reference"}]
        return [
            sampler.sample(
                lambda x, t, c: 0.1 * x + c.to(x.dtype), LATENTS, condition, negative, progress=False, **loop
            ).samples
            for loop in loops
        ]

    _same(make)


@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
def test_single_steps_and_noise_are_independent_of_defaults(default: Callable[[], Any]) -> None:
    x, m = LATENTS, LATENTS.flip(0)

    def make() -> list[Tensor]:
        single_steps._compiled.cache_clear()
        words = philox_words((1, 2, 3, 4), (5, 6))
        return [
            *words,
            fastdiff.randn(SHAPE, [1, 2]),
            fastdiff.randn(SHAPE, [1, 2], backend="reference"),
            sampling.cfg_combine(x, m, 2.5),
            sampling.cfg_combine(x, m, 2.5, backend="reference"),
            sampling.ddim_step(x, m, alpha_cumprod=0.25, alpha_cumprod_prev=0.5),
            sampling.ddpm_step(x, m, alpha_cumprod=0.25, alpha_cumprod_prev=0.5, noise=m, backend="reference"),
            *sampling.dpm_solver_step(x, m, alphas_cumprod=[0.25, 0.5]),
            sampling.euler_step(x[:, ::2], m[:, ::2], sigma=2.0, sigma_next=1.0),
            ops.quantile(x, 0.3),
            ops.mean(x),
        ]

    _same(make, default)
