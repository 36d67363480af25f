# SPDX-License-Identifier: MIT
"""Walks a step table under guidance: at most one reduction, then the step, which combines the branches itself."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_type, error_message
from ..guidance.combining import HostTable, as_tokens, combine, combined_pair, row_index, table_and_scale
from ..guidance.frequency import FrequencyDecoupledGuidance
from ..guidance.gradients import ClassifierGuidance, LossGuidance, Term, add_gradients
from ..guidance.method import STATE, Guidance, Place, RowWeights
from ..guidance.mixed import MixedGuidance
from ..guidance.per_token_norm import PerTokenNormGuidance
from ..guidance.rescale import host_rescaling_of
from ..guidance.rows import Placement, guided_row, place_branches, scaled_pair, table_of, uses_bounded_x0
from ..guidance.scalars import Scalar
from ..guidance.weights import MOST_ON_HOST, plain_scale, rescaled_weights, step_weights, without_zeros
from ..noise.generators import Generators
from ..schedules.levels import Levels
from ..solvers.table import StepTable
from .guided_needs import GuidedNeeds, StepKind
from .guided_row_step import GuidedRows, step_with_rows
from .stepper import Stepper

#: The weights of a tensor that is the model's output by itself.
_ALONE: list[RowWeights] = [((1.0, 0.0), None)]


class GuidedStepper:
    """The state of one guided loop over a table: a `Stepper` whose model output is a combination of branches.

    A step takes one reduction where the method needs scalar products, and one pass: the weights of the branches go into
    the solver's row, a row a sample.  ``rescale`` adds a pass and two reductions.  Another pass combines the branches
    first where they do not fit into the row: see `passes`.

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
        self._needs = GuidedNeeds(table, self.methods, levels)
        self._state: Tensor | None = None
        self._before: tuple[Tensor | None, list[bool]] = None, self._needs.with_state
        self._table: HostTable | None = None
        self._tables: dict[Hashable, tuple[Tensor, list[Any], list[Placement | None]]] = {}
        self._placements: dict[Hashable, Placement | None] = {}

    def __getstate__(self) -> dict[str, object]:
        """Copy stepper and state, which either copy would write; leave out what a step makes again."""
        state = None if self._state is None else self._state.clone()
        new: dict[str, object] = {
            "stepper": copy.copy(self.stepper),
            "_needs": copy.copy(self._needs),
            "_state": state,
            "_before": (state, self._needs.with_state),
            "_table": None,
            "_tables": {},
        }
        return {**self.__dict__, **new}

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
        return self._needs.branches(self.stepper.index)

    def samples_for(self, branch: str) -> Tensor | None:
        """Return the samples for which the next step needs a branch, int64 ``[N]`` on the CPU; None for all of them.

        `step` takes the outputs of these alone, ``[N, ...]``.
        """
        return self._needs.samples_for(branch, self.stepper.index)

    def passes(self) -> int:
        """Return the number of passes of the next step over the samples: 1, or 2 where the branches are combined first.

        Two are needed where x0 is clipped or thresholded and more than two tensors are combined, where the solver's
        history leaves too few of the four slots, where the solver keeps two outputs and guidance one more, for tokens
        of a thresholded x0, and for `FrequencyDecoupledGuidance`.  Dynamic thresholding adds a pass that measures x0,
        with guidance or without, and ``rescale`` one that measures the guided output.
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
        needs = self._needs
        place = needs.at(self.stepper.index)
        self._before = self._state, needs.with_state
        if needs.kind is not None and not self.terms:
            result = self._known(needs.kind, sample, outputs, given)
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
            row, level = self.table.source[place.index], None if self.levels is None else self.levels[place.index]
            rows, moves = add_gradients(self.terms, sample, tensors, rows, row, level)
            sample, tensors = sample.detach(), [tensor.detach() for tensor in tensors]
        tensors, rows = without_zeros(sample, tensors, rows)
        keeps = rows[0][1] is not None
        scale = None if keeps or moves or self._token_dims is not None else plain_scale(rows, sample)
        if scale is not None:
            uncond: dict[str, Any] = {"uncond": tensors[1], "guidance_scale": scale} if len(tensors) > 1 else {}
            return self.stepper.step(sample, tensors[0], **uncond, **given)
        placement = self._placement(len(tensors), keeps, len(moves))
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sample, *tensors))
        if placement is not None and not graph and (self._token_dims is None or not self.table.thresholding):
            return self._with_rows(sample, tensors, rows, placement, moves, self._token_dims, given)
        guided, *kept = combine(sample, tensors, rows, token_dims=self._token_dims, backend=self.stepper.backend)
        if moves:
            placement = self._placement(1, False, len(moves))
            if placement is None:
                remedy = "use fewer terms, or a solver with less history"
                expected = "no more than the history slots that the row leaves free"
                raise ValueError(error_message("step", "terms", f"are {len(moves)}", expected, remedy))
            result = self._with_rows(sample, [guided], _ALONE, placement, moves, None, given)
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
        at.stepper.index = self.stepper.index - 1
        at._state, at._needs.with_state = self._before
        place = at._needs.at(at.stepper.index)
        names, tensors = at._tensors(place, sample, outputs)
        tensors = [tensor.detach() for tensor in tensors]
        if len(tensors) > 1 and isinstance(self.guidance, FrequencyDecoupledGuidance):
            return self.guidance.output(*tensors)
        rows = at._weights(place, names, tensors, sample)
        tensors, rows = without_zeros(sample, tensors, rows)
        return combine(sample, tensors, rows, token_dims=self._token_dims, backend=self.stepper.backend)[0]

    def _known(self, kind: StepKind, sample: Tensor, outputs: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Take a step of a known kind, on the CPU of few samples; None where there is more to look at."""
        if not isinstance(outputs, Mapping):
            return None
        try:
            tensors = [outputs[name] for name in kind.names]
            shape = sample.shape
            if not all(tensor.shape == shape for tensor in tensors):
                return None
        except (AttributeError, LookupError, TypeError):
            return None  # the checks name what is wrong
        if kind.scale is not None:
            if len(tensors) == 1:
                return self.stepper.step(sample, tensors[0], **given)
            return self.stepper.step(sample, tensors[0], uncond=tensors[1], guidance_scale=kind.scale, **given)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sample, *tensors)):
            return None
        if kind.weights is not None and kind.share == 0.0:
            return self._constant(kind.weights, sample, tensors, given)
        batch = shape[0] if shape else 0
        if (kind.formula is None and kind.weights is None) or sample.device.type != "cpu":
            return None
        if not 0 < batch <= MOST_ON_HOST:
            return None
        names = kind.names
        if self._state is not None:
            names, tensors = (*names, STATE), [*tensors, self._state]
        keeps = self.methods[0].keeps_state
        pair = len(tensors) == 2 and not keeps
        placement = None if pair else self._placement(len(tensors), keeps, 0)
        if placement is None and not pair:
            return None
        weights: list[RowWeights]
        if kind.formula is None:
            assert kind.weights is not None
            weights = [(kind.weights, None)]
        else:
            weights = [kind.formula(matrix, kind.guidance_scale) for matrix in ops.host_gram(tensors)]
        if kind.share > 0.0 and not pair:
            weights = rescaled_weights(weights, [kind.share], names[:1], names, tensors, sample)
        if self._table is None or len(self._table) != batch or self._table.of is not sample.dtype:
            self._table = HostTable(batch, sample)
        base = self._rows[self.stepper.index]
        if placement is None:
            pairs = [scaled_pair(row[0], row[1]) for row, _ in weights]
            if kind.share > 0.0:
                guided = combined_pair(self._table, pairs, sample, tensors)
                pairs = [(factor, 1.0) for factor in host_rescaling_of(guided, tensors[0], kind.share)]
                rows, _ = self._table.write_pairs(base, pairs)
                return self.stepper.step(sample, guided, rows=rows, **given)
            rows, scale = self._table.write_pairs(base, pairs)
            return self.stepper.step(sample, tensors[0], uncond=tensors[1], guidance_scale=scale, rows=rows, **given)
        scale = self._table.write(base, placement, weights)
        table = self._table.tensor
        in_row = GuidedRows(table, row_index(table), scale, placement, keeps)
        result, kept = step_with_rows(self.stepper, sample, tensors, in_row, given)
        if kept is not None:
            self._keep(kept)
        return result

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
        return step_with_rows(self.stepper, sample, tensors, GuidedRows(table, index, scales[index], placement), given)[
            0
        ]

    def _tensors(
        self, place: Place, sample: Tensor, outputs: Mapping[str, Tensor]
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Return the names and tensors of the branches at hand, what guidance has kept last."""
        names, tensors = self._needs.tensors(sample, outputs, place.index)
        if self._state is not None and any(m.keeps_state and m.is_on(place) for m in self.methods):
            return (*names, STATE), [*tensors, self._state]
        return names, tensors

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
        return step_weights(self.methods, place, names, branches, x, self._needs.with_state)

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

    def _with_rows(
        self, sample: Tensor, tensors: Sequence[Tensor], weights: Sequence[RowWeights], placement: Placement,
        moves: Sequence[tuple[Tensor, Scalar]], token_dims: int | None, given: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Take the step with the branches in a row made for it."""
        base, x = self._rows[self.stepper.index], as_tokens(sample, token_dims)
        table, scale = table_and_scale(base, placement, weights, [weight for _, weight in moves], x)
        rows = GuidedRows(table, row_index(table), scale, placement, weights[0][1] is not None)
        moving = [tensor for tensor, _ in moves]
        result, kept = step_with_rows(self.stepper, sample, tensors, rows, given, moves=moving, token_dims=token_dims)
        if kept is not None:
            self._keep(kept)
        return result

    def _keep(self, state: Tensor) -> None:
        """Remember what guidance has kept in a step."""
        self._state = state
        self._needs.keep_state()


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
