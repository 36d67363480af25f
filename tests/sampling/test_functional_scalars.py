# SPDX-License-Identifier: MIT
"""Scalar arguments of the single steps: numbers and one-element tensors, read at each call."""

from __future__ import annotations

import functools
import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.sampling import ddim_step, ddpm_step, dpm_solver_step, euler_step
from fastdiff.sampling import single_steps as functional
from support.oracle import assert_same_bits

X, M = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
NOISE = torch.randn(2, 3, 4)

#: A step with its scalars; that of dpm_solver_step is one entry of its list.
STEPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ddpm": (
        functools.partial(ddpm_step, noise=NOISE),
        {"alpha_cumprod": 0.25, "alpha_cumprod_prev": 0.5, "clip_range": 0.75},
    ),
    "ddim": (
        functools.partial(ddim_step, noise=NOISE),
        {"alpha_cumprod": 0.25, "alpha_cumprod_prev": 0.5, "eta": 0.5, "clip_range": 0.75},
    ),
    "dpm": (
        lambda x, m, first, second: dpm_solver_step(x, m, alphas_cumprod=[first, second]),
        {"first": 0.25, "second": 0.5},
    ),
    "euler": (
        functools.partial(euler_step, noise=NOISE),
        {"sigma": 2.0, "sigma_next": 1.0, "eta": 0.5, "s_noise": 1.5},
    ),
}
CASES = [(step, name) for step, (_, scalars) in STEPS.items() for name in scalars]


def _results(step: str, **scalars: Any) -> list[Tensor]:
    function, given = STEPS[step]
    result = function(X, M, **{**given, **scalars})
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize(("step", "name"), CASES)
@pytest.mark.parametrize(
    "wrap",
    [
        torch.tensor,
        lambda value: torch.tensor([[value]], dtype=torch.float64),
        lambda value: torch.tensor(value, dtype=torch.bfloat16),
        lambda value: torch.nn.Parameter(torch.tensor(value), requires_grad=False),
        np.float32,
        np.float64,
    ],
    ids=["0-D", "float64 [1, 1]", "bfloat16", "parameter", "numpy float32", "numpy float64"],
)
def test_scalar_may_be_a_tensor_of_one_element(wrap: Callable[[float], Any], step: str, name: str) -> None:
    value = STEPS[step][1][name]  # exact in all of these types
    assert_same_bits(_results(step, **{name: wrap(value)}), _results(step))


@pytest.mark.parametrize(("step", "name"), CASES)
def test_scalar_tensor_is_read_at_each_call(step: str, name: str) -> None:
    value = STEPS[step][1][name]
    tensor = torch.tensor(value)
    before = _results(step, **{name: tensor})
    tensor.mul_(1.0625)
    after = _results(step, **{name: tensor})
    assert_same_bits(after, _results(step, **{name: value * 1.0625}))
    assert not torch.equal(after[0], before[0])


def test_dpm_solver_step_accepts_one_dimensional_tensor() -> None:
    schedule = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    previous = [torch.randn(2, 3, 4)]
    given = dpm_solver_step(X, M, alphas_cumprod=schedule, previous=previous)
    assert_same_bits(given, dpm_solver_step(X, M, alphas_cumprod=[0.25, 0.5, 0.75], previous=previous))
    schedule.copy_(torch.tensor([0.125, 0.25, 0.5]))
    given = dpm_solver_step(X, M, alphas_cumprod=schedule, previous=previous)
    assert_same_bits(given, dpm_solver_step(X, M, alphas_cumprod=[0.125, 0.25, 0.5], previous=previous))


def test_equal_values_in_different_tensors_compile_once() -> None:
    functional._compiled.cache_clear()
    for _ in range(20):
        _results("ddim", alpha_cumprod=torch.tensor(0.375), eta=torch.tensor(0.25))
    assert functional._compiled.cache_info().misses == 1


def test_memory_is_bounded_over_many_values() -> None:
    sizes: list[int] = []
    tracemalloc.start()
    try:
        for part in range(3):
            for i in range(1500):
                ddim_step(X, M, alpha_cumprod=torch.tensor(0.1 + (1500 * part + i) * 2e-5), alpha_cumprod_prev=0.5)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # The cache is full after the first part. 1500 more tables of above 2 kB would be 3 MB a part.
    assert max(sizes[1:]) - sizes[0] < 500_000, sizes
    assert functional._compiled.cache_info().currsize <= 1024


@pytest.mark.parametrize(("step", "name"), CASES)
@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (None, TypeError, "has type NoneType"),
        (True, TypeError, "has type bool"),
        ("0.5", TypeError, "has type str"),
        (torch.tensor(True), TypeError, "has type bool"),
        (torch.tensor(0.5 + 0.5j), TypeError, "has type complex"),
        (np.array(0.5), TypeError, "has type ndarray"),
        (torch.tensor([0.5, 0.25]), ValueError, r"has shape \[2\]"),
        (torch.tensor([]), ValueError, r"has shape \[0\]"),
        (torch.tensor(0.5, requires_grad=True), TypeError, "requires grad"),
        (10**400, ValueError, "is an integer of 1329 bits, beyond the range of a float"),
    ],
    ids=["None", "bool", "str", "bool tensor", "complex", "array", "two", "none", "grad", "huge"],
)
def test_non_scalars_are_refused(value: Any, error: type[Exception], got: str, step: str, name: str) -> None:
    if name == "clip_range" and value is None:
        return  # stands for no clipping
    argument = {"first": r"alphas_cumprod\[0\]", "second": r"alphas_cumprod\[1\]"}.get(name, name)
    operation = "dpm_solver_step" if step == "dpm" else f"{step}_step"
    with pytest.raises(error, match=rf"^{operation}: {argument} {got}, expected a number, or a tensor of one; .+"):
        _results(step, **{name: value})


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"alphas_cumprod": None}, TypeError, "alphas_cumprod is a NoneType, expected a list, tuple or 1-D tensor"),
        ({"alphas_cumprod": 0.5}, TypeError, "alphas_cumprod is a float"),
        ({"alphas_cumprod": torch.ones(1, 2)}, TypeError, r"alphas_cumprod has shape \[1, 2\]"),
        ({"previous": None}, TypeError, "previous is a NoneType, expected a list or tuple of tensors"),
        ({"previous": X}, TypeError, "previous is a Tensor"),
        ({"previous": [None], "alphas_cumprod": [0.2, 0.3, 0.4]}, TypeError, r"previous\[0\] is a NoneType"),
        ({"out": X}, TypeError, "out is a Tensor, expected a list or tuple of tensors"),
    ],
)
def test_dpm_solver_step_refuses_non_lists(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"^dpm_solver_step: {text}.*; .+"):
        dpm_solver_step(X, M, **{"alphas_cumprod": [0.25, 0.5], **given})


def test_one_generator_per_sample_draws_noise() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    noise = torch.cat([torch.randn(1, 3, 4, generator=generator) for generator in generators()])
    scalars = {"alpha_cumprod": 0.25, "alpha_cumprod_prev": 0.5}
    assert_same_bits([ddpm_step(X, M, **scalars, generator=generators())], [ddpm_step(X, M, **scalars, noise=noise)])
    with pytest.raises(TypeError, match=r"generator is a int, expected a torch.Generator, or one a sample; .+"):
        ddpm_step(X, M, **scalars, generator=5)
