# SPDX-License-Identifier: MIT
"""Every backend computes the formula: within rounding of the oracle, and bitwise where that is promised."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from support.child_environment import child_environment
from support.fork_server import run_module, run_program
from support.oracle import (
    DTYPES,
    FORMS,
    INTERPRETED,
    TIE_FACTORS,
    Case,
    Shape,
    all_bit_patterns,
    assert_same_bits,
    assert_within_rounding,
    available_backends,
    bits,
    cases,
    device_of,
    evaluate,
    form_case,
    make,
    plain_row,
)

pytestmark = pytest.mark.checks_backend
BACKENDS = available_backends()
HALVES = (torch.float16, torch.bfloat16)


def few_where_interpreted(backend: str, examples: int) -> settings:
    """Return settings with few examples and no shrinking for Triton's interpreter, which takes 10 ms per call."""
    if backend == "triton" and INTERPRETED:
        return settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    # Compiled, most examples are another kernel to compile, a second each.
    return settings(max_examples=min(examples, 25) if backend == "triton" else examples)


# --- The formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_step_equals_formula_within_rounding(backend: str, dtype: torch.dtype) -> None:
    @few_where_interpreted(backend, 60)
    @given(plan=cases([dtype]))
    def check(plan: Shape) -> None:
        case = make(plan).to(device_of(backend))
        out = case.poisoned_out()
        returned = case.run(backend, out=out)
        assert all(a is b for a, b in zip(returned, out, strict=True))
        assert_within_rounding(case, out, backend)

    check()


@pytest.mark.skipif(fastdiff.ops.backends.extension is None, reason="the C++ extension was not built")
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solver_rows_equal_formula_and_outputs_are_independent(dtype: torch.dtype, guided: bool) -> None:
    for form in FORMS:
        case = form_case(form, dtype, random.randrange(2**32), guided=guided, size=random.randint(1, 150))
        out = case.poisoned_out()
        case.run("cpu", out=out)
        assert_within_rounding(case, out, "cpu")
        for o, output in enumerate(out):
            table = case.table.clone()
            table[:, 8:] = 0
            table[:, 8:16] = case.table[:, 8 * (o + 1) : 8 * (o + 2)]
            assert_same_bits(replace(case, table=table, keeps=0).run("cpu"), [output])
        # Over what is read: each output on a tensor that later outputs may read too.
        inputs = [case.sample.clone(), case.model_output.clone(), case.history[0].clone()]
        over = replace(case, sample=inputs[0], model_output=inputs[1], history=[inputs[2], *case.history[1:]])
        assert_same_bits(over.run("cpu", out=inputs[: len(form)]), out)


@given(plan=cases())
def test_default_backend_matches_forced_one_bitwise(plan: Shape) -> None:
    # The two ways into the extension: at once, and through the checks.
    case = make(plan)
    chosen = fastdiff.ops.backend_for(case.sample)
    assert_same_bits(case.run(), case.run(chosen))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_with_zero_coefficients_is_ignored(backend: str) -> None:
    @few_where_interpreted(backend, 60)
    @given(plan=cases(), poison=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    def check(plan: Shape, poison: float) -> None:
        case = make(plan).to(device_of(backend))

        def poisoned(name: str, tensor: Tensor) -> Tensor:
            return torch.full_like(tensor, poison) if name in case.unused else tensor

        assert_same_bits(case.with_tensors(poisoned).run(backend), case.run(backend))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_of_zeros_gives_zero(backend: str) -> None:
    x = torch.full((2, 3), float("nan"), device=device_of(backend))
    case = Case(x, x, plain_row(p=1.0, q=1.0).to(x.device), history=[x] * 4, noise=x, keeps=2)
    for output in case.run(backend, out=case.poisoned_out()):
        assert torch.equal(output, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "m", "d", "h0", "h3", "z"])
def test_nan_in_a_used_tensor_affects_only_its_element(backend: str, name: str) -> None:
    device = device_of(backend)
    tensors = {column: torch.ones(2, 5, device=device) for column in ("x", "m", "h0", "h3", "z")}
    # d is made of x and m: with clip, the comparison must not turn NaN into a bound.
    tensors["m" if name == "d" else name][1, 2] = float("nan")
    row = plain_row(p=1.0, q=1.0, clip=0.5, **{f"prev_{name}": 1.0}).to(device)
    history = [tensors["h0"], None, None, tensors["h3"]]
    case = Case(tensors["x"], tensors["m"], row, history=history, noise=tensors["z"])
    (output,) = case.run(backend)
    expected = torch.zeros(2, 5, dtype=torch.bool, device=device)
    expected[1, 2] = True
    assert torch.equal(output.isnan(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_coefficient_affects_its_term(backend: str) -> None:
    # One coefficient at a time, each tensor a different power of 2: the value says which term it multiplied.
    device = device_of(backend)
    value = {"x": 2.0, "m": 4.0, "h0": 8.0, "h1": 16.0, "h2": 32.0, "h3": 64.0, "z": 128.0}
    t = {name: torch.full((3,), number, device=device) for name, number in value.items()}
    value["d"] = 0.5 * 2.0 - 3.0 * 4.0
    for o, output in enumerate(("prev", "k0", "k1")):
        for column, number in value.items():
            row = plain_row(p=0.5, q=-3.0, **{f"{output}_{column}": 1.0}).to(device)
            history = [t["h0"], t["h1"], t["h2"], t["h3"]]
            results = Case(t["x"], t["m"], row, history=history, noise=t["z"], keeps=2).run(backend)
            assert [r[0].item() for r in results] == [number if i == o else 0.0 for i in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_named_row_of_table_is_read(backend: str) -> None:
    device = device_of(backend)
    x, m = torch.randn(7, device=device), torch.randn(7, device=device)
    table = torch.full((5, 32), float("nan"), device=device)
    table[3] = plain_row(prev_x=2.0)[0]
    (output,) = fastdiff.ops.step(x, m, table, 3, backend=backend)
    assert torch.equal(output, 2 * x)


def test_oracle_matches_example_computed_by_hand() -> None:
    # m = 1 + 3·(2 − 1) = 4; d = ½·6 − 4 = −1, clamped to −0.75, then to −0.5 and divided by 0.5: −1.
    # std = √4 = 2; prev = 2·6 + 4 + 10·(−1) + 7 + 0.5·(3·2) = 16; keep = d = −1.
    row = plain_row(p=0.5, q=-1.0, clip=0.75, prev_x=2.0, prev_m=1.0, prev_d=10.0, prev_h1=1.0, prev_z=0.5, k0_d=1.0)
    one = torch.ones(1)
    case = Case(
        6 * one, 2 * one, row, uncond=one, guidance=3 * one, history=[None, 7 * one], noise=3 * one, variance=4 * one,
        variance_kind=2, threshold=0.5 * one, keeps=1,
    )  # fmt: skip
    assert [float(value[0]) for value, _ in evaluate(case, "reference")] == [16.0, -1.0]


def test_oracle_bound_is_tight() -> None:
    # A tolerance that grew by mistake would let anything pass: here the outputs are of the size of 1 to 100.
    for seed in range(20):
        case = make(Shape(seed, torch.float32, (64,), "scalar", 15, True, 0, False, 2))
        for _, bound in evaluate(case, "cpu"):
            assert float(bound.max()) < 200 * 2.0**-24 * 20


# --- Conversions of the half types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_half_bit_pattern_is_preserved(backend: str, dtype: torch.dtype) -> None:
    x = all_bit_patterns(dtype).to(device_of(backend))
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        x = x[(x.abs() == 0) | ~(x.abs() < torch.finfo(dtype).tiny)]  # the interpreter reads subnormals as 0
    case = Case(x, x, plain_row(prev_x=1.0).to(x.device))
    (output,) = case.run(backend, out=case.poisoned_out())
    # −0 alone comes back as +0: sums start at 0, and 0 + (−0) = 0.
    assert_same_bits([output], [torch.where(x == 0, torch.zeros_like(x), x)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float_to_half_rounds_like_torch(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts float32 off to bfloat16 instead of rounding it")
    if backend == "triton" and INTERPRETED:
        patterns = all_bit_patterns(dtype)[torch.randperm(65536)[:4096]]
    else:
        patterns = all_bit_patterns(dtype).to(device_of(backend))
    factors = [
        *TIE_FACTORS,
        *(random.uniform(-2, 2) for _ in range(8)),
        *(2.0 ** random.uniform(-40, 20) for _ in range(8)),
    ]
    for factor in factors:
        row = plain_row(prev_x=factor).to(patterns.device)
        case = Case(patterns, patterns, row)
        (output,) = case.run(backend, out=case.poisoned_out())
        expected = (row[0, 8] * patterns.float()).to(dtype)
        # Zeros in one form: a product that underflows keeps its sign in an fma and loses it where 0 is added later.
        assert_same_bits([output + 0.0], [expected + 0.0])


# --- The builds of the CPU extension ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results_of_builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Tensor, ...]] | str]:
    """Return each build's results on the same cases, or why the processor cannot run it; the seed is random."""
    if fastdiff.ops.backends.extension is None:
        pytest.skip(fastdiff.ops.backends.extension_error)
    folder = tmp_path_factory.mktemp("builds")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    results: dict[str, list[tuple[Tensor, ...]] | str] = {}
    for build in ("generic", "avx2", "avx512"):
        path = folder / f"{build}.pt"
        environment = child_environment(FASTDIFF_CPU=build, FASTDIFF_BACKEND="")
        done = run_module("support.oracle", str(path), str(seed), env=environment)
        if path.exists():
            saved = torch.load(path)
            assert saved["build"] == build
            results[build] = saved["results"]
        else:
            results[build] = done.stderr
    return results


@pytest.mark.parametrize("build", ["avx2", "avx512"])
def test_cpu_builds_agree_bitwise(results_of_builds: dict[str, list[tuple[Tensor, ...]] | str], build: str) -> None:
    generic, other = results_of_builds["generic"], results_of_builds[build]
    assert not isinstance(generic, str), generic
    if isinstance(other, str):
        # Any other failure than this one is the extension's.
        assert f"FASTDIFF_CPU is '{build}'" in other, other
        pytest.skip(f"this processor lacks {build}")
    assert len(generic) == len(other) > 180 + len(FORMS)
    for a, b in zip(generic, other, strict=True):
        assert_same_bits(a, b)


def test_unknown_cpu_build_is_refused() -> None:
    if fastdiff.ops.backends.extension is None:
        pytest.skip(fastdiff.ops.backends.extension_error)
    environment = child_environment(FASTDIFF_CPU="sse9", FASTDIFF_BACKEND="cpu")
    code = "import torch, fastdiff; fastdiff.ops.backend_for(torch.ones(1))"
    done = run_program(code, env=environment)
    assert done.returncode != 0
    assert "FASTDIFF_CPU is 'sse9', expected one of avx2, avx512, generic" in done.stderr


@pytest.mark.skipif(fastdiff.ops.backends.extension is None, reason="the C++ extension was not built")
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), batch=st.integers(1, 3))
def test_results_are_independent_of_threads(seed: int, dtype: torch.dtype, batch: int) -> None:
    # Above two grains of 65536 elements the loop is shared out; samples of odd sizes straddle the shares.
    size = 2 * 65536 // batch + seed % 1000 + 1
    case = make(Shape(seed, dtype, (batch, size), "a sample", 3, True, 0, True, 1, True))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run("cpu")
        torch.set_num_threads(2)
        two = case.run("cpu")
    finally:
        torch.set_num_threads(before)
    assert_same_bits(one, two)
    assert torch.equal(bits(one[0]), bits(two[0]))
