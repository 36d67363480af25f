# SPDX-License-Identifier: MIT
"""A step that the step cache does not know: look its plan up and execute it, or fall back to the class's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...noise.brownian_path import BrownianPath
from ...noise.seeded_draws import SeededDraws
from ...ops import backends
from ..compiler.inputs import CACHE, snapshot
from ..compiler.plan import Fallback, Plan
from ..guidance import combined
from .execute import execute
from .lookup import SCALING, find_plan
from .scheduler_cache import SchedulerCache, current_cache_of


def take_step(
    scheduler: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None, output_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    """Take a step whose plan has to be looked up.

    Args:
        scheduler: a drop-in scheduler.
        method: the name of its step method.
        args, kwargs: of the call; under guidance `model_output` is the conditional output.
        uncond, guidance_scale: of guidance within the step.
        output_scale: what each sample's model output is multiplied by, ``[B]``.

    Returns:
        What the diffusers class's own method returns.
    """
    call = {**dict(zip(scheduler.arguments[method], args, strict=False)), **kwargs}
    # An argument that is the default says nothing that the scheduler's own code does not know.
    defaults = scheduler.defaults[method]
    arguments = {n: value for n, value in call.items() if n not in defaults or value is not defaults[n]}
    sample = arguments.get("sample")
    output = sample if method == SCALING else arguments.get("model_output")
    twice = len(call) != len(args) + len(kwargs)
    if twice or not isinstance(output, Tensor) or not isinstance(sample, Tensor):
        return getattr(scheduler.original, method)(scheduler, *args, **kwargs)  # which says what is wrong
    if scheduler.never_planned(arguments):
        reason = Fallback("has a timestep for each token")
        cache = vars(scheduler).get(CACHE)
        return _fall_back(scheduler, cache, reason, method, arguments, uncond, guidance_scale, output_scale)
    cache = current_cache_of(scheduler)
    if cache.seeded and method != SCALING:
        _use_path_of_seeds(vars(scheduler), cache, sample)
    begun = cache.advance_epoch()
    missed_next = cache.last_miss_epoch == begun - 1 and output_scale is None and method != SCALING
    attributes = vars(scheduler)

    def current_plan() -> Plan | Fallback:
        return find_plan(
            scheduler, method, arguments, snapshot(attributes), cache.plan_cache, guided=uncond is not None,
            seeded=cache.seeded,
        )  # fmt: skip

    plan = cache.latest = current_plan()
    if method == SCALING:
        cache.scaling = None if isinstance(plan, Fallback) else plan
    if isinstance(plan, Fallback):
        return _fall_back(scheduler, cache, plan, method, arguments, uncond, guidance_scale, output_scale)
    before = None
    if cache.steps_taken == 0 and output_scale is None and backends.forced.get() is None:
        before = cache.first_step_guards(attributes, scheduler.original)
        if before is not None and not (plan is current_plan() and cache.plan_cache.matches(attributes)):
            before = None  # another thread changed the state meanwhile: this plan may not belong to it
    result = execute(plan, attributes, arguments, uncond, guidance_scale, cache, output_scale=output_scale)
    alone = cache.advance_epoch() == begun + 1
    if before is not None and alone:
        cache.add_first_step(plan, scheduler, method, uncond is not None, call, before)
    if method == SCALING:
        return result
    cache.steps_taken += 1
    if missed_next and alone and cache.plan is not None:  # None: the arrays were read anew
        cache.plan.set_next(plan)
    if alone and cache.is_regular(arguments):
        cache.install_step(plan, method, uncond is not None, call, scheduler)
    else:
        cache.forget()
    return result


def _fall_back(
    scheduler: Any, cache: SchedulerCache | None, reason: Fallback, method: str, arguments: dict[str, Any],
    uncond: Tensor | None, guidance_scale: Any, output_scale: Tensor | None,
) -> Any:  # fmt: skip
    """Take a step without a plan: combine the guided output, then run the scheduler's own code."""
    if uncond is not None:
        arguments["model_output"] = combined(uncond, arguments["model_output"], guidance_scale, output_scale)
    if cache is None or method == SCALING:
        return scheduler.unplanned_step(method, arguments)
    cache.latest = reason
    cache.advance_epoch()
    cache.forget()
    if cache.seeds is None:
        result = scheduler.unplanned_step(method, arguments)
    else:
        with SeededDraws(cache.seeds_for(arguments["sample"]), cache.steps_taken):
            result = scheduler.unplanned_step(method, arguments)
    cache.steps_taken += 1
    return result


def _use_path_of_seeds(attributes: dict[str, Any], cache: SchedulerCache, sample: Tensor) -> None:
    """Give a scheduler whose noise belongs to intervals the Brownian path of the samples' seeds."""
    if "noise_sampler" not in attributes:
        return
    sampler = attributes["noise_sampler"]
    wanted = tuple(sample.shape), sample.dtype, sample.device
    if type(sampler) is BrownianPath and (sampler.shape, sampler.dtype, sampler.seeds.device) == wanted:
        return
    seeds = cache.seeds_for(sample)
    attributes["noise_sampler"] = BrownianPath(sample.shape, seeds, device=sample.device, dtype=sample.dtype)
