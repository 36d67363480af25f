# SPDX-License-Identifier: MIT
"""Differences between loops of the drop-in schedulers and diffusers' own, and the number of non-finite values.

    python -m benchmarks.differences                          # the loops of docs/diffusers.md
    python -m benchmarks.differences --only DEISMultistep

The loop is that of diffusers' tests: it starts from 768 numbers between 0 and 1 as a batch 4x3x8x8, with x*t/(t+1) as
the model.  "apart" is the largest difference of the two last samples over the larger of 1 and the largest number; the
sums are of |x|.  Numbers that are not finite are counted and left out of both.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
#: Class, configuration and number of steps of each loop.
LOOPS: list[tuple[str, dict[str, Any], int]] = [
    ("DDIM", {}, 50),
    ("EulerDiscrete", {}, 50),
    ("DPMSolverMultistep", {}, 50),
    ("DDPM", {}, 1000),
    ("DDPM", {"prediction_type": "v_prediction"}, 1000),
    ("DEISMultistep", {}, 50),
    ("DEISMultistep", {}, 250),
    ("DEISMultistep", {"solver_order": 3} | COSINE, 250),
    ("DEISMultistep", {}, 1000),
    ("DEISMultistep", COSINE, 4),
    ("DEISMultistep", COSINE, 1000),
    ("DPMSolverMultistep", COSINE, 4),
    ("DPMSolverMultistep", COSINE, 1000),
    ("DPMSolverMultistepInverse", COSINE, 1000),
    ("UniPCMultistep", COSINE, 4),
    ("UniPCMultistep", COSINE, 1000),
    ("SASolver", COSINE, 1000),
    ("KDPM2AncestralDiscrete", COSINE, 3),
]


def last_sample(module: Any, name: str, config: dict[str, Any], steps: int, part: slice = slice(None)) -> Tensor:
    """Run a loop, or a part of one, with a scheduler class of a module.

    Returns:
        The last sample, ``[4, 3, 8, 8]``.
    """
    torch.manual_seed(0)
    scheduler = getattr(module, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    sample = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps[part]:
        scaled = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(scaled * t / (t + 1), t, sample).prev_sample
    return sample


def compare(theirs: Tensor, ours: Tensor) -> tuple[int, int, float, float, float]:
    """Return both counts of non-finite numbers, the relative difference of the others, and both sums of |x|."""
    finite = theirs.isfinite() & ours.isfinite()
    a, b = theirs[finite].double(), ours[finite].double()
    apart = float((a - b).abs().max() / a.abs().max().clamp(min=1.0)) if finite.any() else 0.0
    counts = [int((~x.isfinite()).sum()) for x in (theirs, ours)]
    return counts[0], counts[1], apart, float(a.abs().sum()), float(b.abs().sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    import diffusers

    import fastdiff.diffusers

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.differences", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--only", default="", help="which classes, separated by commas; all if not given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    print("| | configuration | steps | apart | Σ\\|x\\|: diffusers | fastdiff | not finite: diffusers | fastdiff |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config, steps in LOOPS:
        if options.only and name not in options.only.split(","):
            continue
        theirs, ours = (last_sample(module, name, config, steps) for module in (diffusers, fastdiff.diffusers))
        odd_theirs, odd_ours, apart, sum_theirs, sum_ours = compare(theirs, ours)
        far = f"{apart:.1e} | {sum_theirs:.7g} | {sum_ours:.7g}" if min(theirs.numel() - odd_theirs, 1) else "– | – | –"
        what = ", ".join(f"`{key}={value!r}`" for key, value in config.items()) or "its own"
        print(f"| {name} | {what} | {steps} | {far} | {odd_theirs} | {odd_ours} |", flush=True)


if __name__ == "__main__":
    main()
