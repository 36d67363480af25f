# SPDX-License-Identifier: MIT
"""The training loss: the formulas in float64, the bits of the same noise given, and no noise or target in memory."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import Purpose, ops
from fastdiff.ops.diffusion_loss import diffusion_loss as unrecorded  # the record of backends cannot be compiled
from support.forward_cases import KINDS, linear_signal, noisy_and_target, penalty, scales
from support.oracle import DTYPES, INTERPRETED, assert_same_bits, available_backends, device_of
from support.reduction_cases import with_layout

pytestmark = pytest.mark.checks_backend
BACKENDS = available_backends()
LOSSES = ("l2", "l1", "huber")
SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.sampled_from([(1, 5), (2, 3, 8, 8), (3, 1025), (2, 2, 20, 15)])
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "batch inside", "gaps"])
LINEAR = fastdiff.create_noise_scheduler("linear")
SIGNAL = linear_signal()


def tensors(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """Return output, x0, noise and timesteps."""
    generator = torch.Generator().manual_seed(seed)
    three = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]
    return *three, torch.randint(1000, shape[:1], generator=generator).to(device)


def few(backend: str, examples: int) -> settings:
    """Return settings with one example for Triton's interpreter, which takes a second a call."""
    return settings(max_examples=1 if backend == "triton" and INTERPRETED else examples)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_are_those_of_the_formula(backend: str) -> None:
    device = device_of(backend)

    @few(backend, 25)
    @given(
        seed=SEEDS, shape=SHAPES, dtype=st.sampled_from(DTYPES), layout=LAYOUTS, kind=st.sampled_from(KINDS),
        loss=st.sampled_from(LOSSES), drawn=st.booleans(), variance=st.booleans(), mixed=st.booleans(),
        reduction=st.sampled_from(["mean", "sum", "none"]),
    )  # fmt: skip
    def check(
        seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: str, loss: str, drawn: bool,
        variance: bool, mixed: bool, reduction: str,
    ) -> None:  # fmt: skip
        output, x0, noise, t = tensors(seed, shape, dtype, device)
        x0 = with_layout(x0, layout).detach().requires_grad_()
        half = torch.bfloat16 if mixed else dtype
        whole = torch.cat([output, torch.full_like(output, math.nan)], 1) if variance else output
        whole = with_layout(whole.to(half), layout).detach().requires_grad_()
        noise = noise.requires_grad_()
        seeds = torch.arange(shape[0], device=device) + seed
        source: dict[str, Any] = {"seeds": seeds, "noise_step": 3} if drawn else {"noise": noise}
        z = fastdiff.randn(shape, seeds, 3, Purpose.FORWARD, device, torch.float32) if drawn else noise.detach()
        weights = torch.linspace(0.5, 2.0, shape[0]).to(device)
        found = ops.diffusion_loss(
            whole, x0, t, LINEAR, kind, **source, loss=loss, huber_c=0.1, weights=weights, reduction=reduction,
            backend=backend,
        )  # fmt: skip
        inputs = [whole, x0] if drawn else [whole, x0, noise]
        upstream = torch.linspace(1.0, 2.0, shape[0]).to(found) if reduction == "none" else None
        grads = torch.autograd.grad(found, inputs, upstream, allow_unused=False)

        wide = [whole.detach()[:, : shape[1]].cpu().double().contiguous(), x0.detach().cpu().double(), z.cpu().double()]
        wide = [tensor.requires_grad_() for tensor in wide]
        alpha, sigma = scales(SIGNAL, t.cpu(), x0)
        _, target = noisy_and_target(wide[1], wide[2], alpha, sigma, kind)
        each = penalty(wide[0] - target, loss, 0.1).flatten(1) * weights.cpu().double()[:, None]
        expected = {"mean": each.mean(), "sum": each.sum(), "none": each.mean(1)}[reduction]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.dtype == compute
        # Residuals have a few roundings of numbers up to 5, and sums of n positive numbers at most 2 log₂(n) more.
        relative = 1e-13 if compute == torch.float64 else 2e-5
        torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=relative, atol=relative)
        exact = torch.autograd.grad(
            expected, wide[: len(inputs)], None if upstream is None else upstream.cpu().double(), allow_unused=True
        )
        for got, like, wanted in zip(grads, inputs, exact, strict=True):
            assert got.dtype == like.dtype
            assert got.shape == like.shape
            part = got[:, : shape[1]].cpu().double()
            assert not got[:, shape[1] :].any()  # of a variance
            wanted = torch.zeros_like(part) if wanted is None else wanted
            # A slope may turn with a residual below its rounding; else it has that of its dtype.
            near = (wide[0] - target).abs() < 2e-4 if loss != "l2" else torch.zeros_like(part, dtype=torch.bool)
            last = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(like.dtype, 0.0)
            slack = (relative + last) * (wanted.abs() + wanted.abs().max()) + (2.0**-24 if last else 0.0)
            assert (((part - wanted).abs() <= slack) | near.detach()).all()

    check()


@settings(max_examples=8)
@given(seed=SEEDS, kind=st.sampled_from(KINDS), loss=st.sampled_from(LOSSES), dtype=st.sampled_from(DTYPES))
def test_drawn_noise_has_the_bits_of_the_same_noise_given(seed: int, kind: str, loss: str, dtype: torch.dtype) -> None:
    output, x0, _, t = tensors(seed, (3, 2, 30, 20), dtype)
    output.requires_grad_()
    seeds = fastdiff.noise.sample_seeds(seed, range(3))
    noise = fastdiff.randn(x0.shape, seeds, 0, Purpose.FORWARD)
    results = []
    for source in ({"seeds": seeds}, {"noise": noise}):
        value = ops.diffusion_loss(output, x0, t, LINEAR, kind, **source, loss=loss)  # type: ignore[arg-type]
        results.append([value.detach(), *torch.autograd.grad(value, output)])
    assert_same_bits(results[0], results[1])


def test_one_node_has_the_bits_of_the_operator() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("the C++ extension was not built")

    @settings(max_examples=20)
    @given(
        seed=SEEDS, shape=st.sampled_from([(1, 5), (3, 64), (2, 3, 20, 20)]), dtype=st.sampled_from(DTYPES),
        loss=st.sampled_from(LOSSES), reduction=st.sampled_from(["mean", "sum", "none"]), drawn=st.booleans(),
        weighted=st.sampled_from([None, "samples", "timesteps"]), wide=st.booleans(), one=st.booleans(),
    )  # fmt: skip
    def check(
        seed: int, shape: tuple[int, ...], dtype: torch.dtype, loss: str, reduction: str, drawn: bool,
        weighted: str | None, wide: bool, one: bool,
    ) -> None:  # fmt: skip
        *inputs, t = tensors(seed, shape, dtype)
        inputs = [tensor.requires_grad_() for tensor in inputs][: 2 if drawn else 3]
        source: dict[str, Any] = {"seeds": torch.arange(shape[0]), "noise_step": 2} if drawn else {"noise": inputs[2]}
        numbers = torch.linspace(0.1, 3.0, 1000 if weighted == "timesteps" else shape[0], dtype=torch.float64)
        weights = None if weighted is None else numbers if wide else numbers.float()
        upstream = torch.linspace(0.3, 1.7, shape[0]) if reduction == "none" else torch.tensor(1.3)

        def run(backend: str | None) -> list[Tensor]:
            value = ops.diffusion_loss(
                inputs[0], inputs[1], int(t[0]) if one else t, LINEAR, "v_prediction", **source, loss=loss,
                weights=weights, reduction=reduction, backend=backend,
            )  # fmt: skip
            return [value.detach(), *torch.autograd.grad(value, inputs, upstream.to(value.dtype))]

        assert_same_bits(run(None), run("cpu"))  # a forced backend has its gradient from Python

    check()


def test_gradient_is_taken_once_and_from_unchanged_tensors() -> None:
    output, x0, noise, t = tensors(8, (2, 3, 4, 4), torch.float32)
    output.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)

    def run(x0: Tensor = x0, **options: Any) -> Tensor:
        return ops.diffusion_loss(output, x0, t, LINEAR, noise=noise, **options)

    for backend in (None, "reference"):
        for factor in (scale, 2.0):  # with a graph of its own and without
            once = torch.autograd.grad(run(backend=backend) * factor, output, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="differentiate twice"):
                once.sum().backward()
    changed = x0.clone()
    value = run(changed)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    value = run()
    torch.autograd.grad(value, output)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(run(reduction="none"), output, torch.eye(2), is_grads_batched=True)


def test_transforms_of_torch_func_give_the_gradients_of_the_samples() -> None:
    output, x0, noise, t = tensors(10, (3, 2, 4), torch.float32)
    ids = torch.arange(3)

    def loss(output: Tensor, x0: Tensor, t: Tensor, noise: Tensor | None, seed: Tensor | None = None) -> Tensor:
        source = {"noise": noise} if seed is None else {"seeds": seed}
        return ops.diffusion_loss(output, x0, t, LINEAR, "v_prediction", **source, reduction="sum")

    def of_one(*tensors: Tensor | None) -> Tensor:
        return loss(*(None if one is None else one[None] for one in tensors))  # type: ignore[arg-type]

    wanted = (0, 1, 3)
    inputs = [one.clone().requires_grad_() for one in (output, x0, noise)]
    expected = torch.autograd.grad(loss(inputs[0], inputs[1], t, inputs[2]), inputs)
    of_seeds = torch.func.grad(loss)(output, x0, t, None, ids)
    found = torch.func.vmap(torch.func.grad(of_one, argnums=wanted))(output, x0, t, noise)
    assert_same_bits(list(found), list(expected))
    assert_same_bits(list(torch.func.grad(loss, argnums=wanted)(output, x0, t, noise)), list(expected))
    by_seed = torch.func.vmap(torch.func.grad(of_one), in_dims=(0, 0, 0, None, 0))(output, x0, t, None, ids)
    assert_same_bits([by_seed], [of_seeds])

    def of_both(x0: Tensor) -> Tensor:  # x0 is one for both models
        return torch.func.vmap(lambda output: loss(output, x0, t, noise))(torch.stack([output, -output])).sum()

    both = expected[1] + torch.func.grad(loss, argnums=1)(-output, x0, t, noise)
    torch.testing.assert_close(torch.func.grad(of_both)(x0), both, rtol=1e-6, atol=1e-6)  # a sum of two, rounded once
    with pytest.raises(RuntimeError, match="diffusion_loss: output carries a forward-mode tangent"):
        torch.func.jvp(lambda output: loss(output, x0, t, noise), (output,), (output,))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.func.grad(lambda output: torch.func.grad(loss)(output, x0, t, noise).sum())(output)


def test_gradient_is_the_same_from_tensors_kept_in_another_layout() -> None:
    last = {"memory_format": torch.channels_last}
    output, x0, noise, t = tensors(9, (2, 3, 4, 4), torch.float32)
    output, x0, noise = output.to(**last).requires_grad_(), x0.to(**last), noise.to(**last)
    whole = torch.cat([output.detach(), output.detach()], 1).requires_grad_()
    results = []
    for source, hooks in (
        (output, contextlib.nullcontext()),
        (output, torch.autograd.graph.save_on_cpu()),
        (whole, contextlib.nullcontext()),
    ):
        with hooks:
            value = ops.diffusion_loss(source[:, :3], x0, t, LINEAR, noise=noise)
        results.append([value.detach(), torch.autograd.grad(value, source)[0][:, :3]])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@settings(max_examples=6)
@given(seed=SEEDS, loss=st.sampled_from(LOSSES), dtype=st.sampled_from(DTYPES))
def test_bits_are_independent_of_batch_and_threads(seed: int, loss: str, dtype: torch.dtype) -> None:
    output, x0, _, t = tensors(seed, (3, 30_001), dtype)

    def run(part: slice) -> list[Tensor]:
        own = output[part].clone().requires_grad_()
        seeds = fastdiff.noise.sample_seeds(seed, range(3)[part])
        value = ops.diffusion_loss(
            own, x0[part], t[part], LINEAR, "v_prediction", seeds=seeds, loss=loss, reduction="none"
        )
        return [value.detach(), *torch.autograd.grad(value.sum(), own)]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(slice(None)))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    pieces = [run(slice(i, i + 1)) for i in range(3)]
    assert_same_bits(results[0], [torch.cat(parts) for parts in zip(*pieces, strict=True)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_passes_gradcheck(backend: str, loss: str) -> None:
    if backend not in BACKENDS:
        pytest.skip("the C++ extension was not built")
    output, x0, noise, t = tensors(6, (2, 3), torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (output, x0, noise, torch.tensor([0.5, 2.0]).double())]

    def run(output: Tensor, x0: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        return ops.diffusion_loss(
            output, x0, t, LINEAR, "v_prediction", noise=noise, loss=loss, huber_c=0.5, weights=weights,
            reduction="none", backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs)


def test_small_residuals_of_the_pseudo_huber_loss_keep_their_digits() -> None:
    x0 = torch.zeros(1, 4)
    output = torch.full((1, 4), 1e-7)
    value = ops.diffusion_loss(output, x0, 0, LINEAR, "sample", noise=x0, loss="huber", huber_c=0.001)
    # √(r² + c²) − c in float32 would be 0.
    assert value.item() == pytest.approx(1e-14 / 0.002, rel=1e-6)


def test_weights_may_be_a_table_of_timesteps() -> None:
    output, x0, noise, t = tensors(1, (3, 6), torch.float32)
    table = torch.rand(1000)
    common: dict[str, Any] = {"noise": noise, "reduction": "none"}
    expected = ops.diffusion_loss(output, x0, t, LINEAR, weights=table[t], **common)
    assert_same_bits([ops.diffusion_loss(output, x0, t, LINEAR, weights=table, **common)], [expected])
    one = ops.diffusion_loss(output, x0, 7, LINEAR, weights=table, **common)
    assert_same_bits([one], [ops.diffusion_loss(output, x0, 7, LINEAR, weights=table[7].expand(3), **common)])
    for dtype in (torch.uint8, torch.int16):  # torch reads uint8 indices as a mask, and refuses int16
        short = (t % 256).to(dtype)
        found = ops.diffusion_loss(output, x0, short, LINEAR, weights=table, **common)
        assert_same_bits([found], [ops.diffusion_loss(output, x0, t % 256, LINEAR, weights=table, **common)])
    with pytest.raises(ValueError, match="weights has 3 entries for 3 samples of 3 timesteps"):
        ops.diffusion_loss(output, x0, t % 3, SIGNAL[:3], weights=table[:3], **common)


def _live_bytes(run: Any) -> int:
    """Return the most bytes of torch's CPU memory that a function holds beyond those before it."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = run()
    held = most = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert result is not None
    return most


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_neither_noise_nor_target_is_in_memory(kind: str) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("the C++ extension was not built")
    output, x0, _, t = tensors(2, (4, 4, 64, 64), torch.float32)
    output.requires_grad_()
    seeds = torch.arange(4)
    size = x0.numel() * x0.element_size()

    def fused() -> Tensor:
        return torch.autograd.grad(ops.diffusion_loss(output, x0, t, LINEAR, kind, seeds=seeds), output)[0]

    def plain() -> Tensor:
        _, target = ops.noise_and_target(x0, t, LINEAR, kind, noise=torch.randn_like(x0))
        return torch.autograd.grad(torch.nn.functional.mse_loss(output, target), output)[0]

    fused()
    # The gradient is one tensor; what else there is are numbers a sample.
    assert _live_bytes(fused) <= size + 65536
    assert _live_bytes(plain) >= 3 * size
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.diffusion_loss(output, x0, t, LINEAR, kind, seeds=seeds)
    large = [tensor.data_ptr() for tensor in saved if tensor.numel() >= x0.numel()]
    assert sorted(large) == sorted([output.data_ptr(), x0.data_ptr()])


def test_timestep_that_cannot_be_read_gives_nan() -> None:
    output, x0, noise, _ = tensors(3, (2, 6), torch.float32)
    table, _ = ops.forward_rows.forward_rows("test", x0, 0, LINEAR, "epsilon", torch.float32)
    for backend in BACKENDS:
        if not isinstance(backend, str):
            continue
        found = torch.ops.fastdiff.diffusion_loss(
            output, x0, table, 0, torch.tensor([-1, 3]), noise, None, 0, None, 0, "l2", 1.0, backend
        )
        assert found.isnan().tolist() == [True, False]


def test_compiled_loss_is_nan_where_a_timestep_is_out_of_range() -> None:
    output, x0, noise, _ = tensors(3, (4, 6), torch.float32)

    def run(t: Tensor, weights: Tensor) -> Tensor:
        return unrecorded(output, x0, t, LINEAR, noise=noise, weights=weights, reduction="none")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = compiled(torch.tensor([-1, 0, 999, 1000]), torch.ones(1000))
    assert found.isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize("loss", LOSSES)
def test_operator_passes_opcheck_and_compiles_to_one_graph(loss: str) -> None:
    output, x0, _, t = tensors(4, (2, 2, 3), torch.float32)
    output = torch.cat([output, output], 1).requires_grad_()
    table, index = ops.forward_rows.forward_rows("test", x0, t, LINEAR, "v_prediction", torch.float32)
    arguments = (output, x0, table, 0, index, None, torch.tensor([1, 2]), 0, None, 3, loss, 0.1, "")
    torch.library.opcheck(torch.ops.fastdiff.diffusion_loss.default, arguments)
    gradient = torch.ops.fastdiff.diffusion_loss_gradient.default
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(gradient, (torch.ones(2), [True, True, False], *arguments), test_utils=utils)

    def run(output: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        return unrecorded(output * 1.0, x0, t, LINEAR, "v_prediction", seeds=seeds, loss=loss, huber_c=0.1)

    seeds = torch.tensor([1, 2])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        value = function(output, t, seeds)
        results.append([value.detach(), *torch.autograd.grad(value, output)])
    assert_same_bits(results[0], results[1])


ONE = tensors(5, (2, 6), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": None}, TypeError, "diffusion_loss: output is a NoneType"),
        ({"output": torch.ones(2, 7)}, ValueError, r"output has shape \[2, 7\]"),
        ({"output": torch.ones(2, 6).long()}, TypeError, "output has dtype torch.int64"),
        ({"loss": "mse"}, ValueError, "loss is 'mse'"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"huber_c": 0.0}, ValueError, "huber_c is 0.0"),
        ({"huber_c": 1e-30}, ValueError, "huber_c is 1e-30"),
        ({"weights": 2.0}, TypeError, "weights is a float"),
        ({"purpose": 1.5}, TypeError, "diffusion_loss: purpose has type float"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \[3\]"),
        ({"noise": None}, ValueError, "noise and seeds are both missing"),
        ({"t": torch.tensor([0, 1000])}, ValueError, "diffusion_loss: t spans 0 to 1000"),
    ],
)
def test_invalid_arguments_are_refused_with_one_sentence(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"output": ONE[0], "x0": ONE[1], "t": ONE[3], "schedule": LINEAR, "noise": ONE[2]} | changes
    with pytest.raises(error, match=message):
        ops.diffusion_loss(**arguments)


def test_samples_without_elements_have_no_mean() -> None:
    empty = torch.empty(2, 0, requires_grad=True)
    value = ops.diffusion_loss(empty, empty.detach(), 3, LINEAR, noise=empty.detach(), reduction="none")
    assert value.isnan().tolist() == [True, True]
    assert torch.autograd.grad(value.sum(), empty)[0].shape == (2, 0)
