# SPDX-License-Identifier: MIT
"""Steps that follow each other: which calls go on from the last one, and that all others are looked at anew."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

import fastdiff.diffusers
from fastdiff import ops
from fastdiff.diffusers import mixin
from fastdiff.diffusers.runtime import execute as executor
from fastdiff.diffusers.runtime import plan_cache, scheduler_cache
from fastdiff.ops import backends, use_backend
from fastdiff.philox import Purpose
from support.dropin_helpers import forget_first_steps, quiet
from support.oracle import assert_same_bits

pytestmark = pytest.mark.skipif(backends.extension is None, reason="steps go on in the C++ extension")
STEPS = 6
NAMES = ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "FlowMatchEulerDiscrete", "HeunDiscrete", "IPNDM",
         "LMSDiscrete", "PNDM", "UniPCMultistep")  # fmt: skip


def made(name: str, **options: Any) -> Any:
    scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"](**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def original(name: str, **options: Any) -> Any:
    scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"].original(**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def tensors(*shape: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(STEPS * 3, *(shape or (2, 3, 4)), generator=torch.Generator().manual_seed(seed)))


def loop(scheduler: Any, outputs: list[Tensor], between: Callable[[int, Any], None] | None = None, **extra: Any) -> Any:
    x = outputs[-1]
    for i, timestep in enumerate(scheduler.timesteps):
        if between is not None:
            between(i, scheduler)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        x = scheduler.step(outputs[i], timestep, x, return_dict=False, **extra)[0]
    return x


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the method of each step that was looked up."""
    calls: list[str] = []
    take_step = mixin.take_step

    def counted(scheduler: Any, name: str, *rest: Any) -> Any:
        calls.append(name)
        return take_step(scheduler, name, *rest)

    monkeypatch.setattr(mixin, "take_step", counted)
    monkeypatch.setattr(plan_cache.PLANS, "schedules", OrderedDict())  # not those of other tests
    forget_first_steps()
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_a_second_loop_looks_up_its_first_steps_alone(name: str, looked_up: list[str]) -> None:
    scheduler, outputs = made(name), tensors()
    first = loop(scheduler, outputs)
    assert len(looked_up) == len(scheduler.timesteps)
    scheduler.set_timesteps(STEPS)
    assert_same_bits([loop(scheduler, outputs)], [first])  # which finds what follows what
    for _ in range(2):
        scheduler.set_timesteps(STEPS)
        looked_up.clear()
        assert_same_bits([loop(scheduler, outputs)], [first])
        assert not looked_up
    for _ in range(2):  # a new scheduler begins as quickly as an old one, once one has begun as a new one
        looked_up.clear()
        assert_same_bits([loop(made(name), outputs)], [first])
    assert not looked_up


def test_a_list_that_only_grows_keeps_its_step_in_cpp(looked_up: list[str]) -> None:
    """IPNDM's `ets` hold all outputs of a loop, of which a step reads four."""
    steps = 40
    scheduler = fastdiff.diffusers.CLASSES["IPNDMScheduler"]()
    twin = type(scheduler).original()
    outputs = list(torch.randn(steps, 2, 3, 4, generator=torch.Generator().manual_seed(0)))
    ends = []
    for each in (scheduler, scheduler, scheduler, twin):
        each.set_timesteps(steps)
        looked_up.clear()
        x = outputs[0]
        for output, timestep in zip(outputs, each.timesteps, strict=True):
            x = each.step(output, timestep, x, return_dict=False)[0]
        ends.append((x, list(each.ets), len(looked_up)))
    assert ends[2][2] == 0
    plan = scheduler._fused.plan
    assert plan.native_eligible
    assert len(plan.attribute_inputs) <= 4
    for mine, other in zip(ends[2][1], ends[3][1], strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1)
    assert (ends[2][0] - ends[3][0]).abs().max() <= 1e-5 * ends[3][0].abs().max().clamp(min=1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "DDPM", "UniPCMultistep"])
def test_outputs_in_another_layout_are_laid_out_in_cpp(
    name: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformer's output is a view in another order of dimensions; the bits are those of a contiguous one."""
    scheduler, outputs = made(name), tensors(2, 4, 6, 5)
    permuted = [output.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for output in outputs]
    assert permuted[0].stride() != outputs[0].stride()
    ends = []
    for each in (outputs, permuted, permuted):
        if each is permuted and len(ends) == 2:
            monkeypatch.setattr(ops, "step", lambda *call, **options: pytest.fail("by way of Python"))
        torch.manual_seed(3)
        scheduler.set_timesteps(STEPS)
        x = outputs[-1]
        for i, t in enumerate(scheduler.timesteps):
            if guided:
                x = scheduler.guided_step(each[i], each[i + STEPS], 3.0, t, x, return_dict=False)[0]
            else:
                x = scheduler.step(each[i], t, x, return_dict=False)[0]
        ends.append(x)
    assert_same_bits(ends[1:], [ends[0], ends[0]])


def test_the_purpose_of_a_steps_noise_is_fixed() -> None:
    assert Purpose.STEP == 1  # a word of the counter: with another one every seed would give another picture


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", ["model_output_cond", "guidance_rescale"])
def test_the_names_of_guidance_are_none_of_a_plain_step(name: str, place: int) -> None:
    scheduler, outputs = made("DDIM"), tensors()
    for _ in range(3):
        scheduler.set_timesteps(STEPS)
        loop(scheduler, outputs)
    scheduler.set_timesteps(STEPS)
    x = outputs[-1]
    for i, t in enumerate(scheduler.timesteps[:place]):
        x = scheduler.step(outputs[i], t, x, return_dict=False)[0]
    given = {"timestep": scheduler.timesteps[place], "sample": x, "return_dict": False}
    wrong = {name: outputs[0]} if name.endswith("cond") else {"model_output": outputs[0], name: 0.0}
    with pytest.raises(TypeError, match=name):
        scheduler.step(**given, **wrong)


def test_guidance_goes_on_with_and_without_a_rescale_of_nothing(looked_up: list[str]) -> None:
    scheduler, outputs = made("DDIM"), tensors()

    def guided(**extra: Any) -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = outputs[-1]
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.guided_step(outputs[i], outputs[i + STEPS], 3.0, t, x, return_dict=False, **extra)[0]
        return x

    plain = guided()
    guided()
    looked_up.clear()
    assert_same_bits([guided(), guided(guidance_rescale=0.0)], [plain, plain])
    assert not looked_up
    assert not torch.equal(guided(guidance_rescale=0.7), plain)
    assert len(looked_up) == STEPS


def _other_shape(i: int, scheduler: Any) -> None:
    if i == 3 and getattr(scheduler, "model_outputs", None):
        scheduler.model_outputs[:] = [None if m is None else m[:1] for m in scheduler.model_outputs]


def _list_shortened(i: int, scheduler: Any) -> None:
    for name in ("ets", "derivatives"):
        if i == 3 and hasattr(scheduler, name):
            del getattr(scheduler, name)[0]


def _order_lowered(i: int, scheduler: Any) -> None:
    if i == 3 and hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0


def _sigmas_written(i: int, scheduler: Any) -> None:
    if i == 3 and hasattr(scheduler, "sigmas"):
        scheduler.sigmas[4:] *= 1.01


def _attribute_more(i: int, scheduler: Any) -> None:
    if i == 3:
        scheduler.note = "something else"


def _attribute_less(i: int, scheduler: Any) -> None:
    if i == 2:
        scheduler.note = "something else"
    if i == 4:
        del scheduler.note


@pytest.mark.parametrize(
    "between",
    [_other_shape, _list_shortened, _order_lowered, _sigmas_written, _attribute_more, _attribute_less],
    ids=lambda change: change.__name__[1:],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_changed_between_two_steps_counts_as_in_diffusers(name: str, between: Callable[..., None]) -> None:
    outputs = tensors()
    ours, theirs = made(name), original(name)
    for _ in range(2):  # so that every step has one that follows it
        ours.set_timesteps(STEPS)
        loop(ours, outputs)
    ours.set_timesteps(STEPS)
    wanted = _outcome(lambda: loop(theirs, outputs, between))
    found = _outcome(lambda: loop(ours, outputs, between))
    assert found.keys() == wanted.keys(), (found, wanted)
    if "result" in wanted:
        worst = (found["result"] - wanted["result"]).abs() / wanted["result"].abs().clamp(min=1)
        assert float(worst.max()) < 3e-4


def _outcome(run: Callable[[], Tensor]) -> dict[Any, Any]:
    try:
        return {"result": run()}
    except Exception as error:
        return {type(error): str(error)}


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_another_shape_in_the_middle_of_a_loop(name: str) -> None:
    outputs = tensors(1, 3, 4)
    ours = made(name)
    loop(ours, outputs)
    ours.set_timesteps(STEPS)

    def widened(scheduler: Any) -> Tensor:
        x = outputs[-1]
        for i, timestep in enumerate(scheduler.timesteps):
            output = outputs[i]
            if i >= 3:
                x, output = x.expand(2, 3, 4).contiguous(), output.expand(2, 3, 4).contiguous()
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.is_scale_input_called = True
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        return x

    theirs = original(name)
    wanted, found = _outcome(lambda: widened(theirs)), _outcome(lambda: widened(ours))
    assert found.keys() == wanted.keys(), (found, wanted)
    if "result" in wanted:
        assert torch.allclose(found["result"], wanted["result"], atol=3e-4, rtol=3e-4)


def test_a_forced_backend_answers_in_the_middle_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, scheduler = tensors(), made("DDIM")
    first = loop(scheduler, outputs)
    scheduler.set_timesteps(STEPS)
    asked = []
    fused_step = ops.step
    monkeypatch.setattr(ops, "step", lambda *call, **options: asked.append(1) or fused_step(*call, **options))
    loop(scheduler, outputs)
    assert not asked
    scheduler.set_timesteps(STEPS)
    with use_backend("reference"):
        found = loop(scheduler, outputs)
    assert len(asked) == STEPS
    assert torch.allclose(found, first, rtol=1e-5, atol=1e-6)


def test_a_forced_backend_answers_in_its_own_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, schedulers = tensors(), [made("DDIM"), made("DDIM")]
    for scheduler in schedulers:
        loop(scheduler, outputs)  # its steps have plans, its first step is kept
        scheduler.set_timesteps(STEPS)
    asked: list[int] = []
    fused_step = ops.step
    monkeypatch.setattr(
        ops, "step", lambda *call, **options: asked.append(threading.get_ident()) or fused_step(*call, **options)
    )
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: (threading.get_ident(), loop(schedulers[0], outputs))).result(timeout=60)
        here = threading.get_ident(), loop(schedulers[1], outputs)
    assert set(asked) == {here[0]}
    assert len(asked) == STEPS
    assert torch.allclose(here[1], there[1], rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_steps_that_follow_each_other() -> None:
    outputs = tensors()
    scheduler = made("DDIM", clip_sample=False)
    loop(scheduler, outputs)
    scheduler.set_timesteps(STEPS)
    first = [t.clone().requires_grad_() for t in outputs]
    loop(scheduler, first).sum().backward()
    theirs = [t.clone().requires_grad_() for t in outputs]
    loop(original("DDIM", clip_sample=False), theirs).sum().backward()
    for ours, wanted in zip(first, theirs, strict=True):
        assert (ours.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            assert torch.allclose(ours.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_a_draw_that_fails_changes_nothing() -> None:
    outputs = tensors()
    scheduler = made("EulerAncestralDiscrete")
    scheduler.is_scale_input_called = True
    wrong, timesteps = object(), scheduler.timesteps
    for _ in range(2):
        scheduler.set_timesteps(STEPS)
        loop(scheduler, outputs, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps
    generator = torch.Generator().manual_seed(1)
    first = scheduler.step(outputs[0], timesteps[0], outputs[-1], return_dict=False, generator=generator)[0]
    before = {name: value for name, value in vars(scheduler).items() if name != "_fused"}
    with pytest.raises((AttributeError, TypeError)):
        scheduler.step(outputs[1], timesteps[1], first, return_dict=False, generator=wrong)
    assert {name: value for name, value in vars(scheduler).items() if name != "_fused"} == before
    again = scheduler.step(outputs[1], timesteps[1], first, return_dict=False, generator=generator)[0]
    fresh = made("EulerAncestralDiscrete")
    generator = torch.Generator().manual_seed(1)
    a = fresh.step(outputs[0], fresh.timesteps[0], outputs[-1], return_dict=False, generator=generator)[0]
    b = fresh.step(outputs[1], fresh.timesteps[1], a, return_dict=False, generator=generator)[0]
    assert_same_bits([first, again], [a, b])


def test_a_draw_that_fails_in_python_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, scheduler = tensors(), made("EulerAncestralDiscrete")
    for _ in range(2):
        scheduler.set_timesteps(STEPS)
        loop(scheduler, outputs)
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps
    scheduler.is_scale_input_called = True
    x = scheduler.step(outputs[0], timesteps[0], outputs[-1], return_dict=False)[0]

    def broken(*call: Any) -> Tensor:
        raise MemoryError("no room for noise")

    before = {name: value for name, value in vars(scheduler).items() if name != "_fused"}
    randn_like_diffusers = executor.randn_like_diffusers
    monkeypatch.setattr(executor, "randn_like_diffusers", broken)
    with pytest.raises(MemoryError, match="no room"), BaseTorchFunctionMode():  # the mode has to see torch's operator
        scheduler.step(outputs[1], timesteps[1], x, return_dict=False)
    assert {name: value for name, value in vars(scheduler).items() if name != "_fused"} == before
    monkeypatch.setattr(executor, "randn_like_diffusers", randn_like_diffusers)
    assert scheduler.step(outputs[1], timesteps[1], x, return_dict=False)[0].isfinite().all()
    assert scheduler.step_index == 2


def test_a_step_that_fails_after_its_state_is_written_leaves_no_plan_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is then one step on, as diffusers' own would be, and so is what the next step does."""
    outputs, scheduler = tensors(), made("DPMSolverMultistep")
    twin = type(scheduler).original.from_config(scheduler.config)

    def broken(output: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # learns which plan follows which
        scheduler.set_timesteps(STEPS)
        x = outputs[-1]
        for output, timestep in zip(outputs, scheduler.timesteps, strict=False):
            x = scheduler.step(output, timestep, x)[0]

    results = []
    for each in (scheduler, twin):
        each.set_timesteps(STEPS)
        x = outputs[-1]
        for k in range(2):
            x = each.step(outputs[k], each.timesteps[k], x)[0]
        with monkeypatch.context() as patched:
            kind = type(each.step(outputs[2], each.timesteps[2], x))
            patched.setattr(kind, "__post_init__", broken)
            with pytest.raises(KeyboardInterrupt):
                each.step(outputs[3], each.timesteps[3], x)
        assert each.step_index == 4
        results.append(each.step(outputs[0], each.timesteps[3], x)[0])  # tried once more, from where the state is
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[1].abs().max().clamp(min=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_dies_with_its_last_reference(name: str) -> None:
    scheduler, outputs = made(name), tensors()
    for _ in range(2):
        scheduler.set_timesteps(STEPS)
        loop(scheduler, outputs)
    gc.disable()
    try:
        gone = weakref.ref(scheduler._fused)
        del scheduler
        assert gone() is None
    finally:
        gc.enable()


def test_a_scheduler_that_refers_to_itself_is_collected() -> None:
    scheduler, outputs = made("DDIM"), tensors()
    scheduler.myself = scheduler
    scheduler.hooks = [scheduler.step]
    for _ in range(2):
        loop(scheduler, outputs)
    gone = weakref.ref(scheduler._fused)
    del scheduler
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", NAMES)
def test_no_reference_is_lost_or_kept(name: str) -> None:
    outputs, scheduler = tensors(), made(name)
    for _ in range(3):
        scheduler.set_timesteps(STEPS)
        loop(scheduler, outputs)
    kept = [outputs[0], scheduler.timesteps, scheduler.config, outputs[-1]]

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(value) for value in kept]

    def many(times: int) -> None:
        timesteps = scheduler.timesteps
        for _ in range(times):
            scheduler.set_timesteps(STEPS)
            scheduler.timesteps = timesteps
            loop(scheduler, outputs)

    with quiet():  # pytest keeps warnings
        many(2)
        before, nothing = counts(), sys.getrefcount(None)
        many(50)
        assert counts() == before
    assert abs(sys.getrefcount(None) - nothing) < 50  # one a loop would be 50


def test_the_method_looks_like_the_one_that_it_replaces() -> None:
    cls = fastdiff.diffusers.DDIMScheduler
    for owner in (cls, cls()):
        assert inspect.signature(owner.step) == inspect.signature(
            cls.original.step if owner is cls else cls.original().step
        )
        assert owner.step.__name__ == "step"
        assert owner.step.__doc__ == cls.original.step.__doc__
        assert list(inspect.signature(owner.guided_step).parameters)[-7:] == [
            "model_output_uncond", "model_output_cond", "guidance_scale", "timestep", "sample", "guidance_rescale",
            "kwargs",
        ]  # fmt: skip
    assert inspect.ismethod(cls().step)
    assert inspect.isroutine(cls().step)
    assert inspect.unwrap(cls.step) is cls.original.step


def test_it_is_called_in_all_the_ways_of_a_method() -> None:
    outputs = tensors()
    cls = fastdiff.diffusers.DDIMScheduler

    class Own(cls):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    def ways() -> Iterator[Callable[[Any], Any]]:
        yield lambda s: s.step
        yield lambda s: functools.partial(type(s).step, s)
        yield lambda s: copy.copy(s.step)
        yield lambda s: lambda o, t, x, **k: s.step(*(o, t), sample=x, **k)
        yield lambda s: lambda o, t, x, **k: s.step(sample=x, timestep=t, model_output=o, **k)
        yield lambda s: functools.partial(cls.original.step, s)

    wanted = loop(made("DDIM"), outputs)
    for kind in (cls, Own):
        for way in ways():
            scheduler = kind()
            for _ in range(2):
                scheduler.set_timesteps(STEPS)
                x, step = outputs[-1], way(scheduler)
                for i, t in enumerate(scheduler.timesteps):
                    x = step(outputs[i], t, x, return_dict=False)[0]
                assert torch.allclose(x, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, o, t, x: s.step(),
        lambda s, o, t, x: s.step(o),
        lambda s, o, t, x: s.step(o, t, x, 0.0, False, None, None, True, "more"),
        lambda s, o, t, x: s.step(o, t, x, sample=x),
        lambda s, o, t, x: s.step(o, t, x, nothing=1),
        lambda s, o, t, x: type(s).step(),
        lambda s, o, t, x: s.guided_step(o, o),
        lambda s, o, t, x: s.guided_step(o, o, 3.0, t, x, nothing=1),
        lambda s, o, t, x: s.guided_step(None, o, 3.0, t, x),
        lambda s, o, t, x: s.guided_step("uncond", o, 3.0, t, x),
        lambda s, o, t, x: s.guided_step(o, o, "3", t, x),
    ],
)
def test_a_wrong_call_is_refused_and_the_loop_goes_on(call: Callable[..., Any]) -> None:
    outputs, scheduler = tensors(), made("DDIM")
    for _ in range(2):
        scheduler.set_timesteps(STEPS)
        wanted = loop(scheduler, outputs)
    scheduler.set_timesteps(STEPS)
    x = outputs[-1]
    for i, t in enumerate(scheduler.timesteps):
        if i == 2:
            with pytest.raises((TypeError, ValueError)):
                call(scheduler, outputs[i], t, x)
        x = scheduler.step(outputs[i], t, x, return_dict=False)[0]
    assert_same_bits([x], [wanted])


def test_threads_that_share_a_scheduler_break_nothing_but_its_loop() -> None:
    """diffusers' schedulers hold one loop's state, so the numbers are anybody's; memory and later loops are not."""
    outputs = [t.repeat(1, 40, 40) for t in tensors(4, 16, 16)]  # large enough to let other threads in
    scheduler = made("UniPCMultistep")
    wanted = loop(scheduler, outputs)

    def work() -> None:
        for _ in range(5):
            try:
                loop(scheduler, outputs)
                scheduler.set_timesteps(STEPS)
            except Exception:  # whatever diffusers' own says of a state that others have changed
                scheduler.set_timesteps(STEPS)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.set_timesteps(STEPS)
    assert_same_bits([loop(scheduler, outputs)], [wanted])


def test_a_compiled_function_around_a_step_gives_what_diffusers_gives() -> None:
    """There the scheduler's own step is traced, whose scalars are float32."""
    outputs, scheduler, theirs = tensors(), made("DDIM"), original("DDIM")

    def after(output: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        return scheduler.step(output, timestep, x, return_dict=False)[0] + 1

    compiled = torch.compile(after, backend="eager")
    for i, t in enumerate(scheduler.timesteps):
        wanted = theirs.step(outputs[i], t, outputs[-1], return_dict=False)[0] + 1
        assert_same_bits([compiled(outputs[i], t, outputs[-1])], [wanted])
        torch.testing.assert_close(after(outputs[i], t, outputs[-1]), wanted, rtol=1e-5, atol=1e-5)


@given(data=st.data())
def test_any_order_of_any_timesteps_gives_what_fresh_schedulers_give(data: st.DataObject) -> None:
    """Whatever came before, a step of a scheduler without state is that of a fresh one."""
    scheduler, outputs = made("DDIM"), tensors()
    loop(scheduler, outputs)
    for index in data.draw(st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=12)):
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
        named = data.draw(st.booleans())
        output, x = outputs[index].to(dtype), outputs[-1 - index].to(dtype)
        fresh = made("DDIM")
        extra = {"return_dict": False} if named else {}
        found = scheduler.step(output, scheduler.timesteps[index], x, **extra)
        wanted = fresh.step(output, fresh.timesteps[index], x, **extra)
        assert_same_bits(list(found), list(wanted)) if named else assert_same_bits(
            [found.prev_sample, found.pred_original_sample], [wanted.prev_sample, wanted.pred_original_sample]
        )


@pytest.mark.parametrize("form", [lambda t: t[None], lambda t: t.expand(2)], ids=["one element", "expanded"])
def test_a_view_of_a_timestep_is_known_by_its_address(form: Callable[[Tensor], Tensor], looked_up: list[str]) -> None:
    scheduler, outputs = made("DDPMWuerstchen"), tensors()

    def run() -> Tensor:
        x = outputs[-1]
        generator = torch.Generator().manual_seed(3)
        for i, t in enumerate(scheduler.timesteps[:-1]):
            x = scheduler.step(outputs[i], form(t), x, return_dict=False, generator=generator)[0]
        return x

    first = run()
    run()
    looked_up.clear()
    assert_same_bits([run()], [first])
    assert len(looked_up) == 1
    theirs = original("DDPMWuerstchen")
    x, generator = outputs[-1], torch.Generator().manual_seed(3)
    for i, t in enumerate(theirs.timesteps[:-1]):
        x = theirs.step(outputs[i], form(t), x, return_dict=False, generator=generator)[0]
    assert torch.allclose(first, x, atol=3e-4, rtol=3e-4)


def test_what_only_looks_like_a_view_of_a_timestep_is_read() -> None:
    scheduler = made("DDPMWuerstchen")
    position = scheduler_cache.current_cache_of(scheduler).plan_cache.position
    timesteps = scheduler.timesteps
    assert [position(t) for t in timesteps] == list(range(len(timesteps)))
    assert position(timesteps[2].expand(3)) == 2
    assert position(timesteps[1:3]) is None
    assert position(timesteps[2:2]) is None
    assert position(timesteps[2].clone()) is None
    assert position(timesteps[2].double()) is None
    assert position(timesteps[2][None, None]) is None


@pytest.mark.parametrize("kind", ["learned_range", "learned"])
def test_a_learned_variance_that_the_last_step_does_not_ask_for(kind: str) -> None:
    """Its output has twice the channels of the sample, though nothing but the fused step is to be done."""
    outputs = [torch.cat([t, t.abs() * 0.1], 1) for t in tensors()]

    def run(scheduler: Any, first: int) -> Tensor:
        scheduler.set_timesteps(STEPS)
        x, generator = outputs[-1][:, :3], torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps[first:]):
            x = scheduler.step(outputs[i], t, x, return_dict=False, generator=generator)[0]
        return x

    ours, theirs = made("DDPM", variance_type=kind), original("DDPM", variance_type=kind)
    for first in (0, STEPS - 1):
        wanted = run(theirs, first)
        for _ in range(3):
            assert torch.allclose(run(ours, first), wanted, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("name", ["generator", "variance_noise"])
def test_an_argument_whose_name_a_program_put_together(name: str) -> None:
    """It is equal to the name that a parameter has, and another object."""
    outputs = tensors()
    together = "".join([name[:4], name[4:]])
    assert together is not name

    def run(scheduler: Any, called: str) -> Tensor:
        scheduler.set_timesteps(STEPS)
        value = torch.Generator().manual_seed(1) if name == "generator" else outputs[-2]
        x = outputs[-1]
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(outputs[i], t, x, eta=0.5, return_dict=False, **{called: value})[0]
        return x

    wanted = run(made("DDIM"), sys.intern(name))
    scheduler = made("DDIM")
    for called in (together, together, together, sys.intern(name), together):
        assert_same_bits([run(scheduler, called)], [wanted])
