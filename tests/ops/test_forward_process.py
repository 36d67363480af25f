# SPDX-License-Identifier: MIT
"""Noisy samples and targets: the papers' formulas, diffusers' schedulers, and the same bits in every batch."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff import Purpose, ops
from fastdiff.ops import forward_rows
from fastdiff.ops.forward_process import noise_and_target as unrecorded  # the record of backends cannot be compiled
from support.forward_cases import KINDS, linear_signal, noisy_and_target, scales
from support.oracle import DTYPES, INTERPRETED, assert_same_bits, available_backends, device_of
from support.reduction_cases import with_layout

pytestmark = pytest.mark.checks_backend
BACKENDS = available_backends()
SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.sampled_from([(1, 5), (2, 3, 8, 8), (3, 1025), (2, 2, 20, 15)])
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "batch inside", "gaps"])
LINEAR = fastdiff.create_noise_scheduler("linear")


def tensors(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return x0, noise, torch.randint(1000, shape[:1], generator=generator).to(device)


def few(backend: str, examples: int) -> settings:
    """Return settings with one example for Triton's interpreter, which takes a second a call."""
    return settings(max_examples=1 if backend == "triton" and INTERPRETED else examples)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_those_of_the_papers(backend: str) -> None:
    device = device_of(backend)

    @few(backend, 25)
    @given(
        seed=SEEDS, shape=SHAPES, dtype=st.sampled_from(DTYPES), layout=LAYOUTS, kind=st.sampled_from(KINDS),
        drawn=st.booleans(), one=st.booleans(), given_out=st.booleans(),
    )  # fmt: skip
    def check(
        seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: str, drawn: bool, one: bool,
        given_out: bool,
    ) -> None:  # fmt: skip
        x0, noise, t = tensors(seed, shape, dtype, device)
        x0 = with_layout(x0, layout)
        seeds = torch.arange(shape[0], device=device) + seed
        source: dict[str, Any] = {"seeds": seeds, "noise_step": 3} if drawn else {"noise": noise}
        z = fastdiff.randn(shape, seeds, 3, Purpose.FORWARD, device, torch.float32) if drawn else noise
        alpha, sigma = scales(linear_signal(), t[:1].expand_as(t).cpu() if one else t.cpu(), x0)
        out = None
        if given_out:
            out = tuple(torch.full_like(x0, math.nan) for _ in range(2))
        step = int(t[0]) if one else t
        found = ops.noise_and_target(x0, step, LINEAR, kind, **source, out=out, backend=backend)
        if out is not None:
            assert all(value is to for value, to in zip(found, out, strict=True))
        # Coefficients are rounded, each of two products and the sum too, and the result to its dtype.
        units = 4 * 2.0**-53 if dtype == torch.float64 else 4 * 2.0**-24
        last = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(dtype, 0.0)  # the interpreter truncates
        expected = noisy_and_target(x0.cpu(), z.cpu(), alpha, sigma, kind)
        for value, wanted in zip(found, expected, strict=True):
            size = x0.cpu().double().abs() + z.cpu().double().abs() + 1e-4
            assert value.dtype == dtype
            assert ((value.cpu().double() - wanted).abs() <= units * size + last * (wanted.abs() + 1e-4)).all()
        assert_same_bits([ops.add_noise(x0, step, LINEAR, **source, backend=backend)], found[:1])

    check()


@settings(max_examples=10)
@given(seed=SEEDS, kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), drawn=st.booleans())
def test_a_sample_has_its_bits_in_every_batch(seed: int, kind: str, dtype: torch.dtype, drawn: bool) -> None:
    x0, noise, t = tensors(seed, (4, 3, 7, 5), dtype)
    ids = torch.arange(4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))

    def take(places: Tensor) -> tuple[Tensor, ...]:
        seeds = fastdiff.noise.sample_seeds(seed, ids[places], epoch=2)
        source = {"seeds": seeds} if drawn else {"noise": noise[places]}
        return ops.noise_and_target(x0[places], t[places], LINEAR, kind, **source)  # type: ignore[arg-type]

    whole = take(ids)
    assert_same_bits([value[order] for value in whole], take(order))
    halves = [take(ids[:1]), take(ids[1:])]
    assert_same_bits(whole, [torch.cat(pair) for pair in zip(*halves, strict=True)])


def test_target_may_be_wider_than_the_model_input() -> None:
    x0, noise, t = tensors(1, (2, 3, 4, 4), torch.float32)
    noisy, target = ops.noise_and_target(x0, t, LINEAR, "v_prediction", noise=noise, out=(torch.bfloat16, None))
    both = ops.noise_and_target(x0, t, LINEAR, "v_prediction", noise=noise)
    assert_same_bits([noisy, target], [both[0].bfloat16(), both[1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_of_flow_schedules_may_be_continuous(backend: str) -> None:
    device = device_of(backend)
    x0, noise, _ = tensors(2, (3, 2, 5), torch.float64, device)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, device=device)
    schedule = fastdiff.FlowNoiseScheduler(shift=3.0)
    noisy, target = ops.noise_and_target(x0, t, schedule, "flow", noise=noise, backend=backend)
    sigma = t[:, None, None]
    torch.testing.assert_close(noisy, (1 - sigma) * x0 + sigma * noise, rtol=0, atol=1e-15)
    torch.testing.assert_close(target, noise - x0, rtol=0, atol=1e-15)
    # An integer is a level of the schedule, whose shift moves it.
    level = 3 * 0.5 / (1 + 2 * 0.5)
    (at_level,) = {float(value) for value in (ops.add_noise(x0, 499, schedule, noise=noise) - level * noise)[0, 0, :1]}
    assert at_level == pytest.approx(float((1 - level) * x0[0, 0, 0]), abs=1e-14)


def test_schedules_of_diffusers_give_their_own_noise() -> None:
    diffusers = pytest.importorskip("diffusers")
    x0, noise, t = tensors(3, (3, 2, 5, 5), torch.float32)
    ddpm = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noisy, velocity = ops.noise_and_target(x0, t, ddpm, "v_prediction", noise=noise)
    # diffusers takes the roots in float32: a few roundings of numbers up to 5.
    torch.testing.assert_close(noisy, ddpm.add_noise(x0, noise, t), rtol=0, atol=5e-6)
    torch.testing.assert_close(velocity, ddpm.get_velocity(x0, noise, t), rtol=0, atol=5e-6)
    assert_same_bits([noisy], [ops.add_noise(x0, t, ddpm.alphas_cumprod, noise=noise)])
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    at = 999 - t  # its timesteps fall
    torch.testing.assert_close(
        ops.add_noise(x0, t, flow, noise=noise), flow.scale_noise(x0, flow.timesteps[at], noise), rtol=0, atol=5e-6
    )
    changed = diffusers.FlowMatchEulerDiscreteScheduler()
    changed.set_shift(3.0)  # its configuration stays as it was
    assert_same_bits([ops.add_noise(x0, t, changed, noise=noise)], [ops.add_noise(x0, t, flow, noise=noise)])
    multistep = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    assert_same_bits([ops.add_noise(x0, t, multistep, noise=noise)], [ops.add_noise(x0, t, flow, noise=noise)])
    multistep.register_to_config(use_dynamic_shifting=True)  # its shift is then chosen in sampling
    plain = diffusers.FlowMatchEulerDiscreteScheduler()
    assert_same_bits([ops.add_noise(x0, t, multistep, noise=noise)], [ops.add_noise(x0, t, plain, noise=noise)])


def test_rows_follow_a_schedule_that_changes() -> None:
    x0, noise, _ = tensors(4, (1, 6), torch.float32)
    signal = linear_signal()
    first = ops.add_noise(x0, 500, signal, noise=noise)
    signal.mul_(0.5)
    assert_same_bits(
        [ops.add_noise(x0, 500, signal, noise=noise)], [ops.add_noise(x0, 500, signal.clone(), noise=noise)]
    )
    assert not torch.equal(first, ops.add_noise(x0, 500, signal, noise=noise))
    with torch.inference_mode():
        inferred = linear_signal()
    assert_same_bits([ops.add_noise(x0, 500, inferred, noise=noise)], [first])
    for i in range(2 * forward_rows._CACHE_SIZE):
        ops.add_noise(x0, 0, signal[i:].clone(), noise=noise)
    assert len(forward_rows._cache) == forward_rows._CACHE_SIZE


def test_timesteps_that_cannot_be_read_give_nan_where_out_of_range() -> None:
    x0, noise, _ = tensors(5, (4, 6), torch.float32)
    t = torch.tensor([-1, 0, 999, 1000])
    with mock.patch.object(forward_rows, "readable_without_sync", return_value=False):
        noisy, target = ops.noise_and_target(x0, t, LINEAR, "v_prediction", noise=noise)
        levels = torch.tensor([-0.1, 0.0, 1.0, 1.1])
        continuous = ops.noise_and_target(x0, levels, fastdiff.FlowNoiseScheduler(), "flow", noise=noise)
    for value in (noisy, target, *continuous):
        assert value.isnan().all(1).tolist() == [True, False, False, True]
    expected = ops.noise_and_target(x0[1:3], t[1:3], LINEAR, "v_prediction", noise=noise[1:3])
    assert_same_bits([noisy[1:3], target[1:3]], expected)


def test_rows_of_fake_tensors_are_not_kept() -> None:
    x0, noise, _ = tensors(5, (1, 6), torch.float32)
    signal = linear_signal()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        unrecorded(mode.from_tensor(x0), 5, signal, noise=mode.from_tensor(noise))
    assert_same_bits([ops.add_noise(x0, 5, signal, noise=noise)], [ops.add_noise(x0, 5, signal.clone(), noise=noise)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_passes_gradcheck(backend: str, kind: str) -> None:
    if backend not in BACKENDS:
        pytest.skip("the C++ extension was not built")
    x0, noise, t = tensors(6, (2, 3), torch.float64)
    inputs = x0.requires_grad_(), noise.requires_grad_()

    def run(x0: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return ops.noise_and_target(x0, t, LINEAR, kind, noise=noise, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)


def test_compiles_to_one_graph() -> None:
    x0, _, t = tensors(7, (2, 3, 4), torch.float32)
    seeds = torch.tensor([1, 2])

    def run(x0: Tensor, t: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        return unrecorded(x0 * 1.0, t, LINEAR, "v_prediction", seeds=seeds)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x0, t, seeds), run(x0, t, seeds))


ONE = tensors(8, (2, 6), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x0": 1.0}, TypeError, "noise_and_target: x0 is a float"),
        ({"x0": torch.ones(2, 6).long()}, TypeError, "x0 has dtype torch.int64"),
        ({"x0": torch.tensor(1.0)}, ValueError, "x0 has no dimension"),
        ({"t": torch.tensor([0, 1000])}, ValueError, "t spans 0 to 1000, expected 0 to 999"),
        ({"t": -1}, ValueError, "t is -1"),
        ({"t": torch.tensor([0.5, 0.5])}, TypeError, "t has dtype torch.float32"),
        ({"t": torch.tensor([0, 1, 2])}, ValueError, r"t has shape \[3\]"),
        ({"t": torch.zeros(2, 3).long()}, ValueError, r"t has shape \[2, 3\]"),
        ({"t": True}, TypeError, "t is a bool"),
        ({"t": None}, TypeError, "t is a NoneType"),
        ({"schedule": 3}, TypeError, "schedule is a int without alphas_cumprod"),
        ({"schedule": torch.ones(2, 2)}, TypeError, "schedule is torch.float32 of shape"),
        ({"prediction_type": "velocity"}, ValueError, "prediction_type is 'velocity'"),
        ({"noise": None}, ValueError, "noise and seeds are both missing"),
        ({"seeds": torch.tensor([1, 2])}, ValueError, "noise is given beside seeds"),
        ({"noise": torch.ones(2, 7)}, ValueError, r"noise has shape \[2, 7\]"),
        ({"noise": None, "seeds": torch.tensor([1])}, ValueError, r"seeds is torch.int64 of shape \[1\]"),
        ({"out": torch.ones(2, 6)}, ValueError, "out is a Tensor"),
        ({"out": (None,)}, ValueError, "out holds 1"),
    ],
)
def test_invalid_arguments_are_refused_with_one_sentence(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x0": ONE[0], "t": ONE[2], "schedule": LINEAR, "noise": ONE[1]} | changes
    with pytest.raises(error, match=message):
        ops.noise_and_target(**arguments)
