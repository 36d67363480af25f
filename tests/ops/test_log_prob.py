# SPDX-License-Identifier: MIT
"""The log-probability of a step: torch's normal distribution, the step's own bits, and a replay with the same bits."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.log_prob import log_prob as unrecorded_log_prob  # the record of backends cannot be compiled
from fastdiff.row_layout import CLIP, COLUMNS, KEEP_0, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE, blank_row
from support.oracle import DTYPES, INTERPRETED, assert_same_bits, available_backends, device_of
from support.reduction_cases import with_layout

log_prob_module = importlib.import_module("fastdiff.ops.log_prob")
gradient_module = importlib.import_module("fastdiff.ops.log_prob_gradient")
pytestmark = pytest.mark.checks_backend
BACKENDS = available_backends()
SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.sampled_from([(1, 5), (2, 3, 8, 8), (3, 1025), (2, 4, 20, 15), (2, 2, 64, 16)])
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "batch inside", "gaps"])
SIGMAS = (0.37, 0.0021)
NOISE = PREV_SAMPLE + COLUMNS.index("noise")


@dataclass
class Case:
    """The arguments of a step with guidance, a clipped prediction, one history slot and one kept output."""

    tensors: dict[str, Tensor]
    table: Tensor
    row_index: int | Tensor
    noise: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        t = self.tensors
        return {
            "sample": t["x"], "model_output": t["c"], "table": self.table, "row_index": self.row_index,
            "uncond": t["u"], "guidance_scale": 3.0, "history": (t["h"],),
        }  # fmt: skip

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation in float64, by the formula of the row written out."""
        x, c, u, h = (self.tensors[name].double() for name in "xcuh")
        rows = self.table[self.row_index].double().reshape(-1, self.table.shape[1])
        column = [rows[:, i].reshape(-1, *[1] * (x.dim() - 1)) for i in range(rows.shape[1])]
        m = u + 3.0 * (c - u)
        d = (column[PREDICTION_SAMPLE] * x + column[PREDICTION_OUTPUT] * m).clamp(-1.5, 1.5)
        a = column[PREV_SAMPLE:]
        return a[0] * x + a[1] * m + a[2] * d + a[3] * h, a[7].abs()


def case(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, *, layout: str = "contiguous", drawn: bool = False,
    per_sample: bool = False, device: str = "cpu",
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)]
    tensors = {
        name: with_layout(t, layout if name != "h" else "contiguous").to(device)
        for name, t in zip("xcuhz", draw, strict=True)
    }
    table = torch.tensor([blank_row()] * 3, dtype=torch.float64)
    table[:, PREDICTION_SAMPLE], table[:, PREDICTION_OUTPUT], table[:, CLIP] = 1.1, -0.4, 1.5
    table[:, PREV_SAMPLE : PREV_SAMPLE + 4] = torch.tensor([0.3, 0.2, 0.5, -0.15], dtype=torch.float64)
    table[:, KEEP_0 + COLUMNS.index("prediction")] = 1.0
    table[0, NOISE], table[1, NOISE] = SIGMAS[0], -SIGMAS[1]  # row 2 adds no noise; a sign changes no density
    table = table.to(torch.float64 if dtype == torch.float64 else torch.float32)
    index: int | Tensor = torch.arange(shape[0], device=device) % 2 if per_sample else seed % 2
    noise = (
        {"seeds": torch.arange(shape[0], device=device) + seed, "noise_step": 3} if drawn else {"noise": tensors["z"]}
    )
    return Case(tensors, table.to(device), index, noise)


def few(backend: str, examples: int) -> settings:
    """Return settings with one example for Triton's interpreter, which takes a second a call."""
    return settings(max_examples=1 if backend == "triton" and INTERPRETED else examples)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_has_its_bits_and_the_density_of_a_normal_distribution(backend: str, dtype: torch.dtype) -> None:
    @few(backend, 12)
    @given(
        seed=SEEDS, shape=SHAPES, layout=LAYOUTS, drawn=st.booleans(), per_sample=st.booleans(),
        reduction=st.sampled_from(["sum", "mean"]),
    )  # fmt: skip
    def check(seed: int, shape: tuple[int, ...], layout: str, drawn: bool, per_sample: bool, reduction: str) -> None:
        device = device_of(backend)
        one = case(seed, shape, dtype, layout=layout, drawn=drawn, per_sample=per_sample, device=device)
        log_prob, prev, kept = ops.step_log_prob(
            **one.arguments, **one.noise, keeps=1, reduction=reduction, backend=backend
        )
        assert_same_bits([prev, kept], ops.step(**one.arguments, **one.noise, keeps=1, backend=backend))
        replayed = ops.log_prob(prev, **one.arguments, reduction=reduction, backend=backend)
        assert_same_bits([replayed], [log_prob])
        mean, std = one.mean()
        each = torch.distributions.Normal(mean, std).log_prob(prev.double()).flatten(1)
        expected = each.mean(1) if reduction == "mean" else each.sum(1)
        # The mean is rounded in float32, so that the distance from it is off by 8 roundings of a number up to 8, over
        # σ = 0.0021; the bound is on the sum of the magnitudes of the terms.
        relative = 1e-5 if dtype != torch.float64 else 1e-12
        distance = 8 * 8 * 2.0 ** (-24 if dtype != torch.float64 else -53) / std.min()
        size = each.abs().mean(1) if reduction == "mean" else each.abs().sum(1)
        slack = distance * (1 + each.abs()).sqrt().mul(2).sum(1) / (each.shape[1] if reduction == "mean" else 1)
        assert ((log_prob.double() - expected).abs() <= relative * size + slack).all()

    check()


def test_sum_and_mean_equal_torch_to_five_digits() -> None:
    one = case(4, (3, 4, 32, 32), torch.float32)
    for reduction in ("sum", "mean"):
        log_prob, prev = ops.step_log_prob(**one.arguments, **one.noise, reduction=reduction)
        mean, std = one.mean()
        each = torch.distributions.Normal(mean, std).log_prob(prev.double()).flatten(1)
        expected = each.mean(1) if reduction == "mean" else each.sum(1)
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=0.0)


@settings(max_examples=6)
@given(seed=SEEDS, dtype=st.sampled_from(DTYPES), drawn=st.booleans())
def test_bits_are_independent_of_batch_and_threads(seed: int, dtype: torch.dtype, drawn: bool) -> None:
    one = case(seed, (3, 30_001), dtype, drawn=drawn)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.step_log_prob(**one.arguments, **one.noise))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    alone = {
        name: v[1:2] if isinstance(v, Tensor) and v.dim() == 2 and len(v) == 3 and name != "table" else v
        for name, v in one.arguments.items()
    }
    alone["history"] = (one.tensors["h"][1:2],)
    noise = {name: v[1:2] if isinstance(v, Tensor) else v for name, v in one.noise.items()}
    assert_same_bits(ops.step_log_prob(**alone, **noise), [value[1:2] for value in results[0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_may_have_dtypes_of_their_own(backend: str) -> None:
    one = case(1, (2, 3, 40), torch.float32, device=device_of(backend))
    one.tensors["c"], one.tensors["u"] = one.tensors["c"].bfloat16(), one.tensors["u"].half()
    log_prob, prev = ops.step_log_prob(**one.arguments, **one.noise, out=(torch.bfloat16,), backend=backend)
    assert prev.dtype == torch.bfloat16
    assert_same_bits([ops.log_prob(prev, **one.arguments, backend=backend)], [log_prob])
    mean, std = one.mean()
    expected = torch.distributions.Normal(mean, std).log_prob(prev.double()).flatten(1).sum(1)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_without_noise_and_skipped_samples_give_zero(backend: str) -> None:
    one = case(0, (3, 70), torch.float32, device=device_of(backend))
    one.row_index = torch.tensor([2, -1, 0], device=device_of(backend))
    log_prob, prev = ops.step_log_prob(**one.arguments, **one.noise, backend=backend)
    assert log_prob[:2].tolist() == [0.0, 0.0]
    assert log_prob[2] != 0
    assert_same_bits([prev], ops.step(**one.arguments, **one.noise, backend=backend))
    assert torch.equal(prev[1], one.tensors["x"][1])
    assert_same_bits([ops.log_prob(prev, **one.arguments, backend=backend)], [log_prob])


def test_step_may_be_taken_in_place() -> None:
    one = case(3, (2, 2000), torch.float32)
    expected = ops.step_log_prob(**one.arguments, **one.noise)
    sample = one.tensors["x"].clone()
    found = ops.step_log_prob(**{**one.arguments, "sample": sample}, **one.noise, out=(sample,))
    assert found[1] is sample
    assert_same_bits(found, expected)


# --- The gradient ----------------------------------------------------------------------------------------------------


def _plain(one: Case, tensors: dict[str, Tensor], prev: Tensor, scale: Tensor, reduction: str) -> Tensor:
    """The formula in plain torch and float64."""
    x, c, u, h = (tensors[name] for name in "xcuh")
    column = (
        one.table[one.row_index]
        .double()
        .reshape(-1, one.table.shape[1])
        .T.reshape(one.table.shape[1], -1, *[1] * (x.dim() - 1))
    )
    m = u + scale.reshape(-1, *[1] * (x.dim() - 1)) * (c - u)
    d = (column[PREDICTION_SAMPLE] * x + column[PREDICTION_OUTPUT] * m).clamp(-column[CLIP], column[CLIP])
    a = column[PREV_SAMPLE:]
    each = torch.distributions.Normal(a[0] * x + a[1] * m + a[2] * d + a[3] * h, a[7].abs()).log_prob(prev).flatten(1)
    return each.mean(1) if reduction == "mean" else each.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_matches_plain_formula_in_float64(backend: str, per_sample: bool, dtype: torch.dtype) -> None:
    if backend not in BACKENDS:
        pytest.skip("the C++ extension was not built")
    for reduction, bound in (("sum", 1.5), ("mean", 1.5), ("sum", math.inf)):
        one = case(5, (3, 2, 30), dtype, per_sample=per_sample)
        one.table[:, CLIP] = bound
        _, prev = ops.step_log_prob(**one.arguments, **one.noise, backend=backend)
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=one.table.dtype)
        names = ("x", "c", "u", "h")
        one.tensors |= {name: one.tensors[name].detach().requires_grad_() for name in names}
        prev = prev.detach().requires_grad_()
        scale = torch.full((3,), 3.0, dtype=one.table.dtype, requires_grad=True)
        arguments = {**one.arguments, "guidance_scale": scale}
        got = torch.autograd.grad(
            (ops.log_prob(prev, **arguments, reduction=reduction, backend=backend) * weights).sum(),
            [*(one.tensors[name] for name in names), scale, prev],
        )
        wide = {name: one.tensors[name].detach().double().requires_grad_() for name in names}
        wide_prev, wide_scale = (t.detach().double().requires_grad_() for t in (prev, scale))
        expected = torch.autograd.grad(
            (_plain(one, wide, wide_prev, wide_scale, reduction) * weights.double()).sum(),
            [*wide.values(), wide_scale, wide_prev],
        )
        # The score divides a distance of 8 roundings by σ², 0.0021² at the least; bfloat16 rounds the gradient.
        tolerance = {torch.float32: 2e-3, torch.float64: 1e-10, torch.bfloat16: 1e-2}[dtype]
        for mine, theirs, like in zip(
            got, expected, [*(one.tensors[name] for name in names), scale, prev], strict=True
        ):
            assert mine.dtype == like.dtype
            assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("names", ["c", "cu", "xcu", "ch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_of_linear_row_is_one_step(names: str, dtype: torch.dtype) -> None:
    one = case(7, (2, 3, 40), dtype, per_sample=True)
    one.table[:, CLIP] = math.inf
    _, prev = ops.step_log_prob(**one.arguments, **one.noise)
    one.tensors |= {name: one.tensors[name].detach().requires_grad_() for name in names}
    loss = ops.log_prob(prev, **one.arguments, reduction="mean").sum()
    with mock.patch.object(gradient_module, "gradients", side_effect=AssertionError("a second step")):
        got = torch.autograd.grad(loss, [one.tensors[name] for name in names])
    wide = {name: one.tensors[name].detach().double().requires_grad_() for name in "xcuh"}
    scale = torch.full((2,), 3.0, dtype=torch.float64)
    expected = torch.autograd.grad(
        _plain(one, wide, prev.double(), scale, "mean").sum(), [wide[name] for name in names]
    )
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= 2e-3 * theirs.abs().max()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension was not built")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("names", ["c", "cu", "xcp", "hp", "x"])
def test_small_gradient_is_one_call_of_the_extension(names: str, batch: int) -> None:
    one = case(8, (batch, 3, 40), torch.float32)
    one.table[:, CLIP] = math.inf
    _, prev = ops.step_log_prob(**one.arguments, **one.noise)
    tensors = one.tensors | {"p": prev}
    one.tensors |= {name: tensors[name].detach().requires_grad_() for name in names}
    prev = one.tensors.pop("p", prev)
    inputs = [prev if name == "p" else one.tensors[name] for name in names]
    weights = torch.tensor([1.0, -2.0, 0.5])[:batch]
    with mock.patch.object(log_prob_module, "gradients_of", side_effect=AssertionError("the path of operators")):
        got = torch.autograd.grad((ops.log_prob(prev, **one.arguments) * weights).sum(), inputs)
    # The bits of the path of operators.
    with mock.patch.object(log_prob_module, "direct_gradients", return_value=None):
        assert_same_bits(got, torch.autograd.grad((ops.log_prob(prev, **one.arguments) * weights).sum(), inputs))
    wide = {name: tensors[name].detach().double().requires_grad_() for name in "xcuhp"}
    scale = torch.full((batch,), 3.0, dtype=torch.float64)
    loss = (_plain(one, wide, wide["p"], scale, "sum") * weights.double()).sum()
    for mine, theirs in zip(got, torch.autograd.grad(loss, [wide[name] for name in names]), strict=True):
        # As above: a distance of 8 roundings is divided by σ².
        assert (mine.double() - theirs).abs().max() <= 2e-3 * theirs.abs().max()


def test_operator_passes_opcheck_and_compiles_to_one_graph() -> None:
    one = case(2, (2, 3, 8), torch.float32)
    _, prev = ops.step_log_prob(**one.arguments, **one.noise)

    def loss(c: Tensor) -> Tensor:
        return unrecorded_log_prob(prev, **{**one.arguments, "model_output": c})

    c = one.tensors["c"].detach().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits([compiled(c).detach()], [loss(c).detach()])
    (got,) = torch.autograd.grad(compiled(c).sum(), c)
    assert_same_bits([got], torch.autograd.grad(loss(c).sum(), c))


# --- Refusals --------------------------------------------------------------------------------------------------------

ONE = case(0, (2, 8), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"noise": None}, ValueError, "step_log_prob: noise and seeds are both missing"),
        ({"seeds": torch.arange(2)}, ValueError, "step_log_prob: noise is given beside seeds"),
        ({"reduction": "max"}, ValueError, "step_log_prob: reduction is 'max'"),
        ({"row_index": 2}, ValueError, "step_log_prob: row_index is 2, a row that adds no noise"),
        ({"sample": torch.tensor(1.0)}, ValueError, "has shape"),
        ({"model_output": ONE.tensors["c"].clone().requires_grad_()}, RuntimeError, "model_output requires grad"),
    ],
)
def test_invalid_step_is_refused_with_one_sentence(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.step_log_prob(**{**ONE.arguments, **ONE.noise, **changes})


def test_invalid_replay_is_refused_with_one_sentence() -> None:
    with pytest.raises(ValueError, match="prev_sample has shape"):
        ops.log_prob(torch.ones(2, 7), **ONE.arguments)
    with pytest.raises(TypeError, match="prev_sample is a NoneType"):
        ops.log_prob(None, **ONE.arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_prob: row_index is 2, a row that adds no noise"):
        ops.log_prob(ONE.tensors["z"], **{**ONE.arguments, "row_index": 2})


def test_samples_without_elements_have_a_sum_of_zero() -> None:
    empty = torch.empty(2, 0)
    found = ops.step_log_prob(empty, empty, ONE.table, 0, noise=empty)
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1].shape == (2, 0)
    assert math.isnan(ops.log_prob(empty, empty, empty, ONE.table, 0, reduction="mean")[0].item())
