# SPDX-License-Identifier: MIT
"""A plan's step on real tensors: gather, draw, one fused step, hand out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..noise.brownian_tree import sampled
from ..noise.torch_normals import randn_like_diffusers
from ..ops.layout import laid_out, output_strides
from ..ops.thresholding import dynamic_threshold
from ..philox import purpose_of_draw
from ..row_layout import COLUMNS, KEEP_0, KEEP_1, PREDICTION_OUTPUT, PREV_SAMPLE
from .plan import Plan
from .tracing import USUAL


def run_plan(
    plan: Plan,
    attributes: dict[str, Any],
    arguments: Mapping[str, Any],
    uncond: Tensor | None,
    guidance: float | Tensor | None,
    seeds: Tensor | None,
    noise_step: int,
    factor: Tensor | None = None,
) -> Any:
    """Take a step.

    Args:
        plan: of this step in this state.
        attributes: the scheduler's, which are written once the step has succeeded.
        arguments: of the call, by name.
        uncond, guidance: of a guided step; `model_output` is then the conditional output.
        seeds, noise_step: of noise that belongs to the samples' own seeds.
        factor: what each sample's model output is multiplied by, ``[B]``.
    """
    sample = arguments["sample"]
    output = arguments.get("model_output", sample)
    variance = None
    if output.shape != sample.shape:
        output, variance = output.chunk(2, dim=1)
        if uncond is not None:
            uncond = uncond.chunk(2, dim=1)[0]
        variance = variance if plan.variance_kind else None
    if plan.make_sampler is not None:
        attributes["noise_sampler"] = plan.make_sampler(attributes, arguments)
    drawn = _draw(plan, attributes, arguments, output, seeds, noise_step)
    values: list[Any] = [
        attributes[name] if index is None else attributes[name][index] for name, index in plan.from_attributes
    ]
    values += [arguments[name] for name in (*(USUAL[i] for i in plan.from_arguments), *plan.from_keywords)]
    values += drawn
    history = [values[slot] for slot in plan.registers]
    noise = None if plan.noise is None else values[plan.noise]
    sample, output = _as_taken(sample, plan.dtype), _as_taken(output, plan.dtype)
    uncond, noise, variance = (t if t is None else _as_taken(t, plan.dtype) for t in (uncond, noise, variance))
    history = [_as_taken(t, plan.dtype) for t in history]
    threshold = None
    if plan.thresholding:
        rows = _rows(plan.prediction_table(sample.device), factor)
        (x0,) = ops.step(sample, output, *rows, uncond=uncond, guidance=guidance, out=[plan.dtype])
        config = attributes["_internal_dict"]
        ratio, largest = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        threshold = dynamic_threshold(x0, ratio, largest, keep_nan=True)
    rows = _rows(plan.table(sample.device), factor)
    made = _step(plan, rows, sample, output, uncond, guidance, history, noise, variance, threshold,
                 seeds if plan.draws_inside else None, noise_step)  # fmt: skip
    if plan.blend is not None:
        mask, a, b = plan.blend
        blended = torch.addcmul(made[a], values[mask].to(plan.dtype), made[b])
        made = (blended, *(t for k, t in enumerate(made) if k not in (a, b)))
    if plan.converts:
        made = tuple(t if t.dtype is wanted else t.to(wanted) for t, wanted in zip(made, plan.made, strict=True))
    values.extend(made)
    _write(plan, attributes, values)
    return _result(plan, values)


def _as_taken(tensor: Tensor, widest: torch.dtype) -> Tensor:
    """A tensor as the fused step takes it beside a table for the widest dtype: nearly always as it is."""
    dtype = tensor.dtype
    if dtype is widest or dtype in _NARROW or (dtype is torch.float64 and widest is torch.float64):
        return tensor
    return tensor.to(widest)


def draw(output: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    """A step's noise, drawn as diffusers draws it."""
    return randn_like_diffusers(output.shape, generator, output.device, dtype)


#: What may stand beside a table of either compute dtype.
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def launch(
    plan: Plan, sample: Tensor, output: Tensor, uncond: Any, guidance: Any, history: list[Tensor], noise: Any,
    seeds: Any, noise_step: int,
) -> Any:  # fmt: skip
    """The fused step of a `simple` plan, by whichever backend it is."""
    rows = plan.table(sample.device), 0
    uncond = uncond if uncond is None else _as_taken(uncond, plan.dtype)  # which no plan knows the dtype of
    return _step(plan, rows, sample, output, uncond, guidance, history, noise, None, None, seeds, noise_step)


def _draw(
    plan: Plan, attributes: dict[str, Any], arguments: Mapping[str, Any], output: Tensor, seeds: Tensor | None,
    step: int,
) -> list[Any]:  # fmt: skip
    """The step's noise, drawn as diffusers draws it, or from seeds, and as often."""
    if plan.spans:
        sampler = attributes["noise_sampler"]
        return [sampled(sampler, start, end).to(output.device) for start, end in plan.spans]
    if not plan.draws or plan.draws_inside:
        return []
    if plan.seeded:
        assert seeds is not None
        draws = enumerate(plan.draws)
        return [ops.randn(output.shape, seeds, step, purpose_of_draw(k), output.device, dtype) for k, dtype in draws]
    generator = arguments.get("generator")
    return [draw(output, generator, dtype) for dtype in plan.draws]


#: The columns of a row that multiply the model's output, itself or within the prediction.
_OF_OUTPUT = [PREDICTION_OUTPUT, *(first + COLUMNS.index("model_output") for first in (PREV_SAMPLE, KEEP_0, KEEP_1))]


def _rows(table: Tensor, factor: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """A table of one row for all, or of one for each sample with the output's coefficients times its factor."""
    if factor is None:
        return table, 0
    rows = table.repeat(len(factor), 1)
    rows[:, _OF_OUTPUT] *= factor[:, None].to(table.dtype)
    return rows, torch.arange(len(factor), device=table.device)


def _step(plan: Plan, rows: tuple[Tensor, int | Tensor], sample: Tensor, output: Tensor, uncond: Any, guidance: Any,
          history: Any, noise: Any, variance: Any, threshold: Any, seeds: Any, noise_step: int) -> Any:  # fmt: skip
    """One call of the fused step: (prev_sample, and what it keeps)."""
    kind, out = plan.variance_kind, plan.outputs

    def directly() -> Any:
        return ops.direct_step(
            sample, output, *rows, uncond, guidance, history, noise, variance, threshold, kind, plan.keeps, out, seeds,
            noise_step, plan.purpose,
        )  # fmt: skip

    done = directly()
    if done is None:
        # Transformers' outputs are often views in another order of dimensions, and noise comes contiguous.
        strides = output_strides(sample)
        sample, output = laid_out(sample, strides), laid_out(output, strides)
        uncond, noise = (t if t is None else laid_out(t, strides) for t in (uncond, noise))
        history = [laid_out(t, strides) for t in history]
        done = directly()
    if done is not None:
        return done
    return ops.step(
        sample, output, *rows, uncond=uncond, guidance=guidance, history=history, noise=noise, seeds=seeds,
        noise_step=noise_step, purpose=plan.purpose, variance=variance, threshold=threshold, variance_kind=kind,
        keeps=plan.keeps, out=out,
    )  # fmt: skip


def _write(plan: Plan, attributes: dict[str, Any], values: list[Any]) -> None:
    """Bring the scheduler to its state after the step."""
    attributes.update(plan.constants)
    for name, slot in plan.variables:
        attributes[name] = values[slot]
    for name, stay, entries in plan.lists:
        items = []
        for v in entries:
            items.append(values[v] if type(v) is int else v.value)  # type: ignore[union-attr]
        if stay is None:
            attributes[name] = items
        else:
            attributes[name][stay:] = items


def _result(plan: Plan, values: list[Any]) -> Any:
    results = [values[v] if type(v) is int else v.value for v in plan.results]  # type: ignore[union-attr]
    if plan.kind is tuple:
        return tuple(results)
    if plan.kind is None:
        return results[0]
    return plan.kind(**dict(zip(plan.names, results, strict=True)))  # type: ignore[arg-type]
