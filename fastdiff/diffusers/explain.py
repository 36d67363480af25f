# SPDX-License-Identifier: MIT
"""What a scheduler's steps come to in its present configuration: fused or not, and why."""

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

#: Attributes that a loop leaves behind, beside its tensors.
_LEFT_BEHIND = HISTORY | SCALARS_OF_STATE | {
    "_step_index", "counter", "lower_order_nums", "this_order", "this_corrector_order", "this_predictor_order",
    "noise_sampler", "timestep_list", "is_scale_input_called",
}  # fmt: skip
#: Operators that touch no element.
_FREE = frozenset(
    (
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
        "expand", "lift_fresh", "new_empty", "permute", "reshape", "select", "slice", "split", "squeeze", "t",
        "transpose", "unbind", "unsqueeze", "view",
    )
)  # fmt: skip
#: What a call of a noise sampler is counted as, and the making of one.
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
        index, timestep: which.
        fused: whether it is run as a fused step.
        operations: the tensor operations that it takes, draws of noise among them, by torch's names.  Those of making
            its plan, once for a state, are not counted.
        draws: how many of them draw noise.
        drawn_inside: whether the fused step draws its noise itself (`use_philox`).
        reason: why it is not fused; empty where it is.
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
    """What `explain` found.

    Attributes:
        name: of the scheduler's class.
        guided: whether the steps are those of `guided_step`.
        steps: one after another.
    """

    name: str
    guided: bool
    steps: tuple[ExplainedStep, ...]

    @property
    def fused(self) -> bool:
        """Whether every step is."""
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
    """Walk a scheduler's timesteps with small random tensors, and say how each step is taken.

    It is done on a copy: neither the scheduler nor torch's generators are changed.  What a step comes to can depend on
    the dtype and on what `step` is told besides, so these are arguments.

    Args:
        scheduler: one of `fastdiff.diffusers`, or diffusers' own, of which is said what its fused class would do.
        num_inference_steps: for a scheduler whose timesteps have not been set.
        guided: take `guided_step` in place of `step`.
        shape, dtype: of the samples.
        kwargs: what `step` is to be called with besides, such as ``eta=1.0``.

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
    # The first walk makes what a loop makes once; the second is as any later one.
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
    """A scheduler with the same configuration and the same timesteps, before its first step."""
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
    """The operators that touch elements; a call of the scheduler's own noise sampler, which has hundreds, is one, and
    so is the making of it."""

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
                return  # a step is traced once for a state, and not when it is taken
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
            scheduler.scale_model_input(sample, timestep)  # as a pipeline does: some schedulers find their place by it
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
        # Where no plan was looked up, the step before had its follower at hand.
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
    """The timesteps at which a pipeline calls `step`."""
    timesteps = scheduler.timesteps
    name = scheduler.original.__name__
    if name in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        timesteps = timesteps[:-1]  # the last is where the loop arrives
    for index, timestep in enumerate(timesteps):
        # RePaint goes back up by `undo_step`.
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
