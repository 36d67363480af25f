# SPDX-License-Identifier: MIT
"""What hangs on a scheduler: the schedule and the plans that it has found, and what is known of its last step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeVar, cast

from torch import Tensor

from ..ops import backends
from ..philox import as_seeds
from .compiler.inputs import CACHE, TENSOR_ARGUMENTS, USUAL_ARGUMENTS
from .compiler.plan import Fallback, Plan
from .reads import reads_of
from .running import draw, launch, run_plan
from .schedule import PLAIN, KeptAttribute, Schedule, comparable


class _NoLoop:
    """Stands in for the extension's `Loop` where there is none: every step's plan is looked up."""

    plan: Plan | None = None
    undisturbed_at = -1

    def __init__(self, choice: Mapping[str, Any]) -> None:
        self.steps_taken = self._moves = 0

    def move(self) -> int:
        self._moves += 1
        return self._moves

    def remember(self, *step: Any) -> None:
        return None

    def forget(self) -> None:
        return None

    def begin(self, *step: Any) -> None:
        return None

    def keep_beginning(self, found: Any) -> None:
        return None

    def adopt(self, other: Any) -> None:
        return None

    def unchanged(self, scheduler: Any) -> bool:
        return False


#: What knows the last step, and takes one that follows it with nothing changed between (csrc/bindings/loop.h).
_Loop: Any = getattr(backends.extension, "Loop", _NoLoop)
_Method = TypeVar("_Method", bound=Callable[..., Any])


def goes_on(name: str, arguments: Sequence[str]) -> Callable[[_Method], _Method]:
    """Make of a method that takes the step called `name` one that goes on from the last step where it can.

    `arguments` are the names of those that may be passed by place.
    """

    def decorate(otherwise: _Method) -> _Method:
        if backends.extension is None:
            return otherwise
        stepping = backends.extension.Stepping(name, otherwise, tuple(arguments))
        return cast(_Method, functools.update_wrapper(stepping, otherwise))

    return decorate


class Known(IntEnum):
    """What an argument has to be in the next call for its step to go on from this one (`Known` in csrc/bindings)."""

    SAME = 0
    LIKE = 1
    MOVING = 2


class Begun(IntEnum):
    """What an argument has to be for a loop to begin as one before (`KeptArgument` in csrc/bindings)."""

    EQUAL = 0
    LIKE = 1
    MOVING = 2
    ANY = 3


def _begun(schedule: Schedule, name: str, value: Any) -> tuple[str, Begun, Any, int] | None:
    """None for an argument that cannot be compared at once."""
    if name == "generator":
        return name, Begun.ANY, None, 0  # no plan asks which one it is
    if not isinstance(value, Tensor):
        return (name, Begun.EQUAL, value, 0) if type(value) in PLAIN else None
    if name in TENSOR_ARGUMENTS:
        return (name, Begun.LIKE, value, 0) if comparable(value) else None
    place = schedule.position(value)
    return None if place is None else (name, Begun.MOVING, value, place)


def _known(schedule: Schedule, name: str, value: Any) -> Known | None:
    """None for a tensor whose numbers count."""
    if not isinstance(value, Tensor):
        return Known.SAME
    if name in TENSOR_ARGUMENTS:
        return Known.LIKE
    return Known.MOVING if schedule.position(value) is not None else None


class Fused(_Loop):  # type: ignore[misc]
    """What a scheduler has beside its own attributes; not part of its configuration, copies or pickles.

    `plan` is that of the last step, where the next may follow it at once; `steps_taken` counts since the seeds were
    given or the timesteps set, and is the step of noise drawn inside.

    Attributes:
        schedule: what stays from step to step, with the plans.
        seeds: of noise that the fused step draws, or None.
    """

    def __init__(self, scheduler: Any, beside: Fused | None = None) -> None:
        """Look at a scheduler; or, `beside` what hangs on another with the same attributes, at nothing yet."""
        super().__init__(backends.forced)
        if beside is not None:
            self.adopt(beside)
        self.schedule: Schedule = Schedule(scheduler) if beside is None else beside.schedule
        self.seeds: int | Sequence[int] | Tensor | None = None
        #: The plan of the last step that was looked up, or why there was none.
        self.latest: Plan | Fallback | None = None
        #: Whether the schedule has to be looked at anew, for numbers may have been written that nobody counts.
        self.look_again = False
        #: Whether the last step that was looked up was none of a loop.
        self.irregular = False
        #: The plan of the last look at `scale_model_input`.
        self.scaling: Plan | None = None
        self._seeds_kept: Tensor | None = None
        #: Of the last step that was looked up: how many had been taken, the timestep's place, the call's numbers.
        self._last: tuple[int, int | None, list[Any]] = (-1, None, [])

    def use_seeds(self, seeds: int | Sequence[int] | Tensor | None) -> None:
        """Draw noise inside the step from now on, or not any more."""
        self.seeds = seeds.clone() if isinstance(seeds, Tensor) else seeds if isinstance(seeds, int) else _listed(seeds)
        self.steps_taken, self._seeds_kept = 0, None
        self.forget()

    def invalidate(self) -> None:
        """Compare and look up everything anew with the next step."""
        self.look_again = True
        self.forget()
        self.adopt(_Loop(backends.forced))  # which has no first steps of earlier loops

    def seeds_for(self, sample: Tensor) -> Tensor:
        """The seeds as a tensor beside the samples, kept for the loop."""
        kept = self._seeds_kept
        if kept is None or kept.device != sample.device or len(kept) != len(sample):
            assert self.seeds is not None
            kept = self._seeds_kept = as_seeds(self.seeds, sample.shape[0], sample.device)
        return kept

    def is_regular(self, given: Mapping[str, Any]) -> bool:
        """Whether a step is one of a loop: one timestep on from the last, with the same numbers.

        Where timesteps come in any order, or eta is another each time, no step follows from the last one, and what
        would be remembered of it is never used.
        """
        timestep = given.get("timestep")
        place = self.schedule.position(timestep) if isinstance(timestep, Tensor) else None
        now = self.steps_taken, place, [value for value in given.values() if type(value) in (int, float)]
        before, self._last = self._last, now
        # Where the last one was the first of its kind, or taken in C++, nothing says that this is no loop.
        follows = before[0] != now[0] - 1 or (place is not None and before[1] == place - 1 and before[2] == now[2])
        self.irregular = place is None or not follows
        return not self.irregular

    def go_on_from(self, plan: Plan, method: str, guided: bool, given: Mapping[str, Any], scheduler: Any) -> None:
        """Look at the scheduler and the call after a step that was taken the longer way."""
        schedule = self.schedule
        names = (*USUAL_ARGUMENTS, *(name for name in given if name not in USUAL_ARGUMENTS))
        known = [(name, given.get(name), _known(schedule, name, given.get(name))) for name in names]
        if known[1][2] is Known.MOVING and all(kind is not None for _, _, kind in known):
            self.remember(
                plan, vars(scheduler), method, guided, known, schedule.step_bytes, schedule.tensors_read(),
                reads_of(scheduler.original), type(scheduler),
            )  # fmt: skip
        else:
            self.forget()

    def begin_from(
        self, plan: Plan, scheduler: Any, schedule: Schedule, method: str, guided: bool, given: Mapping[str, Any],
        before: list[KeptAttribute],
    ) -> None:  # fmt: skip
        """Let later loops begin with this step at once, where they stand as the scheduler stood `before` it."""
        if backends.forced.get() is not None:
            return  # a loop does not begin at once there
        given = {"model_output": given["sample"], **given}  # what scales the model's input has but one tensor
        names = (*USUAL_ARGUMENTS, *(name for name in given if name not in USUAL_ARGUMENTS))
        arguments = [_begun(schedule, name, given.get(name)) for name in names]
        if arguments[1] is None or arguments[1][1] is not Begun.MOVING or None in arguments:
            return
        self.keep_beginning(
            (plan, type(scheduler), method, guided, self.seeds is not None, before, arguments, schedule,
             schedule.step_bytes, reads_of(scheduler.original))
        )  # fmt: skip

    # What the loop in C++ leaves to Python.

    draw = staticmethod(draw)
    launch = staticmethod(launch)

    def run(self, plan: Plan, attributes: dict[str, Any], given: Mapping[str, Any], uncond: Any, guidance: Any) -> Any:
        """A step by a plan that is not `simple`."""
        seeds = self.seeds_for(given["sample"]) if plan.uses_seeds else None
        return run_plan(plan, attributes, given, uncond, guidance, seeds, self.steps_taken)


def _listed(seeds: Sequence[int] | None) -> list[int] | None:
    return None if seeds is None else list(seeds)


def fused_of(scheduler: Any) -> Fused:
    """What hangs on a scheduler, with the schedule that it has now."""
    attributes = vars(scheduler)
    fused: Fused | None = attributes.get(CACHE)
    if fused is None:
        fused = attributes[CACHE] = Fused(scheduler)
    elif fused.look_again or not fused.schedule.holds(attributes):
        before = fused.schedule
        fused.schedule = Schedule(scheduler, None if fused.look_again else before)
        fused.look_again = False
        # A loop that began as an earlier one has looked at nothing, and goes on where the numbers are the same.
        if fused.schedule.plans is not before.plans:
            fused.forget()
    return fused
