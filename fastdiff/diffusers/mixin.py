# SPDX-License-Identifier: MIT
"""The mixin that makes a diffusers scheduler a drop-in: it replaces the methods that take a step.

The step cache takes the usual step; any other goes through `fastdiff.diffusers.runtime.step`.  What is assigned to the
scheduler from outside between two steps counts as it does in diffusers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..errors import error_message
from ..noise.seeded_draws import SeededDraws
from .compiler.inputs import CACHE
from .compiler.overrides import OWN_CLASSES, overriding_class, pristine
from .guidance import combined, combined_by_torch, rescaling
from .runtime.lookup import SCALING
from .runtime.scheduler_cache import SchedulerCache, begin_loop, cache_of, current_cache_of, with_fast_path
from .runtime.step import take_step

#: The attribute by which a compiled function sees that there are seeds.
_SEEDED = "_draws_from_seeds"
#: The entry of a copy or a pickle with the seeds and the number of steps taken with them.
_SEEDS = "_philox_seeds"
#: The positional arguments of `guided_step`.
_GUIDED = "model_output_uncond", "model_output_cond", "guidance_scale", "timestep", "sample", "guidance_rescale"
_is_compiling = torch.compiler.is_dynamo_compiling
#: The drop-in classes by name, for pickles.
_BY_NAME: dict[str, type[FusedScheduler]] = {}


class FusedScheduler:
    """Mixin before a diffusers scheduler; it replaces the methods named in `stepping`."""

    #: Methods that take a step.
    stepping: ClassVar[tuple[str, ...]] = ("step",)
    #: The diffusers class, and for each stepping method its arguments in order and their defaults.
    original: ClassVar[type]
    arguments: ClassVar[dict[str, tuple[str, ...]]]
    defaults: ClassVar[dict[str, dict[str, Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "original"):
            return  # a user's class over a drop-in: what it overrides stays overridden
        cls.original = next(
            base for base in cls.__mro__[1:] if not issubclass(base, FusedScheduler) and hasattr(base, "step")
        )
        # Configurations and pipelines record a class by its module's library and its name, which are diffusers'.
        cls.__module__ = cls.original.__module__
        _BY_NAME[cls.__name__] = cls
        pristine(cast(Any, cls.original))
        cls.arguments, cls.defaults = {}, {}
        for name in cls.stepping:
            method = getattr(cls.original, name)
            signature = inspect.signature(method)
            cls.arguments[name] = tuple(signature.parameters)[1:]
            cls.defaults[name] = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
            make = _scaling_method if name == SCALING else _step_method
            setattr(cls, name, make(name, method, signature))
        if hasattr(cls.original, "set_timesteps"):
            cls.set_timesteps = _set_timesteps_method(cls.original.set_timesteps)  # type: ignore[attr-defined]
        if hasattr(cls.original, "undo_step"):
            cls.undo_step = _undo_step_method(cls.original.undo_step)  # type: ignore[attr-defined]
        index = getattr(cls.original, "index_for_timestep", None)
        if index is not None and "schedule_timesteps" in inspect.signature(index).parameters:
            cls.index_for_timestep = _index_for_timestep  # type: ignore[attr-defined]
        for base in cls.__mro__[: cls.__mro__.index(cls.original)]:
            OWN_CLASSES[base] = dict(vars(base))

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
        """Take a step with the guided output uncond + scale·(cond − uncond), which is combined within the step.

        Args:
            model_output_uncond, model_output_cond: like `sample`, or with twice the channels for a learned variance.
            guidance_scale: a float, or a tensor ``[]``, ``[1]`` or ``[B]`` in the compute dtype.
            timestep, sample: as in `step`.
            guidance_rescale: φ of arXiv 2305.08891, section 3.4: the guided output is scaled to the standard deviation
                of the conditional one, a share φ of the way.
            kwargs: the other arguments of `step`.

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
        """Read the scheduler's arrays anew before the next step.

        A step follows the numbers that `set_timesteps` finds, and what is assigned or written by torch afterwards.
        Numbers on the CPU that are written in a way that torch does not count (through `Tensor.data`, a numpy view or
        shared memory) are seen by the first step after the next `set_timesteps`, those on a device not at all: call
        this after such a write.
        """
        cache: SchedulerCache | None = vars(self).get(CACHE)
        if cache is not None:
            cache.invalidate()

    def use_philox(self, seeds: int | Sequence[int] | Tensor | None) -> None:
        """Draw the step's noise from seeds, each sample's from its own; None goes back to generators.

        It is no part of the configuration.  A generator passed to `step` is then not asked.

        Args:
            seeds: one for each sample, as in `fastdiff.randn`; its `step` is the number of steps taken since
                `set_timesteps`.
        """
        cache_of(self).use_seeds(seeds)
        vars(self).pop(_SEEDED, None)
        if seeds is not None:
            vars(self)[_SEEDED] = True
        if "noise_sampler" in vars(self):
            self.noise_sampler = None  # the next step makes the one that belongs to the seeds, or to generators

    @staticmethod
    def never_planned(arguments: Mapping[str, Any]) -> bool:
        """Return whether no plan is looked up for a call with these arguments."""
        return False

    def unplanned_step(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Take a step that has no plan, by the diffusers class's own code."""
        return getattr(self.original, method)(self, **arguments)

    def stepper(self) -> Any:
        """Return a scheduler with a state of its own for one loop, which shares the schedule and the plans.

        diffusers' schedulers hold the state of one loop, so threads must not share one; each may have a stepper.
        """
        own = type(self).__new__(type(self))
        for name, value in vars(self).items():
            if name == CACHE:
                shared, value = value, SchedulerCache(own)
                value.share_from(shared)
            vars(own)[name] = list(value) if isinstance(value, list) else value
        return own

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in (CACHE, _SEEDED)}
        cache: SchedulerCache | None = vars(self).get(CACHE)
        if cache is not None and cache.seeds is not None:
            state[_SEEDS] = cache.seeds, cache.steps_taken
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        seeds = state.get(_SEEDS)
        vars(self).update({name: value for name, value in state.items() if name != _SEEDS})
        if seeds is not None:
            sampler = vars(self).get("noise_sampler")
            self.use_philox(seeds[0])
            vars(self)[CACHE].steps_taken = seeds[1]
            if sampler is not None:
                vars(self)["noise_sampler"] = sampler

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        if _BY_NAME.get(name) is not type(self):
            return super().__reduce_ex__(protocol)
        # By the module that the class names, pickle would find diffusers' class.
        return _rebuild, (name,), self.__getstate__()


def _rebuild(name: str) -> FusedScheduler:
    return _BY_NAME[name].__new__(_BY_NAME[name])


@with_fast_path("step", _GUIDED)
def _guided_step(
    self: Any, model_output_uncond: Any, model_output_cond: Any, guidance_scale: Any, timestep: Any, sample: Any,
    guidance_rescale: float = 0.0, **kwargs: Any,
) -> Any:  # fmt: skip
    """Take a guided step that the step cache does not know."""
    _check_uncond(model_output_uncond)
    output_scale = None
    if guidance_rescale != 0.0:
        output_scale = rescaling(model_output_uncond, model_output_cond, guidance_scale, guidance_rescale, sample)
    if "step" in vars(self) or overriding_class(type(self), self.original, "step") is not None:
        guided = combined(model_output_uncond, model_output_cond, guidance_scale, output_scale)
        return self.step(guided, timestep, sample, **kwargs)  # a user's own
    arguments = {"model_output": model_output_cond, "timestep": timestep, "sample": sample, **kwargs}
    return take_step(self, "step", (), arguments, model_output_uncond, guidance_scale, output_scale)


def _step_method(name: str, method: Any, signature: inspect.Signature) -> Any:
    @with_fast_path(name, tuple(signature.parameters)[1:])
    def take(self: Any, *args: Any, **kwargs: Any) -> Any:
        return take_step(self, name, args, kwargs)

    def compiled(self: Any, *args: Any) -> Any:
        _refuse_seeds(self)
        return method(self, *args)  # torch.compile fuses it

    return _literal_method(name, method, signature, take, compiled)


def _scaling_method(name: str, method: Any, signature: inspect.Signature) -> Any:
    @with_fast_path(name, tuple(signature.parameters)[1:], scales=True)
    def take(self: Any, sample: Any, timestep: Any) -> Any:
        cache = cache_of(self)
        if cache.irregular and isinstance(sample, Tensor):
            return method(self, sample, timestep)  # to look up a plan takes longer, and no step will follow this one
        last = cache.plan
        follows = last is not None and vars(self).get("_step_index") is not None and cache.unchanged(self)
        result = take_step(self, name, (sample, timestep), {})
        scaling = cache.scaling
        if follows and cache.plan is last and scaling is not None and scaling.scale_only is not None:
            last.set_scaling(scaling)  # while nothing changes after that step, samples are scaled by this plan
        return result

    return _literal_method(name, method, signature, take, method)


def _literal_method(name: str, method: Any, signature: inspect.Signature, take: Any, compiled: Any) -> Any:
    """Return a method with a literal signature that calls `take`, or `compiled` where Dynamo traces it."""
    # To collect arguments and pass them on would take a tenth of a short step.
    names = list(signature.parameters)
    scope = {"is_compiling": _is_compiling, "compiled": compiled, "take": take}
    scope |= {f"default_{n}": p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    given = ", ".join(names)
    wanted = ", ".join(f"{n}=default_{n}" if f"default_{n}" in scope else n for n in names)
    exec(f"def {name}({wanted}):\n if is_compiling():\n  return compiled({given})\n return take({given})\n", scope)
    made: Any = functools.update_wrapper(cast(Any, scope[name]), method)
    # With the annotations of diffusers' method: pipelines look there for `eta` and `generator`.
    made.__signature__ = signature
    return made


def _set_timesteps_method(method: Any) -> Any:
    @functools.wraps(method)  # with its signature: pipelines look there for `sigmas` and `timesteps`
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if not _is_compiling():
            begin_loop(self)
        return result

    return set_timesteps


def _index_for_timestep(self: Any, timestep: Any, schedule_timesteps: Any = None) -> Any:
    """Find a timestep's index by diffusers' own code, without copying a view of the schedule from a device."""
    on_device = isinstance(timestep, Tensor) and not _is_compiling() and not timestep.is_cpu
    if schedule_timesteps is None and on_device:
        plan_cache = current_cache_of(self).plan_cache
        place = plan_cache.position(timestep)
        if place is not None:
            schedule_timesteps = plan_cache.host["timesteps"]
            timestep = schedule_timesteps[place]
    return self.original.index_for_timestep(self, timestep, schedule_timesteps)


def _undo_step_method(method: Any) -> Any:
    @functools.wraps(method)
    def undo_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache: SchedulerCache | None = vars(self).get(CACHE)
        if cache is None or cache.seeds is None:
            return method(self, *args, **kwargs)
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        with SeededDraws(cache.seeds_for(sample), cache.steps_taken):
            result = method(self, *args, **kwargs)
        cache.steps_taken += 1
        return result

    return undo_step


def _refuse_seeds(scheduler: Any) -> None:
    if _SEEDED in scheduler.__dict__:
        raise RuntimeError(
            error_message(
                "step",
                "use_philox",
                "was called, and the step is traced by torch.compile",
                "a step outside of compiled functions",
                "call use_philox(None), or compile the model alone",
            )
        )


def _check_uncond(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            error_message(
                "guided_step",
                "model_output_uncond",
                f"is a {type(value).__name__}",
                "a tensor like model_output_cond",
                "pass the model's output without the condition, or call step where there is no guidance",
            )
        )
