# SPDX-License-Identifier: MIT
"""Walks a step table under guidance: at most one reduction, then the step, which combines the branches itself."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_type, error_message
from ..guidance.combining import HostTable, as_tokens, combine, or_empty, row_index, table_and_scale, weighted_sum
from ..guidance.frequency import FrequencyDecoupledGuidance
from ..guidance.gradients import ClassifierGuidance, LossGuidance
from ..guidance.method import STATE, Guidance, Place, RowWeights
from ..guidance.mixed import MixedGuidance
from ..guidance.per_token_norm import PerTokenNormGuidance
from ..guidance.rows import Placement, guided_row, place_branches, table_of, uses_bounded_x0
from ..guidance.scalars import Scalar
from ..guidance.tracing import Formula
from ..guidance.weights import MOST_ON_HOST, step_weights
from ..noise.generators import Generators, draw
from ..ops.thresholding import dynamic_threshold
from ..philox import Purpose
from ..row_layout import NUM_REGISTERS, compute_dtype
from ..schedules.levels import Levels
from ..solvers.table import StepTable, prediction_rows
from .stepper import Stepper

#: A gradient that moves the step.
Term = ClassifierGuidance | LossGuidance

#: The weights of a tensor that is the model's output by itself.
_ALONE: list[RowWeights] = [((1.0, 0.0), None)]


class _Kind(NamedTuple):
    """A step of one method with one scale for all samples, seen often in a loop.

    Attributes:
        names: the branches it needs.
        scale: the scale with which plain guidance is the whole combination; None for other steps.
        weights: the weights of the branches and the sample where they are known before the loop; else None.
        formula: the weights from the scalar products of the branches; None where they need none.
        guidance_scale: the scale of the formula.
    """

    names: tuple[str, ...]
    scale: float | None
    weights: Sequence[float] | None
    formula: Formula | None
    guidance_scale: float


class GuidedStepper:
    """The state of one guided loop over a table: a `Stepper` whose model output is a combination of branches.

    A step takes one reduction where the method needs scalar products, and one pass: the weights of the branches go into
    the solver's row, a row a sample.  Another pass combines the branches first where they do not fit into the row: see
    `passes`.

    ::

        guided = GuidedStepper(sampler.table, ProjectedGuidance(7.5, momentum=-0.5))
        for t in sampler.timesteps:
            outputs = {name: model(x, t, conditions[name]) for name in guided.branches}
            x = guided.step(x, outputs)

    Args:
        table: the compiled sampler.
        guidance: the method, or a `MixedGuidance` with one a sample.
        terms: gradients that move the step, in the same pass.
        levels: the levels of the loop (``sampler.levels(n)``), for methods and terms that ask for σ.
        dynamic_thresholding_ratio, sample_max_value, seeds, backend: as in `Stepper`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(
        self,
        table: StepTable,
        guidance: Guidance | MixedGuidance,
        *,
        terms: Sequence[Term] = (),
        levels: Levels | None = None,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        seeds: int | Sequence[int] | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        self.stepper = Stepper(
            table,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            seeds=seeds,
            backend=backend,
        )
        _check(table, guidance, terms, levels)
        self.table, self.guidance, self.terms, self.levels = table, guidance, tuple(terms), levels
        self.methods = guidance.methods if isinstance(guidance, MixedGuidance) else (guidance,)
        self._token_dims = guidance.token_dims if isinstance(guidance, PerTokenNormGuidance) else None
        self._rows: list[list[float]] = table.coefficients.tolist()
        self._state: Tensor | None = None
        self._with_state = [False] * len(self.methods)
        self._before: tuple[Tensor | None, list[bool]] = None, self._with_state
        self._place: Place | None = None
        self._needed: list[tuple[str, ...]] = []
        self._kind: _Kind | None = None
        self._kinds: dict[Hashable, _Kind] = {}
        self._table: HostTable | None = None
        self._tables: dict[Hashable, tuple[Tensor, list[Any], list[Placement | None]]] = {}
        self._placements: dict[Hashable, Placement | None] = {}

    @property
    def index(self) -> int:
        """The index of the next row."""
        return self.stepper.index

    @property
    def done(self) -> bool:
        """True after the last row."""
        return self.stepper.done

    # --- What the next step needs -----------------------------------------------------------------------------------

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches whose outputs the next step needs, those of weight 0 left out."""
        self._look_ahead()
        if len(self._needed) == 1:
            return self._needed[0]
        return tuple(dict.fromkeys(name for names in self._needed for name in names))

    def samples_for(self, branch: str) -> Tensor | None:
        """Return the samples for which the next step needs a branch, int64 ``[N]`` on the CPU; None for all of them.

        `step` takes the outputs of these alone, ``[N, ...]``.
        """
        self._look_ahead()
        if all(branch in names for names in self._needed):
            return None
        return torch.tensor([i for i, names in enumerate(self._needed) if branch in names], dtype=torch.int64)

    def passes(self) -> int:
        """Return the number of passes of the next step over the samples: 1, or 2 where the branches are combined first.

        Two are needed where x0 is clipped or thresholded and more than two tensors are combined, where the solver's
        history leaves too few of the four slots, where the solver keeps two outputs and guidance one more, for tokens
        of a thresholded x0, and for `FrequencyDecoupledGuidance`.  Dynamic thresholding adds a pass that measures x0,
        with guidance or without.
        """
        count = len(self.branches)
        if count > 1 and not all(method.is_affine for method in self.methods):
            return 2
        keeps = any(m.keeps_state for m in self.methods)
        shifts = sum(isinstance(term, ClassifierGuidance) and term.form == "epsilon" for term in self.terms)
        count += shifts + (keeps and self._state is not None)
        if self._token_dims is not None and self.table.thresholding and count > 1:
            return 2
        return 2 if self._placement(count, keeps, len(self.terms) - shifts) is None else 1

    def _look_ahead(self) -> Place:
        """Find the next step's place and the branches that each row needs: one row for all samples, or one a sample."""
        index = self.stepper.index
        if self._place is not None and self._place.index == index:
            return self._place
        row = self.table.source[min(index, len(self.table) - 1)]
        ratio = None
        if self.levels is not None and not self.done:
            ratio = self.levels[index].noise_ratio
        state = self._with_state[0] if len(self.methods) == 1 else False
        place = self._place = Place(index, len(self.table), row.timestep, row.prediction, ratio, state)
        self._kind = self._known_kind(place)
        if self._kind is not None:
            self._needed = [self._kind.names]
            return place
        self._needed = []
        for method, has_state in zip(self.methods, self._with_state, strict=True):
            at = place._replace(has_state=True) if has_state else place
            scales = method.host_scales(at)
            if scales is None:
                self._needed.append(method.needed(at, None))
            elif len(self.methods) > 1:
                self._needed.append(method.needed(at, scales[len(self._needed) if len(scales) > 1 else 0]))
            else:
                self._needed = [method.needed(at, scale) for scale in scales]
        return place

    def _known_kind(self, place: Place) -> _Kind | None:
        """Return the kind of a step; None for a scale or a method a sample, tokens and frequencies."""
        method = self.methods[0]
        if len(self.methods) > 1 or self._token_dims is not None or not method.is_affine:
            return None
        scale = method.scale_at(place)
        if isinstance(scale, Tensor):
            return None
        key = (scale, method.kind(place))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _kind_of(method, place, scale)
        return kind

    # --- The step ---------------------------------------------------------------------------------------------------

    def step(
        self,
        sample: Tensor,
        outputs: Mapping[str, Tensor],
        *,
        variance: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
        out: Tensor | None = None,
        model_input: Tensor | None = None,
    ) -> Tensor:
        """Take the next row's step.

        Args:
            sample: x, ``[B, ...]``.
            outputs: the model's outputs by branch, at least those of `branches`; each like `sample`, or ``[N, ...]``
                for the samples of `samples_for`.
            variance, noise, generator, out, model_input: as in `Stepper.step`.

        Returns:
            The previous sample.

        Raises:
            IndexError: the table has no row left.
            TypeError, ValueError: an argument does not fit; the stepper is then as it was.
            RuntimeError: gradients are asked for through the weights of a method that has scalar products.
        """
        given: dict[str, Any] = {
            "variance": variance,
            "noise": noise,
            "generator": generator,
            "out": out,
            "model_input": model_input,
        }
        if self.done:
            return self.stepper.step(sample, sample, **given)  # raises
        place = self._look_ahead()
        self._before = self._state, self._with_state
        if self._kind is not None and not self.terms:
            result = self._quick(self._kind, sample, outputs, given)
            if result is not None:
                return result
        names, tensors = self._tensors(place, sample, outputs)
        moves: list[tuple[Tensor, Scalar]] = []
        if not self.terms and names == self.methods[0].branches[:1]:
            return self.stepper.step(sample, tensors[0], **given)
        if len(tensors) > 1 and isinstance(self.guidance, FrequencyDecoupledGuidance):
            tensors, rows = [self.guidance.output(*tensors)], _ALONE
        else:
            rows = self._weights(place, names, tensors, sample)
        if self.terms:
            sample, tensors, rows, moves = self._with_terms(sample, tensors, rows)
        tensors, rows = _without_zeros(sample, tensors, rows)
        keeps = rows[0][1] is not None
        scale = None if keeps or moves or self._token_dims is not None else _plain_scale(rows, sample)
        if scale is not None:
            uncond: dict[str, Any] = {"uncond": tensors[1], "guidance_scale": scale} if len(tensors) > 1 else {}
            return self.stepper.step(sample, tensors[0], **uncond, **given)
        placement = self._placement(len(tensors), keeps, len(moves))
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sample, *tensors))
        if placement is not None and not graph and (self._token_dims is None or not self.table.thresholding):
            return self._fused(sample, tensors, rows, placement, moves, self._token_dims, given)
        guided, *kept = combine(sample, tensors, rows, token_dims=self._token_dims, backend=self.stepper.backend)
        if moves:
            placement = self._placement(1, False, len(moves))
            if placement is None:
                remedy = "use fewer terms, or a solver with less history"
                expected = "no more than the history slots that the row leaves free"
                raise ValueError(error_message("step", "terms", f"are {len(moves)}", expected, remedy))
            result = self._fused(sample, [guided], _ALONE, placement, moves, None, given)
        else:
            result = self.stepper.step(sample, guided, **given)
        if kept:
            self._keep(kept[0])
        return result

    def combined(self, sample: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the guided output of the step that was taken last, in a pass of its own; the stepper is as it was.

        Args:
            sample, outputs: of that step.
        """
        at = copy.copy(self)
        at.stepper = copy.copy(self.stepper)
        at.stepper.index = self.stepper.index - 1
        at._state, at._with_state = self._before
        at._place = None
        place = at._look_ahead()
        names, tensors = at._tensors(place, sample, outputs)
        tensors = [tensor.detach() for tensor in tensors]
        if len(tensors) > 1 and isinstance(self.guidance, FrequencyDecoupledGuidance):
            return self.guidance.output(*tensors)
        rows = at._weights(place, names, tensors, sample)
        tensors, rows = _without_zeros(sample, tensors, rows)
        return combine(sample, tensors, rows, token_dims=self._token_dims, backend=self.stepper.backend)[0]

    def _quick(
        self, kind: _Kind, sample: Tensor, outputs: Mapping[str, Tensor], given: Mapping[str, Any]
    ) -> Tensor | None:
        """Take a step of a known kind on few samples; None where there is more to look at."""
        try:
            tensors = [outputs[name] for name in kind.names]
            shape = sample.shape
            if not all(tensor.shape == shape for tensor in tensors):
                return None
        except (AttributeError, LookupError, TypeError):
            return None  # the checks name what is wrong
        c = tensors[0] if tensors else sample
        if kind.scale is not None:
            if len(tensors) == 1:
                return self.stepper.step(sample, c, **given)
            return self.stepper.step(sample, c, uncond=tensors[1], guidance_scale=kind.scale, **given)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sample, *tensors)):
            return None
        if kind.weights is not None:
            return self._constant(kind.weights, sample, tensors, given)
        batch = sample.shape[0] if sample.dim() > 0 else 0
        if kind.formula is None or sample.device.type != "cpu" or not 0 < batch <= MOST_ON_HOST:
            return None
        if self._state is not None:
            tensors.append(self._state)
        keeps = self.methods[0].keeps_state
        placement = self._placement(len(tensors), keeps, 0)
        if placement is None:
            return None
        products, sums = ops.gram(tensors, sums=True)
        elements = float(sample.numel() // batch)
        of_samples = zip(products.tolist(), sums.tolist(), strict=True)
        rows: list[RowWeights] = [
            kind.formula(matrix, total, elements, kind.guidance_scale) for matrix, total in of_samples
        ]
        if keeps or len(tensors) > 2 or self.table.thresholding:
            return self._fused(sample, tensors, rows, placement, (), None, given)
        scale = _plain_scale(rows, sample)
        if scale is not None:
            return self.stepper.step(sample, c, uncond=tensors[1], guidance_scale=scale, **given)
        if self._table is None or len(self._table) != batch:
            self._table = HostTable(batch, sample)
        scale = self._table.write(self._rows[self.stepper.index], rows)
        table = self._table.tensor
        return self._call(sample, c, tensors[1], (None,) * NUM_REGISTERS, table, row_index(table), scale, given)

    def _constant(
        self, weights: Sequence[float], sample: Tensor, tensors: Sequence[Tensor], given: Mapping[str, Any]
    ) -> Tensor | None:
        """Take a step with weights that are known before the loop: from a table of all steps, made once."""
        if self.table.thresholding:
            return None
        key = (tuple(weights), sample.dtype, sample.device)
        if key not in self._tables:
            placements = [self._placement(len(tensors), False, 0, index) for index in range(len(self.table))]
            made = [
                (base, 1.0) if placement is None else guided_row(base, placement, weights, None)
                for base, placement in zip(self._rows, placements, strict=True)
            ]
            table = table_of([row for row, _ in made], 0, sample)
            self._tables[key] = table, [scale for _, scale in made], placements
        table, scales, placements = self._tables[key]
        index = self.stepper.index
        placement = placements[index]
        if placement is None:
            return None
        history: list[Tensor | None] = [None] * NUM_REGISTERS
        for slot, tensor in zip(placement.slots, tensors[2:], strict=True):
            history[slot] = tensor
        return self._call(sample, tensors[0], tensors[1], history, table, index, scales[index], given)

    def _call(
        self, sample: Tensor, cond: Tensor, uncond: Tensor, others: Sequence[Tensor | None], table: Tensor,
        row: int | Tensor, scale: float | Tensor, given: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Take a step with a table of guided rows.

        Args:
            sample, given: as in `step`.
            cond, uncond, scale: the first two branches and the scale that goes with them.
            others: further branches by history slot.
            table, row: the rows, and the index of the step's or of each sample's.
        """
        stepper, index = self.stepper, self.stepper.index
        if sample is not stepper._seen:
            stepper._look_at(sample)
        reads, slots, draws = stepper._plan[index]
        noise, seeds = given["noise"], None
        if draws and noise is None:
            seeds = stepper._seeds
            if seeds is None:
                noise = draw(sample.shape, given["generator"], dtype=sample.dtype, device=sample.device)
        kept, out, history = len(slots), given["out"], stepper._history
        outs: list[Tensor | None] | None = None
        if kept or out is not None:
            if out is None and isinstance(row, Tensor):  # rows in a tensor could leave samples unwritten
                out = torch.empty_like(sample)
            outs = [out, *(or_empty(history[slot], sample) for slot in slots)]
        results = ops.step(
            sample,
            cond,
            table,
            row,
            uncond=uncond,
            guidance_scale=scale,
            history=[history[j] if j in reads else others[j] for j in range(NUM_REGISTERS)],
            noise=noise,
            variance=given["variance"],
            variance_kind=stepper._variance_kind(given["variance"]) if stepper._measures else 0,
            keeps=kept,
            seeds=seeds,
            noise_step=index,
            model_input=given["model_input"],
            out=outs,
            backend=stepper.backend,
        )
        for slot, result in zip(slots, results[1:], strict=True):
            history[slot] = result
        stepper.index = index + 1
        stepper._seen = results[0]
        return results[0]

    def _tensors(
        self, place: Place, sample: Tensor, outputs: Mapping[str, Tensor]
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Return the names and tensors of the branches at hand, what guidance has kept last."""
        checked_type("step", "sample", sample, Tensor, "a torch.Tensor", "pass a tensor")
        expected, remedy = "the outputs by branch", "pass {'cond': c, 'uncond': u}"
        checked_type("step", "outputs", outputs, Mapping, expected, remedy)
        names = self.branches
        if len(self._needed) not in (1, sample.shape[0]):
            got, remedy = f"is for {len(self._needed)} samples", "pass one method and scale, or one a sample"
            raise ValueError(error_message("GuidedStepper", "guidance", got, f"{sample.shape[0]} samples", remedy))
        tensors = []
        for name in names:
            if name not in outputs:
                got, remedy = f"lacks {name!r}", f"pass the outputs of {', '.join(names)}"
                raise ValueError(error_message("step", "outputs", got, "every branch of `branches`", remedy))
            tensors.append(self._whole(name, outputs, sample))
        if self._state is not None and any(m.keeps_state and m.is_on(place) for m in self.methods):
            return (*names, STATE), [*tensors, self._state]
        return names, tensors

    def _whole(self, name: str, outputs: Mapping[str, Tensor], sample: Tensor) -> Tensor:
        """Return a branch's output for all samples; those that do not need it get the output of the first branch."""
        output = outputs[name]
        checked_type("step", f"outputs[{name!r}]", output, Tensor, "a torch.Tensor", "pass the model's output")
        if output.shape == sample.shape:
            return output
        chosen = self.samples_for(name)
        if chosen is None or output.shape != (len(chosen), *sample.shape[1:]):
            got, remedy = f"has shape {list(output.shape)}", "pass one output a sample"
            expected = f"{list(sample.shape)}" if chosen is None else f"{list(sample.shape)} or {len(chosen)} samples"
            raise ValueError(error_message("step", f"outputs[{name!r}]", got, expected, remedy))
        first = self.branches[0]
        whole = sample if name == first else outputs[first]
        return whole.index_copy(0, chosen.to(sample.device), output.to(whole.dtype))

    def _weights(
        self, place: Place, names: Sequence[str], tensors: Sequence[Tensor], sample: Tensor
    ) -> list[RowWeights]:
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sample, *tensors))
        if graph and any(method.uses_reduction(place) for method in self.methods):
            got, remedy = "needs gradients through its weights", "use torch.no_grad(), or PlainGuidance without rescale"
            raise RuntimeError(error_message("step", "guidance", got, "outputs outside of autograd", remedy))
        if len(tensors) < 2 and self._token_dims is not None:
            return _ALONE
        x, *branches = (as_tokens(tensor, self._token_dims) for tensor in (sample, *tensors))
        return step_weights(self.methods, place, names, branches, x, self._with_state)

    def _placement(self, branches: int, keeps: bool, moves: int, index: int | None = None) -> Placement | None:
        """Return the placement of branches in a row, the next one where `index` is None."""
        if index is None:
            index = min(self.stepper.index, len(self.table) - 1)
        reads, kept, _ = self.stepper._plan[index]
        row = self._rows[index]
        bounded = uses_bounded_x0(row, self.table.thresholding)
        key = (reads, len(kept), bounded, branches, keeps, moves)
        if key not in self._placements:
            found = place_branches(reads, len(kept), branches, keeps=keeps, terms=moves, bounded=bounded)
            self._placements[key] = found
        return self._placements[key]

    def _fused(
        self, sample: Tensor, tensors: Sequence[Tensor], rows: Sequence[RowWeights], placement: Placement,
        moves: Sequence[tuple[Tensor, Scalar]], token_dims: int | None, given: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Take the step with the branches in the row."""
        stepper, index = self.stepper, self.stepper.index
        if sample is not stepper._seen:
            stepper._look_at(sample)
        reads, slots, draws = stepper._plan[index]
        noise, seeds = given["noise"], None
        if draws and noise is None:
            seeds = stepper._seeds
            if seeds is None:
                noise = draw(sample.shape, given["generator"], dtype=sample.dtype, device=sample.device)
            elif token_dims is not None:  # rows a token, seeds a sample
                noise, seeds = ops.randn(sample.shape, seeds, index, Purpose.STEP, sample.device), None
        history: list[Tensor | None] = [stepper._history[j] if j in reads else None for j in range(NUM_REGISTERS)]
        for slot, tensor in zip(placement.slots, tensors[1 + placement.paired :], strict=True):
            history[slot] = tensor
        for slot, (tensor, _) in zip(placement.terms, moves, strict=True):
            history[slot] = tensor
        keeps = rows[0][1] is not None
        out = or_empty(given["out"], sample)
        outs = [out, *(or_empty(stepper._history[slot], sample) for slot in slots)]
        outs += [torch.empty_like(sample)] if keeps else []  # not in place: x0 may be asked for after the step
        inputs: dict[str, Any] = {
            "sample": sample,
            "model_output": tensors[0],
            "uncond": tensors[1] if placement.paired else None,
            "noise": noise,
            "variance": given["variance"],
        }
        model_input = given["model_input"]
        if token_dims is not None:
            inputs = {name: None if t is None else as_tokens(t, token_dims) for name, t in inputs.items()}
            history = [None if t is None else as_tokens(t, token_dims) for t in history]
            model_input = None if model_input is None else _viewed(model_input, token_dims)
            written = [_viewed(tensor, token_dims) for tensor in outs]
        else:
            written = outs
        x = inputs["sample"]
        table, scale = table_and_scale(self._rows[index], placement, rows, [weight for _, weight in moves], x)
        inputs["guidance_scale"] = scale if placement.paired else None
        threshold = None
        if self.table.thresholding:
            measured = {name: inputs[name] for name in ("sample", "model_output", "uncond", "guidance_scale")}
            (x0,) = ops.step(
                **measured,
                table=prediction_rows(table),
                row_index=row_index(table),
                backend=stepper.backend,
            )
            threshold = dynamic_threshold(x0, stepper._ratio, stepper._max_value)
        ops.step(
            **inputs,
            table=table,
            row_index=row_index(table),
            history=history,
            threshold=threshold,
            variance_kind=stepper._variance_kind(given["variance"]) if stepper._measures else 0,
            keeps=len(outs) - 1,
            seeds=seeds,
            noise_step=index,
            model_input=model_input,
            out=written,
            backend=stepper.backend,
        )
        for slot, tensor in zip(slots, outs[1:], strict=False):
            stepper._history[slot] = tensor
        stepper.index = index + 1
        stepper._seen = out
        if keeps:
            self._keep(outs[-1])
        return out

    def _keep(self, state: Tensor) -> None:
        """Remember what guidance has kept in a step."""
        self._state = state
        self._with_state = [
            has or method.keeps_state for has, method in zip(self._with_state, self.methods, strict=True)
        ]

    def _with_terms(
        self, sample: Tensor, tensors: list[Tensor], rows: list[RowWeights]
    ) -> tuple[Tensor, list[Tensor], list[RowWeights], list[tuple[Tensor, Scalar]]]:
        """Add the gradients: those that shift the model's output as branches, the others as moves of the result."""
        index = self.stepper.index
        row = self.table.source[index]
        level = None if self.levels is None else self.levels[index]
        moves: list[tuple[Tensor, Scalar]] = []
        shifts: list[tuple[Tensor, Scalar]] = []
        for term in self.terms:
            if isinstance(term, ClassifierGuidance):
                gradient = term.gradient(sample, row.timestep)
            else:
                with torch.enable_grad():
                    gradient = term.gradient(sample, weighted_sum(sample, tensors, rows), row)
            of_output, of_result = term.weights(row, level)
            if isinstance(of_output, Tensor) or of_output != 0.0:
                shifts.append((gradient, of_output))
            if isinstance(of_result, Tensor) or of_result != 0.0:
                moves.append((gradient, of_result))
        sample, tensors = sample.detach(), [tensor.detach() for tensor in tensors]
        for gradient, weight in shifts:
            rows = [((*w[:-1], weight, w[-1]), k and (*k[:-1], 0.0, k[-1])) for w, k in rows]
            tensors.append(gradient)
        return sample, tensors, rows, moves


def _kind_of(method: Guidance, place: Place, scale: float) -> _Kind:
    """Return the kind of a step with one scale for all samples."""
    names = method.needed(place, scale)
    if len(names) < 2 and not method.uses_sample:
        alone = names == method.branches[:1]
        return _Kind(names, 1.0 if alone else None, None, None, scale)
    if method.uses_sample:
        return _Kind(names, None, None, None, scale)
    if method.uses_reduction(place):
        with_state = (*names, STATE) if place.has_state else names
        return _Kind(names, None, None, method.formula(with_state, place), scale)
    weights, kept = method.formula(names, place)(None, None, 0.0, scale)
    first, second = weights[0], weights[1]
    plain = len(names) == 2 and kept is None and abs(first + second - 1.0) <= 1e-15 * (abs(first) + abs(second))
    return _Kind(names, first if plain else None, weights if kept is None else None, None, scale)


def _viewed(tensor: Tensor, token_dims: int) -> Tensor:
    """Return a tensor to write as tokens, in its own memory."""
    if not tensor.is_contiguous():
        remedy = "pass contiguous tensors"
        raise ValueError(error_message("step", "sample", "is not contiguous", "row-major memory for tokens", remedy))
    return tensor.view(-1, *tensor.shape[tensor.dim() - token_dims :])


def _without_zeros(
    sample: Tensor, tensors: list[Tensor], rows: list[RowWeights]
) -> tuple[list[Tensor], list[RowWeights]]:
    """Leave out the branches whose weight is 0 in every row; the sample takes the place of the last one, unread."""
    used = [j for j in range(len(tensors)) if any(_is_used(row[j]) or (k and _is_used(k[j])) for row, k in rows)]
    if not used:
        return [sample], [((0.0, row[-1]), None) for row, _ in rows]
    if len(used) == len(tensors):
        return tensors, rows
    columns = [*used, len(tensors)]
    return [tensors[j] for j in used], [
        ([row[j] for j in columns], None if k is None else [k[j] for j in columns]) for row, k in rows
    ]


def _is_used(weight: Scalar) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0


def _plain_scale(rows: Sequence[RowWeights], sample: Tensor) -> float | Tensor | None:
    """Return the scale with which plain guidance is the whole combination; None where a row is needed."""
    scales: list[float] = []
    for (first, *others), _ in rows:
        if len(others) > 2 or isinstance(first, Tensor) or any(isinstance(w, Tensor) for w in others):
            return None
        second = others[0] if len(others) == 2 else 0.0
        if others[-1] != 0.0 or abs(first + second - 1.0) > 1e-15 * (abs(first) + abs(second)):  # type: ignore[operator]
            return None
        scales.append(first)
    if all(scale == scales[0] for scale in scales):
        return scales[0]
    return torch.tensor(scales, dtype=compute_dtype(sample.dtype)).to(sample.device)


def _check(table: StepTable, guidance: object, terms: Sequence[object], levels: Levels | None) -> None:
    """Refuse arguments that do not fit together."""
    operation = "GuidedStepper"
    if not isinstance(guidance, (Guidance, MixedGuidance)):
        remedy = "pass PlainGuidance(7.5) or another method of fastdiff.guidance"
        checked_type(operation, "guidance", guidance, Guidance, "a guidance method", remedy)
    for i, term in enumerate(terms):
        if not isinstance(term, (ClassifierGuidance, LossGuidance)):
            expected = "a ClassifierGuidance or LossGuidance"
            checked_type(operation, f"terms[{i}]", term, LossGuidance, expected, "pass a list of them")
        if isinstance(guidance, PerTokenNormGuidance):
            remedy = "use another method"
            raise ValueError(error_message(operation, "terms", "are given", "none for weights a token", remedy))
        if isinstance(term, ClassifierGuidance) and term.form == "epsilon" and levels is None:
            remedy = "pass levels=sampler.levels(n)"
            raise ValueError(error_message(operation, "levels", "is missing", "the levels, for terms of σ", remedy))
    if levels is not None and len(levels) != len(table):
        got, expected = f"has {len(levels)} model calls", f"{len(table)}, as the table"
        raise ValueError(error_message(operation, "levels", got, expected, "pass the levels of the table"))
