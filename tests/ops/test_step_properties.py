# SPDX-License-Identifier: MIT
"""Coefficients and values at the ends of their range, zeros of both signs, and one tensor in several roles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.row_layout import ROW_WIDTH, compute_dtype
from support.oracle import (
    DTYPES,
    INTERPRETED,
    Case,
    Shape,
    assert_same_bits,
    backends_at_hand,
    cases,
    device_of,
    evaluate,
    make,
    plain_row,
)

BACKENDS = backends_at_hand()
SEEDS = st.integers(0, 2**32 - 1)


def examples_for(backend: str, examples: int) -> settings:
    """A call of Triton's interpreter takes 10 ms and more: few examples, and no search for the smallest failure."""
    if backend == "triton" and INTERPRETED:
        return settings(max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    return settings(max_examples=examples)


def extreme(dtype: torch.dtype) -> list[float]:
    """0 and 1 of both signs, the ends of the normal and of the subnormal numbers, and what overflows when squared."""
    info = torch.finfo(dtype)
    smallest = float(torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))
    positive = [0.0, 1.0, 0.1, smallest, 7 * smallest, info.tiny, info.max, info.max**0.5 * 1.5, info.tiny**0.5]
    return [sign * value for value in positive for sign in (1.0, -1.0)]


def extreme_case(seed: int, dtype: torch.dtype, keeps: int, guided: bool, clip: bool) -> Case:
    """All tensors and all coefficients drawn from `extreme`; no learned variance, whose exp has a test of its own."""
    rng = np.random.default_rng(seed)
    plan = Shape(
        seed, dtype, (2, 17), "a sample" if guided else "none", int(rng.integers(16)), True, keeps=keeps, clip=clip
    )
    case = make(plan)
    wide = compute_dtype(dtype)

    def drawn(name: str, tensor: Tensor) -> Tensor:
        if name == "table":
            row = torch.from_numpy(rng.choice(extreme(wide), tensor.shape)).to(wide)
            # A few ordinary ones among them, or every sum overflows.
            row = torch.where(torch.from_numpy(rng.random(tensor.shape) < 0.6), tensor, row)
            row[0, 2] = tensor[0, 2]  # the clip stays above 0
            return row
        if name == "guidance":
            return tensor
        values = torch.from_numpy(rng.choice(extreme(dtype), tensor.shape)).to(dtype)
        return torch.where(torch.from_numpy(rng.random(tensor.shape) < 0.4), tensor, values)

    return case.with_tensors(drawn)


def reach(case: Case) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each output how large m and d may become on the way, how large the sum, and what underflow in m and d adds.

    `evaluate` counts underflow at the outputs alone, where coefficients of order 1 leave it; here it is multiplied by
    coefficients of up to the largest number.
    """
    # Half the smallest subnormal number an operation; four operations make m or d from numbers already rounded.
    unit = 2 * np.longdouble(2.0 ** (-1074 if case.sample.dtype == torch.float64 else -149))

    def size(tensor: Tensor | None) -> np.ndarray:
        return np.zeros(()) if tensor is None else abs(tensor.double().numpy().astype(np.longdouble))

    row = size(case.table[0])
    x, m, lost = size(case.sample), size(case.model_output), unit * np.zeros(case.sample.shape, np.longdouble)
    if case.uncond is not None:
        scale = size(case.guidance).reshape(-1, 1)
        m = size(case.uncond) + scale * (m + size(case.uncond))
        lost = unit * (1 + scale) + lost
    d, lost_d = row[0] * x + row[1] * m, unit + row[1] * lost
    history = [*case.history, *[None] * (4 - len(case.history))]
    terms = [x, m, d, *(size(h) for h in history), size(case.noise)]
    results = []
    for o in range(case.keeps + 1):
        weights = row[8 + 8 * o : 16 + 8 * o]
        total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        used = (weights[1] != 0, weights[2] != 0)
        inner = np.maximum(m * max(used), d * used[1])
        results.append((inner, total, weights[1] * lost + weights[2] * lost_d))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_coefficients_and_values_are_the_formula_or_overflow(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter reads bfloat16's subnormal numbers as 0")

    @examples_for(backend, 60)
    @given(seed=SEEDS, keeps=st.integers(0, 2), guided=st.booleans(), clip=st.booleans())
    def check(seed: int, keeps: int, guided: bool, clip: bool) -> None:
        case = extreme_case(seed, dtype, keeps, guided, clip)
        outputs = case.to(device_of(backend)).run(backend)
        computed, stored = (float(torch.finfo(d).max) for d in (compute_dtype(dtype), dtype))
        with np.errstate(all="ignore"):
            expected = evaluate(case, backend)
        for output, (value, bound), (inner, total, lost) in zip(outputs, expected, reach(case), strict=True):
            got = output.cpu().double().numpy().astype(np.longdouble)
            with np.errstate(all="ignore"):
                close = abs(got - value) <= bound + lost
                # Rounding can bring a partial result over the end from half of it at the earliest.
                partial = ~np.isfinite(got) & (np.maximum(inner, total) > computed / 2)
                # An infinite prediction is clipped to a number, whatever the exact one is.
                partial |= clip & (inner > computed / 2)
                rounded = np.isinf(got) & (np.sign(got) * value + bound + lost > stored)
                # And what lies beyond the end for certain must not come back as a number.
                beyond = abs(value) - bound - lost > 2 * stored
            assert (close | partial | rounded).all()
            assert not (np.isfinite(got) & beyond).any()

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_zero_is_a_zero_coefficient(backend: str) -> None:
    @examples_for(backend, 60)
    @given(plan=cases(), poison=st.sampled_from([float("nan"), float("inf")]))
    def check(plan: Shape, poison: float) -> None:
        case = make(plan).to(device_of(backend))

        def negated(name: str, tensor: Tensor) -> Tensor:
            if name in case.unused:
                return torch.full_like(tensor, poison)
            if name != "table":
                return tensor
            row = torch.where(tensor == 0, -torch.zeros_like(tensor), tensor)
            row[0, :8] = tensor[0, :8]  # the signs of p and q reach d: 0 · x is −0 where x is negative
            return row

        assert_same_bits(case.with_tensors(negated).run(backend), case.run(backend))

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_and_minus_one_copy_negate_and_cancel_exactly(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter reads bfloat16's subnormal numbers as 0")
    x = torch.tensor([value for value in extreme(dtype) if value != 0], dtype=dtype, device=device_of(backend))
    row = plain_row(dtype, prev_x=1.0, k0_m=-1.0, k1_x=1.0, k1_m=-1.0).to(x.device)
    same, negated, nothing = Case(x, x.clone(), row, keeps=2).run(backend)
    assert_same_bits([same, negated, nothing], [x, -x, torch.zeros_like(x)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_guidance_scale_of_zero_is_the_unconditional_output(backend: str, scale: float) -> None:
    device = device_of(backend)
    x, cond, uncond = torch.randn(3, 2, 9, device=device)
    row = plain_row(p=0.5, q=-0.5, clip=0.9, prev_x=0.5, prev_m=0.25, prev_d=2.0, k0_m=1.0).to(device)
    guidance = torch.tensor([scale], device=device)
    guided = Case(x, cond, row, uncond=uncond, guidance=guidance, keeps=1).run(backend)
    assert_same_bits(guided, Case(x, uncond, row, keeps=1).run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_in_several_roles_are_read_before_they_are_written(backend: str) -> None:
    # A pool of tensors, each in any number of roles, and outputs among them: a register that is the sample as well,
    # is read by two sums and takes the third.
    @examples_for(backend, 150)
    @given(
        seed=SEEDS,
        dtype=st.sampled_from(DTYPES),
        size=st.sampled_from([1, 5, 513, 1030]),
        roles=st.lists(st.integers(0, 3), min_size=8, max_size=8),
        targets=st.permutations(range(4)),
        keeps=st.integers(0, 2),
        guided=st.booleans(),
    )
    def check(
        seed: int, dtype: torch.dtype, size: int, roles: list[int], targets: list[int], keeps: int, guided: bool
    ) -> None:
        gen = torch.Generator().manual_seed(seed)
        pool = list(torch.randn(4, size, generator=gen).to(device_of(backend), dtype))
        row = torch.randn(1, ROW_WIDTH, generator=gen, dtype=torch.float64)
        row[torch.rand(row.shape, generator=gen) < 0.3] = 0.0
        row[0, 2] = float("inf")
        x, m, u, z, *history = (pool[role] for role in roles)
        guidance = torch.tensor([2.5], dtype=compute_dtype(dtype), device=x.device)
        case = Case(
            x, m, row.to(x.device, compute_dtype(dtype)), uncond=u if guided else None,
            guidance=guidance if guided else None, history=history, noise=z, keeps=keeps,
        )  # fmt: skip
        expected = case.with_tensors(lambda _, tensor: tensor.clone()).run(backend)
        before = [tensor.clone() for tensor in pool]
        written = targets[: keeps + 1]
        case.run(backend, out=[pool[t] for t in written])
        assert_same_bits([pool[t] for t in written], expected)
        assert_same_bits([pool[i] for i in targets[keeps + 1 :]], [before[i] for i in targets[keeps + 1 :]])

    check()
