# SPDX-License-Identifier: MIT
"""A sampler whose steps are given: the rows of a table from a file, or of anybody's own solver."""

from __future__ import annotations

from typing import Any

from ..errors import checked_type, error_message
from ..sampling.config import SamplingConfig
from ..schedules import BaseNoiseScheduler
from ..schedules.levels import Levels
from ..solvers import Prediction, SamplingMethod
from ..solvers.table import StepTable
from .base import BaseSampler


class TableSampler(BaseSampler):
    """Samples with the rows of a table: ``TableSampler(StepTable.load("x.json"), scheduler).sample(model, latents)``.

    The table settles what a solver would: its timesteps, the prediction type, clipping and the kind of variance.  The
    configuration's guidance and dynamic thresholding ratio are read; its method and the options of solvers are not.

    Args:
        table: a `fastdiff.StepTable` with timesteps of the schedule.
        scheduler: the noise schedule that the model was trained on.
        config, fields: as in `BaseSampler`.

    Raises:
        TypeError, ValueError: it is no table, or has timesteps that are not on the schedule or do not descend.
    """

    method = SamplingMethod.DDPM

    def __init__(
        self, table: StepTable, scheduler: BaseNoiseScheduler, config: SamplingConfig | None = None, **fields: Any
    ) -> None:
        checked_type("TableSampler", "table", table, StepTable, "a StepTable", "load one with StepTable.load")
        self._given = table
        #: Solvers with several calls a step call the model at one timestep twice.
        self._steps = list(dict.fromkeys(table.timesteps))
        super().__init__(scheduler, config, **{**fields, "num_inference_steps": len(self._steps)})

    def levels(self, num_inference_steps: int) -> Levels:
        """Return the noise levels of the table's timesteps.

        Raises:
            ValueError: another number of steps than the table's.
        """
        if num_inference_steps != len(self._steps):
            got, remedy = f"is {num_inference_steps}", "load a table that was compiled for that number"
            raise ValueError(
                error_message("TableSampler", "num_inference_steps", got, f"{len(self._steps)}, the table's", remedy)
            )
        path = self.scheduler.path
        return Levels((*map(path.at_timestep, self._steps), self._end), path.at_ratio, path.at_timestep)

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        """Return the table, which was compiled for one list of levels."""
        if levels.timesteps != self._steps:
            got, remedy = "are other ones than the table's", "leave them out, or compile a table for them"
            raise ValueError(error_message("TableSampler", "the steps", got, f"all {len(self._steps)} of it", remedy))
        return self._given
