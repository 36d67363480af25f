# SPDX-License-Identifier: MIT
"""What stands before the class of a diffusers scheduler and makes its steps fused ones.

The first time that a scheduler takes a step in some state, the step is traced and compiled to a `Plan`; from then on
the plan is run.  What a plan depends on is looked at in every step, so that what is assigned from outside between two
steps counts: where nothing was and the next timestep follows, by identity alone, which takes a microsecond.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..errors import sentence
from ..noise.brownian_path import BrownianPath
from ..noise.seeded_draws import SeededDraws
from .environment import FUSED, snapshot
from .guidance import combined, combined_by_torch, rescaling
from .loop import Fused, fused_of, goes_on
from .overrides import HOUSE, overriding_class, pristine
from .plan import Plan
from .planning import SCALING, find_plan
from .running import run_plan
from .tracing import USUAL


class FusedScheduler:
    """Mixed in before a diffusers scheduler, of which it replaces the methods named in `stepping`."""

    #: Methods that take a step.
    stepping: ClassVar[tuple[str, ...]] = ("step",)
    #: The diffusers class, and each stepping method's arguments in order, with their defaults.
    original: ClassVar[type]
    arguments: ClassVar[dict[str, tuple[str, ...]]]
    defaults: ClassVar[dict[str, dict[str, Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "original"):
            return  # somebody's class over one of these: what it overrides stays overridden
        cls.original = next(
            base for base in cls.__mro__[1:] if not issubclass(base, FusedScheduler) and hasattr(base, "step")
        )
        # Configurations and pipelines write a class down by its module's library and its name: they find diffusers'.
        cls.__module__ = cls.original.__module__
        _BY_NAME[cls.__name__] = cls
        pristine(cast(Any, cls.original))
        cls.arguments, cls.defaults = {}, {}
        for name in cls.stepping:
            method = getattr(cls.original, name)
            signature = inspect.signature(method)
            cls.arguments[name] = tuple(signature.parameters)[1:]
            cls.defaults[name] = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
            make = _scaling_method if name == SCALING else _stepping_method
            setattr(cls, name, make(name, method, signature))
        if hasattr(cls.original, "set_timesteps"):
            cls.set_timesteps = _setting_method(cls.original.set_timesteps)  # type: ignore[attr-defined]
        if hasattr(cls.original, "undo_step"):
            cls.undo_step = _undoing_method(cls.original.undo_step)  # type: ignore[attr-defined]
        index = getattr(cls.original, "index_for_timestep", None)
        if index is not None and "schedule_timesteps" in inspect.signature(index).parameters:
            cls.index_for_timestep = _index_for_timestep  # type: ignore[attr-defined]
        for base in cls.__mro__[: cls.__mro__.index(cls.original)]:
            HOUSE[base] = dict(vars(base))

    def guided_step(
        self,
        model_output_uncond: Tensor,
        model_output_cond: Tensor,
        guidance_scale: float | Tensor,
        timestep: Any,
        sample: Tensor,
        guidance_rescale: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """`step` of the guided output uncond + scale·(cond − uncond), which is combined within the step.

        Args:
            model_output_uncond, model_output_cond: like `sample`, or with twice the channels for a learned variance.
            guidance_scale: a float, or a tensor ``[]``, ``[1]`` or ``[B]`` in the compute dtype.
            timestep, sample: as in `step`.
            guidance_rescale: φ of arXiv 2305.08891, section 3.4: the guided output is scaled to the standard deviation
                of the conditional one, a share φ of the way.
            kwargs: what `step` takes besides.

        Raises:
            TypeError: the unconditional output is no tensor.
        """
        if not _is_compiling():
            return _guided_step(
                self, model_output_uncond, model_output_cond, guidance_scale, timestep, sample, guidance_rescale,
                **kwargs,
            )  # fmt: skip
        _refuse_seeds(self)
        output = combined_by_torch(
            model_output_uncond, model_output_cond, guidance_scale, guidance_rescale, sample.shape[1]
        )
        return self.original.step(self, output, timestep, sample, **kwargs)  # type: ignore[attr-defined]

    def invalidate(self) -> None:
        """Look at the scheduler's arrays anew before the next step.

        A step follows the numbers that `set_timesteps` finds, and what is assigned or written by torch afterwards.
        Numbers on the CPU that are written in a way that torch does not count (through `Tensor.data`, a numpy view or
        shared memory) are seen by the first step after the next `set_timesteps`, those on a device not at all: call
        this after such a write.
        """
        fused: Fused | None = vars(self).get(FUSED)
        if fused is not None:
            fused.invalidate()

    def use_philox(self, seeds: int | Sequence[int] | Tensor | None) -> None:
        """Draw the step's noise inside the step, each sample's from its own seed; None goes back to generators.

        It is no part of the configuration.  A generator passed to `step` is then not asked.

        Args:
            seeds: one for each sample, as in `fastdiff.randn`; its `step` is the number of steps taken since
                `set_timesteps`.
        """
        fused: Fused | None = vars(self).get(FUSED)
        if fused is None:
            fused = fused_of(self)
        fused.use_seeds(seeds)  # the schedule is nothing to them
        vars(self).pop(_SEEDED, None)
        if seeds is not None:
            vars(self)[_SEEDED] = True
        if "noise_sampler" in vars(self):
            self.noise_sampler = None  # the next step makes the one that belongs to the seeds, or to generators

    @staticmethod
    def never_planned(given: Mapping[str, Any]) -> bool:
        """Whether a call of a step is one for which no plan is looked for."""
        return False

    def step_otherwise(self, name: str, given: Mapping[str, Any]) -> Any:
        """Take a step that has no plan, by the diffusers class's own code."""
        return getattr(self.original, name)(self, **given)

    def stepper(self) -> Any:
        """A scheduler of its own for one loop: its state is its own, the schedule and the plans are shared.

        diffusers' schedulers hold the state of one loop, so threads must not share one; each may have a stepper.
        """
        own = type(self).__new__(type(self))
        for name, value in vars(self).items():
            if name == FUSED:
                beside, value = value, Fused(own, beside=value)
                value.use_seeds(beside.seeds)
                value.steps_taken = beside.steps_taken
            vars(own)[name] = list(value) if isinstance(value, list) else value
        return own

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in (FUSED, _SEEDED)}
        fused: Fused | None = vars(self).get(FUSED)
        if fused is not None and fused.seeds is not None:
            state[_SEEDS] = fused.seeds, fused.steps_taken
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        seeds = state.get(_SEEDS)
        vars(self).update({name: value for name, value in state.items() if name != _SEEDS})
        if seeds is not None:
            sampler = vars(self).get("noise_sampler")
            self.use_philox(seeds[0])
            vars(self)[FUSED].steps_taken = seeds[1]
            if sampler is not None:
                vars(self)["noise_sampler"] = sampler

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        if _BY_NAME.get(name) is not type(self):
            return super().__reduce_ex__(protocol)
        # By the module that the class names, pickle would find diffusers' own.
        return _rebuild, (name,), self.__getstate__()


#: The attribute by which a compiled function sees that there are seeds.
_SEEDED = "_draws_from_seeds"
#: Where a copy or a pickle has the seeds, and the number of steps taken with them.
_SEEDS = "_philox_seeds"
_is_compiling = torch.compiler.is_dynamo_compiling


_GUIDED = "model_output_uncond", "model_output_cond", "guidance_scale", "timestep", "sample", "guidance_rescale"


@goes_on("step", _GUIDED)
def _guided_step(
    self: Any, model_output_uncond: Any, model_output_cond: Any, guidance_scale: Any, timestep: Any, sample: Any,
    guidance_rescale: float = 0.0, **kwargs: Any,
) -> Any:  # fmt: skip
    """A guided step that does not go on from the last one."""
    _check_uncond(model_output_uncond)
    factor = None
    if guidance_rescale != 0.0:
        factor = rescaling(model_output_uncond, model_output_cond, guidance_scale, guidance_rescale, sample)
    if "step" in vars(self) or overriding_class(type(self), self.original, "step") is not None:
        guided = combined(model_output_uncond, model_output_cond, guidance_scale, factor)
        return self.step(guided, timestep, sample, **kwargs)  # somebody's own
    given = {**dict(zip(USUAL, (model_output_cond, timestep, sample), strict=True)), **kwargs}
    return _take(self, "step", (), given, model_output_uncond, guidance_scale, factor)


#: The classes, for pickles.
_BY_NAME: dict[str, type[FusedScheduler]] = {}


def _rebuild(name: str) -> FusedScheduler:
    return _BY_NAME[name].__new__(_BY_NAME[name])


def _stepping_method(name: str, method: Any, signature: inspect.Signature) -> Any:
    @goes_on(name, tuple(signature.parameters)[1:])
    def take(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _take(self, name, args, kwargs, None, None)

    def compiled(self: Any, *args: Any) -> Any:
        _refuse_seeds(self)
        return method(self, *args)  # which torch.compile fuses itself

    # A function of its own signature: to collect arguments and hand them on again would take a tenth of a short step.
    names = list(signature.parameters)
    scope = {"is_compiling": _is_compiling, "compiled": compiled, "take": take}
    scope |= {f"default_{n}": p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    given = ", ".join(names)
    wanted = ", ".join(f"{n}=default_{n}" if f"default_{n}" in scope else n for n in names)
    exec(f"def {name}({wanted}):\n if is_compiling():\n  return compiled({given})\n return take({given})\n", scope)
    step: Any = functools.update_wrapper(cast(Any, scope[name]), method)
    # With the diffusers method's annotations: pipelines look there for `eta` and `generator`.
    step.__signature__ = signature
    return step


def _scaling_method(name: str, method: Any, signature: inspect.Signature) -> Any:
    @functools.wraps(method)
    def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return method(self, *args, **kwargs)
        attributes = self.__dict__
        fused: Fused | None = attributes.get(FUSED)
        # Where nothing has changed since the last step, the factor is the one that was found there before.
        after = fused.plan if fused is not None and len(args) == 2 and not kwargs else None
        if fused is not None and fused.irregular:
            return method(self, *args, **kwargs)  # to look up a plan takes longer, and no step will follow this one
        if fused is None or after is None or attributes.get("_step_index") is None:
            return _take(self, name, args, kwargs, None, None)
        if not fused.unchanged(self):
            return _take(self, name, args, kwargs, None, None)
        sample = args[0]
        if after.next_scale is not None and isinstance(sample, Tensor) and sample.dtype is after.next_scale[0]:
            return sample * after.next_scale[1]
        result = _take(self, name, args, kwargs, None, None)
        plan = fused.scaling
        if plan is not None and fused.plan is after:
            after.next_scale = None if plan.only_scale is None else (plan.dtype, plan.only_scale)
        return result

    scale_model_input.__signature__ = signature  # type: ignore[attr-defined]
    return scale_model_input


def _setting_method(method: Any) -> Any:
    @functools.wraps(method)  # with its signature: pipelines look there for `sigmas` and `timesteps`
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if _is_compiling():
            return result
        fused: Fused | None = vars(self).get(FUSED)
        if fused is not None:
            fused.steps_taken = 0  # noise of `use_philox` starts again with its first step
            fused.look_again = True
        return result

    return set_timesteps


def _index_for_timestep(self: Any, timestep: Any, schedule_timesteps: Any = None) -> Any:
    """As the diffusers class's own, without fetching a view of the schedule from a device."""
    on_device = isinstance(timestep, Tensor) and not _is_compiling() and not timestep.is_cpu
    if schedule_timesteps is None and on_device:
        schedule = fused_of(self).schedule
        place = schedule.position(timestep)
        if place is not None:
            schedule_timesteps = schedule.host["timesteps"]
            timestep = schedule_timesteps[place]
    return self.original.index_for_timestep(self, timestep, schedule_timesteps)


def _refuse_seeds(scheduler: Any) -> None:
    if _SEEDED in scheduler.__dict__:
        raise RuntimeError(
            sentence(
                "step",
                "use_philox",
                "was called, and the step is traced by torch.compile",
                "a step outside of compiled functions",
                "call use_philox(None), or compile the model alone",
            )
        )


def _take_path_of_seeds(attributes: dict[str, Any], fused: Fused, sample: Tensor) -> None:
    """Give a scheduler whose noise belongs to intervals the Brownian path of the samples' own seeds."""
    if "noise_sampler" not in attributes:
        return
    sampler = attributes["noise_sampler"]
    wanted = tuple(sample.shape), sample.dtype, sample.device
    if type(sampler) is BrownianPath and (sampler.shape, sampler.dtype, sampler.seeds.device) == wanted:
        return
    seeds = fused.seeds_for(sample)
    attributes["noise_sampler"] = BrownianPath(sample.shape, seeds, device=sample.device, dtype=sample.dtype)


def _undoing_method(method: Any) -> Any:
    @functools.wraps(method)
    def undo_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused: Fused | None = vars(self).get(FUSED)
        if fused is None or fused.seeds is None:
            return method(self, *args, **kwargs)
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        with SeededDraws(fused.seeds_for(sample), fused.steps_taken):
            result = method(self, *args, **kwargs)
        fused.steps_taken += 1
        return result

    return undo_step


def _check_uncond(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            sentence(
                "guided_step",
                "model_output_uncond",
                f"is a {type(value).__name__}",
                "a tensor like model_output_cond",
                "pass the model's output without the condition, or call step where there is no guidance",
            )
        )


def _take(
    scheduler: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], uncond: Any, scale: Any,
    factor: Tensor | None = None,
) -> Any:  # fmt: skip
    """A step whose plan has to be looked up, or made; or one that the scheduler's own code takes."""
    names = scheduler.arguments[name]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    twice_or_too_many = len(call) != len(args) + len(kwargs)
    found: Fused | None = vars(scheduler).get(FUSED)
    if found is not None and factor is None and not twice_or_too_many:
        result = found.begin(scheduler, name, name == SCALING, found.seeds is not None, call, uncond, scale)
        if result is not None:
            if name == SCALING:
                found.scaling = None  # whichever it was, nobody has looked
            return result
    # What is a default says nothing that the scheduler's own code does not know.
    defaults = scheduler.defaults[name]
    given = {n: value for n, value in call.items() if n not in defaults or value is not defaults[n]}
    output, sample = given.get("model_output"), given.get("sample")
    if name == SCALING:
        output = sample
    if not isinstance(output, Tensor) or not isinstance(sample, Tensor) or twice_or_too_many:
        return getattr(scheduler.original, name)(scheduler, *args, **kwargs)  # which says what is wrong
    if scheduler.never_planned(given):
        return _take_otherwise(scheduler, found, "has a timestep for each token", name, given, uncond, scale, factor)
    fused = fused_of(scheduler)
    if fused.seeds is not None and name != SCALING:
        _take_path_of_seeds(vars(scheduler), fused, sample)
    begun = fused.move()
    undisturbed = fused.undisturbed_at == begun - 1 and factor is None and name != SCALING
    schedule, attributes = fused.schedule, vars(scheduler)

    def plan_of_now() -> Plan | str:
        now = snapshot(attributes)
        return find_plan(
            scheduler, name, given, now, schedule, guided=uncond is not None, seeded=fused.seeds is not None
        )

    plan = fused.latest = plan_of_now()
    if name == SCALING:
        fused.scaling = None if isinstance(plan, str) else plan
    if isinstance(plan, str):
        return _take_otherwise(scheduler, fused, plan, name, given, uncond, scale, factor)
    before = schedule.kept(attributes) if fused.steps_taken == 0 and factor is None else None
    if before is not None and not (plan is plan_of_now() and schedule.holds(attributes)):
        before = None  # another thread came between, and it is no state that this plan is known to be for
    seeds = fused.seeds_for(sample) if plan.seeded else None
    result = run_plan(plan, attributes, given, uncond, scale, seeds, fused.steps_taken, factor)
    alone = fused.move() == begun + 1
    if before is not None and alone:
        fused.begin_from(plan, scheduler, schedule, name, uncond is not None, call, before)
    if name == SCALING:
        return result
    fused.steps_taken += 1
    if undisturbed and alone and fused.plan is not None:  # none: the schedule was looked at anew
        fused.plan.program.follow(plan.program)
    if alone and fused.is_regular(given):
        fused.go_on_from(plan, name, uncond is not None, call, scheduler)
    else:
        fused.forget()
    return result


def _take_otherwise(
    scheduler: Any, fused: Fused | None, reason: str, name: str, given: dict[str, Any], uncond: Any, scale: Any,
    factor: Tensor | None,
) -> Any:  # fmt: skip
    """A step without a plan, for a reason: guidance first, then the scheduler's own way."""
    if uncond is not None:
        given["model_output"] = combined(uncond, given["model_output"], scale, factor)
    if fused is None or name == SCALING:
        return scheduler.step_otherwise(name, given)
    fused.latest = reason
    fused.move()
    fused.forget()
    if fused.seeds is None:
        result = scheduler.step_otherwise(name, given)
    else:
        with SeededDraws(fused.seeds_for(given["sample"]), fused.steps_taken):
            result = scheduler.step_otherwise(name, given)
    fused.steps_taken += 1
    return result
