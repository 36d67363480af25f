# SPDX-License-Identifier: MIT
"""Reductions: quantiles match torch bitwise, sums are within rounding and equal on every backend."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import reductions_reference
from fastdiff.row_layout import compute_dtype
from support.child_environment import child_environment
from support.fork_server import run_module
from support.oracle import DTYPES, INTERPRETED, UNIT_ROUNDOFF, assert_same_bits, available_backends, device_of
from support.reduction_cases import (
    KINDS,
    LAYOUTS,
    QUANTILES,
    SEEDS,
    SHAPES,
    SPREADS,
    by_torch,
    call,
    numbers,
    oracle,
    with_layout,
)

pytestmark = pytest.mark.checks_backend
BACKENDS = available_backends()
needs_extension = pytest.mark.skipif(ops.backends.extension is None, reason="the C++ extension was not built")
#: torch's interpolation fuses a product with its sum in its builds for AVX2 and AVX-512 and on CUDA.
torch_fuses = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this torch rounds a quantile twice"
)


def few_where_interpreted(backend: str, examples: int) -> settings:
    """Return settings with few examples for Triton's interpreter, which takes 50 ms per call."""
    if backend == "triton" and INTERPRETED:
        return settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    return settings(max_examples=examples)


# --- The quantile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "weight"), [(True, 0.203125), (False, 0.2018396407365799)])
def test_quantile_position_matches_installed_torch_in_float32(
    rounds: bool, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 0.1 in float32 times 1234562 is 123456.20183964074, in float32 123456.203125.
    monkeypatch.setattr(reductions_reference, "_ROUNDS_POSITION", rounds)
    assert reductions_reference.rank(0.1, 1234563, torch.float32) == (123456, weight)


@torch_fuses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantile_matches_torch_bitwise(backend: str, dtype: torch.dtype) -> None:
    @few_where_interpreted(backend, 100)
    @given(
        seed=SEEDS, shape=SHAPES, spread=SPREADS, layout=LAYOUTS, q=QUANTILES, absolute=st.booleans(),
        bad=st.sampled_from([None, None, None, math.nan, -math.nan, math.inf, -math.inf]),
    )  # fmt: skip
    def check(
        seed: int, shape: tuple[int, ...], spread: str, layout: str, q: float, absolute: bool, bad: float | None
    ) -> None:
        x = numbers(seed, shape, dtype, spread)
        if bad is not None:
            x.view(-1)[seed % x.numel()] = bad
        got = ops.quantile(with_layout(x, layout).to(device_of(backend)), q, absolute, backend=backend).cpu()
        expected = by_torch(x, q, absolute)
        if backend == "triton" and INTERPRETED:
            # The interpreter rounds the product of an fma: once more, by half a unit of the distance it is a part of.
            finite = expected.isfinite()
            values = x.to(got.dtype).reshape(shape[0], -1)
            bound = 2 * UNIT_ROUNDOFF[dtype] * (2 * (values.amax(1) - values.amin(1)) + expected.abs())
            assert torch.equal(got.isnan(), expected.isnan())
            assert not bool(((got - expected).abs() > bound)[finite].any())
            return
        # −0 and +0 are equal to torch's sort, and which of them it finds is their order in memory.
        assert_same_bits([got + 0.0], [expected + 0.0])

    check()


@needs_extension
@torch_fuses
@settings(max_examples=15)
@given(seed=SEEDS, dtype=st.sampled_from(DTYPES), q=QUANTILES, absolute=st.booleans(), spread=SPREADS)
def test_quantile_of_long_samples_matches_torch_for_any_threads(
    seed: int, dtype: torch.dtype, q: float, absolute: bool, spread: str
) -> None:
    batch = 1 + seed % 3
    x = numbers(seed, (batch, 70_000 + seed % 5), dtype, spread)
    expected = by_torch(x, q, absolute)
    for threads in (1, 2):
        got = with_threads(threads, lambda: ops.quantile(x, q, absolute, backend="cpu"))
        assert_same_bits([got + 0.0], [expected + 0.0])


def with_threads(threads: int, run: Any) -> Any:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return run()
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_quantile_of_samples_too_long_for_torch_is_order_statistic() -> None:
    times, values = 16778, 1000
    x = torch.arange(values, dtype=torch.float32).repeat(times)[None]
    assert x.numel() > 2**24
    for q in (0.0, 0.30003, 0.99999, 1.0):
        # Each value stands there so many times, so that only a position at the border of two would interpolate.
        assert ops.quantile(x, q).item() == int(q * (x.numel() - 1)) // times


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_quantile_of_constant_sample_is_the_constant(backend: str) -> None:
    for dtype in DTYPES:
        x = torch.full((2, 300), 1.5, dtype=dtype, device=device_of(backend))
        for q in (0.0, 0.3, 1.0):
            assert ops.quantile(x, q, backend=backend).tolist() == [1.5, 1.5]
            assert ops.quantile(-x, q, absolute=True, backend=backend).tolist() == [1.5, 1.5]


# --- Sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_within_rounding_bound(backend: str, kind: str, dtype: torch.dtype) -> None:
    @few_where_interpreted(backend, 60)
    @given(seed=SEEDS, shape=SHAPES, spread=SPREADS, layout=LAYOUTS, correction=st.sampled_from([0.0, 0.5, 1.0]))
    def check(seed: int, shape: tuple[int, ...], spread: str, layout: str, correction: float) -> None:
        x, y = (numbers(seed + i, shape, dtype, spread)[:, None] for i in range(2))
        if kind == "std" and x[0].numel() <= correction:
            return
        device = device_of(backend)
        got = call(kind, with_layout(x, layout).to(device), y.to(device), correction, backend=backend).cpu()
        assert got.dtype == compute_dtype(dtype)
        assert got.shape == shape[:1]
        value, bound = oracle(kind, x, y, correction)
        error = abs(np.asarray(got.double().numpy(), dtype=np.longdouble) - value)
        assert (error <= bound).all(), (got, value, error, bound)

    check()


def test_oracle_bound_is_tight() -> None:
    # A tolerance that grew by mistake would let anything pass.
    x, y = (numbers(i, (4, 5000), torch.float32) for i in range(2))
    for kind, size in (("mean", 1.0), ("std", 1.0), ("norm", 71.0), ("dot", 5000.0)):
        _, bound = oracle(kind, x, y, 1.0)
        assert float(bound.max()) < 350 * 2.0**-24 * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_sum_in_same_order(backend: str, kind: str) -> None:
    # Of numbers with 11 bits the products are exact, and so fused or not makes no difference: any other order of the
    # additions would show. The deviation subtracts a mean first: there each whole number is followed by its negative.
    @few_where_interpreted(backend, 40)
    @given(seed=SEEDS, inner=st.sampled_from([5, 64, 700, 1024, 1025, 4000, 66_000]))
    def check(seed: int, inner: int) -> None:
        x, y = (numbers(seed + i, (2, inner), torch.float16, "wide").float() for i in range(2))
        if kind == "std":
            x = torch.randint(-1000, 1000, (2, inner), generator=torch.Generator().manual_seed(seed)).float()
            x = torch.cat([x, -x], dim=1).reshape(2, 2, inner).transpose(1, 2).reshape(2, -1)
        device = device_of(backend)
        got = call(kind, x.to(device), y.to(device), backend=backend).cpu()
        assert_same_bits([got], [call(kind, x, y, backend="reference")])

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_has_same_bits_on_every_backend(backend: str) -> None:
    @few_where_interpreted(backend, 40)
    @given(seed=SEEDS, shape=SHAPES, dtype=st.sampled_from(DTYPES), spread=SPREADS)
    def check(seed: int, shape: tuple[int, ...], dtype: torch.dtype, spread: str) -> None:
        x = numbers(seed, shape, dtype, spread)
        got = ops.mean(x.to(device_of(backend)), backend=backend).cpu()
        assert_same_bits([got], [ops.mean(x, backend="reference")])

    check()


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(seed=SEEDS, dtype=st.sampled_from(DTYPES), batch=st.integers(1, 3))
def test_sums_are_independent_of_threads(kind: str, seed: int, dtype: torch.dtype, batch: int) -> None:
    x, y = (numbers(seed + i, (batch, 140_000 // batch + seed % 3000), dtype, "wide") for i in range(2))
    one, two = (with_threads(n, lambda: call(kind, x, y, backend="cpu")) for n in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_summed_in_memory_order(kind: str) -> None:
    x, y = (numbers(i, (3, 8, 20, 9), torch.float32, "wide") for i in range(2))
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, y)]
    as_it_lies = [t.permute(0, 2, 3, 1).contiguous() for t in (x, y)]
    assert torch.equal(call(kind, *last), call(kind, *as_it_lies))
    assert torch.equal(call(kind, last[0], y), call(kind, *last))  # y follows x
    for layout in ("gaps", "batch inside"):
        assert torch.equal(call(kind, with_layout(x, layout), with_layout(y, layout)), call(kind, x, y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_affect_only_their_sample(backend: str, kind: str) -> None:
    for bad in (math.nan, math.inf):
        x = torch.ones(3, 2000)
        x[1, 1500] = bad
        got = call(kind, x.to(device_of(backend)), torch.ones_like(x).to(device_of(backend)), backend=backend).cpu()
        by_torch = {
            "mean": x.mean(1), "std": x.std(1), "norm": x.norm(dim=1), "dot": x.sum(1)
        }[kind]  # fmt: skip
        assert torch.equal(got.isnan(), by_torch.isnan())
        assert torch.equal(got.isinf(), by_torch.isinf())


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_samples_match_torch(backend: str) -> None:
    device = device_of(backend)
    empty, one, none = torch.empty(2, 0, device=device), torch.ones(2, device=device), torch.empty(0, 3, device=device)
    for kind in KINDS:
        assert call(kind, none, none, backend=backend).shape == (0,)
        nothing = call(kind, empty, empty, backend=backend)
        assert nothing.isnan().all() if kind in ("mean", "std") else nothing.tolist() == [0.0, 0.0]
        single = call(kind, one, one, backend=backend)
        assert single.isnan().all() if kind == "std" else single.tolist() == [1.0, 1.0]
    assert ops.std(one, 2, backend=backend).isnan().all()
    assert ops.std(torch.tensor([[1.0, 3.0]], device=device), 2, backend=backend).tolist() == [math.inf]
    assert ops.quantile(one, 0.3, backend=backend).tolist() == [1.0, 1.0]
    assert ops.quantile(none, 0.3, backend=backend).shape == (0,)


# --- The builds of the CPU extension ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results_of_builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor] | str]:
    folder, seed = tmp_path_factory.mktemp("reductions"), random.randrange(2**32)
    print(f"seed {seed}")
    results: dict[str, list[Tensor] | str] = {}
    for build in ("generic", "avx2", "avx512"):
        path = folder / f"{build}.pt"
        environment = child_environment(FASTDIFF_CPU=build, FASTDIFF_BACKEND="")
        done = run_module("support.reduction_cases", str(path), str(seed), env=environment)
        results[build] = torch.load(path) if path.exists() else done.stderr
    return results


@needs_extension
@pytest.mark.parametrize("build", ["avx2", "avx512"])
def test_cpu_builds_reduce_bitwise_equal(results_of_builds: dict[str, list[Tensor] | str], build: str) -> None:
    generic, other = results_of_builds["generic"], results_of_builds[build]
    assert not isinstance(generic, str), generic
    if isinstance(other, str):
        assert f"FASTDIFF_CPU is '{build}'" in other, other
        pytest.skip(f"this processor lacks {build}")
    assert len(generic) == len(other) > 200
    assert_same_bits(generic, other)
