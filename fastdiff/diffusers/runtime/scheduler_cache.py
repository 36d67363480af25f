# SPDX-License-Identifier: MIT
"""The cache of one scheduler: its step cache, its plan cache, its seeds, and what was found for its last step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ...ops import backends
from ...philox import as_seeds
from ..compiler.inputs import CACHE
from ..compiler.plan import Fallback, Plan
from . import step_cache as in_python
from .execute import execute
from .guards import FirstStep, Guard, GuardKind, HostCopy, argument_guards, attribute_guards
from .plan_cache import PlanCache, arrays_of, copies_of_device_arrays
from .reads import attributes_read

#: In C++ where there is an extension, else in Python.
_StepCache: Any = getattr(backends.extension, "StepCache", in_python.StepCache)
_FirstSteps: Any = getattr(backends.extension, "FirstSteps", in_python.FirstSteps)
_Method = TypeVar("_Method", bound=Callable[..., Any])

#: The first steps of each diffusers class, shared by its schedulers.
_FIRST_STEPS: dict[type, Any] = {}


def first_steps(original: type) -> Any:
    """Return the first steps that schedulers of a diffusers class have begun loops with."""
    found = _FIRST_STEPS.get(original)
    if found is None:
        found = _FIRST_STEPS[original] = _FirstSteps()
    return found


def forget_first_steps() -> None:
    """Drop the first steps of all classes."""
    for each in _FIRST_STEPS.values():
        each.clear()


class SchedulerCache(_StepCache):  # type: ignore[misc]
    """What belongs to a scheduler beside its own attributes; no part of its configuration, copies or pickles.

    Attributes:
        seeds: of the samples, from which noise is drawn; None where generators draw it.
        latest: the plan of the last step that was looked up, or why there was none.
        read_again: the arrays have to be read anew: they may have been written in a way that torch does not count.
        irregular: the last step that was looked up was not one of a loop.
        scaling: the plan of the last look-up for `scale_model_input`.
    """

    plan_cache: Any
    steps_taken: int

    def __init__(self, scheduler: Any) -> None:
        super().__init__(backends.forced, execute, first_steps(scheduler.original))
        self.seeds: int | Sequence[int] | Tensor | None = None
        self.latest: Plan | Fallback | None = None
        self.read_again = False
        self.irregular = False
        self.scaling: Plan | None = None
        self._seeds_tensor: Tensor | None = None
        #: Of the scheduler's arrays on a device, by attribute.
        self._copies: dict[str, HostCopy] = {}
        #: Of the last step that was looked up: the number of steps taken, the timestep's index, the call's numbers.
        self._last: tuple[int, int | None, list[Any]] = (-1, None, [])

    def share_from(self, other: SchedulerCache) -> None:
        """Continue with the seeds and the plans of another scheduler's cache."""
        self.plan_cache = other.plan_cache
        self._set_copies(other._copies)
        self.use_seeds(other.seeds)
        self.steps_taken = other.steps_taken

    def use_seeds(self, seeds: int | Sequence[int] | Tensor | None) -> None:
        """Draw noise from seeds from now on; by generators again for None."""
        if isinstance(seeds, Tensor):
            seeds = seeds.clone()
        elif seeds is not None and not isinstance(seeds, int):
            seeds = list(seeds)
        self.seeds, self.seeded = seeds, seeds is not None
        self.steps_taken = 0
        self._set_seeds_tensor(None)
        self.forget()

    def seeds_for(self, sample: Tensor) -> Tensor:
        """Return the seeds as a tensor on the samples' device, one for each sample, kept for the loop."""
        kept = self._seeds_tensor
        if kept is None or kept.device != sample.device or len(kept) != len(sample):
            assert self.seeds is not None
            kept = as_seeds(self.seeds, sample.shape[0], sample.device)
            self._set_seeds_tensor(kept)
        return kept

    def _set_seeds_tensor(self, seeds: Tensor | None) -> None:
        self._seeds_tensor = seeds
        self.set_seeds(seeds)

    def invalidate(self) -> None:
        """Read the arrays anew before the next step."""
        self.read_again = True
        self._set_copies({})
        self.forget()

    def begin_loop(self, scheduler: Any) -> None:
        """Take note of new timesteps, and copy arrays that are on a device to the host.

        A scheduler's own `set_timesteps` has waited for the device; before the first step, the model is at work there.
        """
        self.steps_taken = 0  # noise of `use_philox` starts again with its first step
        self.read_again = True
        if torch._C._len_torch_dispatch_stack() == 0:
            self._set_copies(copies_of_device_arrays(scheduler, self._copies))

    def read_arrays(self, scheduler: Any) -> None:
        """Bring the plan cache up to date with the scheduler's arrays."""
        before = None if self.read_again else self.plan_cache
        self.plan_cache = PlanCache(scheduler, before, self._copies)
        self.read_again = False

    def _set_copies(self, copies: dict[str, HostCopy]) -> None:
        if copies or self._copies:
            self._copies = copies
            self.set_host_copies(list(copies.values()))

    def is_regular(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a step is one of a loop: one timestep on from the last, with the same numbers.

        Where timesteps come in any order, or eta is another each time, no step follows from the last one, and recording
        it would be for nothing.
        """
        timestep = arguments.get("timestep")
        place = self.plan_cache.position(timestep) if isinstance(timestep, Tensor) else None
        numbers = [value for value in arguments.values() if type(value) in (int, float)]
        steps_before, place_before, numbers_before = self._last
        self._last = self.steps_taken, place, numbers
        # After the first of its kind, or one that the step cache took, nothing says that this is no loop.
        follows = steps_before != self.steps_taken - 1 or (
            place is not None and place_before == place - 1 and numbers_before == numbers
        )
        self.irregular = place is None or not follows
        return not self.irregular

    def install_step(self, plan: Plan, method: str, guided: bool, call: Mapping[str, Any], scheduler: Any) -> None:
        """Record a step whose plan was looked up, so that the next one can follow from it."""
        guards = argument_guards(call, self.plan_cache)
        if guards is None:
            self.forget()
            return
        self.install(
            plan, vars(scheduler), method, guided, guards, call["timestep"], self.plan_cache.step_bytes,
            self.plan_cache.tensors_read(), attributes_read(scheduler.original), type(scheduler),
        )  # fmt: skip

    def add_first_step(
        self, plan: Plan, scheduler: Any, method: str, guided: bool, call: Mapping[str, Any], before: list[Guard],
    ) -> None:  # fmt: skip
        """Let later loops begin with this step at once.

        Args:
            plan: of the step.
            scheduler: the scheduler.
            method, guided, call: of the step.
            before: the guards of the scheduler's attributes as they were before it.
        """
        call = {"model_output": call["sample"], **call}  # scale_model_input has but one tensor
        guards = argument_guards(call, self.plan_cache)
        # An entry outlives the call, and must not hold an object of its caller's.
        if guards is None or any(guard.kind is GuardKind.ID for guard in guards):
            return
        first_step = FirstStep(
            plan=plan,
            scheduler_class=type(scheduler),
            method=method,
            guided=guided,
            seeded=self.seeded,
            attributes=before,
            arguments=guards,
            place=self.plan_cache.position(call["timestep"]),
            step_bytes=self.plan_cache.step_bytes,
            plan_cache=self.plan_cache,
            reads=attributes_read(scheduler.original),
        )
        first_steps(scheduler.original).add(first_step)

    def first_step_guards(self, attributes: Mapping[str, Any], original: type) -> list[Guard] | None:
        """Emit the guards of a scheduler's attributes before a first step; None where they cannot be compared later."""
        if not isinstance(attributes.get("timesteps"), Tensor):
            return None
        return attribute_guards(attributes, attributes_read(original), self.plan_cache.array_guards())


def cache_of(scheduler: Any) -> SchedulerCache:
    """Return the cache of a scheduler, made where there is none."""
    cache: SchedulerCache | None = vars(scheduler).get(CACHE)
    if cache is None:
        cache = vars(scheduler)[CACHE] = SchedulerCache(scheduler)
    return cache


def current_cache_of(scheduler: Any) -> SchedulerCache:
    """Return the cache of a scheduler, with a plan cache for the arrays that the scheduler has now."""
    cache, attributes = cache_of(scheduler), vars(scheduler)
    before = cache.plan_cache
    if before is None or cache.read_again or not before.matches(attributes):
        cache.read_arrays(scheduler)
        # A loop that began like an earlier one has read nothing, and goes on where the numbers are the same.
        if before is not None and cache.plan_cache.plans is not before.plans:
            cache.forget()
    return cache


def begin_loop(scheduler: Any) -> None:
    """Take note of a scheduler's new timesteps; one without a cache gets one where it has arrays on a device."""
    cache: SchedulerCache | None = vars(scheduler).get(CACHE)
    if cache is None and any(isinstance(a, Tensor) and not a.is_cpu for a in arrays_of(scheduler).values()):
        cache = cache_of(scheduler)
    if cache is not None:
        cache.begin_loop(scheduler)


def with_fast_path(method: str, arguments: Sequence[str], *, scales: bool = False) -> Callable[[_Method], _Method]:
    """Make a step method try the scheduler's step cache before its own body.

    Args:
        method: the name of the scheduler's method that the step belongs to.
        arguments: the names of the positional arguments.
        scales: the method scales the model's input; it is called with a sample and a timestep.
    """

    def decorate(fallback: _Method) -> _Method:
        if _StepCache is in_python.StepCache:
            fast = (_scaling_in_python if scales else _in_python)(method, fallback, tuple(arguments))
        else:
            assert backends.extension is not None
            fast = backends.extension.CachedStepMethod(method, fallback, tuple(arguments), _cache_or_none, scales)
        return cast(_Method, functools.update_wrapper(fast, fallback))

    return decorate


def _cache_or_none(scheduler: Any) -> SchedulerCache | None:
    """Return a drop-in scheduler's cache; None for any other object, which the method's own body refuses."""
    return cache_of(scheduler) if hasattr(type(scheduler), "original") else None


def _in_python(method: str, fallback: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        call = in_python.Call.read(names, args, kwargs)
        cache = None if call is None else _cache_or_none(scheduler)
        if call is None or cache is None:
            return fallback(scheduler, *args, **kwargs)
        result = cache.try_next_step(scheduler, method, call)
        if result is in_python.MISS:
            result = cache.try_first_step(scheduler, method, call)
        return fallback(scheduler, *args, **kwargs) if result is in_python.MISS else result

    return step


def _scaling_in_python(method: str, fallback: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def scale(scheduler: Any, sample: Any, timestep: Any) -> Any:
        cache = _cache_or_none(scheduler)
        result = in_python.MISS if cache is None else cache.try_scaling(scheduler, method, sample, timestep)
        return fallback(scheduler, sample, timestep) if result is in_python.MISS else result

    return scale
