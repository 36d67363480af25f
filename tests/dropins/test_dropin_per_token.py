# SPDX-License-Identifier: MIT
"""Flow-matching Euler steps with per-token timesteps, compared with diffusers' and float64."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.diffusers
from fastdiff.diffusers import FusedScheduler
from fastdiff.diffusers.per_token import _LEVELS, per_token_step

FusedFlowMatch = fastdiff.diffusers.CLASSES["FlowMatchEulerDiscreteScheduler"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONFIGS: list[dict[str, Any]] = [{}, {"shift": 3.0}, {"invert_sigmas": True}, {"num_train_timesteps": 128}]


def pair(steps: int = 8, **config: Any) -> tuple[Any, Any]:
    """Return a scheduler of diffusers and one of fastdiff with the same schedule."""
    schedulers = FlowMatchEulerDiscreteScheduler(**config), FusedFlowMatch(**config)
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers


def tensors(dtype: torch.dtype, shape: tuple[int, ...] = (2, 12, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a sample and a model output."""
    random = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, v


def exact(theirs: Any, x: Tensor, v: Tensor, per_token: Tensor, noise: Tensor | None) -> Tensor:
    """Return the step in float64, with the next levels chosen by diffusers' arithmetic."""
    count = theirs.config.num_train_timesteps
    sigmas = theirs.sigmas
    lower = torch.zeros(per_token.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, per_token.shape)).tolist():
        limit = per_token[tuple(index)][None] / count - 1e-6
        lower[tuple(index)] = max(float(s) if bool((s[None] < limit).all()) else 0.0 for s in sigmas)
    # A bfloat16 level is rounded where it is divided, by which its next level is chosen.
    level = per_token / count if per_token.dtype is torch.bfloat16 else per_token.double() / count
    level, lower = level.double()[..., None], lower[..., None]
    x, v = x.float().double(), v.double()
    return x + (level - lower) * v if noise is None else (1 - lower) * (x - level * v) + lower * noise.double()


def beside(theirs: Any, ours: Any, x: Tensor, v: Tensor, per_token: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Take one step of each with the same seed and compare everything but the numbers."""
    given = {
        "model_output": v,
        "timestep": theirs.timesteps[0],
        "sample": x,
        "per_token_timesteps": per_token,
        **kwargs,
    }
    torch.manual_seed(0)
    expected = theirs.step(**given)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    got = per_token_step(ours, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(got) is type(expected)
    assert ours.step_index == theirs.step_index
    got, expected = got[0], expected[0]
    assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
    return got, expected


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("levels", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_step_error_against_float64(dtype: torch.dtype, levels: torch.dtype, stochastic: bool) -> None:
    for k, config in enumerate(CONFIGS):
        theirs, ours = pair(**config, stochastic_sampling=stochastic)
        x, v = tensors(dtype, seed=k)
        count = theirs.config.num_train_timesteps
        # Levels between the schedule's, on them, above and below all of them.
        per_token = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(k)) * count
        per_token[0, :8] = theirs.timesteps
        per_token[1, :4] = torch.tensor([0.0, 1e-4, 1.5 * count, count * float(theirs.sigmas[3]) + 1e-3])
        per_token = per_token.to(levels)
        got, expected = beside(theirs, ours, x, v, per_token, return_dict=bool(k % 2))
        noise = None
        if stochastic:
            torch.manual_seed(0)
            noise = torch.randn(x.shape)
        right = exact(theirs, x, v, per_token, noise)
        # As near to float64 as diffusers', and one unit in the last place of the largest term, in float32 for float64
        # levels too: sigmas and noise are float32, and so are their products.
        unit = torch.finfo(torch.float32).eps * right.abs().clamp(min=float(x.abs().max()))
        assert bool(((got - right).abs() <= (expected - right).abs() + unit).all())


@settings(max_examples=100)
@given(st.lists(st.floats(-2.0, 3.0, width=32), min_size=1, max_size=9), st.data())
def test_per_token_step_for_any_sigmas(sigmas: list[float], data: st.DataObject) -> None:
    level = st.one_of(st.floats(-2.0, 3.0, width=32), st.sampled_from(sigmas).map(lambda s: s + 1e-6))
    per_token = torch.tensor([data.draw(st.lists(level, min_size=7, max_size=7))]) * 1000
    theirs, ours = pair()
    for scheduler in (theirs, ours):
        scheduler.sigmas = torch.tensor(sigmas)
    x, v = torch.zeros(1, 7, 1), torch.ones(1, 7, 1)
    got, expected = beside(theirs, ours, x, v, per_token)
    assert torch.equal(got, expected)  # level - lower, which both subtract once


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_per_token_step_with_non_finite_sigmas(odd: float) -> None:
    theirs, ours = pair()
    for scheduler in (theirs, ours):
        scheduler.sigmas[3] = odd
    x, v = tensors(torch.float32)
    got, expected = beside(theirs, ours, x, v, torch.rand(x.shape[:2]) * 1000)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)  # two roundings of float32


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second"])
def test_per_token_step_accepts_levels_in_any_layout(layout: str, recwarn: pytest.WarningsRecorder) -> None:
    theirs, ours = pair()
    x, v = tensors(torch.float32)
    levels = torch.rand(x.shape[:2]) * 1000
    levels = {
        "expanded": levels[:, :1].expand(x.shape[:2]),
        "transposed": levels.t().contiguous().t(),
        "every second": levels.repeat(1, 2)[:, ::2],
    }[layout]
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    got, expected = beside(theirs, ours, x, v, levels)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # two roundings of float32
    assert not recwarn.list


@pytest.mark.parametrize("make", [lambda: torch.Generator(), lambda: [torch.Generator(), torch.Generator()]])
def test_per_token_step_draws_diffusers_noise(make: Any) -> None:
    theirs, ours = pair(stochastic_sampling=True)
    x, v = tensors(torch.bfloat16)
    levels = torch.rand(x.shape[:2]) * 1000
    states, results = [], []
    for step in (theirs.step, lambda **given: per_token_step(ours, given)):
        generator = make()
        generators = generator if isinstance(generator, list) else [generator]
        for i, each in enumerate(generators):
            each.manual_seed(i)
        for t in theirs.timesteps[:3]:
            given = {"model_output": v, "timestep": t, "sample": x, "per_token_timesteps": levels}
            result = step(**given, generator=generator, return_dict=False)
        results.append(result[0])
        states.append([each.get_state() for each in generators])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # three roundings of float32


REFUSED = {
    "an index": {"timestep": 3},
    "a tensor of an index": {"timestep": torch.tensor(3)},
    "no timestep": {"timestep": ...},
    "an unknown argument": {"eta": 1.0},
    "levels of another length": {"per_token_timesteps": torch.ones(2, 11)},
    "a list of levels": {"per_token_timesteps": [[1.0] * 12] * 2},
    "output of another shape": {"model_output": torch.ones(2, 11, 5)},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_per_token_step_leaves_refusals_to_diffusers(changes: dict[str, Any]) -> None:
    theirs, ours = pair()
    x, v = tensors(torch.float32)
    given = {"model_output": v, "timestep": theirs.timesteps[0], "sample": x, "per_token_timesteps": torch.ones(2, 12)}
    given = {name: value for name, value in {**given, **changes}.items() if value is not ...}
    before = dict(vars(ours))
    assert per_token_step(ours, given) is None
    assert vars(ours) == before
    with pytest.raises((TypeError, ValueError, RuntimeError)) as expected:
        theirs.step(**given)
    with pytest.raises(type(expected.value)):
        ours.step(**given)
    assert ours.step_index == theirs.step_index


def test_per_token_step_leaves_levels_on_another_device_to_diffusers() -> None:
    _, ours = pair()
    x, v = tensors(torch.float32)
    given = {"model_output": v, "timestep": ours.timesteps[0], "sample": x}
    assert per_token_step(ours, {**given, "per_token_timesteps": torch.ones(2, 12, device="meta")}) is None
    assert ours.step_index is None


@pytest.mark.parametrize("levels", [torch.full((1, 12), 300.0), torch.full((12,), 300.0), None])
def test_per_token_step_leaves_other_calls_to_diffusers(levels: Tensor | None) -> None:
    theirs, ours = pair()
    x, v = tensors(torch.float32)
    given = {"model_output": v, "timestep": theirs.timesteps[0], "sample": x, "per_token_timesteps": levels}
    assert per_token_step(ours, given) is None
    torch.testing.assert_close(ours.step(**given).prev_sample, theirs.step(**given).prev_sample)


def test_per_token_step_starts_where_the_timestep_is() -> None:
    theirs, ours = pair()
    x, v = tensors(torch.float32)
    for scheduler, step in ((theirs, theirs.step), (ours, lambda **given: per_token_step(ours, given))):
        step(model_output=v, timestep=theirs.timesteps[3], sample=x, per_token_timesteps=torch.ones(2, 12))
        assert scheduler.step_index == 4


@pytest.mark.parametrize("inference", [False, True])
def test_per_token_step_follows_its_sigmas(inference: bool) -> None:
    theirs, ours = pair()
    x, v = tensors(torch.float32)
    levels = torch.rand(x.shape[:2]) * 1000
    with torch.inference_mode(inference):
        for change in (
            lambda s: None,
            lambda s: s.set_timesteps(5),
            lambda s: s.sigmas.mul_(0.5),
            lambda s: setattr(s, "sigmas", s.sigmas + 0.2),
        ):
            for scheduler in (theirs, ours):
                change(scheduler)
            got, expected = beside(theirs, ours, x, v, levels)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # two roundings of float32
    got, expected = beside(theirs, ours, x, v, levels)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stochastic", [False, True])
def test_per_token_step_has_gradients(stochastic: bool) -> None:
    found = []
    for scheduler in pair(stochastic_sampling=stochastic):
        torch.manual_seed(0)
        leaves = [*tensors(torch.float32), torch.rand(2, 12) * 1000]
        x, v, levels = (leaf.requires_grad_() for leaf in leaves)
        given = {"model_output": v, "timestep": scheduler.timesteps[0], "sample": x, "per_token_timesteps": levels}
        theirs = type(scheduler) is FlowMatchEulerDiscreteScheduler
        result = scheduler.step(**given) if theirs else per_token_step(scheduler, given)
        found.append(torch.autograd.grad(result.prev_sample.square().sum(), leaves))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_per_token_step_in_fake_mode_and_compiled() -> None:
    theirs, ours = pair()
    ours.set_begin_index(0)  # a search for the timestep reads it, which a fake tensor has not
    x, v = tensors(torch.float32)
    levels = torch.rand(2, 12) * 1000

    def step(x: Tensor, v: Tensor, levels: Tensor) -> Tensor:
        given = {"model_output": v, "timestep": ours.timesteps[0], "sample": x, "per_token_timesteps": levels}
        new: Tensor = per_token_step(ours, given).prev_sample
        return new

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = step(*map(mode.from_tensor, (x, v, levels)))
    assert isinstance(fake, FakeTensor)
    assert fake.shape == x.shape
    expected = theirs.step(v, theirs.timesteps[0], x, per_token_timesteps=levels).prev_sample
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for got in (step(x, v, levels), compiled(x, v, levels)):  # after the fake one, of which nothing is kept
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # two roundings of float32


class Dispatches(TorchDispatchMode):
    """Dispatch mode that counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stochastic", [False, True])
def test_per_token_step_dispatches_less_than_diffusers(stochastic: bool) -> None:
    counts = []
    x, v = tensors(torch.float32)
    for scheduler in pair(stochastic_sampling=stochastic):
        theirs = type(scheduler) is FlowMatchEulerDiscreteScheduler
        for _ in range(2):  # the first call also sorts the sigmas
            given = {"model_output": v, "timestep": scheduler.timesteps[0], "sample": x}
            given["per_token_timesteps"] = torch.rand(2, 12) * 1000
            with Dispatches() as dispatches:
                scheduler.step(**given) if theirs else per_token_step(scheduler, given)
        counts.append(dispatches.count)
    assert counts[1] == (10 if stochastic else 7)
    assert counts[1] < counts[0]


def test_per_token_steps_keep_no_memory() -> None:
    _, ours = pair()
    x, v = tensors(torch.float32)

    def live_after(count: int) -> int:
        for i in range(count):
            given = {"model_output": v, "timestep": ours.timesteps[0], "sample": x}
            per_token_step(ours, {**given, "per_token_timesteps": torch.rand(2, 12) * i})
        gc.collect()
        return sum(type(value) is Tensor for value in gc.get_objects())

    assert live_after(50) == live_after(50)


def test_per_token_step_keeps_no_scheduler_alive() -> None:
    _, ours = pair()
    x, v = tensors(torch.float32)
    given = {"model_output": v, "timestep": ours.timesteps[0], "sample": x, "per_token_timesteps": torch.ones(2, 12)}
    per_token_step(ours, given)
    assert ours in _LEVELS
    before, gone = len(_LEVELS), weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None
    assert len(_LEVELS) == before - 1


def test_step_takes_per_token_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    x, v = tensors(torch.float32)
    given = {"model_output": v, "timestep": ours.timesteps[0], "sample": x, "return_dict": False,
             "per_token_timesteps": torch.linspace(900.0, 100.0, 24).reshape(2, 12)}  # fmt: skip
    wanted = per_token_step(ours.stepper(), given)[0]
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", lambda *_, **__: pytest.fail("by diffusers' own code"))
    assert torch.equal(ours.step(**given)[0], wanted)


def test_every_method_of_a_mixin_overrides_one_that_is_called() -> None:
    for kind in fastdiff.diffusers.CLASSES.values():
        for mixin in kind.__mro__[1 : kind.__mro__.index(FusedScheduler)]:
            defined = {name for name in vars(mixin) if not name.startswith("__")}
            assert defined <= vars(FusedScheduler).keys(), mixin
