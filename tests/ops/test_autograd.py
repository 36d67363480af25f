# SPDX-License-Identifier: MIT
"""Gradients of compiled backends against the reference and finite differences, first and second order; refusals."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.sampling.stepper import Stepper
from fastdiff.solvers.affine import Affine
from fastdiff.solvers.table import Row, StepTable
from support.oracle import INTERPRETED, UNIT_ROUNDOFF, assert_same_bits, plain_row

pytestmark = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
INF = float("inf")
#: The gradients of `Problem` are sums of fewer than 100 terms, each below 10³ (|G| ≤ 5, coefficients ≤ 2, std ≤ e⁴,
#: 1/s ≤ 4, |g| ≤ 2), rounded to 2⁻⁵³ by either backend: they differ by less than 2·100·10³·2⁻⁵³ = 2e-11.
CLOSE = {"rtol": 0.0, "atol": 2e-11}


class Problem:
    """Random step in float64 with some inputs that require grad."""

    def __init__(self, seed: int, shape: tuple[int, ...] = (2, 3)) -> None:
        self.gen, self.dice = torch.Generator().manual_seed(seed), random.Random(seed)
        dice, self.batch = self.dice, shape[0]
        self.shape = shape
        table = torch.randn(3, 32, generator=self.gen, dtype=torch.float64).clamp(-2, 2)
        self.table = torch.where(torch.rand(3, 32, generator=self.gen) < 0.3, 0.0, table)
        self.table[:, 2] = dice.choice([INF, 0.7])
        self.table[:, 6:8] = -1
        kind, guided, noisy = dice.randrange(3), dice.choice(["none", "one", "each"]), dice.choice(["", "z", "seeds"])
        self.rest: dict[str, Any] = {
            "row_index": dice.choice([0, 2, torch.tensor([1]), torch.tensor([0, 2]), torch.tensor([-1, 1])]),
            "keeps": dice.randrange(3), "variance_kind": kind, "noise_step": 2,
            "seeds": torch.tensor([3, 4]) if noisy == "seeds" else None,
        }  # fmt: skip
        self.copies = dice.choice([0, 1, 2])
        self.inputs: dict[str, Tensor] = {"sample": self.tensor(), "model_output": self.tensor()}
        if guided != "none":
            self.inputs |= {"uncond": self.tensor(), "guidance_scale": self.scalars(1 if guided == "one" else 2)}
        if noisy == "z":
            self.inputs["noise"] = self.tensor()
        if kind:
            self.inputs["variance"] = self.tensor(0.5)
        if dice.random() < 0.4:
            self.inputs["threshold"] = self.scalars(2).abs() + 0.3
        for j in range(4):
            if dice.random() < 0.5:
                self.inputs[f"h{j}"] = self.tensor()
        for tensor in self.inputs.values():
            tensor.requires_grad_(dice.random() < 0.7)
        self.inputs["model_output"].requires_grad_()

    def tensor(self, low: float = -1.0) -> Tensor:
        # Uniform and of moderate size: finite differences lose digits to large second derivatives.
        return low + torch.rand(self.shape, generator=self.gen, dtype=torch.float64) * (1.0 - low)

    def scalars(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.gen, dtype=torch.float64) * 3 - 1

    def run(self, *tensors: Tensor, backend: str = "cpu") -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=True))
        history = [given.pop(f"h{j}", None) for j in range(4)]
        x, m, row = given.pop("sample"), given.pop("model_output"), self.rest["row_index"]
        rest = {name: value for name, value in self.rest.items() if name != "row_index"}
        buffer = x.new_zeros(self.copies * self.batch, *self.shape[1:]) if self.copies else None
        results = ops.step(x, m, self.table, row, history=history, model_input=buffer, backend=backend, **rest, **given)
        return results if buffer is None else (*results, buffer)

    def lies_on_a_bound(self) -> bool:
        """Return True if a value is too close to a clamp's bound for finite differences."""
        with torch.no_grad():
            given = {name: self.inputs[name] for name in ("uncond", "guidance_scale") if name in self.inputs}
            rows = torch.zeros_like(self.table)
            rows[:, :2], rows[:, 2], rows[:, 10] = self.table[:, :2], INF, 1.0
            row = self.rest["row_index"]
            (d,) = ops.step(self.inputs["sample"], self.inputs["model_output"], rows, row, backend="reference", **given)
            near = (d.abs() - 0.7).abs() < 1e-4
            if "threshold" in self.inputs:
                s = self.inputs["threshold"].reshape(-1, *[1] * (d.dim() - 1))
                near = near | ((d.abs() - s).abs() < 1e-4) | ((s - 0.7).abs() < 1e-4)
            return bool(near.any())


def gradients(problem: Problem, backend: str) -> list[Tensor | None]:
    results = problem.run(*problem.inputs.values(), backend=backend)
    gen = torch.Generator().manual_seed(7)
    grads = [torch.randn(r.shape, generator=gen, dtype=r.dtype) for r in results]
    reached = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
    wanted = [t for t in problem.inputs.values() if t.requires_grad]
    if not reached:  # the reference leaves out what a coefficient of 0 multiplies
        return [None] * len(wanted)
    outputs, seeds = zip(*reached, strict=True)
    return list(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradients_of_any_step_equal_reference(seed: int) -> None:
    problem = Problem(seed)
    assume(not problem.lies_on_a_bound())
    for ours, its in zip(gradients(problem, "cpu"), gradients(problem, "reference"), strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        a, b = torch.broadcast_tensors(zero if ours is None else ours, zero if its is None else its)
        torch.testing.assert_close(a, b, **CLOSE)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1))
def test_first_and_second_gradients_match_finite_differences(seed: int) -> None:
    problem = Problem(seed)
    assume(not problem.lies_on_a_bound())
    tensors = tuple(problem.inputs.values())
    assert torch.autograd.gradcheck(problem.run, tensors)
    assert torch.autograd.gradgradcheck(problem.run, tensors)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_second_derivatives_equal_reference(seed: int) -> None:
    # gradgradcheck leaves out a gradient that is cut off from the graph; this does not.
    problem = Problem(seed)
    assume(not problem.lies_on_a_bound())
    found = []
    for backend in ("cpu", "reference"):
        wanted = [t for t in problem.inputs.values() if t.requires_grad]
        results = [r for r in problem.run(*problem.inputs.values(), backend=backend) if r.requires_grad]
        assume(results)
        first = torch.autograd.grad([r.square().sum() for r in results], wanted, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None and g.requires_grad)
        assume(isinstance(total, Tensor) and total.requires_grad)
        assert isinstance(total, Tensor)
        found.append(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    # Either backend rounds to 2⁻⁵³ in fewer than 1000 places numbers that are not larger than 10 times the largest
    # result: 2·1000·10·2⁻⁵³ = 2.2e-12 of that.
    largest = max(float(g.abs().max()) for g in found[1])
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its, rtol=0.0, atol=2.2e-12 * max(1.0, largest))


@pytest.mark.parametrize("clip", [INF, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_round_in_compute_dtype_and_once_in_sample_dtype(dtype: torch.dtype, clip: float) -> None:
    gen = torch.Generator().manual_seed(torch.seed() % 2**32)
    table = torch.randn(1, 32, generator=gen)
    table[0, 2], scale = clip, torch.tensor([2.5, -1.5])
    values = [torch.randn(2, 50, generator=gen).to(dtype) for _ in range(8)]

    def grads(table: Tensor, scale: Tensor, of: Callable[[Tensor], Tensor], backend: str, to: torch.dtype) -> Any:
        x, c, u, h, z = (value.to(to).requires_grad_() for value in values[:5])
        wide = torch.float64 if to == torch.float64 else torch.float32
        results = ops.step(
            x,
            c,
            table.to(wide),
            0,
            uncond=u,
            guidance_scale=scale.to(wide),
            history=[h],
            noise=z,
            keeps=2,
            backend=backend,
        )
        return torch.autograd.grad(results, (x, c, u, h, z), [of(value.to(to)) for value in values[5:]])

    x, c, u = (value.double() for value in values[:3])
    d = table[0, 0] * x + table[0, 1] * (u + scale[:, None] * (c - u))
    sure = (d.abs() - clip).abs() > 1e-4  # elsewhere rounding decides whether a value is clipped
    ours = grads(table, scale, lambda g: g, "cpu", dtype)
    exact = grads(table, scale, lambda g: g, "reference", torch.float64)
    # A gradient is a sum Σ w·G of at most three G and that of d. The weights are products of at most three scalars,
    # rounded once from float64; products, sums and d's own gradient are rounded in the compute dtype: fewer than 12
    # roundings of partial sums that Σ|w|·|G| bounds. That sum is the gradient itself where all scalars are positive
    # (for u, whose weight is 1 − g, with −|g|). Then comes one rounding to the samples' dtype.
    unclipped = table.abs()
    unclipped[0, 2] = INF
    bound = grads(unclipped, -scale.abs(), torch.abs, "reference", torch.float64)
    info = torch.finfo(dtype)
    for a, b, size in zip(ours, exact, bound, strict=True):
        assert a.dtype == dtype
        allowed = 12 * UNIT_ROUNDOFF[dtype] * size.abs()
        allowed = allowed + (b.abs() + allowed) * info.eps / 2 + info.smallest_normal * info.eps
        assert bool(((a.double() - b).abs() <= allowed)[sure].all())


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "saved"), [(None, []), ("cpu", [32])])  # a forced backend saves the table
@pytest.mark.parametrize(
    ("wanted", "launches"), [(["x"], 1), (["x", "m", "h0"], 1), (["x", "m", "h0", "z"], 2), (["z"], 1)]
)
def test_backward_of_linear_row_is_one_launch_and_saves_no_tensor(
    wanted: list[str], launches: int, backend: str | None, saved: list[int]
) -> None:
    t = {name: torch.randn(4, 64, requires_grad=name in wanted) for name in ("x", "m", "h0", "z")}
    table, kept = torch.randn(1, 32).index_fill_(1, torch.tensor([2]), INF), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (kept.append(saved.numel()), saved)[1], lambda s: s):
        results = ops.step(t["x"], t["m"], table, 0, history=[t["h0"]], noise=t["z"], keeps=2, backend=backend)
    assert kept == saved
    with Launches() as mode:
        torch.autograd.grad([r.sum() for r in results], [t[name] for name in wanted])
    assert mode.seen["fastdiff.step.default"] == launches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_linear_steps_that_the_extension_records_have_the_bits_of_the_general_way(
    dtype: torch.dtype, seed: int
) -> None:
    """A forced backend takes the general way.  Any inputs and outputs may be left out of the graph."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = (dice.randint(1, 3), dice.randint(1, 5))
    table = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    table = torch.where(torch.rand(2, 32, generator=generator) < 0.3, 0.0, table)
    table[:, 2], table[:, 6:8] = INF, -1
    table = table.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x, m, u, z, *history = torch.randn(8, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
    history = [h if dice.random() < 0.6 else None for h in history]
    options: dict[str, Any] = {"history": history, "keeps": dice.randrange(3)}
    options |= {"uncond": u, "guidance_scale": dice.uniform(-2, 8)} if dice.random() < 0.6 else {}
    options |= dice.choice([{}, {"noise": z}, {"seeds": torch.arange(shape[0]), "noise_step": 3}])
    present = [t for t in (x, m, options.get("uncond"), *history, options.get("noise")) if t is not None]
    wanted = [t for t in present if dice.random() < 0.6] or [m]
    for tensor in wanted:
        tensor.requires_grad_()
    index = dice.randrange(2)
    found = ops.step(x, m, table, index, **options)
    expected = ops.step(x, m, table, index, **options, backend="cpu")
    assert found[0].grad_fn is not None
    assert "_LinearStep" in found[0].grad_fn.name()
    assert_same_bits([one.detach() for one in found], [one.detach() for one in expected])
    chosen = [o for o in range(len(found)) if dice.random() < 0.7] or [0]
    grads = [torch.randn(shape, generator=generator).to(dtype) for _ in chosen]
    create_graph = dice.random() < 0.3
    one, other = (
        torch.autograd.grad([made[o] for o in chosen], wanted, grads, create_graph=create_graph, allow_unused=True)
        for made in (found, expected)
    )
    for a, b in zip(one, other, strict=True):
        # An input that no output reads has zeros, or None, for its gradient.
        zeros = torch.zeros(shape, dtype=dtype)
        assert_same_bits([zeros if a is None else a.detach()], [zeros if b is None else b.detach()])


def test_gradients_of_recorded_linear_steps_have_gradients() -> None:
    """The gradient is linear in the outputs' gradients, which may have a graph."""
    row = plain_row(prev_x=0.5, prev_m=2.0, prev_d=0.25, k0_m=1.5, p=0.5, q=-1.0).double()
    x, m, grad, other = torch.randn(4, 2, 3, dtype=torch.float64).unbind()
    x.requires_grad_(), m.requires_grad_(), grad.requires_grad_()
    prev, kept = ops.step(x, m, row, 0, keeps=1)
    of_x, of_m = torch.autograd.grad((prev * kept).sum(), (x, m), create_graph=True)
    torch.testing.assert_close(of_x, 0.625 * kept, **CLOSE)
    torch.testing.assert_close(of_m, 1.75 * kept + 1.5 * prev, **CLOSE)
    (twice,) = torch.autograd.grad(of_m.sum(), m)
    torch.testing.assert_close(twice, torch.full_like(m, 2 * 1.75 * 1.5), **CLOSE)
    (of_x,) = torch.autograd.grad(prev, x, grad, create_graph=True)
    (back,) = torch.autograd.grad(of_x, grad, other, retain_graph=True)
    torch.testing.assert_close(back, 0.625 * other, **CLOSE)


def test_non_contiguous_layouts_have_same_gradients() -> None:
    table = torch.randn(1, 32, dtype=torch.float64)
    table[0, 2] = 0.7
    x, m, grad = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    layouts: list[Callable[[Tensor], Tensor]] = [
        Tensor.contiguous,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    ]
    found = []
    for of_input in layouts:
        for of_grad in layouts:
            leaves = [of_input(t).detach().requires_grad_() for t in (x, m)]
            (prev,) = ops.step(*leaves, table, 0)
            found.append(torch.autograd.grad(prev, leaves, of_grad(grad)))
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


def test_drawn_noise_has_gradients_of_given_noise() -> None:
    x, m = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    v = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    table, seeds = torch.randn(1, 32, dtype=torch.float64), torch.tensor([5, 6])
    z = fastdiff.randn(x.shape, seeds, 9, fastdiff.Purpose.STEP, dtype=torch.float64)
    found = []
    for noise in ({"seeds": seeds, "noise_step": 9}, {"noise": z}):
        (prev,) = ops.step(x, m, table, 0, variance=v, variance_kind=1, **noise)  # type: ignore[arg-type]
        found += torch.autograd.grad(prev.square().sum(), v)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_stepper_loop_has_reference_gradient() -> None:
    row = Row(
        1.0, Affine([0.9, 0.2, 0.1, 0.1, 0, 0, 0, 0.3]), (0.5, 0.1), clip=1.0, kept=(Affine([0, 0, 1, 0, 0, 0, 0, 0]),),
        slots=(0,),
    )  # fmt: skip
    table = StepTable((Row(1.0, Affine([0.9, 0.1, 0, 0, 0, 0, 0, 0]), (0.5, 0.1), kept=row.kept, slots=(0,)), row, row))
    x, w = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in (None, "reference"):
        stepper, y = Stepper(table, seeds=[1, 2], backend=backend), x
        while not stepper.done:
            y = stepper.step(y, y @ w, uncond=y, guidance_scale=2.0)
        found += torch.autograd.grad(y.square().sum(), w)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)  # as CLOSE, for three steps of this size


def test_scale_first_used_in_inference_mode_works_with_autograd() -> None:
    # Numbers become tensors that are kept from call to call; one made in inference mode could not be saved.
    x, table = torch.randn(3, 2).t(), plain_row(prev_m=1.0)
    with torch.inference_mode():
        ops.step(x, x, table, 0, uncond=x, guidance_scale=4.0625, backend="cpu")
    leaf = torch.randn(2, 3, requires_grad=True)
    (prev,) = ops.step(leaf, leaf, table, 0, uncond=x, guidance_scale=4.0625)
    assert torch.equal(torch.autograd.grad(prev.sum(), leaf)[0], torch.full((2, 3), 4.0625))


# --- What has no gradient --------------------------------------------------------------------------------------------


def test_table_requiring_grad_is_refused_except_by_reference() -> None:
    x, table = torch.ones(2, 3), plain_row(prev_x=1.0).requires_grad_()
    with pytest.raises(RuntimeError, match=r"^step: table requires grad .* pass backend='reference'$"):
        ops.step(x, x, table, 0)
    (prev,) = ops.step(x, x, table, 0, backend="reference")
    assert torch.autograd.grad(prev.sum(), table)[0][0, 8] == 6


def test_step_rows_with_registers_refuses_gradients_with_alternative() -> None:
    table = plain_row(prev_x=1.0)
    table[:, 6:8] = -1
    x, rows = torch.ones(2, 3, requires_grad=True), torch.tensor([0, 0])
    with pytest.raises(RuntimeError, match=r"^step_rows: sample requires grad .* ops\.step\(row_index=indices\)"):
        ops.step_rows(x, x.detach(), table, rows)
    with torch.no_grad():
        assert torch.equal(ops.step_rows(x, x, table, rows), x)
    assert torch.equal(torch.autograd.grad(ops.step(x, x.detach(), table, rows)[0].sum(), x)[0], torch.ones(2, 3))


def test_output_requiring_grad_is_refused() -> None:
    x, out = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"^step: out\[0\] requires grad, expected a tensor outside the graph; leave"):
        ops.step(x, x, plain_row(prev_x=1.0), 0, out=[out])


def test_given_output_is_written_and_has_gradient() -> None:
    x, out = torch.ones(2, 3, requires_grad=True), torch.empty(2, 3)
    (prev,) = ops.step(x, x.detach(), plain_row(prev_x=3.0), 0, out=[out])
    assert prev is out
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((2, 3), 3.0))


def test_forward_mode_is_refused_except_by_reference() -> None:
    x, table = torch.ones(2, 3), plain_row(prev_x=3.0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, 2 * x)
        with pytest.raises(RuntimeError, match=r"^step: sample carries a forward-mode tangent .* backend='reference'"):
            ops.step(dual, x, table, 0)
        (prev,) = ops.step(dual, x, table, 0, backend="reference")
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(prev).tangent, 6 * x)


@pytest.mark.skipif(not INTERPRETED or bool(backends.why_missing("triton")), reason="Triton is not interpreted here")
@pytest.mark.parametrize("clip", [INF, 0.7])
def test_triton_gradients_equal_extension(clip: float) -> None:
    table = torch.randn(1, 32, dtype=torch.float64)
    table[0, 2] = clip
    leaves = [torch.randn(2, 9, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    found = []
    for backend in ("triton", "cpu"):
        x, c, u, h = leaves
        results = ops.step(x, c, table, 0, uncond=u, guidance_scale=1.5, history=[h], keeps=2, backend=backend)
        found.append(torch.autograd.grad([r.square().sum() for r in results], leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-10)  # as CLOSE; the outputs, below 10², are factors too
