# SPDX-License-Identifier: MIT
"""UniPC: a multistep exponential predictor, and a corrector of one order more that costs no model call."""

from __future__ import annotations

import math

from ..errors import checked_bool, unknown_name
from ..schedules.levels import Levels
from .adams import MultistepStep, adams_weights, checked_order, log_snr_nodes, multistep_table
from .exponential import Algorithm, exponential_step
from .prediction import Prediction
from .table import StepTable

UNIPC_TYPES = ("bh1", "bh2")


def unipc(
    levels: Levels,
    prediction: Prediction,
    *,
    solver_order: int = 2,
    unipc_type: str = "bh2",
    predict_x0: bool = True,
    use_corrector: bool = True,
    lower_order_final: bool = True,
) -> StepTable:
    """Compile the table of UniPC-p (arXiv 2302.04867, eq. 3 and 9 and algorithms 1 and 2; appendix B for p = 1, 2).

    Predictor and corrector integrate ``e^λ·x0`` (or ``e^−λ·ε``) with the polynomial through the outputs at the last p
    levels, the corrector with the output at the new level besides.  With p = 2 the predictor, and with p = 1 the
    corrector, takes the weight B(h)/2 of the difference instead of its integral, as the paper does; B(h) matters there
    alone, since it cancels from the others.  The first steps have the order that the history allows; a
    step to σ = 0 has order 1.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        solver_order: p, 1 to 3: the order of accuracy is p + 1 with the corrector, p without.
        unipc_type: ``bh1``, B(h) = h, or ``bh2``, B(h) = e^h − 1; with −h for h in the data form.
        predict_x0: interpolate x0; False: ε.
        use_corrector: correct each sample once the model has been called there.
        lower_order_final: lower the order at the end, to 1 in the last step.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    checked_order("unipc", "solver_order", solver_order, 1, 3)
    checked_bool("unipc", "predict_x0", predict_x0)
    if unipc_type not in UNIPC_TYPES:
        raise unknown_name("unipc", "unipc_type", unipc_type, UNIPC_TYPES)
    algorithm = Algorithm.DPM_SOLVER_PP if predict_x0 else Algorithm.DPM_SOLVER
    n = len(levels)

    def step_at(i: int, known: int) -> MultistepStep:
        t, s = levels[i], levels[i + 1]
        step = exponential_step(algorithm, t, s)
        if math.isinf(step.h):
            return MultistepStep(step.x, [step.d0])
        order = min(solver_order, known + 1, n - i if lower_order_final else solver_order)
        z = -step.h if predict_x0 else step.h
        scale = -s.alpha if predict_x0 else -s.sigma
        half = 0.5 * scale * (z if unipc_type == "bh1" else math.expm1(z))
        nodes = log_snr_nodes(levels, i, order)
        if order == 2:
            predictor = [step.d0 - half / nodes[1], half / nodes[1]]
        else:
            predictor = [scale * z * weight for weight in adams_weights(nodes, z)]
        if order == 1:
            corrector = [half, step.d0 - half]
        else:
            corrector = [scale * z * weight for weight in adams_weights([1.0, *nodes], z)]
        return MultistepStep(step.x, predictor, corrector if use_corrector else ())

    slots = solver_order if use_corrector else max(solver_order - 1, 1)
    return multistep_table(levels, prediction, algorithm.interpolated, slots, step_at)
