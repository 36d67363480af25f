# SPDX-License-Identifier: MIT
"""Streams, trajectories and interrupts: what a loop tells on its way, and what it leaves behind where it is stopped."""

from __future__ import annotations

import gc
import itertools
import math
import pickle
import random
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import SampleStream, StepInfo, create_sampler
from fastdiff.sampling.interrupts import DeferredInterrupt
from support.oracle import assert_same_bits
from support.solver_cases import METHODS, STOCHASTIC

SHAPE = (2, 3, 4, 4)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
CONDITIONS = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)


@pytest.fixture(autouse=True)
def _pythons_own_handler() -> Iterator[None]:
    """Give Ctrl-C Python's handler: a process that was started in the background inherits an ignored one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _model(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    shift = 0.0 if condition is None else condition.to(x.dtype)
    return torch.tanh(x) * 0.5 + 1e-4 * t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) + shift


def _seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sampler(method: str, steps: int = 6, **fields: Any) -> Any:
    return create_sampler("linear", method, num_inference_steps=steps, guidance_scale=3.0, **fields)


# --- Streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_stream_gives_the_bits_of_the_loop(method: str) -> None:
    sampler, seen = _sampler(method), []
    generator = _seeded()
    whole = sampler.sample(_model, LATENTS, *CONDITIONS, generator=_seeded(), callback=seen.append, progress=False)
    stream = sampler.stream(_model, LATENTS, *CONDITIONS, generator=generator)
    assert isinstance(stream, SampleStream)
    assert torch.equal(generator.get_state(), _seeded().get_state()), "no step is taken before it is asked for"
    infos = list(stream)
    assert_same_bits([info.sample for info in infos], [info.sample for info in seen])
    assert [info.index for info in infos] == list(range(len(sampler.table)))
    assert [info.timestep for info in infos] == list(sampler.table.timesteps)
    assert [info.sigma for info in infos] == sampler.sigmas[:-1].tolist()
    assert torch.equal(stream.result.samples, whole.samples)
    assert (stream.result.complete, stream.result.steps) == (True, len(sampler.table))
    assert not torch.is_grad_enabled() or infos[-1].sample.requires_grad is False
    drawn = any(sampler.table.draws_noise)
    assert torch.equal(generator.get_state(), _seeded().get_state()) is not drawn


ENDINGS = ("close", "with", "drop", "error")


# Every ending with one method, and every method with one ending.
@pytest.mark.parametrize(
    ("method", "fields", "how"),
    [(*STOCHASTIC[0], how) for how in ENDINGS]
    + [(*form, how) for form, how in zip(STOCHASTIC[1:], itertools.cycle(ENDINGS), strict=False)],
    ids=str,
)
def test_stream_that_ends_early_puts_generators_back(method: str, fields: dict[str, Any], how: str) -> None:
    generator = _seeded()
    calls = 0

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if how == "error" and calls == 3:
            raise RuntimeError("enough")
        return _model(x, t, condition)

    stream = _sampler(method, **fields).stream(model, LATENTS, *CONDITIONS, generator=generator)
    next(stream), next(stream)
    assert not torch.equal(generator.get_state(), _seeded().get_state())
    result = stream.result
    assert (result.complete, result.steps) == (False, 2)
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    elif how == "drop":
        del stream
        gc.collect()
    else:
        with pytest.raises(RuntimeError, match="enough"):
            next(stream)
    assert torch.equal(generator.get_state(), _seeded().get_state())


def test_stream_continues_from_samples_edited_in_place() -> None:
    def edit(info: StepInfo) -> None:
        info.sample.mul_(0.5)

    sampler = _sampler("dpm_solver")
    expected = sampler.sample(_model, LATENTS, *CONDITIONS, callback=edit, progress=False).samples
    stream = sampler.stream(_model, LATENTS, *CONDITIONS)
    for info in stream:
        edit(info)
    assert torch.equal(stream.result.samples, expected)


def test_stream_leaves_gradient_mode_of_its_consumer() -> None:
    for _ in _sampler("ddim").stream(_model, LATENTS.clone().requires_grad_(), *CONDITIONS):
        assert torch.is_grad_enabled()


def test_stream_checks_its_arguments_at_once() -> None:
    with pytest.raises(TypeError, match="sample: latents is a int"):
        _sampler("ddim").stream(_model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="return_trajectory is 0, expected an integer of at least 1"):
        _sampler("ddim").sample(_model, LATENTS, return_trajectory=0)


# --- Figures of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddim", "heun", "dpm_solver"])
@pytest.mark.parametrize(
    "bound", [{}, {"clip_sample": True, "clip_sample_range": 0.4}, {"thresholding": True}], ids=str
)
def test_x0_is_the_prediction_of_the_step(method: str, bound: dict[str, Any]) -> None:
    sampler, before = _sampler(method, **bound), LATENTS.double()
    for info in sampler.stream(_model, LATENTS.double(), *CONDITIONS):
        t = torch.full((2,), info.timestep)
        u, c = _model(before, t, CONDITIONS[1]), _model(before, t, CONDITIONS[0])
        level = sampler.scheduler.path.at_timestep(info.timestep)
        x0 = (before - level.sigma * (u + 3.0 * (c - u))) / level.alpha
        if "clip_sample" in bound:
            x0 = x0.clamp(-0.4, 0.4)
        if bound.get("thresholding"):
            s = x0.abs().flatten(1).quantile(0.995, dim=1).clamp(1.0, 1.0)[:, None, None, None]
            x0 = x0.clamp(-s, s) / s
        # Float64 throughout: the two differ by the order of their operations.
        torch.testing.assert_close(info.x0, x0, rtol=1e-10, atol=1e-10)
        assert info.x0 is info.x0
        before = info.sample


def test_x0_takes_no_pass_unless_it_is_read() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def count(read: bool) -> int:
        with Count() as mode:
            for info in _sampler("ddim").stream(_model, LATENTS, *CONDITIONS, check_finite=False):
                if read:
                    assert info.x0 is not None
        return mode.calls

    assert count(read=False) < count(read=True)
    assert count(read=False) == count(read=False)


def test_times_and_memory_of_a_step_are_figures_of_this_loop() -> None:
    seen: list[StepInfo] = []
    result = _sampler("ddim").sample(_model, LATENTS, *CONDITIONS, callback=seen.append, progress=False)
    times = [info.times for info in seen]
    assert all(time.model > 0 and time.step > 0 for time in times)
    assert sum(time.model for time in times) == pytest.approx(result.model_time)
    assert sum(time.step for time in times) == pytest.approx(result.step_time)
    assert [time.loop for time in times] == sorted(time.loop for time in times)
    assert times[-1].loop <= result.processing_time
    assert 0 < seen[0].peak_memory <= result.peak_memory
    # The kernel adds up a thread's pages now and then: the two of its figures may differ by some of them.
    assert 0 < seen[0].memory <= result.peak_memory + 2**24
    assert pickle.loads(pickle.dumps(result)).processing_time == result.processing_time


# --- Trajectories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddim", "dpm_solver", "euler_ancestral"])
@pytest.mark.parametrize("every", [True, 2, 4, 100])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_trajectory_holds_first_every_nth_and_last_sample(method: str, every: int, device: str | None) -> None:
    sampler, seen = _sampler(method, steps=7), []
    options: dict[str, Any] = {"progress": False, "return_trajectory": every, "trajectory_device": device}
    seeds = [3, 4]
    watched = sampler.sample(_model, LATENTS, *CONDITIONS, seeds=seeds, callback=seen.append, **options)
    steps = [step for step in range(8) if step % int(every) == 0 or step == 7]
    states = [LATENTS, *(info.sample for info in seen)]
    plain = sampler.sample(_model, LATENTS, *CONDITIONS, seeds=seeds, **options)
    stream = sampler.stream(
        _model, LATENTS, *CONDITIONS, seeds=seeds, return_trajectory=every, trajectory_device=device
    )
    list(stream)
    for result in (watched, plain, stream.result, pickle.loads(pickle.dumps(plain))):
        assert result.trajectory_steps == tuple(steps)
        assert_same_bits(list(result.trajectory), [states[step] for step in steps])
    assert torch.equal(plain.seeds, torch.tensor(seeds))
    assert plain.sigmas == tuple(sampler.sigmas.tolist())
    assert sampler.sample(_model, LATENTS, *CONDITIONS, progress=False).trajectory is None


class LiveTensors(TorchDispatchMode):
    """Count the storages of the samples' size that are alive at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most, self.allocations = size, 0, 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() == self.size:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    self.allocations += 1
                    self.alive[storage.data_ptr()] = weakref.ref(storage)
        self.alive = {key: ref for key, ref in self.alive.items() if ref() is not None}
        self.most = max(self.most, len(self.alive))
        return found


def test_long_trajectory_adds_no_more_than_one_frame() -> None:
    """1000 steps, batch 64, every 10th kept elsewhere: the frames themselves are one allocation of their own."""
    latents = torch.randn(64, 1, 2, 2)
    sampler = create_sampler("linear", "ddim", num_inference_steps=1000)
    counted: list[tuple[int, int]] = []
    for options in ({}, {"return_trajectory": 10, "trajectory_device": "cpu"}):
        gc.collect()
        with LiveTensors(latents.untyped_storage().nbytes()) as mode:
            result = sampler.sample(lambda x, t: 0.1 * x, latents, progress=False, check_finite=False, **options)
        counted.append((mode.most, mode.allocations))
    assert result.trajectory is not None
    assert result.trajectory.shape == (101, *latents.shape)
    assert counted[1][0] <= counted[0][0] + 1
    assert counted[1][1] <= counted[0][1] + 1


# --- Interrupts -------------------------------------------------------------------------------------------------------


def _states(method: str, steps: int) -> list[Tensor]:
    seen: list[StepInfo] = []
    sampler = _sampler(method, steps=steps)
    sampler.sample(_model, LATENTS, *CONDITIONS, generator=_seeded(), callback=seen.append, progress=False)
    return [LATENTS, *(info.sample for info in seen)]


@pytest.mark.parametrize("method", ["euler_ancestral", "dpm_solver"])
def test_interrupts_at_random_instants_lose_nothing(method: str) -> None:
    steps, stopped = 30, 0
    states, sampler = _states(method, steps), _sampler(method, steps=steps)
    loops = [sampler.sample(_model, LATENTS, *CONDITIONS, generator=_seeded(), progress=False) for _ in range(3)]
    usual = min(loop.processing_time for loop in loops)
    handler = signal.getsignal(signal.SIGINT)
    draw = random.Random(0)
    for _ in range(20):
        generator, begun, delay = _seeded(), threading.Event(), draw.random() * usual

        def model(x: Tensor, t: Tensor, c: Tensor, begun: threading.Event = begun) -> Tensor:
            begun.set()
            return _model(x, t, c)

        def interrupt(begun: threading.Event = begun, delay: float = delay) -> None:
            begun.wait(60)
            threading.Event().wait(delay)
            if signal.getsignal(signal.SIGINT) is not handler:  # the loop is under way
                signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            result = sampler.sample(model, LATENTS, *CONDITIONS, generator=generator, progress=False)
        finally:
            thread.join()
        assert torch.equal(result.samples, states[result.steps])
        assert result.complete is (result.steps == steps)
        if not result.complete:
            stopped += 1
            assert torch.equal(generator.get_state(), _seeded().get_state())
    assert signal.getsignal(signal.SIGINT) is handler
    # Most interrupts come while the loop is under way; on a machine with other work the instants move.
    assert stopped >= 2


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("where", ["model", "callback"])
@pytest.mark.parametrize("how", ["signal", "exception"])
@pytest.mark.parametrize("source", ["generator", "default"])
def test_interrupt_ends_within_a_step(call: int, where: str, how: str, source: str) -> None:
    states, sampler = _states("euler_ancestral", 6), _sampler("euler_ancestral")
    calls = {"model": 0, "callback": 0}

    def come(place: str) -> None:
        calls[place] += 1
        if place == where and calls[place] == call:
            if how == "exception":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        come("model")
        return _model(x, t, c)

    torch.manual_seed(1)
    generator = _seeded() if source == "generator" else None
    before = torch.get_rng_state()
    result = sampler.sample(
        model,
        LATENTS,
        *CONDITIONS,
        generator=generator,
        callback=lambda info: come("callback"),
        progress=False,
        return_trajectory=4,
    )
    taken = call - 1 if (how, where) == ("exception", "model") else call
    assert (result.complete, result.steps) == (False, taken)
    assert torch.equal(result.samples, states[taken])
    assert result.trajectory is not None
    assert torch.equal(result.trajectory[-1], states[taken])
    assert torch.equal(torch.get_rng_state(), before)
    if generator is not None:
        assert torch.equal(generator.get_state(), _seeded().get_state())


def test_second_interrupt_ends_at_once() -> None:
    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was not obeyed")

    with pytest.raises(KeyboardInterrupt):
        _sampler("ddim").sample(model, LATENTS, *CONDITIONS, progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handler_of_the_program_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:

        def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            return _model(x, t, c)

        assert _sampler("ddim").sample(model, LATENTS, *CONDITIONS, progress=False).complete
        assert len(seen) == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_nested_block_leaves_the_outer_handler() -> None:
    with DeferredInterrupt() as outer:
        with DeferredInterrupt() as inner:
            signal.raise_signal(signal.SIGINT)
        assert (outer.pending, inner.pending) == (True, False)


@pytest.mark.parametrize("source", ["generator", "seeds"])
def test_stopping_callback_puts_generators_back(source: str) -> None:
    generator = _seeded()
    noise: dict[str, Any] = {"seeds": [1, 2]} if source == "seeds" else {"generator": generator}
    sampler = _sampler("ddpm")
    result = sampler.sample(_model, LATENTS, *CONDITIONS, callback=lambda info: info.index < 2, progress=False, **noise)
    assert (result.complete, result.steps, len(result.timesteps)) == (False, 3, 6)
    assert torch.equal(generator.get_state(), _seeded().get_state())
    whole = sampler.sample(_model, LATENTS, *CONDITIONS, callback=lambda info: None, progress=False, **noise)
    assert whole.complete


def test_comparison_ends_at_an_interrupt() -> None:
    from fastdiff import create_advanced_sampling_manager

    manager = create_advanced_sampling_manager("linear", num_inference_steps=3)
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        return _model(x, t)

    found = manager.compare_sampling_methods(model, LATENTS, methods=["ddim", "ddpm", "heun"], progress=False)
    assert [(name.value, result.complete) for name, result in found.items()] == [("ddim", True), ("ddpm", False)]
    assert not math.isnan(float(found["ddpm"].samples.sum()))
