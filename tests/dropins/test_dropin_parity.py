# SPDX-License-Identifier: MIT
"""Whole loops of every drop-in beside diffusers' own class, over random configurations.

HYPOTHESIS_PROFILE=thorough takes 200 cases a class; the usual run a few.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.diffusers import CLASSES
from support.dropin_cases import HALVES, OPTIONS, VARIANCE_NOISE, Case, cases
from support.dropin_helpers import (
    MAKES_SAMPLER,
    Drawing,
    Loop,
    classes,
    exact_step,
    exact_walk,
    forget_plans,
    made,
    plans_of,
    values_of,
    walk,
)

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
NAMES = [name for name in OPTIONS if f"{name}Scheduler" in CLASSES]
#: What a whole loop in float32 may differ by, relative to max(1, |x|): the loops round differently, and every step's
#: difference goes on through the model and the history.
LOOP_TOLERANCE = 3e-4


def examples(thorough: int, usual: int) -> Any:
    return settings(max_examples=thorough if THOROUGH else usual)


def test_every_class_is_here() -> None:
    assert {f"{name}Scheduler" for name in OPTIONS} >= CLASSES.keys()


def same_kind(ours: Any, theirs: Any) -> None:
    """The same types, lengths, names, shapes and dtypes."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert tuple(ours) == tuple(theirs)
    a, b = values_of(ours), values_of(theirs)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y)
        if isinstance(y, Tensor):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """How far two tensors are apart, relative to max(1, |x|); what is not finite has to be the same."""
    ours, theirs = ours.double(), theirs.double()
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite) or not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    if not bool((ours[theirs.isinf()] == theirs[theirs.isinf()]).all()):
        return float("inf")
    difference = ((ours - theirs).abs() / theirs.abs().clamp(min=1.0))[finite]
    return float(difference.max()) if difference.numel() else 0.0


def farthest(ours: Loop, theirs: Loop) -> float:
    pairs = zip(ours.outputs, theirs.outputs, strict=False)
    tensors = [(x, y) for a, b in pairs for x, y in zip(values_of(a), values_of(b), strict=True)]
    return max((apart(x, y) for x, y in tensors if isinstance(y, Tensor)), default=0.0)


NOT_FINITE = "has a coefficient that is infinite or not a number"
PER_TOKEN = "scales each sample or element by a number of its own"


def not_fused(case: Case, theirs: Loop) -> set[str]:
    """Why steps of a case may be diffusers' own and not one fused step; docs/diffusers.md lists the same."""
    reasons = set()
    if theirs.error is not None:
        reasons.add(f"raises {type(theirs.error).__name__}")
    if case.per_token:
        reasons.add(PER_TOKEN)
    if case.name == "SASolver" and 4 in (case.config.get("corrector_order"), case.config.get("predictor_order")):
        reasons.add("reads 5 tensors of history, and 4 is the most")
    finite = all(bool(y.isfinite().all()) for out in theirs.outputs for y in values_of(out) if isinstance(y, Tensor))
    if not finite or case.config.get("rescale_betas_zero_snr"):
        # A division by zero. With a terminal SNR of zero the prediction of noise is divided so, and may be clipped.
        reasons.add(NOT_FINITE)
    if case.config.get("variance_type") == "fixed_large_log":
        # The root of the logarithm of a variance that float32 may round to 1, and its logarithm to 0; it is below.
        reasons.add(NOT_FINITE)
    if case.config.get("final_sigmas_type") == "sigma_min" and "sde" in case.config.get("algorithm_type", "sde"):
        # From sigma_min to sigma_min: the root of a difference that rounding alone decides.
        reasons.add(NOT_FINITE)
    return reasons


def check_loop(case: Case) -> Loop:
    """One loop of ours beside diffusers' own."""
    theirs_class, ours_class = classes(case.name)
    drawing = Drawing()
    theirs = made(case, theirs_class)
    if theirs.error is None:
        theirs.run(mode=drawing)
    their_random = theirs.random_states() if theirs.outputs else []
    forget_plans()
    ours = walk(case, ours_class)
    assert (type(ours.error), ours.stage) == (type(theirs.error), theirs.stage), (ours.error, theirs.error)
    event(f"diffusers raises: {theirs.stage.split()[0]}" if theirs.error is not None else "a whole loop")
    assert len(ours.outputs) == len(theirs.outputs)
    for mine, other in zip(ours.outputs, theirs.outputs, strict=True):
        same_kind(mine, other)
    if not theirs.outputs:
        return ours
    for mine, other in zip(ours.random_states(), their_random, strict=True):
        assert torch.equal(mine, other), "a generator stands elsewhere"
    difference = farthest(ours, theirs)
    if not difference <= LOOP_TOLERANCE:
        # Where diffusers' own loop is not that near to exact arithmetic, ours has to be nearer.
        exact = exact_walk(case, drawing.draws)
        assert type(exact.error) is type(theirs.error)
        event("diffusers is not within tolerance of float64")
        # With a terminal SNR of zero the first step divides by 2^-12: 2^-24 of its terms is 2^-12 of what they leave.
        near = 8 * 2.0**-12 if case.config.get("rescale_betas_zero_snr") else LOOP_TOLERANCE
        wrong, theirs_wrong = farthest(ours, exact), farthest(theirs, exact)
        assert wrong <= 1.25 * theirs_wrong + near, (difference, wrong, theirs_wrong)
    allowed = not_fused(case, theirs)
    reasons = {plan for plan in plans_of(ours.scheduler).values() if isinstance(plan, str)}
    assert reasons <= allowed, reasons
    return ours


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_in_float32(name: str) -> None:
    @examples(200, 5)
    @given(cases(name))
    def check(case: Case) -> None:
        check_loop(case)

    check()


@pytest.mark.parametrize("layouts", [("expanded", "contiguous"), ("windows", "expanded"), ("contiguous", "windows")])
@pytest.mark.parametrize("name", NAMES)
def test_elements_of_one_address_are_read_and_results_have_memory_of_their_own(
    name: str, layouts: tuple[str, str]
) -> None:
    noise = "variance_noise" if name in VARIANCE_NOISE else "generator"

    @examples(10, 1)
    @given(st.integers(0, 2**20))
    def check(seed: int) -> None:
        case = Case(name, {}, 4, {}, shape=(3, 4, 8, 6), noise=noise, seed=seed)
        ours = check_loop(case.of(layout=layouts[0], output_layout=layouts[1]))
        assert ours.error is None
        # The first step has samples that overlap, all others the results of the one before.
        results = [value for output in ours.outputs for value in values_of(output) if isinstance(value, Tensor)]
        assert all(result.is_contiguous() for result in results)

    check()


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep"])
@pytest.mark.parametrize("philox", [False, True])
def test_guided_steps_read_elements_of_one_address(name: str, philox: bool) -> None:
    results = []
    for separate in (lambda tensor: tensor, lambda tensor: tensor.clone(memory_format=torch.contiguous_format)):
        generator, scheduler = torch.Generator().manual_seed(3), CLASSES[f"{name}Scheduler"]()
        scheduler.set_timesteps(4)
        if philox:
            scheduler.use_philox([1, 2, 3])
        x = separate(torch.randn(1, 4, 8, 6, generator=generator).expand(3, -1, -1, -1))
        for t in scheduler.timesteps:
            cond = separate(torch.randn(3, 4, 8, 1, generator=generator).expand(-1, -1, -1, 6))
            uncond = separate(torch.randn(3, 1, 8, 6, generator=generator).expand(-1, 4, -1, -1))
            scale = torch.tensor([2.0, 3.0, 4.0])
            torch.manual_seed(int(t))
            x = scheduler.guided_step(uncond, cond, scale, t, x, return_dict=False)[0]
            results.append(x)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(results[:4], results[4:], strict=True))


def unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at numbers of this size, as float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)


def state_of(scheduler: Any) -> dict[str, Any]:
    """What stands in a scheduler, lists apart from its own."""
    return {n: list(v) if isinstance(v, list) else v for n, v in vars(scheduler).items() if n != "_fused"}


def check_steps(case: Case) -> None:
    """Each step of a loop in a half type, ours and diffusers' own from the same state, beside float64."""
    theirs_class, ours_class = classes(case.name)
    theirs, twin = made(case, theirs_class), made(case, ours_class)
    if theirs.error is not None:
        event("diffusers raises")
        return

    failures: list[AssertionError] = []  # apart from those that diffusers' own step may raise

    def step(*args: Any, **kwargs: Any) -> Any:
        before, generator = state_of(theirs.scheduler), kwargs.get("generator")
        generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
        states = [torch.get_rng_state(), *(g.get_state() for g in generators)]
        drawing = Drawing()
        with drawing:
            result = theirs.scheduler.step(*args, **kwargs)
        if case.name in MAKES_SAMPLER and before["noise_sampler"] is None:
            return result
        torch.set_rng_state(states[0])
        for g, state in zip(generators, states[1:], strict=True):
            g.set_state(state)
        for name in vars(twin.scheduler).keys() - before.keys() - {"_fused"}:
            delattr(twin.scheduler, name)
        vars(twin.scheduler).update({n: list(v) if isinstance(v, list) else v for n, v in before.items()})
        ours = twin.scheduler.step(*args, **kwargs)
        exact_scheduler = object.__new__(theirs_class)
        vars(exact_scheduler).update(before)
        exact = exact_step(exact_scheduler, drawing.draws, args, kwargs)
        size = max(float(t.double().abs().max()) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        try:
            same_kind(ours, result)
            for mine, other, right in zip(*map(values_of, (ours, result, exact)), strict=True):
                if isinstance(other, Tensor):
                    near_enough(mine, other, right, size, CONDITION.get(case.name, 0.0))
        except AssertionError as failure:
            failures.append(failure)
        return result

    theirs.run(step=step)
    if failures:
        raise failures[0]


#: UnCLIP's first step divides samples of up to 5 by √ᾱ = 5e-5, and LCM's only one by 4e-4, and both clip all but a few:
#: 2^-24 is what float32 keeps of terms of 1e5 and of 1.2e4 that cancel. A half type that makes both terms one number is
#: right there by luck: 0 where float64 has 4e-5 and float32, of terms of 3.7e4, 2e-3.
CONDITION = {"UnCLIP": 1e5 * 2.0**-24, "LCM": 1.2e4 * 2.0**-24}


def near_enough(ours: Tensor, theirs: Tensor, exact: Tensor, size: float, floor: float) -> None:
    """Elementwise: our error to `exact` is at most diffusers' own and one unit in the last place."""
    finite = theirs.isfinite() & exact.isfinite() & (exact.abs() <= torch.finfo(ours.dtype).max)
    ours_wrong, theirs_wrong = ((x.double() - exact).abs()[finite] for x in (ours, theirs))
    # A float32 result is rounded as often as a sum has terms, and its unit is that of the terms, which may cancel.
    terms = exact if ours.dtype != torch.float32 else exact.abs().clamp(min=size)
    allowed = theirs_wrong + unit(terms, ours.dtype)[finite] + floor
    worst = (ours_wrong - allowed).max() if allowed.numel() else torch.zeros(())
    # Where large terms cancel, a coarse sum may be right by luck: then the largest error of the tensor decides.
    better = bool((ours_wrong <= allowed).all()) or bool(ours_wrong.max() <= theirs_wrong.max())
    assert better, f"{float(worst):.3g} too far of {float(exact[finite].abs().max()):.3g}"


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_half_types(name: str) -> None:
    @examples(200, 3)
    @given(cases(name, HALVES, most_steps=12))
    def check(case: Case) -> None:
        check_steps(case)

    check()
