# SPDX-License-Identifier: MIT
"""A scheduler for diffusers' pipelines whose steps are the rows of a table: one from a file, or of an own sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..errors import checked_type, error_message
from ..noise.generators import Generators
from ..row_layout import Variance
from ..sampling.stepper import Stepper
from ..solvers.table import StepTable


class TableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Walks a step table inside a diffusers pipeline: ``pipe.scheduler = TableScheduler(StepTable.load("x.json"))``.

    The table decides the steps, so a pipeline's ``num_inference_steps`` has to be their number, and ``eta`` and other
    options of a solver are settled.  Samples are α·x0 + σ·ε, as those of fastdiff's own samplers are.

    Args:
        table: a `fastdiff.StepTable`, or the path of its file.
        num_train_timesteps: T of the model, which some pipelines ask for.

    Attributes:
        timesteps: one a row, as `set_timesteps` has put them on a device.
        init_noise_sigma: the standard deviation of the first sample.
        order: 1: pipelines count a step for each row.

    Raises:
        TypeError, ValueError: it is no table, or needs a second model output or a threshold, which no pipeline gives.
    """

    order = 1

    def __init__(self, table: StepTable | str | Path, num_train_timesteps: int = 1000) -> None:
        table = StepTable.load(table) if isinstance(table, (str, Path)) else table
        checked_type("TableScheduler", "table", table, StepTable, "a StepTable or a path", "load it, or compile one")
        if table.variance is not Variance.FIXED:
            got, remedy = f"has a {table.variance.name.lower()} variance", "compile it with a fixed variance_type"
            raise ValueError(error_message("TableScheduler", "table", got, "a fixed one", remedy))
        self.register_to_config(num_train_timesteps=num_train_timesteps)  # type: ignore[no-untyped-call]
        self.num_train_timesteps = num_train_timesteps
        self.table = table
        self.init_noise_sigma = table.initial_scale
        self.set_timesteps(len(table))

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Begin a loop.

        Args:
            num_inference_steps: the number of rows, or None.
            device: of `timesteps`.

        Raises:
            ValueError: another number of steps.
        """
        if num_inference_steps not in (None, len(self.table)):
            got, expected = f"is {num_inference_steps}", f"{len(self.table)}, the table's rows"
            remedy = "ask for that number, or load a table of another length"
            raise ValueError(error_message("set_timesteps", "num_inference_steps", got, expected, remedy))
        whole = all(timestep.is_integer() for timestep in self.table.timesteps)
        timesteps = torch.tensor(self.table.timesteps, dtype=torch.float64, device="cpu")
        self.timesteps = timesteps.to(torch.int64 if whole else torch.float32).to(device)
        self.num_inference_steps = len(self.table)
        self._stepper = Stepper(self.table)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the model's input for the next step: the sample, scaled where the row before says so."""
        index = self._stepper.index
        scale = self.table.source[index - 1].model_input_scale if index else 1.0
        return sample if scale == 1.0 else sample * scale

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Take the next row's step, in one pass.

        Args:
            model_output: the model's prediction, like `sample`.
            timestep: the row's own.
            sample: ``[B, ...]``.
            generator: of the noise, one or one a sample.
            return_dict: return an object with ``prev_sample``, else a tuple.
            options: what a pipeline passes to other schedulers, such as ``eta``; 0, False or None, since the table has
                settled it.

        Raises:
            ValueError: the timestep is not the next row's, an option is set, or a tensor does not fit.  The loop is
                then where it was.
            IndexError: the loop has ended.
        """
        for name, value in options.items():
            if value not in (None, False, 0):
                got, remedy = f"is {value!r}", "leave it out, or compile a table with it"
                raise ValueError(error_message("step", name, got, "no option: the table has settled it", remedy))
        index = self._stepper.index
        if index < len(self.table) and float(timestep) != float(self.timesteps[index]):
            got, expected = f"is {float(timestep):g}", f"{float(self.timesteps[index]):g}, that of row {index}"
            raise ValueError(error_message("step", "timestep", got, expected, "call set_timesteps to begin again"))
        previous = self._stepper.step(sample, model_output, generator=generator)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def __len__(self) -> int:
        return self.num_train_timesteps
