# SPDX-License-Identifier: MIT
"""The Python executor of a scheduler's step: gather the inputs, draw, run the fused step, write the state, return.

It takes every plan on every backend.  The native executor (csrc/dropin/executor.h) takes the plans that are
`Plan.native_eligible` where the extension serves the tensors, by the same contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...guidance.rescale import rows_with_scaled_output
from ...noise.brownian_tree import sampled
from ...noise.torch_normals import randn_like_diffusers
from ...ops.thresholding import dynamic_threshold
from ..compiler.inputs import CONFIG
from ..compiler.plan import Draw, NoiseSource, Plan

#: Dtypes that the fused step takes beside a table of either compute dtype.
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def execute(
    plan: Plan,
    attributes: dict[str, Any],
    arguments: Mapping[str, Any],
    uncond: Tensor | None,
    guidance_scale: float | Tensor | None,
    cache: Any,
    drawn: list[Tensor] | None = None,
    output_scale: Tensor | None = None,
    model_inputs: list[Tensor] | None = None,
) -> Any:
    """Take a step and return what the scheduler's method returns.

    Args:
        plan: of this step in this state.
        attributes: the scheduler's, which are written once the step has succeeded.
        arguments: of the call, by name.
        uncond, guidance_scale: of a guided step; `model_output` is then the conditional output.
        cache: the scheduler's `SchedulerCache`, for its seeds and its number of steps taken.
        drawn: the plan's draws, where they have been drawn.
        output_scale: what each sample's model output is multiplied by, ``[B]``.
        model_inputs: where given, the step writes the next model input too if its plan can, and appends it here.
    """
    sample = arguments["sample"]
    output = arguments.get("model_output", sample)
    variance = None
    if output.shape != sample.shape:
        output, variance = output.chunk(2, dim=1)
        if uncond is not None:
            uncond = uncond.chunk(2, dim=1)[0]
        variance = variance if plan.variance_kind else None
    if plan.noise_sampler_factory is not None:
        attributes["noise_sampler"] = plan.noise_sampler_factory(attributes, arguments)
    seeds = cache.seeds_for(sample) if plan.uses_seeds else None
    if drawn is None:
        slotted = [draw for draw in plan.draws if not draw.fused]
        drawn = [_draw(draw, attributes, arguments, output, seeds, cache.steps_taken) for draw in slotted]
    values: list[Any] = [
        attributes[name] if index is None else attributes[name][index] for name, index in plan.attribute_inputs
    ]
    values += [arguments[name] for name in plan.argument_inputs]
    values += drawn
    history = [_accepted(values[slot], plan.dtype) for slot in plan.history]
    noise = None if plan.noise is None else values[plan.noise]
    sample, output = _accepted(sample, plan.dtype), _accepted(output, plan.dtype)
    uncond, noise, variance = (t if t is None else _accepted(t, plan.dtype) for t in (uncond, noise, variance))
    fused_draw = plan.fused_draw
    tensors: dict[str, Any] = {"uncond": uncond, "guidance_scale": guidance_scale}
    threshold = None
    if plan.thresholding:
        table, row_index = _rows(plan.prediction_table(sample.device), output_scale)
        (x0,) = ops.step(sample, output, table, row_index, out=[plan.dtype], **tensors)
        config = attributes[CONFIG]
        ratio, largest = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        threshold = dynamic_threshold(x0, ratio, largest, keep_nan=True)
    scale = None if model_inputs is None else plan.model_input_scale()
    if model_inputs is not None and scale is not None:
        tensors["model_input"] = torch.empty_like(sample, dtype=plan.output_dtypes[0])
        model_inputs.append(tensors["model_input"])
    table, row_index = _rows(plan.table(sample.device, scale), output_scale)
    if fused_draw is not None:
        tensors |= {"seeds": seeds, "noise_step": cache.steps_taken, "purpose": fused_draw.purpose}
    computed = ops.step(
        sample, output, table, row_index, history=history, noise=noise, variance=variance, threshold=threshold,
        variance_kind=plan.variance_kind, keeps=plan.kept, out=plan.new_output_dtypes, **tensors,
    )  # fmt: skip
    if plan.blend is not None:
        mask, a, b = plan.blend
        blended = torch.addcmul(computed[a], values[mask].to(plan.dtype), computed[b])
        computed = (blended, *(t for k, t in enumerate(computed) if k not in (a, b)))
    if plan.converts:
        pairs = zip(computed, plan.output_dtypes, strict=True)
        computed = tuple(t if t.dtype is wanted else t.to(wanted) for t, wanted in pairs)
    values.extend(computed)
    _write(plan, attributes, values)
    return _result(plan, values)


def _accepted(tensor: Tensor, widest: torch.dtype) -> Tensor:
    """Return a tensor in a dtype that the fused step takes beside a table for the widest dtype: mostly itself."""
    dtype = tensor.dtype
    if dtype is widest or dtype in _NARROW or (dtype is torch.float64 and widest is torch.float64):
        return tensor
    return tensor.to(widest)


def _draw(
    draw: Draw, attributes: dict[str, Any], arguments: Mapping[str, Any], output: Tensor, seeds: Tensor | None,
    step: int,
) -> Tensor:  # fmt: skip
    """Draw one noise of a step, as a tensor like the model's output."""
    if draw.source is NoiseSource.PATH:
        assert draw.interval is not None
        return sampled(attributes["noise_sampler"], *draw.interval).to(output.device)
    if draw.source is NoiseSource.SEEDS:
        assert seeds is not None
        return ops.randn(output.shape, seeds, step, draw.purpose, output.device, draw.dtype)
    return randn_like_diffusers(output.shape, arguments.get("generator"), output.device, draw.dtype)


def _rows(table: Tensor, output_scale: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """Return the table and row index for all samples, or a row for each with the output's coefficients scaled."""
    if output_scale is None:
        return table, 0
    return rows_with_scaled_output(table, output_scale)


def _write(plan: Plan, attributes: dict[str, Any], values: list[Any]) -> None:
    """Bring the scheduler to its state after the step."""
    attributes.update(plan.constant_writes)
    for name, slot in plan.tensor_writes:
        attributes[name] = values[slot]
    for name, start, entries in plan.list_writes:
        items = [_value(entry, values) for entry in entries]
        if start is None:
            attributes[name] = items
        else:
            attributes[name][start:] = items


def _value(entry: Any, values: list[Any]) -> Any:
    return values[entry] if type(entry) is int else entry.value


def _result(plan: Plan, values: list[Any]) -> Any:
    results = [_value(entry, values) for entry in plan.results]
    if plan.result_type is tuple:
        return tuple(results)
    if plan.result_type is None:
        return results[0]
    assert plan.result_names is not None
    return plan.result_type(**dict(zip(plan.result_names, results, strict=True)))
