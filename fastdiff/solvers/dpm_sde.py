# SPDX-License-Identifier: MIT
"""DPM-Solver++ for the reverse SDE with noise η times DDPM's: one stage more (SDE), and multistep (2M, 3M).

The formulas are k-diffusion's, on arXiv 2211.01095, section 5.  With η = 1, 2M is the form ``sde-dpmsolver++`` of
dpm_multistep.py; with η = 0 it is the ODE form.
"""

from __future__ import annotations

import math

from ..errors import as_float
from ..schedules.levels import Level, Levels
from .affine import HISTORY, NOISE, Affine
from .exponential import SolverType, phi1, phi2
from .prediction import Prediction
from .sigma_steps import ancestral_split, between, noise_ratios, scaled
from .table import Row, StepTable

#: History slots of `dpmpp_sde`.
_START, _START_X0 = 0, 1


def dpmpp_sde(
    levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5
) -> StepTable:
    """Compile the table of DPM-Solver++ SDE: two model calls a step, the second at a level inside it.

    Both updates are ancestral from the start of the step: down to σ̂_down, and fresh noise σ̂_up.  The step to σ = 0
    returns x0 after one call.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: 0 adds no noise, 1 is DDPM's.
        s_noise: the standard deviation of the added noise.
        r: the place of the second call, as a fraction of the step in log σ̂, in (0, 1].
    """
    sigmas = noise_ratios("dpmpp_sde", levels)
    as_float("dpmpp_sde", "s_noise", s_noise)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        if s.sigma == 0.0:
            rows.append(model.row(s.alpha * model.x0))
            continue
        middle = levels.locate(between(sigmas[i], sigmas[i + 1], r))

        def update(target: Level, x: Affine, x0: Affine, sigma: float = sigmas[i]) -> Affine:
            down, up = ancestral_split("dpmpp_sde", sigma, target.noise_ratio, eta)
            return target.alpha * (down / sigma * x + (1.0 - down / sigma) * x0 + s_noise * up * NOISE)

        first = update(middle, scaled(t), model.x0)
        rows.append(model.row(first, kept=(scaled(t), model.x0), slots=(_START, _START_X0)))
        second = prediction.at(middle)
        share = 1.0 / (2.0 * r)
        x0 = (1.0 - share) * HISTORY[_START_X0] + share * second.x0
        rows.append(second.row(update(s, HISTORY[_START], x0)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def dpmpp_2m_sde(
    levels: Levels,
    prediction: Prediction,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str | SolverType = SolverType.MIDPOINT,
) -> StepTable:
    """Compile the table of DPM-Solver++(2M) SDE.

    Args:
        levels, prediction, eta, s_noise: as in `dpmpp_sde`.
        solver_type: the weight of the difference of the last two x0, ``midpoint`` or ``heun``.
    """
    kind = SolverType.parse(solver_type)
    return _multistep("dpmpp_2m_sde", levels, prediction, eta, s_noise, 2, kind)


def dpmpp_3m_sde(levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """Compile the table of DPM-Solver++(3M) SDE.

    The second difference has k-diffusion's weight, φ₂ − ½, half of the exact one: the method measures order 2.

    Args:
        levels, prediction, eta, s_noise: as in `dpmpp_sde`.
    """
    return _multistep("dpmpp_3m_sde", levels, prediction, eta, s_noise, 3, SolverType.HEUN)


def _multistep(
    name: str, levels: Levels, prediction: Prediction, eta: float, s_noise: float, order: int, kind: SolverType
) -> StepTable:
    sigmas = noise_ratios(name, levels)
    as_float(name, "s_noise", s_noise)
    slots = order - 1
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        x0 = model.x0
        if s.sigma == 0.0:
            rows.append(model.row(s.alpha * x0))
            continue
        ancestral_split(name, sigmas[i], sigmas[i + 1], eta)  # refuses a negative eta
        h = math.log(sigmas[i] / sigmas[i + 1])
        z = -h * (1.0 + eta)
        next_x = math.exp(z) * scaled(t) - math.expm1(z) * x0
        past = [HISTORY[(i - j) % slots] for j in range(1, min(order, i + 1))]
        r = [math.log(sigmas[i - j] / sigmas[i - j + 1]) / h for j in range(1, len(past) + 1)]
        first_weight = -0.5 * math.expm1(z) if kind is SolverType.MIDPOINT else 1.0 - phi1(z)
        if len(past) == 1:
            next_x = next_x + first_weight * ((x0 - past[0]) / r[0])
        elif len(past) == 2:
            recent, older = (x0 - past[0]) / r[0], (past[0] - past[1]) / r[1]
            bend = (recent - older) / (r[0] + r[1])
            next_x = next_x + first_weight * (recent + r[0] * bend) - (phi2(z) - 0.5) * bend
        if eta:
            next_x = next_x + (s_noise * sigmas[i + 1] * math.sqrt(-math.expm1(-2.0 * h * eta))) * NOISE
        rows.append(model.row(s.alpha * next_x, kept=(x0,), slots=(i % slots,)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
