# SPDX-License-Identifier: MIT
"""The facts of a registered solver; the registry itself is `fastdiff.solvers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..schedules.levels import Levels
from .prediction import Prediction
from .table import StepTable

#: ``(levels, prediction, *, options) -> StepTable``
Solver = Callable[..., StepTable]


@dataclass(frozen=True)
class SolverEntry:
    """One solver that people ask for by name.

    Args:
        sampler_class: the name of its class in `fastdiff.samplers`.
        functions: the solver functions behind the name.
        options: the keyword arguments of the table, which are fields of `SamplingConfig`.
        source: the paper or code, as docs/samplers.md cites it.
        compile: ``(levels, prediction, **options) -> StepTable``, where that is not the first function itself.
        presets: names that the command line takes and the options that each sets; where empty, the method's own name.
        order: the order of accuracy without options.
        calls_per_step: model calls in every step but the last, which makes one.
        extra_calls: model calls besides, in a loop of two steps or more.
        distilled: the solver is for models distilled for it: with others it does not converge to the data.
    """

    sampler_class: str
    functions: tuple[Solver, ...]
    options: tuple[str, ...] = ()
    source: str = ""
    compile: Solver | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    order: int = 1
    calls_per_step: int = 1
    extra_calls: int = 0
    distilled: bool = False

    def table(self, levels: Levels, prediction: Prediction, **options: Any) -> StepTable:
        """Compile the table; an option that is None takes the solver's own default."""
        solver = self.compile or self.functions[0]
        return solver(levels, prediction, **{name: value for name, value in options.items() if value is not None})
