# SPDX-License-Identifier: MIT
"""Rows of the solvers beside diffusers' classes and the rows lowered from them, on the same levels, in float64."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.schedules import create_noise_scheduler
from fastdiff.schedules.levels import (
    Levels,
    levels_from_flow_times,
    levels_from_sigmas,
    levels_from_timesteps,
    variance_preserving,
    with_edm_coordinates,
)
from fastdiff.solvers import (
    Prediction,
    deis,
    edm_euler,
    flow_euler,
    flow_heun,
    ipndm,
    kdpm2,
    kdpm2_ancestral,
    lcm,
    lms,
    pndm,
    sa_solver,
    tcd,
    unipc,
)
from fastdiff.solvers.table import StepTable

pytest.importorskip("diffusers")

from support.dropin_helpers import classes
from support.unrolled_rows import unroll, unroll_scheduler

ALPHAS = create_noise_scheduler("scaled_linear").alphas_cumprod
#: Uneven, and even so that half of each is a timestep.
TIMESTEPS = [940, 800, 610, 420, 260, 120, 40]
N = len(TIMESTEPS)
LEVELS = levels_from_timesteps(ALPHAS, TIMESTEPS)
#: Ends at the noise of timestep 0 instead of the clean sample.
NOISY_END = levels_from_timesteps(ALPHAS, TIMESTEPS, final_alpha_cumprod=float(ALPHAS[0]))
MODULES = {"LMSDiscrete": "lms_discrete", "KDPM2Discrete": "k_dpm_2_discrete", "SASolver": "sasolver",
           "KDPM2AncestralDiscrete": "k_dpm_2_ancestral_discrete", "UniPCMultistep": "unipc_multistep",
           "DEISMultistep": "deis_multistep", "EDMEuler": "edm_euler",
           "FlowMatchEulerDiscrete": "flow_match_euler_discrete",
           "FlowMatchHeunDiscrete": "flow_match_heun_discrete"}  # fmt: skip
#: The classes that round a float64 sample, or LCM's c_skip and c_out, to float32 in each step: seven roundings of 6e-8.
ROUNDS = {"EDMEuler", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "LCM"}


def doubles(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def ratios(levels: Levels) -> torch.Tensor:
    return doubles([level.noise_ratio for level in levels.points])


@dataclass(frozen=True)
class Twin:
    """A solver and the scheduler that means the same.

    Args:
        name: of diffusers' class, without "Scheduler".
        table: ours.
        config: of theirs.
        prepare: sets their schedule to our levels, in float64.
        scales: the factors of our coordinates beside theirs, before each row and after the last.
        options: of their ``step``.
    """

    name: str
    table: StepTable
    config: dict[str, Any]
    prepare: Callable[[Any], None]
    scales: Sequence[float] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def by_sigmas(levels: Levels) -> Callable[[Any], None]:
    """Set timesteps and σ̂; the classes derive α and σ from σ̂."""

    def prepare(scheduler: Any) -> None:
        scheduler.timesteps, scheduler.sigmas = torch.tensor(TIMESTEPS), ratios(levels)
        scheduler.set_begin_index(0)

    return prepare


def by_timesteps(scheduler: Any) -> None:
    """Set timesteps and ᾱ."""
    scheduler.alphas_cumprod, scheduler.timesteps = ALPHAS.clone(), torch.tensor(TIMESTEPS)


def _unipc(order: int, kind: str, data: bool, prediction: str) -> Twin:
    # To the clean sample diffusers has 0·inf with bh1, with order 1 and in the noise form.
    levels = LEVELS if kind == "bh2" and data and order > 1 else NOISY_END
    table = unipc(levels, Prediction(prediction), solver_order=order, unipc_type=kind, predict_x0=data)  # type: ignore[arg-type]
    config = {"solver_order": order, "solver_type": kind, "predict_x0": data, "prediction_type": prediction}
    return Twin("UniPCMultistep", table, config, by_sigmas(levels))


def _deis(order: int, prediction: str) -> Twin:
    table = deis(NOISY_END, Prediction(prediction), solver_order=order)  # type: ignore[arg-type]
    config = {"solver_order": order, "prediction_type": prediction}
    return Twin("DEISMultistep", table, config, by_sigmas(NOISY_END))


def _sa(orders: tuple[int, int], tau: float, data: bool) -> Twin:
    predictor, corrector = orders
    table = sa_solver(
        NOISY_END, Prediction(), predictor_order=predictor, corrector_order=corrector, tau=tau, predict_x0=data
    )
    config = {"predictor_order": predictor, "corrector_order": corrector, "tau_func": lambda t: doubles([tau])[0],
              "algorithm_type": "data_prediction" if data else "noise_prediction"}  # fmt: skip
    return Twin("SASolver", table, config, by_sigmas(NOISY_END))


def _alphas(levels: Levels, calls: Sequence[int] | None = None) -> list[float]:
    """Return α at the levels of the indices: the factor between x and x/α."""
    return [levels[i].alpha for i in (calls or range(len(levels) + 1))]


def _lms(order: int, prediction: str) -> Twin:
    table = lms(LEVELS, Prediction(prediction), multistep_order=order)  # type: ignore[arg-type]
    config = {"prediction_type": prediction}
    return Twin("LMSDiscrete", table, config, by_sigmas(LEVELS), _alphas(LEVELS), options={"order": order})


#: A schedule whose log σ̂ is a line in the timestep, so that the middle in time and the middle in σ̂ are one.
EVEN_TIMES = list(range(960, 0, -80))
EVEN = Levels(
    tuple(variance_preserving(math.exp(t / 200.0 - 3.0), float(t)) for t in (*EVEN_TIMES, 0)),
    lambda ratio: variance_preserving(ratio, 200.0 * (math.log(ratio) + 3.0)),
)


def _pndm(skip: bool) -> Twin:
    def prepare(scheduler: Any) -> None:
        times = EVEN_TIMES
        half = 40
        if skip:
            timesteps = [times[0], times[1], *times[1:]]
            scheduler.prk_timesteps = np.array([])
        else:
            starts = [time for t in times[:3] for time in (t, t - half, t - half, t - 80)]
            scheduler.prk_timesteps, timesteps = np.array(starts), [*starts, *times[3:]]
        scheduler.alphas_cumprod = doubles(
            [variance_preserving(math.exp(t / 200.0 - 3.0), 0.0).alpha ** 2 for t in range(1000)]
        )
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        scheduler.num_inference_steps = 12  # 1000 // 12 is not the step of 80
        scheduler.register_to_config(num_train_timesteps=960)
        scheduler.timesteps = torch.tensor(timesteps)

    return Twin("PNDM", pndm(EVEN, Prediction(), skip_prk_steps=skip), {"skip_prk_steps": skip}, prepare)


def _ipndm() -> Twin:
    def prepare(scheduler: Any) -> None:
        points = NOISY_END.points
        scheduler.betas, scheduler.alphas = doubles([p.sigma for p in points]), doubles([p.alpha for p in points])
        scheduler.timesteps = torch.tensor(TIMESTEPS)
        scheduler.set_begin_index(0)

    # Its outputs are v with alpha·x0 + beta·noise.
    return Twin("IPNDM", ipndm(NOISY_END, Prediction("v_prediction")), {}, prepare)  # type: ignore[arg-type]


def _lcm(prediction: str) -> Twin:
    table = lcm(LEVELS, Prediction(prediction))  # type: ignore[arg-type]
    return Twin("LCM", table, {"prediction_type": prediction, "clip_sample": False}, by_timesteps)


def _tcd(eta: float, prediction: str) -> Twin:
    table = tcd(NOISY_END, Prediction(prediction), eta=eta)  # type: ignore[arg-type]
    return Twin("TCD", table, {"prediction_type": prediction}, by_timesteps, options={"eta": eta})


def _twice(values: Sequence[float]) -> torch.Tensor:
    """Repeat all but the first and the last, as the schedulers with two calls a step do."""
    return doubles([values[0], *[v for v in values[1:-1] for _ in range(2)], values[-1]])


def _kdpm2(prediction: str) -> Twin:
    sigmas = [level.noise_ratio for level in LEVELS.points]
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(sigmas)]

    def prepare(scheduler: Any) -> None:
        scheduler.timesteps = torch.arange(2 * N - 1, 0, -1)
        scheduler.sigmas = _twice([*sigmas, 0.0])
        # Index i of the interpolated ones is the middle before level i.
        scheduler.sigmas_interpol = _twice([0.0, *middles, 0.0])
        scheduler.sample = None
        scheduler.set_begin_index(0)

    scales = [value for i in range(N) for value in (LEVELS[i].alpha, LEVELS.locate(middles[i]).alpha)][: 2 * N - 1]
    table = kdpm2(LEVELS, Prediction(prediction))  # type: ignore[arg-type]
    return Twin("KDPM2Discrete", table, {"prediction_type": prediction}, prepare, [*scales, 1.0])


def _kdpm2_ancestral() -> Twin:
    sigmas = [level.noise_ratio for level in LEVELS.points]
    pairs = list(itertools.pairwise(sigmas))
    ups = [math.sqrt(b**2 * (a**2 - b**2) / a**2) for a, b in pairs]
    downs = [math.sqrt(b**2 - up**2) for (_, b), up in zip(pairs, ups, strict=True)]
    middles = [math.sqrt(a * down) for (a, _), down in zip(pairs, downs, strict=True)]

    def prepare(scheduler: Any) -> None:
        scheduler.timesteps = torch.arange(2 * N - 1, 0, -1)
        scheduler.sigmas = _twice([*sigmas, 0.0])
        # Of a step's pair of calls, each reads the entries of its own or the other's index.
        for name, values in (("sigmas_up", ups), ("sigmas_down", downs), ("sigmas_interpol", middles)):
            setattr(scheduler, name, doubles([v for v in values for _ in range(2)]))
        scheduler.sample = None
        scheduler.set_begin_index(0)

    scales = [value for i in range(N) for value in (LEVELS[i].alpha, LEVELS.locate(middles[i]).alpha)][: 2 * N - 1]
    table = kdpm2_ancestral(LEVELS, Prediction())
    return Twin("KDPM2AncestralDiscrete", table, {}, prepare, [*scales, 1.0])


def _edm_euler() -> Twin:
    plain = levels_from_sigmas(ALPHAS, [80.0, 30.0, 9.0, 2.0, 0.5, 0.1, 0.002])
    levels = with_edm_coordinates(plain, 0.5)

    def prepare(scheduler: Any) -> None:
        scheduler.sigmas, scheduler.timesteps = ratios(plain), doubles(levels.timesteps)
        scheduler.set_begin_index(0)

    return Twin("EDMEuler", edm_euler(levels, Prediction("edm")), {}, prepare, _alphas(levels))  # type: ignore[arg-type]


TIMES = [1.0, 0.9, 0.75, 0.5, 0.3, 0.125, 0.05, 0.0]
FLOW, FLOW_LEVELS = Prediction("flow_prediction"), levels_from_flow_times(TIMES)  # type: ignore[arg-type]


def _flow_euler(stochastic: bool) -> Twin:
    def prepare(scheduler: Any) -> None:
        scheduler.sigmas, scheduler.timesteps = doubles(TIMES), doubles(FLOW_LEVELS.timesteps)
        scheduler.set_begin_index(0)

    table = flow_euler(FLOW_LEVELS, FLOW, stochastic_sampling=stochastic)
    return Twin("FlowMatchEulerDiscrete", table, {"stochastic_sampling": stochastic}, prepare)


def _flow_heun() -> Twin:
    def prepare(scheduler: Any) -> None:
        scheduler.sigmas, scheduler.timesteps = _twice([*TIMES, 0.0]), torch.arange(2 * N - 1, 0, -1).double()
        scheduler.set_begin_index(0)

    return Twin("FlowMatchHeunDiscrete", flow_heun(FLOW_LEVELS, FLOW), {}, prepare)


TWINS: dict[str, Twin] = {
    **{
        f"unipc-{order}-{kind}-{'data' if data else 'noise'}-{prediction}": _unipc(order, kind, data, prediction)
        for order, kind, data, prediction in [
            (1, "bh1", True, "epsilon"),
            (2, "bh2", True, "v_prediction"),
            (2, "bh1", False, "epsilon"),
            (3, "bh2", True, "sample"),
            (3, "bh1", False, "epsilon"),
        ]
    },
    **{f"deis-{order}": _deis(order, kind) for order, kind in ((1, "sample"), (2, "v_prediction"), (3, "epsilon"))},
    **{
        f"sa-{orders}-{tau}-{'data' if data else 'noise'}": _sa(orders, tau, data)
        for orders, tau, data in [
            ((1, 1), 1.0, True),
            ((2, 2), 1.0, True),
            ((3, 4), 0.5, True),
            ((4, 3), 0.8, False),
            ((2, 2), 0.0, False),
        ]
    },
    **{f"lms-{order}": _lms(order, kind) for order, kind in ((1, "sample"), (3, "v_prediction"), (4, "epsilon"))},
    "pndm": _pndm(True),
    "pndm-prk": _pndm(False),
    "ipndm": _ipndm(),
    "lcm": _lcm("epsilon"),
    "lcm-v": _lcm("v_prediction"),
    "tcd-0.5": _tcd(0.5, "epsilon"),
    "tcd-0": _tcd(0.0, "v_prediction"),
    "kdpm2": _kdpm2("epsilon"),
    "kdpm2-v": _kdpm2("v_prediction"),
    "kdpm2_ancestral": _kdpm2_ancestral(),
    "edm_euler": _edm_euler(),
    "flow_euler": _flow_euler(False),
    "flow_euler-stochastic": _flow_euler(True),
    "flow_heun": _flow_heun(),
}


@pytest.mark.parametrize("lowered", [False, True], ids=["diffusers", "lowered"])
@pytest.mark.parametrize("name", TWINS)
def test_rows_equal_those_of_diffusers(name: str, lowered: bool) -> None:
    """Compare the weight of each output and draw in each sample; lowered rows are those of the drop-in class."""
    twin = TWINS[name]
    scheduler = classes(twin.name)[lowered](**twin.config)
    scheduler.set_timesteps(N)
    twin.prepare(scheduler)
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES.get(twin.name, twin.name.lower())}")
    ours = unroll(twin.table, twin.scales)
    theirs = unroll_scheduler(scheduler, module, len(twin.table), **twin.options)
    assert len(theirs) == len(twin.table)
    # Sums of some ten products, and differences of exponentials that lose three digits: 1e-12 of the largest weight.
    tolerance = 1e-6 if twin.name in ROUNDS else 1e-10
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(), err_msg=f"row {i}")
