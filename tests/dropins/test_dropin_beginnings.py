# SPDX-License-Identifier: MIT
"""The first step of a loop: at once where an earlier loop began in the same state, looked at anew where not."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdiff.diffusers
from fastdiff.diffusers.runtime import plan_cache, step
from fastdiff.diffusers.runtime.scheduler_cache import SchedulerCache
from fastdiff.ops import backends, use_backend
from support.dropin_helpers import LAST_IS_NO_STEP, MAKES_SAMPLER, forget_first_steps, forget_plans, quiet
from support.oracle import assert_same_bits

pytestmark = pytest.mark.skipif(backends.extension is None, reason="loops begin at once in the C++ extension")
STEPS = 4
#: Classes without a loop of one tensor an argument, and one whose timesteps are told otherwise.
OTHERS = ("CogVideoXDPM", "RePaint", "SCM", "ConsistencyDecoder", "DDPMWuerstchen")
NAMES = [
    name.removesuffix("Scheduler")
    for name in fastdiff.diffusers.CLASSES
    if name.removesuffix("Scheduler") not in (*OTHERS, *MAKES_SAMPLER, *LAST_IS_NO_STEP)
]


def made(name: str, *, theirs: bool = False, **options: Any) -> Any:
    cls = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]
    with quiet():
        return (cls.original if theirs else cls)(**options)


def tensors(*shape: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(40, *(shape or (2, 3, 4)), generator=torch.Generator().manual_seed(seed)))


def loop(
    scheduler: Any,
    outputs: list[Tensor],
    change: Callable[[Any], Any] | None = None,
    *,
    steps: int = STEPS,
    first: int = 0,
    last: int | None = None,
    scales: bool = False,
    guided: bool = False,
    draws: bool = True,
    **extra: Any,
) -> list[Tensor]:
    """The samples of a loop from `set_timesteps` on; a change comes before the first step."""
    with quiet():
        scheduler.set_timesteps(steps)
        if change is not None:
            change(scheduler)
        scales = scales and hasattr(scheduler, "scale_model_input")
        if draws and "generator" in inspect.signature(scheduler.step).parameters:
            extra = {"generator": torch.Generator().manual_seed(5), **extra}
        x, found = outputs[-1], []
        for i, timestep in enumerate(scheduler.timesteps[first:last]):
            if scales:
                found.append(scheduler.scale_model_input(x, timestep))
            elif hasattr(scheduler, "is_scale_input_called"):
                scheduler.is_scale_input_called = True
            if guided:
                result = scheduler.guided_step(outputs[i], outputs[i + 1], 3.0, timestep, x, **extra)
            else:
                result = scheduler.step(outputs[i], timestep, x, **extra)
            x = result[0] if isinstance(result, tuple) else result.prev_sample
            found.append(x)
    return found


def near(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-4, atol=3e-4, equal_nan=True)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the class of each scheduler whose step had to be looked up."""
    calls: list[str] = []
    current_cache_of = step.current_cache_of

    def counted(scheduler: Any) -> Any:
        calls.append(type(scheduler).__name__)
        return current_cache_of(scheduler)

    monkeypatch.setattr(step, "current_cache_of", counted)
    monkeypatch.setattr(plan_cache.PLANS, "schedules", OrderedDict())  # not those of other tests
    forget_first_steps()
    return calls


def attributes_of(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(scheduler).items() if name not in ("_fused", "_internal_dict")}


@pytest.mark.parametrize("scales", [False, True], ids=["steps alone", "model inputs too"])
@pytest.mark.parametrize("name", NAMES)
def test_a_later_loop_begins_at_once(name: str, scales: bool, looked: list[str]) -> None:
    scheduler, outputs = made(name), tensors()
    wanted = loop(scheduler, outputs, scales=scales)
    for _ in range(2):  # the first of them may find what no loop before had left, and learn factors
        loop(scheduler, outputs, scales=scales)
    state = {n: v for n, v in attributes_of(scheduler).items() if not isinstance(v, (Tensor, list, np.ndarray))}
    assert looked
    looked.clear()
    found = loop(scheduler, outputs, scales=scales)
    assert not looked
    if scales:
        near(found, wanted)  # a factor is rounded once more or less
    else:
        assert_same_bits(found, wanted)
    assert {n: v for n, v in attributes_of(scheduler).items() if n in state} == state
    near(found, loop(made(name, theirs=True), outputs, scales=scales))


def test_guidance_seeds_and_dtypes_each_begin_at_once(looked: list[str]) -> None:
    scheduler = made("EulerAncestralDiscrete")

    def all_of_them() -> list[Tensor]:
        found = []
        for seeds in (None, [1, 2]):
            for dtype in (torch.float32, torch.float16):
                for guided in (False, True):
                    scheduler.use_philox(seeds)
                    outputs = [t.to(dtype) for t in tensors()]
                    found += loop(scheduler, outputs, guided=guided, return_dict=False)
        return found

    wanted = all_of_them()
    all_of_them()
    looked.clear()
    assert_same_bits(all_of_them(), wanted)
    assert not looked


@pytest.mark.parametrize("name", ["PNDM", "UniPCMultistep", "DPMSolverMultistep"])
def test_guided_loops_and_others_in_turn(name: str) -> None:
    """The guided output exists nowhere, and a history that holds outputs has it made."""
    ours, theirs, outputs = made(name), made(name, theirs=True), tensors()

    def combined(i: int) -> Tensor:
        return outputs[i] + 3.0 * (outputs[i + 1] - outputs[i])

    for guided in (False, True) * 3:
        given = [combined(i) for i in range(len(outputs) - 1)] + outputs[-1:] if guided else outputs
        near(loop(ours, outputs, guided=guided), loop(theirs, given))


def _written(name: str) -> Callable[[Any], Any]:
    def change(scheduler: Any) -> None:
        with torch.no_grad():
            getattr(scheduler, name).mul_(0.97)

    return change


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda scheduler: setattr(scheduler, name, copy.copy(value))  # each its own list


def _config(**change: Any) -> Callable[[Any], Any]:
    return lambda scheduler: scheduler.register_to_config(**change)


def _history(scheduler: Any) -> None:
    scheduler.model_outputs[-1] = torch.ones(2, 3, 4)
    scheduler.lower_order_nums = 1


def _dtype_of_sigmas(scheduler: Any) -> None:
    scheduler.sigmas = scheduler.sigmas.double()


def _sigmas_replaced(scheduler: Any) -> None:
    scheduler.sigmas = scheduler.sigmas * 1.01


def _shorter(scheduler: Any) -> None:
    scheduler.sigmas = scheduler.sigmas[1:].clone()
    scheduler.timesteps = scheduler.timesteps[1:].clone()


CHANGES: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("sigmas written", "EulerDiscrete", _written("sigmas")),
    ("sigmas replaced", "EulerDiscrete", _sigmas_replaced),
    ("sigmas of another dtype", "EulerDiscrete", _dtype_of_sigmas),
    ("fewer sigmas", "EulerDiscrete", _shorter),
    ("levels written", "DDIM", _written("alphas_cumprod")),
    ("levels written", "LCM", _written("alphas_cumprod")),
    ("last level written", "DDIM", _written("final_alpha_cumprod")),
    ("number of steps", "DDIM", _set("num_inference_steps", 5)),
    ("configuration", "DDIM", _config(prediction_type="v_prediction")),
    ("configuration", "EulerDiscrete", _config(prediction_type="v_prediction")),
    ("configuration", "FlowMatchEulerDiscrete", _config(stochastic_sampling=True)),
    ("one attribute more", "DDIM", _set("note", "something else")),
    ("begin index", "EulerDiscrete", lambda scheduler: scheduler.set_begin_index(1)),
    ("step index", "DPMSolverMultistep", _set("_step_index", 2)),
    ("order", "DPMSolverMultistep", _set("lower_order_nums", 2)),
    ("history", "DPMSolverMultistep", _history),
    ("levels written", "DPMSolverMultistep", _written("sigmas")),
    ("another list", "DPMSolverMultistep", _set("model_outputs", [None, None, None])),
]


@pytest.mark.parametrize(
    ("name", "change"), [pytest.param(name, change, id=f"{name}, {what}") for what, name, change in CHANGES]
)
def test_what_is_changed_before_a_first_step_counts(name: str, change: Callable[[Any], Any], looked: list[str]) -> None:
    outputs, ours = tensors(), made(name)
    for _ in range(3):
        loop(ours, outputs)
    looked.clear()
    found, wanted = _outcome(ours, outputs, change), _outcome(made(name, theirs=True), outputs, change)
    assert looked
    assert type(found) is type(wanted), (found, wanted)
    if isinstance(wanted, list):
        near(found, wanted)


def _outcome(scheduler: Any, outputs: list[Tensor], change: Callable[[Any], Any]) -> Any:
    try:
        return loop(scheduler, outputs, change)
    except Exception as error:
        return error


def test_a_written_array_of_numpy_counts(looked: list[str]) -> None:
    scheduler, outputs = made("PNDM"), tensors()
    for _ in range(3):
        loop(scheduler, outputs)
    looked.clear()

    def written(scheduler: Any) -> None:
        scheduler.prk_timesteps[0] += 1

    loop(scheduler, outputs, written)
    assert looked
    looked.clear()
    loop(scheduler, outputs)
    assert not looked


def test_levels_whose_writes_nobody_counts_are_compared(looked: list[str]) -> None:
    with torch.inference_mode():
        scheduler = made("DDIM")
    theirs, outputs = made("DDIM", theirs=True), tensors()
    assert scheduler.alphas_cumprod.is_inference()
    for _ in range(3):
        wanted = loop(scheduler, outputs)
    looked.clear()
    assert_same_bits(loop(scheduler, outputs), wanted)
    assert not looked
    with torch.inference_mode():
        _written("alphas_cumprod")(scheduler)
    _written("alphas_cumprod")(theirs)
    near(loop(scheduler, outputs), loop(theirs, outputs))
    assert looked


def test_timesteps_set_in_inference_mode_are_compared(looked: list[str]) -> None:
    scheduler, outputs = made("EulerDiscrete"), tensors()
    wanted = loop(scheduler, outputs)
    with torch.inference_mode():
        for _ in range(2):
            loop(scheduler, outputs)
        looked.clear()
        found = loop(scheduler, outputs)
    assert not looked
    assert_same_bits([t.clone() for t in found], wanted)


CALLS: dict[str, Callable[[Any, list[Tensor], Tensor], Any]] = {
    "another dtype": lambda s, o, t: s.step(o[0].double(), t, o[-1].double(), return_dict=False),
    "half outputs": lambda s, o, t: s.step(o[0].half().float().half(), t, o[-1].half().float(), return_dict=False),
    "another shape": lambda s, o, t: s.step(o[0][:1], t, o[-1][:1], return_dict=False),
    "an output": lambda s, o, t: s.step(o[0], t, o[-1]),
    "an output asked for": lambda s, o, t: s.step(o[0], t, o[-1], return_dict=True),
    "eta": lambda s, o, t: s.step(o[0], t, o[-1], 0.5, generator=torch.Generator(), return_dict=False),
    "clipped": lambda s, o, t: s.step(o[0], t, o[-1], use_clipped_model_output=True, return_dict=False),
    "the next timestep": lambda s, o, t: s.step(o[0], s.timesteps[1], o[-1], return_dict=False),
    "a copy of the timestep": lambda s, o, t: s.step(o[0], t.clone(), o[-1], return_dict=False),
    "a number": lambda s, o, t: s.step(o[0], int(t), o[-1], return_dict=False),
    "guided": lambda s, o, t: (
        s.guided_step(o[1], o[0], 3.0, t, o[-1], return_dict=False)
        if hasattr(s, "guided_step")
        else s.step(o[1] + 3.0 * (o[0] - o[1]), t, o[-1], return_dict=False)
    ),
    "twice the channels": lambda s, o, t: s.step(torch.cat([o[0], o[1]], 1), t, o[-1], return_dict=False),
    "a sample that is broadcast": lambda s, o, t: s.step(o[0], t, o[-1][:1], return_dict=False),
    "twice": lambda s, o, t: s.step(o[0], t, o[-1], sample=o[-1], return_dict=False),
    "an argument that there is not": lambda s, o, t: s.step(o[0], t, o[-1], return_dict=False, nothing=1),
    "a timestep of another schedule": lambda s, o, t: s.step(o[0], made("DDIM").timesteps[0], o[-1], return_dict=False),
}


@pytest.mark.parametrize("call", sorted(CALLS))
def test_another_call_is_no_beginning_of_that_loop(call: str, looked: list[str]) -> None:
    outputs, ours, theirs = tensors(), made("DDIM"), made("DDIM", theirs=True)
    for _ in range(3):
        loop(ours, outputs, return_dict=False, draws=False)
    looked.clear()
    loop(ours, outputs, return_dict=False, draws=False)
    assert not looked
    results: list[Any] = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        try:
            results.append(CALLS[call](scheduler, outputs, scheduler.timesteps[0]))
        except Exception as error:
            results.append(error)
    assert type(results[0]) is type(results[1]), results
    if isinstance(results[1], tuple):
        near([results[0][0]], [results[1][0]])
        assert looked
    elif not isinstance(results[1], Exception):
        near([results[0].prev_sample], [results[1].prev_sample])
        assert looked


def test_what_scales_the_model_input_takes_no_output() -> None:
    outputs, scheduler = tensors(), made("EulerDiscrete")
    for _ in range(3):
        loop(scheduler, outputs, scales=True)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(TypeError, match="model_output"):
        scheduler.scale_model_input(outputs[-1], scheduler.timesteps[0], model_output=outputs[0])


def test_seeds_are_no_part_of_a_beginning_but_that_there_are_some() -> None:
    outputs = tensors()
    results = []
    for seeds in ([1, 2], [3, 4]):
        fresh = made("DDPM")
        fresh.use_philox(seeds)
        results.append(loop(fresh, outputs))
    drawn = loop(made("DDPM"), outputs)
    scheduler = made("DDPM")
    for _ in range(3):
        for seeds, wanted in zip(([1, 2], [3, 4], None), (*results, drawn), strict=True):
            scheduler.use_philox(seeds)
            assert_same_bits(loop(scheduler, outputs), wanted)


def test_a_forced_backend_is_asked_in_a_first_step(looked: list[str]) -> None:
    outputs, scheduler = tensors(), made("DDIM")
    wanted = loop(scheduler, outputs)
    loop(scheduler, outputs, guided=True)
    for _ in range(20):  # nothing is kept of these that would push out what is
        with use_backend("reference"):
            near(loop(scheduler, outputs), wanted)
    looked.clear()
    loop(scheduler, outputs, guided=True)
    assert_same_bits(loop(scheduler, outputs), wanted)
    assert not looked


@pytest.mark.parametrize("attribute", ["sigmas", "alphas_cumprod"])
def test_what_is_written_behind_a_first_step_counts(attribute: str, looked: list[str]) -> None:
    """Of what the first step has read, and of what only later ones may."""
    outputs = tensors()
    ours, theirs = made("EulerDiscrete"), made("EulerDiscrete", theirs=True)
    for _ in range(3):
        loop(ours, outputs, draws=False, return_dict=False)
    looked.clear()
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        scheduler.is_scale_input_called = True
        x = scheduler.step(outputs[0], scheduler.timesteps[0], outputs[-1], return_dict=False)[0]
        assert not looked or scheduler is theirs
        getattr(scheduler, attribute).mul_(0.9)
        results.append(scheduler.step(outputs[1], scheduler.timesteps[1], x, return_dict=False)[0])
    near(results[:1], results[1:])
    levels = made("DDIM")
    for _ in range(3):
        loop(levels, outputs, draws=False, return_dict=False)
    looked.clear()
    again = made("DDIM", theirs=True)
    results = []
    for scheduler in (levels, again):
        scheduler.set_timesteps(STEPS)
        x = scheduler.step(outputs[0], scheduler.timesteps[0], outputs[-1], return_dict=False)[0]
        assert not looked or scheduler is again
        scheduler.final_alpha_cumprod.mul_(0.9)  # which the last step alone reads
        for i in range(1, STEPS):
            x = scheduler.step(outputs[i], scheduler.timesteps[i], x, return_dict=False)[0]
        results.append(x)
    near(results[:1], results[1:])


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_a_loop_that_begins_at_once_learns_what_follows(name: str, looked: list[str]) -> None:
    outputs, scheduler = tensors(), made(name)
    for _ in range(3):
        loop(scheduler, outputs, last=1)  # nothing has followed a first step so far
    looked.clear()
    wanted = loop(scheduler, outputs)
    assert len(looked) == STEPS - 1
    looked.clear()
    assert_same_bits(loop(scheduler, outputs), wanted)
    assert not looked


def test_loops_of_several_lengths_and_sizes_in_turn(looked: list[str]) -> None:
    scheduler = made("FlowMatchEulerDiscrete")
    kinds = [(steps, size) for steps in (1, 2, 4) for size in (4, 6)]
    wanted = {}
    for again in range(3):
        for steps, size in kinds:
            looked.clear()
            found = loop(scheduler, tensors(2, 3, size), steps=steps)
            if again:
                assert not looked
                assert_same_bits(found, wanted[steps, size])
            wanted[steps, size] = found
            plans = scheduler._fused.plan_cache.plans
            assert len(plans) == steps  # of the schedule that it has, at whatever size


def test_more_kinds_of_loops_than_are_kept() -> None:
    scheduler = made("DPMSolverMultistep")
    for _ in range(2):
        for steps in range(1, 20):
            found = loop(scheduler, tensors(), steps=steps)
            assert_same_bits(found, loop(made("DPMSolverMultistep"), tensors(), steps=steps))


def test_a_loop_that_starts_in_the_middle_begins_at_once(looked: list[str]) -> None:
    outputs, scheduler = tensors(), made("EulerDiscrete")

    def middle() -> list[Tensor]:
        return loop(scheduler, outputs, lambda s: s.set_begin_index(2), first=2)

    wanted, whole = middle(), loop(scheduler, outputs)
    middle()
    looked.clear()
    assert_same_bits(middle(), wanted)
    assert_same_bits(loop(scheduler, outputs), whole)
    assert not looked


def test_a_stepper_begins_as_its_scheduler_does(looked: list[str]) -> None:
    outputs, scheduler = tensors(), made("DPMSolverMultistep")
    for _ in range(2):
        wanted = loop(scheduler, outputs)
    looked.clear()
    steppers = [scheduler.stepper() for _ in range(2)]
    for stepper in steppers:
        assert_same_bits(loop(stepper, outputs), wanted)
    assert not looked
    changed = scheduler.stepper()
    changed.set_timesteps(STEPS)
    near(loop(changed, outputs, _written("sigmas")), loop(made("DPMSolverMultistep", theirs=True), outputs,
                                                          _written("sigmas")))  # fmt: skip
    assert looked
    seeded = made("DDPM")
    seeded.use_philox([1, 2])
    wanted = loop(seeded, outputs)
    for own in (seeded.stepper(), copy.copy(seeded), copy.deepcopy(seeded), pickle.loads(pickle.dumps(seeded))):
        own.set_timesteps(STEPS)
        assert_same_bits(loop(own, outputs), wanted)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_begins_at_once(way: Callable[[Any], Any], looked: list[str]) -> None:
    outputs, scheduler = tensors(), made("EulerDiscrete")
    for _ in range(3):
        wanted = loop(scheduler, outputs)
    looked.clear()
    assert_same_bits(loop(way(scheduler), outputs), wanted)
    assert not looked


def test_a_class_of_ones_own_begins_for_itself(looked: list[str]) -> None:
    outputs, scheduler = tensors(), made("DDIM")
    for _ in range(3):
        wanted = loop(scheduler, outputs)

    class Own(type(scheduler)):  # type: ignore[misc]
        pass

    looked.clear()
    scheduler.__class__ = Own
    assert_same_bits(loop(scheduler, outputs), wanted)
    assert looked


def test_nothing_is_kept_of_a_state_that_another_thread_has_met(
    looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, scheduler = tensors(), made("DDIM")
    execute = step.execute

    def interrupted(*call: Any, **options: Any) -> Any:
        scheduler._fused.advance_epoch()  # as another thread's step does
        return execute(*call, **options)

    with monkeypatch.context() as during:
        during.setattr(step, "execute", interrupted)
        wanted = loop(scheduler, outputs, last=1)
    looked.clear()
    assert_same_bits(loop(scheduler, outputs, last=1), wanted)
    assert looked


def test_nothing_is_kept_of_a_state_that_changes_meanwhile(looked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, scheduler = tensors(), made("DDIM")
    guards = SchedulerCache.first_step_guards

    def changing(self: SchedulerCache, attributes: dict[str, Any], original: type) -> Any:
        attributes["num_inference_steps"] = 5
        found = guards(self, attributes, original)
        attributes["num_inference_steps"] = 5
        return found

    with monkeypatch.context() as during:
        during.setattr(SchedulerCache, "first_step_guards", changing)
        loop(scheduler, outputs, last=1)  # by the plan for four steps
    near(loop(scheduler, outputs, _set("num_inference_steps", 5)),
         loop(made("DDIM", theirs=True), outputs, _set("num_inference_steps", 5)))  # fmt: skip


def test_no_tensor_of_a_loop_is_kept_for_the_next() -> None:
    for name in ("PNDM", "HeunDiscrete", "DPMSolverMultistep"):
        forget_plans()  # so that the first loop is traced, whatever ran before
        scheduler, outputs, watched = made(name), tensors(), []
        for _ in range(3):
            first = tensors(seed=1)
            watched += [weakref.ref(t) for t in loop(scheduler, first)] + [weakref.ref(t) for t in first]
            del first
        loop(scheduler, outputs)
        assert not any(each() is not None for each in watched), name


def test_threads_with_steppers_begin_at_once() -> None:
    outputs = [t.repeat(1, 40, 40) for t in tensors(4, 16, 16)]  # large enough to let other threads in
    scheduler = made("DPMSolverMultistep")
    wanted = loop(scheduler, outputs)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(4):
                assert_same_bits(loop(scheduler.stepper(), outputs), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@given(data=st.data())
def test_any_loops_one_after_another_give_what_fresh_schedulers_give(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["DDIM", "EulerDiscrete", "DPMSolverMultistep", "LCM", "PNDM"]))
    scheduler = made(name)
    changes: list[Callable[[Any], Any]] = [change for _, of, change in CHANGES if of == name]
    for _ in range(data.draw(st.integers(2, 6))):
        kind: dict[str, Any] = {
            "steps": data.draw(st.sampled_from([1, 4, 5])),
            "scales": name == "EulerDiscrete" and data.draw(st.booleans()),
            "guided": data.draw(st.booleans()),
            "last": data.draw(st.sampled_from([None, 1, 2])),
        }
        if data.draw(st.booleans()):
            kind["return_dict"] = data.draw(st.booleans())
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
        outputs = [t.to(dtype) for t in tensors(data.draw(st.sampled_from([1, 2])), 3, 4)]
        seeds = data.draw(st.sampled_from([None, 7]))
        change = data.draw(st.sampled_from([None, None, *changes]))
        results: list[Any] = []
        fresh = copy.deepcopy(scheduler)
        for each in (scheduler, fresh):
            each.use_philox(seeds)
            try:
                results.append(loop(each, outputs, change, **kind))
            except Exception as error:
                results.append(error)
        assert type(results[0]) is type(results[1]), results
        if isinstance(results[0], list):
            if kind["scales"]:
                tolerance = 3e-4 if dtype == torch.float32 else 2e-2
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            else:
                assert_same_bits(*results)
