# SPDX-License-Identifier: MIT
"""The loop that samples and stores: each stochastic step gives its log-probability in its own pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops
from ..errors import error_message
from ..guidance import GuidanceMode, GuidedModel
from ..guidance.guided_model import Model
from ..noise.generators import Generators, draw, generator_states
from ..philox import as_seeds
from ..row_layout import COLUMNS, NUM_REGISTERS, PREV_SAMPLE, Variance
from ..sampling.loop import check_latents
from ..solvers.table import StepTable
from .trajectory import Trajectory

_NOISE = PREV_SAMPLE + COLUMNS.index("noise")


class HasTable(Protocol):
    """A sampler of `fastdiff.samplers`, or anything else with a table."""

    table: StepTable


@torch.no_grad()
def rollout(
    source: StepTable | HasTable,
    model: Model,
    latents: Tensor,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    *,
    guidance_scale: float | Tensor = 1.0,
    guidance_mode: str | GuidanceMode = GuidanceMode.BATCHED,
    seeds: int | Sequence[int] | Tensor | None = None,
    generator: Generators = None,
    reduction: str = "sum",
    model_kwargs: Mapping[str, Any] | None = None,
    check_finite: bool = True,
    backend: str | None = None,
) -> Trajectory:
    """Sample with a stochastic table and store every step with its log-probability.

    Any table works whose noise has a fixed variance: ``ddim(eta)``, ``ddpm``, ``euler_ancestral``, ``euler`` with
    churn, ``dpm_multistep`` with an SDE, ``flow_sde``, ``cps``.  Multistep tables store their history as well.

    Args:
        source: a `StepTable`, or a sampler.
        model, latents, prompt_embeds, negative_prompt_embeds, generator, seeds, model_kwargs, backend: as in
            `fastdiff.samplers.BaseSampler.sample`.  With seeds the noise is drawn in the step.
        guidance_scale: 1 asks for no unconditional output; a tensor ``[B]`` is a scale a sample.
        guidance_mode: "batched" or "sequential"; the replay has to call the model in the same way for equal bits.
        reduction: of the log-probabilities, "sum" or "mean" over the elements.
        check_finite: look at every model output for NaN and infinity, which waits for a GPU.

    Returns:
        The `Trajectory`, on the latents' device; ``samples[-1]`` is the finished batch.

    Raises:
        TypeError, ValueError: an argument does not fit, the table has a learned variance or dynamic thresholding, or
            none of its rows adds noise.  Generators are then as they were.
    """
    table = source if isinstance(source, StepTable) else getattr(source, "table", None)
    table = _checked_table(table, source)
    check_latents(latents)
    numbers: Tensor | None = None
    if seeds is not None:
        if generator is not None:
            raise ValueError(
                error_message("rollout", "generator", "is given beside seeds", "one source of noise", "leave out one")
            )
        numbers = as_seeds(seeds, latents.shape[0], latents.device)
    guided = GuidedModel(
        model,
        prompt_embeds,
        negative_prompt_embeds,
        guidance_scale,
        GuidanceMode.parse(guidance_mode),
        check_finite=check_finite,
        model_kwargs={} if model_kwargs is None else model_kwargs,
    )
    states = generator_states(generator)
    try:
        return _run(table, guided, latents, numbers, generator, reduction, backend)
    except BaseException:
        for one, state in states:
            one.set_state(state)
        raise


def _checked_table(table: object, source: object) -> StepTable:
    if not isinstance(table, StepTable):
        got, remedy = f"is a {type(source).__name__}", "pass sampler or solver(levels, prediction)"
        raise TypeError(error_message("rollout", "source", got, "a StepTable or a sampler", remedy))
    refused = ""
    if table.variance != Variance.FIXED:
        refused = "has a learned variance, a standard deviation an element"
    elif table.thresholding:
        refused = "asks for dynamic thresholding, whose threshold depends on the model"
    elif not any(row[_NOISE] for row in table.coefficients.tolist()):
        refused = "adds no noise in any row, so that its steps have no density"
    if refused:
        expected, remedy = "rows with noise of a fixed variance", "use eta > 0, ddpm, flow_sde or cps"
        raise ValueError(error_message("rollout", "source", refused, expected, remedy))
    return table


def _run(
    table: StepTable,
    model: GuidedModel,
    latents: Tensor,
    seeds: Tensor | None,
    generator: Generators,
    reduction: str,
    backend: str | None,
) -> Trajectory:
    coefficients = table.shared_coefficients(latents.dtype, latents.device)
    noise_weights = table.coefficients[:, _NOISE].tolist()
    scale = model.guidance_scale if model.guided else None
    if isinstance(scale, Tensor):
        scale = scale.to(coefficients)
    samples = [(latents * table.initial_scale).clone()]
    kept: list[tuple[Tensor, ...]] = []
    log_probs: list[Tensor] = []
    slots: list[Tensor | None] = [None] * NUM_REGISTERS
    whole = all(float(timestep).is_integer() for timestep in table.timesteps)
    for row, timestep in enumerate(table.timesteps):
        sample = samples[-1]
        time = torch.tensor(timestep, dtype=torch.float64).to(torch.int64 if whole else torch.float32)
        output, uncond, _ = model(sample, time.to(sample.device))
        arguments: dict[str, Any] = {
            "history": tuple(slots[j] if j in table.read_slots[row] else None for j in range(NUM_REGISTERS)),
            "keeps": len(table.kept_slots[row]),
            "backend": backend,
        }
        if uncond is not None:
            arguments |= {"uncond": uncond, "guidance_scale": scale}
        if table.draws_noise[row]:
            if seeds is not None:
                arguments |= {"seeds": seeds, "noise_step": row}
            else:
                arguments["noise"] = draw(sample.shape, generator, dtype=sample.dtype, device=sample.device)
        if noise_weights[row]:
            log_prob, prev, *more = ops.step_log_prob(
                sample, output, coefficients, row, reduction=reduction, **arguments
            )
            log_probs.append(log_prob)
        else:
            prev, *more = ops.step(sample, output, coefficients, row, **arguments)
        for slot, tensor in zip(table.kept_slots[row], more, strict=True):
            slots[slot] = tensor
        samples.append(prev)
        kept.append(tuple(more))
    return Trajectory(
        samples=torch.stack(samples),
        coefficients=table.coefficients.clone(),
        timesteps=torch.tensor(table.timesteps, dtype=torch.float64),
        kept=tuple(kept),
        log_probs=torch.stack(log_probs),
        reduction=reduction,
        guidance_scale=scale,
        seeds=seeds,
    )
