# SPDX-License-Identifier: MIT
"""Flow matching with a timestep of its own for each token: a row for each, and one fused step over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from .. import ops
from ..affine import COLUMNS
from ..table import CLIP, MODEL_INPUT_SCALE, PREV_SAMPLE, ROW_WIDTH, STORE_0, STORE_1
from ..torch_noise import randn_like_diffusers

#: How far below a token's level the next one has to lie, as in diffusers.
_APART = 1e-6


def token_rows(levels: Tensor, sigmas: Tensor, stochastic: bool) -> Tensor:
    """A row of the fused step's table for each token.

    Args:
        levels: σ of each token, ``[N]``, float32.
        sigmas: the schedule's levels, ``[S]``; a token goes to the highest of those below its own, or to 0.
        stochastic: predict the clean sample and add noise anew, instead of a step of Euler.

    Returns:
        ``[N, 32]``, float32.
    """
    ascending = torch.cat([sigmas.new_zeros(1), sigmas.sort().values])
    lower = ascending[torch.searchsorted(ascending[1:].contiguous(), levels - _APART)]
    rows = levels.new_zeros(len(levels), ROW_WIDTH)
    rows[:, CLIP], rows[:, MODEL_INPUT_SCALE] = float("inf"), 1.0
    rows[:, STORE_0 : STORE_1 + 1] = -1.0
    column = {name: PREV_SAMPLE + COLUMNS.index(name) for name in COLUMNS}
    if stochastic:
        rows[:, column["sample"]] = 1.0 - lower
        rows[:, column["model_output"]] = (lower - 1.0) * levels
        rows[:, column["noise"]] = lower
    else:
        rows[:, column["sample"]] = 1.0
        rows[:, column["model_output"]] = levels - lower
    return rows


class PerTokenSteps:
    """Mixed into the flow-matching Euler scheduler, for calls with ``per_token_timesteps``."""

    def step_otherwise(self: Any, name: str, given: Mapping[str, Any]) -> Any:
        """A step that has no plan: one with a timestep a token is still one fused step, any other diffusers' own."""
        timesteps = given.get("per_token_timesteps")
        sample, output = given["sample"], given["model_output"]
        if timesteps is None or sample.dim() != 3 or timesteps.shape != sample.shape[:2]:
            return super().step_otherwise(name, given)  # type: ignore[misc]
        if self.step_index is None:
            self._init_step_index(given["timestep"])
        levels = (timesteps / self.config.num_train_timesteps).reshape(-1).to(torch.float32)
        stochastic = bool(self.config.stochastic_sampling)
        rows = token_rows(levels, self.sigmas.to(levels), stochastic)
        tokens = (len(levels), sample.shape[2])
        noise = None
        if stochastic:
            # In float32, as diffusers draws it for the widened samples.
            noise = randn_like_diffusers(sample.shape, given.get("generator"), sample.device, torch.float32)
            noise = noise.reshape(tokens)
        (new,) = ops.step(
            sample.float().reshape(tokens),
            output.float().reshape(tokens),
            rows,
            torch.arange(len(rows), device=rows.device),
            noise=noise,
        )
        self._step_index += 1
        new = new.reshape(sample.shape)
        if not given.get("return_dict", True):
            return (new,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=new)  # type: ignore[arg-type]
