# SPDX-License-Identifier: MIT
"""Explain a scheduler's steps in its present configuration: fused or not, and why."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import error_message
from ..noise.brownian_tree import sampled, sampler_maker
from .compiler.inputs import CACHE, HISTORY, SCALARS_OF_STATE
from .compiler.plan import Fallback
from .mixin import FusedScheduler
from .registry import CLASSES
from .runtime.lookup import find_plan
from .runtime.scheduler_cache import current_cache_of

#: Attributes that a loop sets and a fresh scheduler does not have.
_LEFT_BEHIND = HISTORY | SCALARS_OF_STATE | {
    "_step_index", "counter", "lower_order_nums", "this_order", "this_corrector_order", "this_predictor_order",
    "noise_sampler", "timestep_list", "is_scale_input_called",
}  # fmt: skip
#: Operators that do no work on elements.
_FREE = frozenset(
    (
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
        "expand", "lift_fresh", "new_empty", "permute", "reshape", "select", "slice", "split", "squeeze", "t",
        "transpose", "unbind", "unsqueeze", "view",
    )
)  # fmt: skip
#: The names under which a call of a noise sampler, and its construction, are counted.
_SAMPLER, _SAMPLER_MADE = "noise_sampler", "make_noise_sampler"
_DRAWS = frozenset(
    (
        _SAMPLER, "bernoulli_", "normal", "normal_", "rand", "rand_like", "randint", "randn", "randn_like", "uniform_",
    )
)  # fmt: skip


@dataclass(frozen=True)
class ExplainedStep:
    """One step of a scheduler.

    Attributes:
        index, timestep: its place in the loop.
        fused: whether it runs as a fused step.
        operations: its tensor operations by torch's names, draws of noise included.  Those of compiling its plan, once
            for a state, are not counted.
        draws: the number of operations that draw noise.
        drawn_inside: whether the fused step draws its noise itself (`use_philox`).
        reason: why it is not fused; empty if it is.
    """

    index: int
    timestep: float
    fused: bool
    operations: tuple[str, ...]
    draws: int
    drawn_inside: bool
    reason: str

    def __str__(self) -> str:
        how = "fused" if self.fused else f"not fused ({self.reason})"
        noise = "draws its noise inside" if self.drawn_inside else f"{_number(self.draws, 'draw')} of noise"
        return f"{how}, {_number(len(self.operations), 'tensor operation')}, {noise}"


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`.

    Attributes:
        name: the name of the scheduler's class.
        guided: whether the steps were taken by `guided_step`.
        steps: the steps in order.
    """

    name: str
    guided: bool
    steps: tuple[ExplainedStep, ...]

    @property
    def fused(self) -> bool:
        """True if every step is fused."""
        return all(step.fused for step in self.steps)

    def __str__(self) -> str:
        count = sum(step.fused for step in self.steps)
        method = "guided_step" if self.guided else "step"
        lines = [f"{self.name}.{method}: {count} of {_number(len(self.steps), 'step')} fused"]
        for text, group in itertools.groupby(self.steps, str):
            indices = [step.index for step in group]
            which = f"step {indices[0]}" if len(indices) == 1 else f"steps {indices[0]} to {indices[-1]}"
            lines.append(f"  {which}: {text}")
        return "\n".join(lines)


def explain(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    guided: bool = False,
    shape: tuple[int, ...] = (1, 4, 8, 8),
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Explanation:
    """Run a scheduler's loop on small random tensors, and report how each step is taken.

    The loop runs on a copy: the scheduler and torch's generators are not changed.  The result can depend on the dtype
    and on further arguments of `step`.

    Args:
        scheduler: one of `fastdiff.diffusers`, or diffusers' own, for which its fused class is explained.
        num_inference_steps: for a scheduler whose timesteps have not been set.
        guided: call `guided_step` instead of `step`.
        shape, dtype: of the samples.
        kwargs: further arguments of `step`, such as ``eta=1.0``.

    Raises:
        TypeError: it is no scheduler, or one without a fused class.
        ValueError: its timesteps have not been set, and there is no `num_inference_steps`.
        Exception: what the scheduler itself raises.
    """
    kind = _fused_class(scheduler)
    if num_inference_steps is None and getattr(scheduler, "num_inference_steps", 0) is None:
        raise ValueError(
            error_message(
                "explain",
                "num_inference_steps",
                "is None for a scheduler without timesteps",
                "a number of steps",
                "call scheduler.set_timesteps first, or pass num_inference_steps",
            )
        )
    # The first walk computes what is computed once; the second is like any later one.
    for _ in range(2):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            steps = tuple(_walk(_fresh(scheduler, kind, num_inference_steps), guided, shape, dtype, kwargs))
    return Explanation(kind.__name__, guided, steps)


def _fused_class(scheduler: Any) -> Any:
    if isinstance(scheduler, FusedScheduler):
        return type(scheduler)
    for kind in CLASSES.values():
        if type(scheduler) is kind.original:
            return kind
    raise TypeError(
        error_message(
            "explain",
            "scheduler",
            f"is a {type(scheduler).__name__}",
            "a scheduler of fastdiff.diffusers, or one of diffusers that has a fused class",
            "pass pipe.scheduler; docs/diffusers.md lists the classes"
            if isinstance(scheduler, SchedulerMixin)
            else "pass pipe.scheduler",
        )
    )


def _fresh(scheduler: Any, kind: Any, num_inference_steps: int | None) -> Any:
    """Return a scheduler with the same configuration and timesteps, before its first step."""
    fresh = kind.from_config(scheduler.config)
    if num_inference_steps is not None:
        fresh.set_timesteps(num_inference_steps)
    else:
        for name, value in vars(scheduler).items():
            if name != CACHE and name not in _LEFT_BEHIND:
                vars(fresh)[name] = list(value) if isinstance(value, list) else value
        if hasattr(scheduler, "noise_sampler"):
            fresh.noise_sampler = None
    given: Any = vars(scheduler).get(CACHE)
    if given is not None and given.seeds is not None:
        fresh.use_philox(given.seeds)
    return fresh


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that touch elements.

    A call of the scheduler's own noise sampler, which has hundreds, counts as one, and so does its construction.
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole: dict[Any, str] = {sampled.__code__: _SAMPLER}
        sampler, maker = getattr(scheduler, "noise_sampler", None), sampler_maker(scheduler.original)
        if sampler is not None:
            self.whole[getattr(type(sampler).__call__, "__code__", None)] = _SAMPLER
        elif maker is not None:
            self.whole[maker.__code__] = _SAMPLER_MADE
        self.calls: list[Any] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is find_plan.__code__:
                return  # compiling, done once for a state, is no part of the step
            if frame.f_code in self.whole:
                if frame not in self.calls:
                    self.calls.append(frame)
                    self.operations.append(self.whole[frame.f_code])
                return
            frame = frame.f_back
        self.operations.append(name)


def _walk(
    scheduler: Any, guided: bool, shape: tuple[int, ...], dtype: torch.dtype, kwargs: dict[str, Any]
) -> Iterator[ExplainedStep]:
    names = tuple(inspect.signature(scheduler.original.step).parameters)[1:]
    learned = str(getattr(scheduler.config, "variance_type", None)).startswith("learned")
    of_output = (shape[0], shape[1] * 2, *shape[2:]) if learned else shape
    timesteps = scheduler.timesteps
    device = timesteps.device
    sample = torch.randn(shape, dtype=dtype, device=device)
    others = _others(names, shape, dtype, device) | kwargs
    earlier: Tensor | None = None
    for index, timestep in _visited(scheduler):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)  # some schedulers set their step index in it
        outputs = [torch.randn(of_output, dtype=dtype, device=device) for _ in range(2 if guided else 1)]
        if "old_pred_original_sample" in names:
            others |= {
                "old_pred_original_sample": earlier,
                "timestep_back": timesteps[index - 1] if index > 0 else None,
            }
        if "prev_timestep" in names:
            others["prev_timestep"] = timesteps[index + 1] if index + 1 < len(timesteps) else None
        if scheduler.original.__name__ == "DDPMWuerstchenScheduler":
            timestep = timestep.expand(shape[0])
        cache = current_cache_of(scheduler)
        cache.latest = None
        with _Counter(scheduler) as counter:
            if guided:
                result = scheduler.guided_step(*outputs, 5.0, timestep, sample, **others)
            elif names[:3] == ("model_output", "timestep", "sample"):
                result = scheduler.step(outputs[0], timestep, sample, **others)
            else:
                result = scheduler.step(model_output=outputs[0], timestep=timestep, sample=sample, **others)
        # If no plan was looked up, the step followed from the one before.
        latest: Any = vars(cache)["latest"]  # set by the step
        plan = (cache.plan if latest is None else latest) or Fallback("it is no call that a plan is made for")
        values = result if isinstance(result, tuple) else tuple(result.values())
        sample, earlier = values[0], (values[1] if len(values) > 1 else None)
        yield ExplainedStep(
            index=index,
            timestep=float(timestep.reshape(-1)[0]),
            fused=not isinstance(plan, Fallback),
            operations=tuple(counter.operations),
            draws=sum(name in _DRAWS for name in counter.operations),
            drawn_inside=not isinstance(plan, Fallback) and plan.fused_draw is not None,
            reason=plan.reason if isinstance(plan, Fallback) else "",
        )


def _visited(scheduler: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield the timesteps at which a pipeline calls `step`, each with its index."""
    timesteps = scheduler.timesteps
    name = scheduler.original.__name__
    if name in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        timesteps = timesteps[:-1]  # the last one is the end of the loop
    for index, timestep in enumerate(timesteps):
        # RePaint goes back to higher timesteps by `undo_step`.
        if name != "RePaintScheduler" or index == 0 or timestep < timesteps[index - 1]:
            yield index, timestep


def _others(names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    others: dict[str, Any] = {"return_dict": False} if "return_dict" in names else {}
    if "original_image" in names:
        others["original_image"] = torch.randn(shape, dtype=dtype, device=device)
        others["mask"] = (torch.rand(shape, device=device) < 0.5).to(dtype)
    return others


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}" if count == 1 else f"{count or 'no'} {what}s"
