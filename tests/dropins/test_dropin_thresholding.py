# SPDX-License-Identifier: MIT
"""Dynamic thresholding and clipping of every drop-in that has them: any bounds that diffusers takes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dropin_parity import check_loop

from fastdiff.diffusers import CLASSES
from support.dropin_cases import Case, cases
from support.dropin_helpers import classes, quiet, values_of


def _with_option(option: str) -> list[str]:
    """The names of the classes whose configuration has an option."""
    return [
        name.removesuffix("Scheduler")
        for name, cls in CLASSES.items()
        if option in inspect.signature(cls.original.__init__).parameters  # type: ignore[attr-defined]
    ]


THRESHOLDS, CLIPS = _with_option("thresholding"), _with_option("clip_sample_range")
#: torch.clamp(s, min=1, max=most) is `most` where that is below 1.
LARGEST = st.one_of(st.sampled_from([-0.5, 0.3, 0.5, 0.99, 1.0, 1.5, 10.0]), st.floats(0.05, 3.0))
RATIOS = st.one_of(st.sampled_from([0.87, 0.995, 1.0]), st.floats(0.05, 1.0))


def _usual(case: Case, **config: Any) -> Case:
    """The case with these options and a prediction type that every class knows."""
    kept = {**case.config, "prediction_type": "epsilon"} if "prediction_type" in case.config else case.config
    return case.of(config={**kept, **config})


def test_every_class_that_thresholds_is_here() -> None:
    assert len(THRESHOLDS) >= 13
    assert {"DDIM", "DDPM", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep"} < set(THRESHOLDS)
    assert {"UniPCMultistep", "DEISMultistep", "EDMDPMSolverMultistep", "SASolver", "LCM"} < set(THRESHOLDS)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_dropin_thresholds_by_any_ratio_and_largest_bound(name: str) -> None:
    @settings(max_examples=6)
    @given(cases(name, most_steps=6), RATIOS, LARGEST)
    def check(case: Case, ratio: float, largest: float) -> None:
        options = {"dynamic_thresholding_ratio": ratio, "sample_max_value": largest}
        check_loop(_usual(case, thresholding=True, **options))

    check()


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverMultistepInverse", "EDMDPMSolverMultistep", "DDIM"])
def test_dropin_largest_bound_below_one_is_the_bound(name: str) -> None:
    # Of the first step alone, in which nothing but the threshold could differ.
    results = []
    for cls in classes(name):
        scheduler = cls(thresholding=True, dynamic_thresholding_ratio=0.87, sample_max_value=0.5)
        with quiet():
            scheduler.set_timesteps(10)
        random = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 8, 8, generator=random) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        output = torch.randn(2, 3, 8, 8, generator=random)
        for t in scheduler.timesteps[:3]:
            x = values_of(scheduler.step(output, t, x))[0]
        results.append(x)
    theirs, ours = results
    # Three steps, some 20 roundings of numbers of the samples' size each.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=60 * 2.0**-24 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", CLIPS)
def test_dropin_clips_to_any_range(name: str) -> None:
    # torch.clamp(x, -bound, bound) is `bound` where that is negative.
    @settings(max_examples=4)
    @given(cases(name, most_steps=6), st.sampled_from([-0.7, 0.3, 1.0]))
    def check(case: Case, bound: float) -> None:
        check_loop(_usual(case, clip_sample=True, clip_sample_range=bound))

    check()
