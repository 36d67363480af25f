# SPDX-License-Identifier: MIT
"""EDM Euler: Euler's method for networks with the preconditioning of EDM."""

from __future__ import annotations

from dataclasses import replace

from ..schedules.levels import Levels
from .euler import Churn, euler
from .prediction import Prediction
from .table import StepTable


def edm_euler(
    levels: Levels, prediction: Prediction, *, sigma_data: float = 0.5, churn: Churn | None = None
) -> StepTable:
    """Compile the table of Euler's method for an EDM network (arXiv 2206.00364, algorithm 2 and table 1).

    The network's output F is read by ``prediction_type="edm"`` as x0 = c_skip·x/α + c_out·F; the other types are read
    as everywhere.  On levels of `fastdiff.schedules.levels.with_edm_coordinates` samples are c_in·x̂, which the network
    is shown as they are, and its time is c_noise; the end is x̂ itself.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        sigma_data: the standard deviation of the data, above 0.
        churn: noise added before each model call; None adds none.

    Raises:
        ValueError, TypeError: sigma_data is out of range.
    """
    return euler(levels, replace(prediction, sigma_data=sigma_data), churn=churn)
