# SPDX-License-Identifier: MIT
"""The table of differences from diffusers' loops."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

import fastdiff.diffusers
from benchmarks import differences


def test_compare_counts_and_leaves_out_what_is_not_finite() -> None:
    theirs = torch.tensor([1.0, 4.0, float("nan"), float("inf")])
    ours = torch.tensor([1.0, 3.0, 2.0, float("inf")])
    assert differences.compare(theirs, ours) == (2, 1, 0.25, 5.0, 4.0)
    assert differences.compare(theirs[2:], ours[2:]) == (2, 1, 0.0, 0.0, 0.0)


def test_table_has_a_row_for_each_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loops = [("DDIM", {"clip_sample": False}, 3), ("KDPM2AncestralDiscrete", differences.COSINE, 3)]
    monkeypatch.setattr(differences, "LOOPS", [*loops, ("DDPM", {}, 1)])
    differences.main(["--only", "DDIM,KDPM2AncestralDiscrete"])
    ddim, kdpm2 = capsys.readouterr().out.splitlines()[2:]
    assert ddim.startswith("| DDIM | `clip_sample=False` | 3 | ")
    assert ddim.endswith(" | 0 | 0 |")
    assert float(ddim.split(" | ")[3]) < 1e-5  # a few roundings of float32
    # The schedule's own array has a NaN in the first step.
    assert kdpm2.endswith(" | 3 | – | – | – | 768 | 768 |")


@pytest.mark.parametrize("steps", [500, 1000])
def test_multistep_loops_are_not_finite_where_diffusers_are_not(steps: int) -> None:
    """Of 1000 steps two have timestep 500, and the one between divides by 0; of 500 no two are the same."""
    part = slice(steps // 2 - 2, steps // 2 + 2)
    ours, theirs = (
        differences.last_sample(module, "DPMSolverMultistep", differences.COSINE, steps, part)
        for module in (fastdiff.diffusers, diffusers)
    )
    assert bool(theirs.isfinite().all()) is (steps == 500)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
