# SPDX-License-Identifier: MIT
"""The log-probabilities of a stored trajectory under the model that is trained, and the objective of their ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from ..guidance import GuidanceMode, GuidedModel
from ..guidance.guided_model import Model
from .trajectory import Trajectory


def replay_log_prob(
    trajectory: Trajectory,
    model: Model,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    *,
    steps: Sequence[int] | None = None,
    guidance_mode: str | GuidanceMode = GuidanceMode.BATCHED,
    model_kwargs: Mapping[str, Any] | None = None,
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Call the model at stored samples and return the log-probabilities of the stored steps.

    With the rollout's model, called on the same batch in the same way, they have the bits of
    ``trajectory.log_probs``.  They are differentiable in whatever the model's outputs are.  The graph of all steps is
    kept until backward: give one or a few `steps` a call where memory is short.

    Args:
        trajectory: of `rollout`, whole or the `Trajectory.select` of some samples.
        model, prompt_embeds, negative_prompt_embeds, guidance_mode, model_kwargs, check_finite, backend: as in
            `rollout`; the guidance scale is the trajectory's.
        steps: indices of stochastic steps; None takes all, ``trajectory.steps``.

    Returns:
        ``[len(steps), B]``.

    Raises:
        TypeError, ValueError: an argument does not fit, or a step added no noise.
    """
    known = trajectory.steps
    chosen = known if steps is None else tuple(steps)
    for step in chosen:
        if step not in known:
            raise ValueError(
                error_message(
                    "replay_log_prob", "steps", f"holds {step!r}", f"stochastic steps, of {list(known)}", "leave it out"
                )
            )
    if not chosen:
        raise ValueError(error_message("replay_log_prob", "steps", "is empty", "one step or more", "name a step"))
    scale = trajectory.guidance_scale
    guided = GuidedModel(
        model,
        prompt_embeds,
        negative_prompt_embeds,
        1.0 if scale is None else scale,
        GuidanceMode.parse(guidance_mode),
        check_finite=check_finite,
        model_kwargs={} if model_kwargs is None else model_kwargs,
    )
    found = []
    for step in chosen:
        output, uncond, _ = guided(trajectory.samples[step], trajectory.timestep(step))
        found.append(trajectory.log_prob(step, output, uncond, backend=backend))
    return torch.stack(found)


def clipped_objective(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return the clipped objective of PPO to be minimised, a scalar (arXiv 1707.06347, eq. 7, negated).

    Args:
        log_probs: ``[N, B]``, of `replay_log_prob`.
        old_log_probs: like it, of ``trajectory.log_probs``.
        advantages: ``[B]`` or ``[N, B]``.
        clip_range: the ratio is held within 1 ± clip_range.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()
