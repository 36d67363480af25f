# SPDX-License-Identifier: MIT
"""The backward of the step, which is the step with other coefficients.

A step's outputs are affine maps of x, m, d, the history and the noise, so the gradient of each input is an affine map
of the outputs' gradients, with the same coefficients in columns instead of rows.  They go into a table of their own,
and `fastdiff::step` computes three of the maps a launch: its history is the outputs' gradients, its outputs the
inputs'.  Because it is that operator again, the backward has a backward.

Where the row is not linear the maps that pass through d or the learned standard deviation are taken first, in the
compute dtype, and multiplied by the local derivative in torch operators.  Whether a row clips is looked up where that
is no host sync; where it is (a table on a GPU, a traced one) the mask of the clip is always taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from ..row_layout import (
    CLIP,
    COLUMNS,
    KEEP_1,
    MODEL_INPUT_SCALE,
    NUM_REGISTERS,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    ROW_WIDTH,
    VARIANCE_OFFSET,
    VARIANCE_SLOPE,
    Variance,
    blank_row,
    compute_dtype,
)
from . import reference
from .call import HISTORY_SLOTS, STEP_ARGUMENTS, STEP_NAMES, StepCall, named, operator_values
from .checks import readable_without_sync
from .dispatch import execute
from .transforms import eager_operator
from .vmap import LIKE_SAMPLE, fold_step

_X, _M, _D, _H0, _Z = (COLUMNS.index(name) for name in ("sample", "model_output", "prediction", "history_0", "noise"))
#: Maps a launch: as many as a row has.
_MAPS = 3
#: The operator's arguments that may be tensors, in the order in which they are saved.
_TENSORS = tuple(argument.name for argument in STEP_ARGUMENTS if argument.type in ("Tensor", "Tensor?"))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save what the wanted gradients need: for a linear row with a fixed scale no tensor but the table."""
    given = named(STEP_ARGUMENTS, inputs)
    wanted = _wanted(ctx)
    for name, remedy in (("table", "detach it, or pass backend='reference'"), ("mask", "detach it")):
        if wanted[name]:
            raise RuntimeError(
                error_message(
                    "step",
                    name,
                    "requires grad and compiled backends have no gradient of it",
                    f"a {name} outside autograd's graph",
                    remedy,
                )
            )
    clips = given["threshold"] is not None or may_clip(given["table"], given["row_index"], given["row_indices"])
    kept = {"table", "row_indices", "guidance_scale", "mask"}
    if clips:
        kept |= {"sample", "model_output", "uncond", "threshold"}
    if wanted["guidance_scale"]:
        kept |= {"model_output", "uncond"}
    if given["variance_kind"] != Variance.FIXED:
        kept |= {"variance", "noise", "seeds", "noise_steps"}
    ctx.clips = clips
    ctx.dtypes = {name: given[name].dtype for name in _TENSORS if given[name] is not None}
    ctx.numbers = {name: value for name, value in given.items() if name not in _TENSORS}
    ctx.save_for_backward(*(given[name] if name in kept else None for name in _TENSORS))
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradient of each of the operator's arguments, or None for those that want none."""
    wanted = _wanted(ctx)
    found: dict[str, Tensor | None] = {}
    if any(grad is not None for grad in grads):
        saved = {**ctx.numbers, **dict(zip(_TENSORS, ctx.saved_tensors, strict=True))}
        found = _Pullback(saved, wanted, ctx.clips, ctx.dtypes, grads).run()
    return tuple(found.get(name) if wanted[name] else None for name in wanted)


def gradients(
    given: dict[str, Any], wanted: dict[str, bool], grads: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Return the gradients of a step's arguments from those of its outputs.

    Args:
        given: the operator's arguments by the names of its schema.
        wanted: which of them want a gradient.
        grads: the gradient of each output, or None.
    """
    clips = given["threshold"] is not None or may_clip(given["table"], given["row_index"], given["row_indices"])
    dtypes = {name: given[name].dtype for name in _TENSORS if given[name] is not None}
    return _Pullback(given, wanted, clips, dtypes, grads).run()


def _wanted(ctx: Any) -> dict[str, bool]:
    """Return which arguments want a gradient, by their names in the schema."""
    return {argument.name: bool(want) for argument, want in zip(STEP_ARGUMENTS, ctx.needs_input_grad, strict=False)}


def apply_step(call: StepCall, backend: str) -> Sequence[Tensor]:
    """Run ``fastdiff::step`` so that autograd, torch.func and compilers see it; the model input comes last."""
    return apply_operator(*operator_values(call, backend))


def _fold(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    out, dims = fold_step(info, in_dims, *arguments, apply=apply_operator)
    return tuple(out), tuple(dims)


#: Run ``fastdiff::step`` with its schema's arguments.
apply_operator: Callable[..., Sequence[Tensor]] = eager_operator(
    "step",
    STEP_NAMES,
    lambda *arguments: torch.ops.fastdiff.step(*arguments),
    execute,
    setup_context,
    lambda ctx, *grads: backward(ctx, grads),
    _fold,
)


def may_clip(table: Tensor, row_index: int, row_indices: Tensor | None) -> bool:
    """Return whether a row may clip the prediction: looked up where that is no host sync, else True."""
    if not readable_without_sync(table):
        return True
    clips = table[row_index, CLIP] if row_indices is None else table[:, CLIP]
    return bool((clips < float("inf")).any())


class _Pullback:
    """One backward: the gradients of the outputs, and the weights with which each input's gradient collects them.

    Weights are float64 ``[N, sources]``, N being 1 or, where samples have rows or scales of their own, B.
    """

    def __init__(
        self,
        saved: dict[str, Any],
        wanted: dict[str, bool],
        clips: bool,
        dtypes: dict[str, torch.dtype],
        grads: Sequence[Tensor | None],
    ) -> None:
        self.saved, self.wanted, self.dtypes = saved, wanted, dtypes
        self.compute = dtypes["table"]
        mask = self._wide("mask")
        self.coefficients = coefficients_of(
            saved["table"], saved["row_index"], saved["row_indices"], blended=mask is not None
        )
        maps = self.coefficients[:, PREV_SAMPLE:]
        self.columns = maps.reshape(len(maps), _MAPS, len(COLUMNS))
        self.through_d = clips and any(
            wanted[name] for name in ("sample", "model_output", "uncond", "guidance_scale", "threshold")
        )
        # Only the last operation rounds: several launches, or torch operators after one, work in the compute dtype.
        learned = saved["variance_kind"] != Variance.FIXED
        wide = (
            self.through_d
            or wanted["guidance_scale"]
            or learned
            or mask is not None
            or saved["model_input_dtype"] is not None
        )
        # Nor where tensors have dtypes of their own: each gradient is rounded to its tensor's.
        stored = {dtypes[name] for name in LIKE_SAMPLE if name in dtypes} | {g.dtype for g in grads if g is not None}
        wide = wide or len(stored) > 1
        outputs = list(grads[: saved["keeps"] + 1])
        if len(grads) > len(outputs) and grads[-1] is not None:
            outputs[0] = self._with_model_input(outputs[0], grads[-1])
        if mask is not None and outputs[0] is not None:
            # prev_sample is two maps, each with its share of the gradient.
            blended = outputs[0].to(self.compute)
            outputs = [(1 - mask) * blended, *outputs[1:]]
            outputs += [None] * (_MAPS - 1 - len(outputs)) + [mask * blended]
        self.of = [o for o, grad in enumerate(outputs) if grad is not None]
        self.sources = [grad.to(self.compute) if wide else grad for grad in outputs if grad is not None]

    def run(self) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        sources = self.sources
        learned = self.saved["variance_kind"] != Variance.FIXED
        if self.through_d:
            grad_d, found["threshold"] = self._through_bounds(self._combine(sources, {"d": self._weights(_D)})["d"])
            sources = [*sources, grad_d]
        maps: dict[str, Tensor] = {}
        if self.wanted["sample"]:
            maps["sample"] = self._with_d(_X, PREDICTION_SAMPLE)
        if self.wanted["model_output"] or self.wanted["uncond"] or self.wanted["guidance_scale"]:
            maps |= self._maps_of_model(self._with_d(_M, PREDICTION_OUTPUT))
        for j, name in enumerate(HISTORY_SLOTS):
            if self.wanted[name]:
                maps[name] = self._of_outputs_only(self._weights(_H0 + j))
        if self.wanted["noise"] or (learned and self.wanted["variance"]):
            maps["noise"] = self._of_outputs_only(self._weights(_Z))
        collected = self._combine(sources, maps)
        found |= collected
        if "m" in collected:
            found |= self._through_guidance(collected["m"])
        if learned and "noise" in collected:
            found |= self._through_std(collected["noise"])
        scalars = ("guidance_scale", "threshold")
        return {
            name: grad if grad is None or name in scalars or name not in self.dtypes else grad.to(self.dtypes[name])
            for name, grad in found.items()
        }

    def _weights(self, column: int) -> Tensor:
        return self.columns[:, self.of, column]

    def _with_d(self, column: int, factor: int) -> Tensor:
        """The weights of a tensor that d is made of: the gradient of d is a source, or is not needed by itself."""
        factors = self.coefficients[:, factor, None]
        if self.through_d:
            return torch.cat([self._weights(column), factors], 1)
        return self._weights(column) + factors * self._weights(_D)

    def _of_outputs_only(self, weights: Tensor) -> Tensor:
        return torch.nn.functional.pad(weights, (0, 1)) if self.through_d else weights

    def _maps_of_model(self, of_m: Tensor) -> dict[str, Tensor]:
        if self.saved["guidance_scale"] is None:
            return {"model_output": of_m}
        if self.wanted["guidance_scale"]:
            return {"m": of_m}  # the scale's own gradient needs m's; the halves are then taken in torch operators
        scale = self.saved["guidance_scale"].double().reshape(-1, 1)
        shares = {"model_output": scale, "uncond": 1.0 - scale}
        return {name: share * of_m for name, share in shares.items() if self.wanted[name]}

    def _combine(self, sources: Sequence[Tensor], maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the maps of the sources, three a launch of the step, whose history they are."""
        found: dict[str, Tensor] = {}
        names = list(maps)
        for first in range(0, len(names), _MAPS):
            group = names[first : first + _MAPS]
            samples = max(len(maps[name]) for name in group)
            weights = torch.stack([maps[name].expand(samples, -1) for name in group], 1)
            after = NUM_REGISTERS - len(sources) + 1
            block = torch.nn.functional.pad(weights, (_H0, after, 0, _MAPS - len(group)))
            head = _head(block).expand(len(block), -1)
            table = torch.cat([head, block.flatten(1)], 1).to(compute_dtype(sources[0].dtype))
            call = StepCall(
                sample=sources[0],
                model_output=sources[0],
                table=table,
                row_index=_row_of_each(table),
                history=tuple(sources),
                keeps=len(group) - 1,
            )
            results = apply_step(call, self.saved["backend"])
            found |= dict(zip(group, results, strict=True))
        return found

    def _through_bounds(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of d before it was clamped, and that of the threshold."""
        x, c, u = self._wide("sample"), self._wide("model_output"), self._wide("uncond")
        assert x is not None
        assert c is not None
        # The prediction by the same operator, so that the mask is that of the forward's own bits.
        head = torch.cat(
            [
                self.coefficients[:, [PREDICTION_SAMPLE, PREDICTION_OUTPUT]],
                _head(self.coefficients)[:, CLIP:].expand(len(self.coefficients), -1),
            ],
            1,
        )
        only_d = torch.zeros(1, ROW_WIDTH - PREV_SAMPLE, dtype=torch.float64, device=grad.device)
        only_d[0, _D] = 1.0
        table = torch.cat([head, only_d.expand(len(head), -1)], 1).to(self.compute)
        call = StepCall(
            sample=x,
            model_output=c,
            table=table,
            row_index=_row_of_each(table),
            uncond=u,
            guidance_scale=self.saved["guidance_scale"],
        )
        (d,) = apply_step(call, self.saved["backend"])
        clip = reference.per_sample(self.coefficients[:, CLIP].to(self.compute), d)
        inside = d.abs() <= clip
        if (threshold := self.saved["threshold"]) is None:
            return torch.where(inside, grad, 0.0), None
        clamped, s = torch.clamp(d, -clip, clip), reference.per_sample(threshold, d)
        through = torch.where(clamped.abs() <= s, grad / s, 0.0)
        of_threshold = -_sum_per_sample(through * clamped / s, threshold) if self.wanted["threshold"] else None
        return torch.where(inside, through, 0.0), of_threshold

    def _through_guidance(self, grad: Tensor) -> dict[str, Tensor | None]:
        c, u, guidance = self._wide("model_output"), self._wide("uncond"), self.saved["guidance_scale"]
        assert c is not None
        assert u is not None
        of_c = reference.per_sample(guidance, grad) * grad
        return {
            "model_output": of_c,
            "uncond": grad - of_c,
            "guidance_scale": _sum_per_sample(grad * (c - u), guidance),
        }

    def _through_std(self, grad: Tensor) -> dict[str, Tensor | None]:
        v, z = self._wide("variance"), self._wide("noise")
        assert v is not None
        if self.saved["seeds"] is not None:
            step = self.saved["noise_step"] if self.saved["noise_steps"] is None else self.saved["noise_steps"]
            z = reference.drawn_noise(v, self.saved["seeds"], step, self.saved["purpose"], self.saved["parts"]).to(
                self.compute
            )
        if self.saved["variance_kind"] == Variance.LEARNED_RANGE:
            offset, slope = (self.coefficients[:, i].to(self.compute) for i in (VARIANCE_OFFSET, VARIANCE_SLOPE))
            std = torch.exp(reference.per_sample(offset, v) + reference.per_sample(slope, v) * v)
            slope_of_std = reference.per_sample(slope, v) * std
        else:
            std = torch.sqrt(v)
            slope_of_std = 0.5 / std
        # Where no output of the row adds the noise, v is not read: 0·∞ is not a gradient.
        read = reference.per_sample((self._weights(_Z) != 0).any(1), v)
        return {
            "noise": torch.where(read, grad * std, 0.0),
            "variance": None if z is None else torch.where(read, grad * z * slope_of_std, 0.0),
        }

    def _with_model_input(self, grad: Tensor | None, of_input: Tensor) -> Tensor:
        copies = self.saved["model_input_copies"]
        batch = of_input.shape[0] // copies
        once = of_input.to(self.compute).reshape(copies, batch, *of_input.shape[1:]).sum(0)
        scaled = reference.per_sample(self.coefficients[:, MODEL_INPUT_SCALE].to(self.compute), once) * once
        return scaled if grad is None else grad + scaled

    def _wide(self, name: str) -> Tensor | None:
        tensor = self.saved[name]
        return None if tensor is None else tensor.to(self.compute)


def coefficients_of(table: Tensor, row_index: int, row_indices: Tensor | None, *, blended: bool = False) -> Tensor:
    """Return the rows of a call, float64 ``[N, 32]``; a skipped sample's row leaves it as it is, blended or not."""
    if row_indices is None:
        return table[row_index][None].double()
    chosen, taken = reference.select_rows(table, row_indices)
    stays = _head(table.double())[0]
    stays = torch.cat([stays, torch.zeros(ROW_WIDTH - len(stays), dtype=stays.dtype, device=stays.device)])
    stays[PREV_SAMPLE + _X] = 1.0
    stays[KEEP_1 + _X] = float(blended)
    return torch.where(taken[:, None], chosen.double(), stays)


def input_weights(row: Sequence[float], output: int, scale: float | None, dtype: torch.dtype) -> dict[str, float]:
    """Return the weight of each input in one output of a linear row, by the input's name.

    Args:
        row: its 32 numbers.
        output: 0 for prev_sample, 1 and 2 for the kept tensors.
        scale: of guidance; None without.
        dtype: of the table, to which the scale is rounded.
    """
    start = PREV_SAMPLE + output * len(COLUMNS)
    of = row[start : start + len(COLUMNS)]
    of_model = of[_M] + row[PREDICTION_OUTPUT] * of[_D]
    share = 1.0 if scale is None else torch.tensor(scale, dtype=dtype, device="cpu").item()
    return {
        "sample": of[_X] + row[PREDICTION_SAMPLE] * of[_D],
        "model_output": of_model * share,
        "uncond": of_model * (1.0 - share),
        **{name: of[_H0 + j] for j, name in enumerate(HISTORY_SLOTS)},
        "noise": of[_Z],
    }


def _head(like: Tensor) -> Tensor:
    """Return the scalars before the maps of a row without prediction."""
    return torch.tensor([blank_row()[:PREV_SAMPLE]], dtype=like.dtype, device=like.device)


def _sum_per_sample(values: Tensor, scalars: Tensor) -> Tensor:
    """Return the sum over what each scalar multiplied, in the scalars' shape."""
    if scalars.numel() == 1:
        return values.sum().reshape(scalars.shape)
    return values.flatten(1).sum(1) if values.dim() > 1 else values.reshape(scalars.shape)


def _row_of_each(table: Tensor) -> int | Tensor:
    """Return row 0 of a table of one row, or, where it has a row for each sample, their indices."""
    return torch.arange(len(table), device=table.device) if len(table) > 1 else 0
