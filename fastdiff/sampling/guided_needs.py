# SPDX-License-Identifier: MIT
"""The branches that the next step of a guided loop needs, found before the model is called."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import checked_type, error_message
from ..guidance.method import STATE, Guidance, Place
from ..guidance.per_token_norm import PerTokenNormGuidance
from ..guidance.tracing import Formula
from ..schedules.levels import Levels
from ..solvers.table import StepTable


class StepKind(NamedTuple):
    """A step of one method with one scale for all samples, seen often in a loop.

    Attributes:
        names: the branches it needs.
        scale: the scale with which plain guidance is the whole combination; None for other steps.
        weights: the weights of the branches and the sample where they are known before the loop; else None.
        formula: the weights from the scalar products of the branches; None where they need none.
        guidance_scale: the scale of the formula.
        share: φ of rescaled guidance.
    """

    names: tuple[str, ...]
    scale: float | None
    weights: Sequence[float] | None
    formula: Formula | None
    guidance_scale: float
    share: float


def kind_of(method: Guidance, place: Place, scale: float) -> StepKind:
    """Return the kind of a step with one scale for all samples."""
    names = method.needed(place, scale)
    if len(names) < 2 and not method.uses_sample:
        alone = names == method.branches[:1]
        return StepKind(names, 1.0 if alone else None, None, None, scale, 0.0)
    if method.uses_sample:
        return StepKind(names, None, None, None, scale, 0.0)
    share = method.rescale_at(place, scale)
    if method.uses_products(place):
        with_state = (*names, STATE) if place.has_state else names
        return StepKind(names, None, None, method.formula(with_state, place), scale, share)
    weights, kept = method.formula(names, place)(None, scale)
    first, second = weights[0], weights[1]
    plain = len(names) == 2 and kept is None and abs(first + second - 1.0) <= 1e-15 * (abs(first) + abs(second))
    plain = plain and share == 0.0
    return StepKind(names, first if plain else None, weights if kept is None else None, None, scale, share)


class GuidedNeeds:
    """The place of the next step, the branches that each sample needs there, and the kind of the step.

    Args:
        table: the compiled sampler.
        methods: one for all samples, or one a sample.
        levels: the levels of the loop, for methods that ask for σ.

    Attributes:
        with_state: for each method, True if it has kept a tensor in an earlier step.
        names: the branches of the next step: one entry for all samples, or one a sample.
        kind: of the next step; None for a scale or a method a sample, tokens and frequencies.
    """

    def __init__(self, table: StepTable, methods: Sequence[Guidance], levels: Levels | None) -> None:
        self._table, self._methods, self._levels = table, methods, levels
        self.with_state = [False] * len(methods)
        self.names: list[tuple[str, ...]] = []
        self.kind: StepKind | None = None
        self._place: Place | None = None
        self._kinds: dict[Hashable, StepKind] = {}
        self._has_kinds = (
            len(methods) == 1 and methods[0].is_affine and not isinstance(methods[0], PerTokenNormGuidance)
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave out what `at` makes again."""
        return {**self.__dict__, "_place": None, "kind": None, "_kinds": {}}

    def at(self, index: int) -> Place:
        """Find what a step needs, once; a table's last row answers for the end of the loop."""
        place = self._place
        if place is not None and place.index == index:
            return place
        row = self._table.source[min(index, len(self._table) - 1)]
        ratio = None
        if self._levels is not None and index < len(self._table):
            ratio = self._levels[index].noise_ratio
        state = self.with_state[0] if len(self._methods) == 1 else False
        place = self._place = Place(index, len(self._table), row.timestep, row.prediction, ratio, state)
        self.kind = self._known_kind(place)
        self.names = self._names(place) if self.kind is None else [self.kind.names]
        return place

    def _known_kind(self, place: Place) -> StepKind | None:
        if not self._has_kinds:
            return None
        method = self._methods[0]
        scale = method.scale_at(place)
        if isinstance(scale, Tensor):
            return None
        key = (scale, method.kind(place))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = kind_of(method, place, scale)
        return kind

    def _names(self, place: Place) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = []
        for method, has_state in zip(self._methods, self.with_state, strict=True):
            at = place._replace(has_state=True) if has_state else place
            scales = method.host_scales(at)
            if scales is None:
                names.append(method.needed(at, None))
            elif len(self._methods) > 1:
                names.append(method.needed(at, scales[len(names) if len(scales) > 1 else 0]))
            else:
                names = [method.needed(at, scale) for scale in scales]
        return names

    def branches(self, index: int) -> tuple[str, ...]:
        """Return the branches that a step needs for any sample."""
        self.at(index)
        if len(self.names) == 1:
            return self.names[0]
        return tuple(dict.fromkeys(name for names in self.names for name in names))

    def samples_for(self, branch: str, index: int) -> Tensor | None:
        """Return the samples for which a step needs a branch, int64 ``[N]`` on the CPU; None for all of them."""
        self.at(index)
        if all(branch in names for names in self.names):
            return None
        return torch.tensor([i for i, names in enumerate(self.names) if branch in names], dtype=torch.int64)

    def keep_state(self) -> None:
        """Note that the step has kept a tensor for the methods that keep one."""
        self.with_state = [
            has or method.keeps_state for has, method in zip(self.with_state, self._methods, strict=True)
        ]

    def tensors(
        self, sample: Tensor, outputs: Mapping[str, Tensor], index: int
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Return the names and outputs of the branches of a step, each for all samples.

        Args:
            sample: x, ``[B, ...]``.
            outputs: the model's outputs by branch, each like `sample`, or ``[N, ...]`` for the samples that need it.
            index: the step.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        checked_type("step", "sample", sample, Tensor, "a torch.Tensor", "pass a tensor")
        expected, remedy = "the outputs by branch", "pass {'cond': c, 'uncond': u}"
        checked_type("step", "outputs", outputs, Mapping, expected, remedy)
        names = self.branches(index)
        if len(self.names) not in (1, sample.shape[0]):
            got, remedy = f"is for {len(self.names)} samples", "pass one method and scale, or one a sample"
            raise ValueError(error_message("GuidedStepper", "guidance", got, f"{sample.shape[0]} samples", remedy))
        for name in names:
            if name not in outputs:
                got, remedy = f"lacks {name!r}", f"pass the outputs of {', '.join(names)}"
                raise ValueError(error_message("step", "outputs", got, "every branch of `branches`", remedy))
        return names, [self._whole(name, outputs, sample, index) for name in names]

    def _whole(self, name: str, outputs: Mapping[str, Tensor], sample: Tensor, index: int) -> Tensor:
        """Return a branch's output for all samples; those that do not need it get the output of the first branch."""
        output = outputs[name]
        checked_type("step", f"outputs[{name!r}]", output, Tensor, "a torch.Tensor", "pass the model's output")
        if output.shape == sample.shape:
            return output
        chosen = self.samples_for(name, index)
        if chosen is None or output.shape != (len(chosen), *sample.shape[1:]):
            got, remedy = f"has shape {list(output.shape)}", "pass one output a sample"
            expected = f"{list(sample.shape)}" if chosen is None else f"{list(sample.shape)} or {len(chosen)} samples"
            raise ValueError(error_message("step", f"outputs[{name!r}]", got, expected, remedy))
        first = self.branches(index)[0]
        whole = sample if name == first else outputs[first]
        return whole.index_copy(0, chosen.to(sample.device), output.to(whole.dtype))
