# SPDX-License-Identifier: MIT
"""Consistency distillation and consistency training: one output for all samples on a path to the data.

The consistency function is that of `fastdiff.solvers.lcm`, so samplers ``lcm`` and ``tcd`` take the trained model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import checked_float, checked_integer, error_message, unknown_name
from ...schedules import BaseNoiseScheduler
from ...schedules.levels import Levels
from ...solvers import Prediction, PredictionType
from ...solvers.affine import SAMPLE
from ...solvers.ddim import ddim
from ...solvers.lcm import consistency_function
from ...solvers.table import Row
from ..data.batches import TrainingBatch
from ..losses.objectives import LossTerms, Predict
from ..losses.timestep_draws import draw_timesteps
from .progressive import RowTable, ddim_sampler, noising_rows, noisy_samples

_CHOICES = {
    "index_sampling": ("uniform", "lognormal"),
    "weighting": ("truncated_snr", "inverse_gap", "uniform"),
    "loss": ("l2", "huber"),
}


@dataclass(frozen=True)
class ConsistencyOptions:
    """Options of consistency distillation and training.

    The defaults distil a model in few training steps: one grid, all its intervals as likely, and progressive
    distillation's weights.  A small error of a model that predicts ε or v hardly moves x0 where there is little noise,
    so with equal weights the levels of little noise, which all others build on, are forgotten first.  Latent
    consistency models (arXiv 2310.04378) are ``weighting="uniform", loss="huber"``.  Improved consistency training
    (arXiv 2310.14189) is ``first_intervals=10, index_sampling="lognormal", weighting="inverse_gap", loss="huber"`` with
    1280 intervals, or T where that is less.

    Args:
        intervals: of the discretization at the end of the training, n.
        first_intervals: at its start; they double at equal distances (arXiv 2310.14189, section 3.4).  None for n
            throughout.
        index_sampling: ``uniform``; or ``lognormal``: an interval is as likely as σ̂ = σ/α is to lie in it, with log σ̂
            normal (arXiv 2310.14189, eq. 10).
        log_mean, log_std: of log σ̂.
        weighting: ``truncated_snr``: max(1/σ̂_t², 1) of a square (arXiv 2202.00512, section 4), its root for ``huber``;
            ``inverse_gap``: 1/(σ̂_t − σ̂_s) of the interval (arXiv 2310.14189, section 3.1); or ``uniform``.
        loss: ``l2``: the mean square; or ``huber``: √(‖r‖² + c²) − c of a sample (arXiv 2310.14189, section 3.3).
        huber_c: c; 0.00054·√d for d numbers a sample where None.
        timestep_scaling, sigma_data: of the consistency function, as in `fastdiff.solvers.lcm`.
    """

    intervals: int = 64
    first_intervals: int | None = None
    index_sampling: str = "uniform"
    log_mean: float = -1.1
    log_std: float = 2.0
    weighting: str = "truncated_snr"
    loss: str = "l2"
    huber_c: float | None = None
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def validate(self) -> ConsistencyOptions:
        """Check all fields and return a copy.

        Raises:
            TypeError, ValueError: a field has the wrong type or is out of range.
        """
        operation = type(self).__name__
        checked_integer(operation, "intervals", self.intervals, 1)
        if self.first_intervals is not None:
            checked_integer(operation, "first_intervals", self.first_intervals, 1)
            if self.first_intervals > self.intervals:
                got, expected = f"is {self.first_intervals}", f"at most {self.intervals}, intervals"
                raise ValueError(error_message(operation, "first_intervals", got, expected, "start with fewer"))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(operation, name, getattr(self, name), known)
        checked_float(operation, "log_mean", self.log_mean, -math.inf)
        for name in ("log_std", "sigma_data"):
            checked_float(operation, name, getattr(self, name), 0.0, strict=True)
        checked_float(operation, "timestep_scaling", self.timestep_scaling, 0.0)
        if self.huber_c is not None:
            checked_float(operation, "huber_c", self.huber_c, 0.0, strict=True)
        return replace(self)

    def intervals_at(self, step: int, total_steps: int) -> int:
        """Return the intervals of the discretization at an optimizer step (arXiv 2310.14189, section 3.4).

        They double each ⌊K/(log2⌊s1/s0⌋ + 1)⌋ of K steps, and end at `intervals`.
        """
        if self.first_intervals is None:
            return self.intervals
        stage = int(total_steps / (math.log2(self.intervals // self.first_intervals) + 1))
        return int(min(self.first_intervals * 2 ** min(step // max(stage, 1), 64), self.intervals))


@dataclass(frozen=True)
class _Grid:
    """Rows of one discretization of n intervals.

    Attributes:
        noising: n rows from x0 to the levels.
        solver: n rows, a DDIM step each.
        clean: n + 1 rows of the consistency function; the last, at the clean end, gives the sample itself.
        cumulative: probability ``[n]`` that a drawn interval is that one or one with more noise, float64; None for
            equal ones.
        weights: ``[n]`` float64.
    """

    noising: RowTable
    solver: RowTable
    clean: RowTable
    cumulative: Tensor | None
    weights: Tensor


class ConsistencyObjective:
    """Loss of consistency distillation or training (arXiv 2303.01469, algorithms 2 and 3), on a discrete grid.

    A sample is noised to the upper end t of one of n intervals.  Its partner at the lower end s is a DDIM step away: of
    the teacher in distillation; in training of x0 itself, which keeps x0 and noise.  The loss is the distance of the
    model's consistency function at t from that at s, which gets no gradient.  Both calls draw the same dropout.  The
    model at s has the student's own weights, not averaged ones (arXiv 2310.14189, section 3.2).

    Args:
        schedule: the noise schedule of fastdiff; the grid is spaced "trailing".
        prediction_type: of teacher and student.
        options: see `ConsistencyOptions`.
        teacher: called with ``(sample, timestep, condition)``, such as a `Teacher`; None for consistency training.
        total_steps: optimizer steps in all, for `first_intervals`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(
        self,
        schedule: BaseNoiseScheduler,
        prediction_type: str,
        options: ConsistencyOptions | None = None,
        *,
        teacher: Predict | None = None,
        total_steps: int = 1,
    ) -> None:
        self.options = (options or ConsistencyOptions()).validate()
        checked_integer("ConsistencyObjective", "total_steps", total_steps, 1)
        self._schedule, self._teacher, self._total_steps = schedule, teacher, total_steps
        self._prediction = Prediction(PredictionType.parse(prediction_type))
        self._grids: dict[int, _Grid] = {}
        self._grid(self.options.intervals)  # raises what does not fit

    def __call__(self, predict: Predict, batch: TrainingBatch) -> LossTerms:
        """Return the losses of a batch; their timesteps are those of the upper ends."""
        device, condition = batch.images.device, batch.condition
        grid = self._grid(self.options.intervals_at(batch.step, self._total_steps))
        index = self._draw(grid, batch)
        timesteps = grid.clean.timesteps.to(device)
        t = timesteps[index]
        with torch.no_grad():
            noisy = noisy_samples(grid.noising, batch, index)
            direction = batch.images if self._teacher is None else self._teacher(noisy, t, condition)
            partner = grid.solver.apply(noisy, direction, index)
            with _draws_repeated(device):
                output = predict(partner, timesteps[index + 1], condition)
            target = grid.clean.apply(partner, output, index + 1)
        clean = grid.clean.apply(noisy, predict(noisy, t, condition), index)
        squares = (clean - target).flatten(1).square()
        if self.options.loss == "l2":
            losses = squares.mean(1)
        else:
            given = self.options.huber_c
            c = 0.00054 * math.sqrt(squares.shape[1]) if given is None else given
            losses = (squares.sum(1) + c * c).sqrt() - c
        return LossTerms(losses * grid.weights.to(device, losses.dtype)[index], t.long())

    def _draw(self, grid: _Grid, batch: TrainingBatch) -> Tensor:
        """Return intervals ``[B]`` int64 from the samples' seeds."""
        count, intervals = len(batch.images), len(grid.weights)
        if grid.cumulative is None:
            return draw_timesteps(count, intervals, seeds=batch.seeds)
        uniform = draw_timesteps(count, seeds=batch.seeds)
        cumulative = grid.cumulative.to(uniform.device, uniform.dtype)
        return torch.searchsorted(cumulative, uniform, right=True).clamp(max=intervals - 1)

    def _grid(self, intervals: int) -> _Grid:
        if intervals not in self._grids:
            self._grids[intervals] = self._make_grid(intervals)
        return self._grids[intervals]

    def _make_grid(self, intervals: int) -> _Grid:
        options, prediction = self.options, self._prediction
        sampler = ddim_sampler(self._schedule, prediction.prediction_type.value, intervals)
        levels: Levels = sampler.levels(intervals)
        table = sampler.table
        if self._teacher is None:
            table = ddim(levels, Prediction(PredictionType.SAMPLE))
        clean = []
        for level in levels.points[:-1]:
            model = prediction.at(level)
            clean.append(model.row(consistency_function(model, options.timestep_scaling, options.sigma_data)))
        clean.append(Row(0.0, SAMPLE, (0.0, 0.0)))
        ratios = torch.tensor([level.noise_ratio for level in levels.points], dtype=torch.float64)
        cumulative, weights = None, torch.ones(intervals, dtype=torch.float64)
        if options.index_sampling == "lognormal":
            heights = torch.erf((ratios.log() - options.log_mean) / (math.sqrt(2.0) * options.log_std))
            shares = heights[:-1] - heights[1:]
            cumulative = (shares / shares.sum()).cumsum(0)
        if options.weighting == "inverse_gap":
            weights = 1 / (ratios[:-1] - ratios[1:])
        elif options.weighting == "truncated_snr":
            weights = (1 / ratios[:-1]).clamp(min=1.0) ** (2 if options.loss == "l2" else 1)
        return _Grid(noising_rows(levels), RowTable(table.source), RowTable(tuple(clean)), cumulative, weights)


@contextlib.contextmanager
def _draws_repeated(device: torch.device) -> Iterator[None]:
    """Put torch's generators back after a block: the next draws are those of the block."""
    accelerator = device.type not in ("cpu", "meta")
    with torch.random.fork_rng(
        devices=[device.index or 0] if accelerator else [], device_type=device.type if accelerator else "cuda"
    ):
        yield
