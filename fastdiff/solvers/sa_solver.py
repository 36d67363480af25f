# SPDX-License-Identifier: MIT
"""SA-Solver: stochastic Adams predictor and corrector for the diffusion SDE with as much noise as one likes."""

from __future__ import annotations

import math

from ..errors import as_float, checked_bool, checked_float
from ..schedules.levels import Levels
from .adams import MultistepStep, adams_weights, checked_order, log_snr_nodes, multistep_table
from .exponential import Algorithm, exponential_step
from .prediction import Prediction
from .table import StepTable


def sa_solver(
    levels: Levels,
    prediction: Prediction,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> StepTable:
    """Compile the table of SA-Solver (arXiv 2309.05019, eq. 14 to 17 and algorithm 1).

    With c = 1 + τ² the predictor of x0 is::

        prev = e^{−τ²h}·σ_s/σ_t·x + c·α_s·∫ e^{c·(λ − λ_s)}·P(λ) dλ + σ_s·√(1 − e^{−2τ²h})·z

    with the polynomial P through the last outputs; the corrector's P goes through the output at s too, with the same z.
    With two outputs the data form weighs their difference as if the exponential were constant, as the authors' code and
    diffusers do; that leaves the order as it is.  The first steps have the order that the history allows; a step to
    σ = 0 has order 1 and adds no noise.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        predictor_order: outputs of the predictor, 1 to 4.
        corrector_order: outputs of the corrector, 1 to 4; 0 for no corrector.
        tau: τ: 0 for the ODE, 1 for the noise of DDPM.
        s_tmin, s_tmax: the range of σ̂ in which τ is not 0; a step counts by the level that it leaves.
        predict_x0: interpolate x0; False: ε.
        lower_order_final: lower the orders at the end, to 1 in the last step.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    checked_order("sa_solver", "predictor_order", predictor_order, 1, 4)
    checked_order("sa_solver", "corrector_order", corrector_order, 0, 4)
    checked_float("sa_solver", "tau", tau, 0.0)
    as_float("sa_solver", "s_tmin", s_tmin)
    as_float("sa_solver", "s_tmax", s_tmax)
    checked_bool("sa_solver", "predict_x0", predict_x0)
    algorithm = Algorithm.DPM_SOLVER_PP if predict_x0 else Algorithm.DPM_SOLVER
    n = len(levels)

    def step_at(i: int, known: int) -> MultistepStep:
        t, s = levels[i], levels[i + 1]
        step = exponential_step(algorithm, t, s)
        if math.isinf(step.h):
            return MultistepStep(step.x, [step.d0])
        h, squared = step.h, tau**2 if s_tmin <= t.noise_ratio <= s_tmax else 0.0
        left = n - i if lower_order_final else n
        outputs = min(predictor_order, known + 1, left)
        corrected = min(corrector_order, known + 2, left + 1)
        nodes = log_snr_nodes(levels, i, max(outputs, corrected - 1, 1))
        c = 1.0 + squared
        if predict_x0:
            x, z, scale = step.x * math.exp(-squared * h), -c * h, c * s.alpha * h
            noise = s.sigma * math.sqrt(-math.expm1(-2.0 * squared * h))
        else:
            x, z, scale = step.x, h, -c * s.sigma * h
            noise = math.sqrt(squared) * s.sigma * math.sqrt(math.expm1(2.0 * h))
        predictor = _weights(nodes[:outputs], z, simplify=predict_x0)
        corrector = _weights([1.0, *nodes][:corrected], z, simplify=predict_x0)
        return MultistepStep(x, [scale * w for w in predictor], [scale * w for w in corrector], noise)

    slots = max(predictor_order, corrector_order - 1) if corrector_order else max(predictor_order - 1, 1)
    return multistep_table(levels, prediction, algorithm.interpolated, slots, step_at)


def _weights(nodes: list[float], z: float, *, simplify: bool) -> list[float]:
    """Return the weights of the outputs at the nodes, of which one is 0; none for no nodes."""
    weights = adams_weights(nodes, z)
    if simplify and len(nodes) == 2:
        total, other = math.fsum(weights), 0 if nodes[1] == 0.0 else 1
        weights[other] = 0.5 / nodes[other]  # the difference of the two over one step, times ∫ v dv
        weights[1 - other] = total - weights[other]
    return weights
