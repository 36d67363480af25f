# SPDX-License-Identifier: MIT
"""The base of guidance methods: the branches of a method, its scale at a step, and the weight of each branch."""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..errors import as_float, checked_float, error_message
from .scalars import Scalar
from .tracing import Formula, Symbol, Trace, compiled
from .vectors import Vector, unit_vectors

#: Names of the branches that are no model output: what a method kept in the step before, and the sample.
STATE, SAMPLE = "state", "sample"
#: The phase of a step whose guided output is 0, whatever the scale.
ZERO_PHASE = "zero"

#: The weights of the branches and, last, of the sample in the guided output; the same in what guidance keeps, or None.
RowWeights = tuple[Sequence[Scalar], Sequence[Scalar] | None]


class Place(NamedTuple):
    """The step at which a scale is asked for.

    Attributes:
        index: of the step, from 0, of `total` steps.
        timestep: the model's time argument.
        prediction: (p, q) with x0 = p·x + q·m.
        noise_ratio: σ/α at the step, or None where the levels are not known.
        has_state: the method has kept a tensor in an earlier step.
    """

    index: int = 0  # type: ignore[assignment]  # as a tuple has a method of that name
    total: int = 1
    timestep: float = 0.0
    prediction: tuple[float, float] = (0.0, 1.0)
    noise_ratio: float | None = None
    has_state: bool = False


#: One number; ``[B]``, a scale a sample; a list, a scale a step; or a function of the step that returns one of the
#: first two.
Scale = float | Tensor | Sequence[float] | Callable[[Place], float | Tensor]


#: The compiled formulas of each method.
_FORMULAS: weakref.WeakKeyDictionary[Guidance, dict[Hashable, Formula]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Guidance:
    """A guidance method: the weight of each branch in the guided output, for one sample.

    Subclasses name their `branches` and write `combination` on symbols.

    Args:
        scale: the guidance scale: a float; a tensor ``[B]``, one a sample; a list, one a step; or a function of a
            `Place`.  A tensor on a GPU is not looked at.
        rescale: φ of rescaled guidance (`rescaling_of`), 0 to 1.
        start, stop: the share of the steps, from 0 to 1, where guidance begins and ends (arXiv 2404.07724); outside
            the output is that of `branches[0]`.  Step i of n takes part where int(start·n) ≤ i < int(stop·n).
        noise_ratios: (low, high): guidance only where low < σ/α ≤ high, as the paper states its interval.

    Raises:
        TypeError, ValueError: a field does not fit; the message names it.
    """

    scale: Scale = 7.5
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    noise_ratios: tuple[float, float] | None = None

    #: The outputs of the model that the method combines; the first is the conditional one.
    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond")
    #: True if the weights depend on scalar products of the branches.
    reduces: ClassVar[bool] = False
    #: The scale at which the guided output is the first branch, so that no other is needed; None if there is none.
    neutral_scale: ClassVar[float | None] = 1.0
    #: True if the sample itself has a weight in the guided output.
    uses_sample: ClassVar[bool] = False
    #: False if the guided output is no weighted sum of the branches.
    is_affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        operation = type(self).__name__
        if not isinstance(self.scale, Tensor) and not callable(self.scale):
            several = isinstance(self.scale, (list, tuple))
            for number in self.scale if several else (self.scale,):  # type: ignore[union-attr]
                checked_float(operation, "scale", number, -math.inf)
        for name in ("rescale", "start", "stop"):
            if checked_float(operation, name, getattr(self, name), 0.0) > 1.0:
                got = f"is {getattr(self, name)}"
                raise ValueError(error_message(operation, name, got, "0 to 1", "pass a share, not a percentage"))

    @abstractmethod
    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return the guided output as a weighted sum of the branches.

        Args:
            branches: the symbols by name: those of `branches`, ``sample``, and ``state``, which is 0 at first.
            scale: the scale of the sample, or ``[B]``.
            place: the step.
        """
        raise NotImplementedError

    def kept(self, branches: Mapping[str, Vector], place: Place) -> Vector | None:
        """Return the weighted sum that the method keeps for later steps, there the branch ``state``; None: nothing."""
        return None

    @property
    def keeps_state(self) -> bool:
        """True if the method keeps a tensor from step to step."""
        return False

    def branches_at(self, place: Place) -> tuple[str, ...]:
        """Return the branches that the method combines at a step where guidance is on."""
        return self.branches

    # --- The scale at a step ----------------------------------------------------------------------------------------

    def is_on(self, place: Place) -> bool:
        """Return whether the step is inside the interval."""
        if not int(self.start * place.total) <= place.index < int(self.stop * place.total):
            return False
        if self.noise_ratios is None:
            return True
        if place.noise_ratio is None:
            remedy = "pass levels=sampler.levels(n), or use start and stop"
            raise ValueError(
                error_message(type(self).__name__, "noise_ratios", "is set", "the noise levels of the loop", remedy)
            )
        low, high = self.noise_ratios
        return low < place.noise_ratio <= high

    def scale_at(self, place: Place) -> float | Tensor:
        """Return the scale at a step: one number, or ``[B]``.

        Raises:
            ValueError: a list of scales has none for the step.
        """
        scale: Any = self.scale
        if type(scale) is float:
            return scale
        if callable(scale) and not isinstance(scale, Tensor):
            scale = scale(place)
        elif isinstance(scale, (list, tuple)):
            if len(scale) != place.total:
                got = f"has {len(scale)} scales"
                expected, remedy = f"one a step: {place.total}", "pass a scale for each row of the table"
                raise ValueError(error_message(type(self).__name__, "scale", got, expected, remedy))
            scale = scale[place.index]
        return scale if isinstance(scale, Tensor) else as_float(type(self).__name__, "scale", scale)

    def host_scales(self, place: Place) -> list[float] | None:
        """Return the scale at a step as numbers, one or one a sample; None for a tensor on a GPU."""
        scale = self.scale_at(place)
        if not isinstance(scale, Tensor):
            return [scale]
        return scale.reshape(-1).tolist() if scale.device.type == "cpu" else None

    def device_scale(self, place: Place, batch: int, like: Tensor) -> Scalar:
        """Return the scale at a step as a float, or as float64 ``[B]`` on the device of `like`."""
        scale = self.scale_at(place)
        if not isinstance(scale, Tensor):
            return scale
        return scale.to(device=like.device, dtype=like.dtype).reshape(-1).expand(batch)

    # --- What a step needs ------------------------------------------------------------------------------------------

    def uses_products(self, place: Place) -> bool:
        """Return whether the formula at a step reads scalar products."""
        return self.reduces and self.is_on(place)

    def rescale_at(self, place: Place, scale: float | None) -> float:
        """Return φ at a step; 0 where guidance is off.

        Args:
            place: the step.
            scale: the sample's, or None if it is not known on the host.
        """
        if self.rescale == 0.0 or not self.is_on(place) or self.phase(place) == ZERO_PHASE:
            return 0.0
        return 0.0 if scale is not None and scale == self.neutral_scale else self.rescale

    def uses_reduction(self, place: Place) -> bool:
        """Return whether the weights at a step depend on scalar products or standard deviations."""
        return self.uses_products(place) or self.rescale_at(place, None) > 0.0

    def needed(self, place: Place, scale: float | None) -> tuple[str, ...]:
        """Return the branches whose weight is not known to be 0 at a step.

        Args:
            place: the step.
            scale: the sample's, or None if it is not known on the host.
        """
        first = self.branches[:1]
        if not self.is_on(place) or (scale is not None and scale == self.neutral_scale):
            return first
        names = self.branches_at(place)
        if scale is None or self.reduces or not self.is_affine:
            return names
        weights, _ = self.formula(names, place)(None, scale)
        return tuple(
            name
            for name, weight in zip(names, weights, strict=False)
            if weight != 0.0 or (self.rescale > 0.0 and name in first)
        )

    # --- The weights ------------------------------------------------------------------------------------------------

    def phase(self, place: Place) -> Hashable:
        """Return what the formula depends on at a step, beside the interval, the state and the scale."""
        return None

    def kind(self, place: Place) -> Hashable:
        """Return a key of the formula at a step: steps with one key have one formula."""
        prediction = place.prediction if self.uses_sample else None
        return self.is_on(place), place.has_state, prediction, self.phase(place)

    def formula(self, names: Sequence[str], place: Place) -> Formula:
        """Return the function from scalar products and scale to the weights of the branches and, last, of the sample.

        Args:
            names: the branches at hand, ``state`` included where there is one.
            place: the step.
        """
        key = (tuple(names), self.kind(place))
        of_method = _FORMULAS.setdefault(self, {})
        if key not in of_method:
            of_method[key] = self._traced(names, place)
        return of_method[key]

    def _traced(self, names: Sequence[str], place: Place) -> Formula:
        trace = Trace()
        units = unit_vectors(len(names) + 1, trace)
        absent = Vector([0.0] * len(units), trace)  # a branch that is not at hand has no weight
        symbols = {
            **dict.fromkeys((*self.branches, STATE), absent),
            **dict(zip([*names, SAMPLE], units, strict=True)),
        }
        if not self.is_on(place):
            return compiled(trace, symbols[self.branches[0]].weights, None)
        kept = self.kept(symbols, place)
        guided = self.combination(symbols, Symbol("scale", trace), place)
        return compiled(trace, guided.weights, None if kept is None else kept.weights)

    def weights(self, names: Sequence[str], place: Place, products: Any, scale: Scalar) -> RowWeights:
        """Return the weights of the guided output before it is rescaled, and of what is kept or None.

        Args:
            names, place: as in `formula`.
            products: the Gram matrix of the branches, of floats or tensors ``[B]``; None for a method without.
            scale: the sample's scale, or ``[B]``.
        """
        if isinstance(scale, float) and scale == self.neutral_scale and self.phase(place) != ZERO_PHASE:
            first = names.index(self.branches[0])
            return tuple(1.0 if j == first else 0.0 for j in range(len(names) + 1)), None
        return self.formula(names, place)(products, scale)
