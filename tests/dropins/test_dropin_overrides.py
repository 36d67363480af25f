# SPDX-License-Identifier: MIT
"""What somebody overrides or replaces below a scheduler's `step` is called, as often as in diffusers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch

from fastdiff.diffusers.compiler.plan import Fallback
from support.dropin_cases import Case
from support.dropin_helpers import CLASSES, Loop, classes, forget_plans, made, quiet

STEPS = 4
#: Methods that fastdiff replaces itself, or that only say what the state is.
_NOT_BELOW = ("step", "scale_model_input", "set_timesteps", "undo_step", "step_prk", "step_plms", "__len__")


def case(name: str) -> Case:
    return Case(name, {}, 2 if name == "ConsistencyDecoder" else STEPS, {}, shape=(1, 4, 4, 4))


@functools.cache
def helpers(name: str) -> list[str]:
    """The methods that diffusers' own step calls on the scheduler."""
    original = classes(name)[0]
    functions = {
        value.__code__: attribute
        for base in reversed(original.__mro__)
        for attribute, value in vars(base).items()
        if isinstance(value, FunctionType) and attribute not in _NOT_BELOW and not attribute.startswith("__")
    }
    called: set[str] = set()

    def watch(frame: Any, event: str, _: Any) -> None:
        caller = frame.f_back.f_code.co_qualname if sys.version_info >= (3, 11) and frame.f_back else ""
        if event == "call" and frame.f_code in functions and "set_timesteps" not in caller:
            called.add(functions[frame.f_code])

    loop = made(case(name), original)

    def step(*args: Any, **kwargs: Any) -> Any:
        sys.setprofile(watch)
        try:
            return loop.scheduler.step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    loop.run(step=step)
    return sorted(called)


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code.co_name != "look_up":
            calls.append(function.__name__)
        return function(*args, **kwargs)

    return replacement


def replace_on(helper: str, replacement: Callable[..., Any], scheduler: Any) -> None:
    vars(scheduler)[helper] = functools.partial(replacement, scheduler)


def run(name: str, scheduler_class: type, prepare: Callable[[Any], None] = lambda _: None) -> Loop:
    loop = made(case(name), scheduler_class)
    assert loop.error is None
    prepare(loop.scheduler)
    with quiet():
        return loop.run()


def same(ours: Loop, theirs: Loop) -> None:
    assert (ours.error is None) == (theirs.error is None), (ours.error, theirs.error)
    assert len(ours.outputs) == len(theirs.outputs)
    torch.testing.assert_close(ours.sample, theirs.sample, rtol=1e-3, atol=1e-3, equal_nan=True)


NAMES = [name.removesuffix("Scheduler") for name in CLASSES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["a subclass", "the object", "diffusers' class", "our class"])
def test_what_is_replaced_below_the_step_is_called(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, ours = classes(name)
    if not helpers(name):
        pytest.skip("its step calls none of its methods once the model's input has been scaled")
    for helper in helpers(name):
        forget_plans()
        function = getattr(original, helper)
        plain = run(name, ours)  # there are plans of the class as it was
        found: dict[str, Loop] = {}
        calls: dict[str, list[str]] = {"ours": [], "theirs": []}
        for whose, base in (("theirs", original), ("ours", ours)):
            replacement = counted(function, calls[whose])
            if way == "a subclass":
                found[whose] = run(name, type("Own", (base,), {helper: replacement}))
            elif way == "the object":
                found[whose] = run(name, base, functools.partial(replace_on, helper, replacement))
            else:
                target = original if way == "diffusers' class" or whose == "theirs" else ours
                with monkeypatch.context() as patch:
                    patch.setattr(target, helper, replacement)
                    found[whose] = run(name, base)
        same(found["ours"], found["theirs"])
        assert calls["theirs"], helper
        assert len(calls["ours"]) == len(calls["theirs"]), helper
        if way in ("diffusers' class", "our class"):
            same(run(name, ours), plain)  # put back, it is fused again
            assert len(calls["ours"]) == len(calls["theirs"])


def test_a_class_replaced_in_the_middle_of_a_loop_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = CLASSES["DDIMScheduler"]()
    x = torch.ones(1, 1, 4, 4)

    def loop(at: int) -> list[float]:
        scheduler.set_timesteps(6)
        values = []
        for i, t in enumerate(scheduler.timesteps):
            if i == at:
                monkeypatch.setattr(scheduler.original, "_get_variance", lambda *_, **__: torch.tensor(0.25))
            step = scheduler.step(x, t, x, eta=1.0, generator=torch.Generator().manual_seed(0))
            values.append(step.prev_sample.mean().item())
        monkeypatch.undo()
        return values

    plain = [loop(99) for _ in range(3)][-1]  # by now the steps follow each other
    replaced = loop(3)
    assert replaced[:3] == plain[:3]
    assert all(a != b for a, b in zip(replaced[3:], plain[3:], strict=True))
    assert loop(99) == plain


def test_explain_names_what_is_overridden() -> None:
    import fastdiff.diffusers as dropins

    class Own(dropins.DDPMScheduler):
        def _get_variance(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_variance(*args, **kwargs)

    scheduler = Own()
    scheduler.set_timesteps(3)
    x = torch.ones(1, 1, 4, 4)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert scheduler._fused.latest == Fallback("uses _get_variance, which Own overrides")


def test_a_subclass_that_overrides_nothing_of_the_step_stays_fused() -> None:
    import fastdiff.diffusers as dropins

    class Own(dropins.DDIMScheduler):
        def describe(self) -> str:
            return "something else"

    scheduler = Own()
    scheduler.set_timesteps(3)
    x = torch.ones(1, 1, 4, 4)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert not isinstance(scheduler._fused.latest, Fallback)


@pytest.mark.parametrize("on_the_object", [False, True])
def test_guidance_goes_through_a_step_of_one_s_own(on_the_object: bool) -> None:
    import fastdiff.diffusers as dropins

    class Own(dropins.DDIMScheduler):
        def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            return super().step(0.5 * model_output, *args, **kwargs)

    x, cond, uncond = (torch.full((1, 1, 4, 4), value) for value in (1.0, 3.0, 2.0))
    results = []
    for kind in (dropins.DDIMScheduler, dropins.DDIMScheduler if on_the_object else Own):
        scheduler = kind()
        scheduler.set_timesteps(4)
        if kind is dropins.DDIMScheduler and results:
            plain = scheduler.step
            scheduler.step = lambda m, *args, plain=plain, **kwargs: plain(0.5 * m, *args, **kwargs)
        t = scheduler.timesteps[0]
        given = (uncond, cond, 2.0) if results else (0.5 * uncond, 0.5 * cond, 2.0)
        results.append([scheduler.guided_step(*given, t, x, return_dict=False)[0] for _ in range(3)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)
