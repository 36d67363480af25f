# SPDX-License-Identifier: MIT
"""The per-scheduler cache of steps in Python, for an install without the extension; twin of csrc/dropin/step_cache.h.

It takes the next step of a loop, and the first step of a loop like an earlier one, without looking up a plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..compiler.inputs import CACHE, USUAL_ARGUMENTS
from ..compiler.plan import Plan
from .guards import FirstStep, Guard, GuardKind, HostCopy
from .plan_cache import class_version, version_of

#: First steps kept for each class: those of a few configurations, sizes, numbers of steps and methods in turn.
MOST_FIRST_STEPS = 32
#: The result of a cache that does not know the step.
MISS: Any = object()


class FirstSteps:
    """The first steps of all schedulers of one diffusers class, the latest first."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, FirstStep]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, first_step: FirstStep) -> None:
        """Keep a first step; the oldest is dropped."""
        version = class_version(first_step.scheduler_class)
        self._entries = [(version, first_step), *self._entries[: MOST_FIRST_STEPS - 1]]

    def clear(self) -> None:
        """Drop all of them."""
        self._entries = []

    def find(
        self, scheduler: Any, method: str, seeded: bool, call: Call, copies: Sequence[HostCopy]
    ) -> FirstStep | None:
        """Return the first step whose guards hold; `copies`: of the scheduler's arrays on devices."""
        attributes = vars(scheduler)
        timesteps = attributes.get("timesteps")
        if not isinstance(timesteps, Tensor):
            return None
        wanted = type(scheduler), class_version(type(scheduler)), method, call.uncond is not None, seeded
        for version, entry in self._entries:
            due = timesteps.data_ptr() + entry.place * entry.step_bytes
            if (
                (entry.scheduler_class, version, entry.method, entry.guided, entry.seeded) == wanted
                and check_arguments(entry.arguments, call, due)
                and check_attributes(entry.attributes, attributes, copies)
            ):
                self._entries.remove((version, entry))
                self._entries.insert(0, (version, entry))
                return entry
        return None


class Call:
    """The arguments of one call of a step method.

    Attributes:
        arguments: by name; under guidance `model_output` is the conditional one.
        uncond, guidance_scale: of `guided_step`, else None.
    """

    __slots__ = ("arguments", "guidance_scale", "uncond")

    def __init__(self, arguments: dict[str, Any], uncond: Any = None, guidance_scale: Any = None) -> None:
        self.arguments, self.uncond, self.guidance_scale = arguments, uncond, guidance_scale

    @staticmethod
    def read(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """Read a call; None for one that the cache does not take: wrong arguments, a guidance rescale.

        Args:
            names: of the positional arguments; those of `guided_step` begin with `model_output_uncond`.
            args, kwargs: of the call, without the scheduler.
        """
        found = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(found) != len(args) + len(kwargs):
            return None
        call = Call(found)
        if names[:1] == ("model_output_uncond",):
            call.uncond = found.pop("model_output_uncond", None)
            call.guidance_scale = found.pop("guidance_scale", None)
            found["model_output"] = found.pop("model_output_cond", None)
            rescale = found.pop("guidance_rescale", 0.0)
            if call.uncond is None or call.guidance_scale is None or not (type(rescale) is float and rescale == 0.0):
                return None
        return call if all(name in found for name in USUAL_ARGUMENTS) else None


class _Snapshot:
    """A scheduler's attributes after a step, by identity."""

    def __init__(self, attributes: Mapping[str, Any], reads: Mapping[str, None], tensors: Sequence[Tensor]) -> None:
        self._reads, self._num_reads, self._tensors = reads, len(reads), tensors
        self._names = list(attributes)
        self._values = {name: value for name, value in attributes.items() if name in reads}
        self._lists = {name: list(value) for name, value in self._values.items() if isinstance(value, list)}
        self._versions = [version_of(tensor) for tensor in tensors]

    def renewed(self, attributes: Mapping[str, Any]) -> _Snapshot:
        """Return a snapshot of the same scheduler now."""
        return _Snapshot(attributes, self._reads, self._tensors)

    def unchanged(self, attributes: Mapping[str, Any]) -> bool:
        """Return whether every attribute that steps read is the same object, and no array has been written."""
        return (
            len(self._reads) == self._num_reads
            and list(attributes) == self._names
            and all(attributes[name] is value for name, value in self._values.items())
            and all(_same_items(items, attributes[name]) for name, items in self._lists.items())
            and [version_of(tensor) for tensor in self._tensors] == self._versions
        )


class _NextModelInput:
    """The sample that the last step returned, and the model input for the next step if that step wrote it in its pass.

    A step writes it once a sample was scaled as the step before had returned it, and no more once it was not asked for.
    """

    def __init__(self) -> None:
        self._sample: weakref.ref[Tensor] | None = None
        self._version = 0
        self._scaled: Tensor | None = None
        self._wanted = False

    def record(self, sample: Tensor | None, scaled: Tensor | None) -> None:
        """Record the step that has been taken; None for a sample that cannot be told from another tensor."""
        self.clear()
        if sample is None:
            return
        if sample.is_inference():  # writes to it are not counted
            self._wanted = False
            return
        self._sample, self._version, self._scaled = weakref.ref(sample), sample._version, scaled

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the step's sample, not written since."""
        return (
            self._sample is not None
            and self._sample() is tensor
            and tensor._version == self._version
            and not (tensor.requires_grad and torch.is_grad_enabled())
        )

    def take(self) -> Tensor | None:
        """Return the model input, and keep no reference to it."""
        scaled, self._scaled = self._scaled, None
        return scaled

    def begin_step(self) -> bool:
        """Drop what was not asked for, and return whether to write the next model input."""
        self._wanted = self._wanted and self._scaled is None
        self.clear()
        return self._wanted

    def expect_again(self) -> None:
        """Have the next steps write their model inputs."""
        self._wanted = True

    def clear(self) -> None:
        """Forget the last step's sample."""
        self._sample = self._scaled = None


class StepCache:
    """Knowledge of a scheduler's last step, by which the next one is taken.

    Args:
        forced_backend: the context variable of a forced backend.
        execute: the executor, `fastdiff.diffusers.runtime.execute.execute`.
        first_steps: of the scheduler's class.

    Attributes:
        steps_taken: since the seeds were given or the timesteps set.
        last_miss_epoch: the epoch at which the last call lacked a next plan and nothing else; else -1.
        seeded: noise comes from the samples' own seeds.
        plan: of the last step; None where no step may follow from it.
        plan_cache: of the scheduler, or None.
    """

    def __init__(self, forced_backend: ContextVar[str | None], execute: Callable[..., Any], first_steps: Any) -> None:
        self._forced_backend, self._execute, self._first_steps = forced_backend, execute, first_steps
        self.steps_taken, self.last_miss_epoch, self._epoch = 0, -1, 0
        self.seeded = False
        self.plan: Plan | None = None
        self.plan_cache: Any = None
        self._snapshot: _Snapshot | None = None
        self._next_model_input = _NextModelInput()
        self._host_copies: Sequence[HostCopy] = ()

    def install(
        self, plan: Plan, attributes: Mapping[str, Any], method: str, guided: bool, arguments: Sequence[Guard],
        timestep: Tensor, step_bytes: int, tensors: Sequence[Tensor], reads: Mapping[str, None], scheduler_class: type,
    ) -> None:  # fmt: skip
        """Record a step whose plan was looked up, so that the next one can follow from it.

        Args:
            plan: of the step.
            attributes: of the scheduler after it.
            method, guided: of the call.
            arguments: the guards of the call's arguments.
            timestep: of the call, a view of the schedule.
            step_bytes: how far apart timesteps lie in memory.
            tensors: arrays whose writes count.
            reads: the attributes that steps of the class read.
            scheduler_class: the scheduler's.
        """
        self._next_model_input.clear()
        self._record(
            plan, attributes, method, guided, arguments, timestep, step_bytes, tensors, reads, scheduler_class,
        )  # fmt: skip

    def _record(
        self, plan: Plan, attributes: Mapping[str, Any], method: str, guided: bool, arguments: Sequence[Guard],
        timestep: Tensor, step_bytes: int, tensors: Sequence[Tensor], reads: Mapping[str, None], scheduler_class: type,
    ) -> None:  # fmt: skip
        self._method, self._guided, self._arguments = method, guided, arguments
        self._timestep, self._step_bytes = timestep.data_ptr(), step_bytes
        self._class_version = class_version(scheduler_class)
        self._snapshot = _Snapshot(attributes, reads, tensors)
        self.plan = plan

    def try_next_step(self, scheduler: Any, method: str, call: Call) -> Any:
        """Take the step that follows the last one; `MISS`, with nothing done, where this call is not it."""
        self.last_miss_epoch = -1
        if self.plan is None or (method, call.uncond is not None) != (self._method, self._guided):
            return MISS
        due = self._timestep + self._step_bytes
        if not check_arguments(self._arguments, call, due) or not self.unchanged(scheduler):
            return MISS
        plan = self.plan.next_plan
        if plan is None:
            self.last_miss_epoch = self._epoch
            return MISS
        result, alone = self._run(plan, scheduler, call, scales=False)
        self.steps_taken += 1
        if alone:
            assert self._snapshot is not None
            self._timestep, self.plan = due, plan
            self._snapshot = self._snapshot.renewed(vars(scheduler))
        else:
            self.forget()
        return result

    def try_first_step(self, scheduler: Any, method: str, call: Call) -> Any:
        """Take a step with which an earlier loop began; `MISS`, with nothing done, where there is none."""
        found = self._find(scheduler, method, call)
        if found is None:
            return MISS
        result, alone = self._run(found.plan, scheduler, call, scales=False)
        self.steps_taken += 1
        if alone:
            attributes = vars(scheduler)
            arrays = (attributes.get(guard.name) for guard in found.attributes if guard.kind is GuardKind.ARRAY)
            tensors = [array for array in arrays if isinstance(array, Tensor) and not array.is_inference()]
            self._record(
                found.plan, attributes, method, found.guided, found.arguments, call.arguments["timestep"],
                found.step_bytes, tensors, found.reads, found.scheduler_class,
            )  # fmt: skip
        else:
            self.forget()
        return result

    def try_scaling(self, scheduler: Any, method: str, sample: Any, timestep: Any) -> Any:
        """Scale the model's input: hand out what the last step wrote, or take one pass.

        Returns:
            The scaled sample; `MISS`, with nothing done, where the plan has to be looked up.
        """
        if not isinstance(sample, Tensor):
            return MISS
        call = Call({"model_output": sample, "timestep": timestep, "sample": sample})
        plan = None if self.plan is None else self.plan.scalings.get(sample.dtype)
        if plan is None or not self.unchanged(scheduler):
            found = self._find(scheduler, method, call)
            return MISS if found is None else self._run(found.plan, scheduler, call, scales=True)[0]
        if self._next_model_input.is_of(sample) and _called_plainly():
            self._next_model_input.expect_again()
            guard = self._arguments[USUAL_ARGUMENTS.index("timestep")]
            if guard.check(timestep, self._timestep + self._step_bytes):
                scaled = self._next_model_input.take()
                if scaled is not None:
                    return scaled
        return self._run(plan, scheduler, call, scales=True)[0]

    def unchanged(self, scheduler: Any) -> bool:
        """Return whether the scheduler is as the last step left it."""
        return (
            self.plan is not None
            and self._snapshot is not None
            and self._class_version == class_version(type(scheduler))
            and self._snapshot.unchanged(vars(scheduler))
        )

    def forget(self) -> None:
        """Forget the last step."""
        self.plan = self._snapshot = None
        self._next_model_input.clear()

    def advance_epoch(self) -> int:
        """Count the beginning or the end of a step."""
        self._epoch += 1
        return self._epoch

    def set_seeds(self, seeds: Tensor | None) -> None:
        """Take note of the seeds; the Python executor asks for them itself."""

    def set_host_copies(self, copies: Sequence[HostCopy]) -> None:
        """Take note of the copies of the scheduler's arrays on devices, by which first steps are found."""
        self._host_copies = copies

    def _find(self, scheduler: Any, method: str, call: Call) -> FirstStep | None:
        if self.steps_taken or not len(self._first_steps):
            return None
        found: FirstStep | None = self._first_steps.find(scheduler, method, self.seeded, call, self._host_copies)
        if found is not None:
            self.plan_cache = found.plan_cache
        return found

    def _run(self, plan: Plan, scheduler: Any, call: Call, *, scales: bool) -> tuple[Any, bool]:
        """Execute a plan; also return whether no other thread stepped meanwhile.

        `scales`: the method scales the model's input.
        """
        begun = self.advance_epoch()
        written: list[Tensor] = []
        # Under a mode the step is an operator, whose model input would be copied into the tensor.
        writes = not scales and self._next_model_input.begin_step() and _called_plainly()
        try:
            result = self._execute(
                plan, vars(scheduler), call.arguments, call.uncond, call.guidance_scale, self, None, None,
                written if writes else None,
            )  # fmt: skip
        except BaseException:
            self.forget()
            raise
        if not scales:
            known = plan.model_input_scale() is not None
            sample = (result if plan.result_type is None else result[0]) if known else None
            self._next_model_input.record(sample, written[0] if written else None)
        return result, self.advance_epoch() == begun + 1


def _called_plainly() -> bool:
    """Return whether no mode or transform of torch has to see an operator that is called here."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )


def check_arguments(guards: Sequence[Guard], call: Call, timestep: int | None) -> bool:
    """Return whether the guards of a call's arguments hold; `timestep` is the address of the one that is due."""
    if len(guards) != len(call.arguments):
        return False
    names = (*USUAL_ARGUMENTS, *(name for name in call.arguments if name not in USUAL_ARGUMENTS))
    pairs = zip(guards, names, strict=True)
    return all(guard.name == name and guard.check(call.arguments[name], timestep) for guard, name in pairs)


def check_attributes(guards: Sequence[Guard], attributes: Mapping[str, Any], copies: Sequence[HostCopy] = ()) -> bool:
    """Return whether the guards of a scheduler's attributes hold; `copies`: of its arrays on devices."""
    items = [(name, value) for name, value in attributes.items() if name != CACHE]
    pairs = zip(guards, items, strict=False)
    return len(guards) == len(items) and all(
        guard.name == name and guard.check(value, copies=copies) for guard, (name, value) in pairs
    )


def _same_items(items: list[Any], now: list[Any]) -> bool:
    return len(items) == len(now) and all(a is b for a, b in zip(items, now, strict=True))
