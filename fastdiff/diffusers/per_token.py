# SPDX-License-Identifier: MIT
"""Flow-matching Euler steps with a timestep of its own for each token (`per_token_timesteps`).

Such a step is computed directly, without a trace or a plan: the levels are tensors, so each call would need a plan of
its own.  Seven torch operations broadcast a coefficient for each token.  A fused step with a row of the step table for
each token takes longer: 69 µs against 22 at 256 tokens of 16 channels in float32 (diffusers: 50), 728 against 480 at
4096 of 128 (1933).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ..noise.torch_normals import randn_like_diffusers

#: How far below a token's level the next one has to be, as in diffusers.
_MARGIN = 1e-6
#: The arguments that the step takes.
_ARGUMENTS = frozenset(inspect.signature(FlowMatchEulerDiscreteScheduler.step).parameters)
#: For each scheduler: its sigmas, their version, and what `_levels_below` made of them.
_LEVELS: WeakKeyDictionary[Any, tuple[Tensor, int, Tensor, Tensor]] = WeakKeyDictionary()


def per_token_step(scheduler: Any, given: Mapping[str, Any]) -> Any:
    """Take a step of `FlowMatchEulerDiscreteScheduler` with `per_token_timesteps`.

    σ of a token is its timestep over `num_train_timesteps`; σ' is the highest of the schedule's sigmas below σ, or 0.
    The result is x + (σ − σ')·v, or with `stochastic_sampling` (1 − σ')·(x − σ·v) + σ'·z.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`.
        given: the arguments of `step` by name.

    Returns:
        What `step` of diffusers returns, in its dtype (float32 for half samples); None, with nothing changed, for a
        call that its own code has to take or refuse: without `per_token_timesteps`, or with arguments of other shapes,
        devices or types.
    """
    timesteps = given.get("per_token_timesteps")
    if timesteps is None or not _supported(scheduler, given, timesteps):
        return None
    sample, output, config = given["sample"], given["model_output"], scheduler.config
    if scheduler.step_index is None:
        scheduler._init_step_index(given["timestep"])
    level = timesteps.unsqueeze(-1) / config.num_train_timesteps
    lower = _next_level(scheduler, level)
    x = sample.to(torch.float32)
    if config.stochastic_sampling:
        new = torch.addcmul(x, level, output, value=-1)
        noise = randn_like_diffusers(x.shape, given.get("generator"), x.device, torch.float32)
        new = new.mul_(1.0 - lower).addcmul_(noise, lower)
    else:
        new = torch.addcmul(x, level - lower, output)
    scheduler._step_index += 1
    if not given.get("return_dict", True):
        return (new,)
    return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=new)  # type: ignore[arg-type]


def _supported(scheduler: Any, given: Mapping[str, Any], timesteps: Any) -> bool:
    """Return whether `per_token_step` computes what diffusers' code would, which then does not raise."""
    sample, output, timestep = given.get("sample"), given.get("model_output"), given.get("timestep")
    sigmas = getattr(scheduler, "sigmas", None)
    return (
        isinstance(sample, Tensor)
        and isinstance(output, Tensor)
        and isinstance(timesteps, Tensor)
        and isinstance(sigmas, Tensor)
        and sample.dim() == 3
        and timesteps.shape == sample.shape[:2]
        and output.shape == sample.shape
        and sample.device == output.device == timesteps.device == sigmas.device
        and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        # diffusers refuses indices for timesteps.
        and (timestep.is_floating_point() if isinstance(timestep, Tensor) else not isinstance(timestep, int))
        and "timestep" in given
        and _ARGUMENTS.issuperset(given)
        and not sigmas.requires_grad
    )


def _next_level(scheduler: Any, level: Tensor) -> Tensor:
    """Return the highest of the scheduler's sigmas below each level, or 0 where there is none.

    The sorted sigmas are kept for each scheduler until it has others, or they are written.  Writes to inference tensors
    are not counted, so those are sorted at every call.
    """
    sigmas = scheduler.sigmas
    counted = not torch.compiler.is_compiling() and not sigmas.is_inference()
    known = _LEVELS.get(scheduler) if counted else None
    if known is not None and known[0] is sigmas and known[1] == sigmas._version:
        ascending, below = known[2], known[3]
    else:
        ascending, below = _levels_below(sigmas)
        if counted and type(below) is Tensor:  # a mode may have made it a subclass, such as a fake tensor
            _LEVELS[scheduler] = sigmas, sigmas._version, ascending, below
    limit = (level - _MARGIN).contiguous()
    if limit.dtype is not ascending.dtype:
        common = torch.promote_types(limit.dtype, ascending.dtype)
        limit, ascending = limit.to(common), ascending.to(common)
    return below.take(torch.searchsorted(ascending, limit))


def _levels_below(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Sort sigmas.

    Returns:
        The sigmas in ascending order, ``[S]``; and for each number of sigmas that are below a level, the next level,
        ``[S + 1]``: diffusers' maximum of σ·[σ < level], which is 0 or more wherever one σ is not below the level.
    """
    ascending = sigmas.sort().values
    below = torch.cat([ascending.new_zeros(1), ascending])
    below[:-1].clamp_(min=0.0)
    # An infinite σ or NaN times a mask of 0 is NaN, and so is the maximum.
    return ascending, below + 0.0 * ascending[-1]


class PerTokenSteps:
    """Mixin of the flow-matching Euler scheduler for calls with `per_token_timesteps`."""

    @staticmethod
    def never_planned(arguments: Mapping[str, Any]) -> bool:
        """Return whether each token has its own timestep: no row expresses such a step."""
        return arguments.get("per_token_timesteps") is not None

    def unplanned_step(self: Any, method: str, arguments: Mapping[str, Any]) -> Any:
        """Take a step that has no plan: directly with a timestep for each token, else by diffusers' own code."""
        result = per_token_step(self, arguments)
        return super().unplanned_step(method, arguments) if result is None else result  # type: ignore[misc]
