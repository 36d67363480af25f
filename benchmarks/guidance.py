# SPDX-License-Identifier: MIT
"""Guidance methods beside diffusers' guiders of the same name, in turn: ``python -m benchmarks.guidance``.

Two figures a method, medians of rounds in which all sides take turns: diffusers' guider and its DDIM step over our
guided DDIM step; and the guider alone over what guidance adds to our step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fastdiff import create_sampler
from fastdiff.guidance import (
    AutoGuidance,
    FrequencyDecoupledGuidance,
    Guidance,
    MagnitudeAwareGuidance,
    PerturbedGuidance,
    PlainGuidance,
    ProjectedGuidance,
    TangentialGuidance,
    ZeroStarGuidance,
)
from fastdiff.sampling import GuidedStepper, Stepper

#: Ours, diffusers' class, its options, and the outputs that it takes.
PAIRS: dict[str, tuple[Guidance, str, dict[str, Any], tuple[str, ...]]] = {
    "plain": (PlainGuidance(7.5), "ClassifierFreeGuidance", {}, ("cond", "uncond")),
    "rescaled": (
        PlainGuidance(7.5, rescale=0.7),
        "ClassifierFreeGuidance",
        {"guidance_rescale": 0.7},
        ("cond", "uncond"),
    ),
    "auto": (AutoGuidance(7.5), "AutoGuidance", {"auto_guidance_layers": [1], "dropout": 0.5}, ("cond", "weak")),
    "CFG-Zero*": (ZeroStarGuidance(7.5), "ClassifierFreeZeroStarGuidance", {}, ("cond", "uncond")),
    "tangential": (TangentialGuidance(7.5), "TangentialClassifierFreeGuidance", {}, ("cond", "uncond")),
    "magnitude-aware": (MagnitudeAwareGuidance(10.0), "MagnitudeAwareGuidance", {}, ("cond", "uncond")),
    "projected": (ProjectedGuidance(7.5, around="uncond"), "AdaptiveProjectedGuidance", {}, ("cond", "uncond")),
    "projected, momentum": (
        ProjectedGuidance(7.5, momentum=-0.5, around="uncond"),
        "AdaptiveProjectedGuidance",
        {"adaptive_projected_guidance_momentum": -0.5},
        ("cond", "uncond"),
    ),
    "perturbed attention": (
        PerturbedGuidance(7.5, perturbed_scale=2.8),
        "PerturbedAttentionGuidance",
        {"perturbed_guidance_layers": [1]},
        ("cond", "uncond", "perturbed"),
    ),
    "skip layer": (
        PerturbedGuidance(7.5, perturbed_scale=2.8),
        "SkipLayerGuidance",
        {"skip_layer_guidance_layers": [1]},
        ("cond", "uncond", "perturbed"),
    ),
    "smoothed energy": (
        PerturbedGuidance(7.5, perturbed_scale=2.8),
        "SmoothedEnergyGuidance",
        {"seg_guidance_layers": [1]},
        ("cond", "uncond", "perturbed"),
    ),
    "frequency-decoupled": (FrequencyDecoupledGuidance(), "FrequencyDecoupledGuidance", {}, ("cond", "uncond")),
}
#: Packages that diffusers' guider of a method needs beside diffusers.
NEEDS = {"frequency-decoupled": "kornia"}

STEPS = 1000


def sides(name: str, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Return one step of each side."""
    from diffusers import DDIMScheduler, guiders

    method, theirs, options, branches = PAIRS[name]
    # diffusers' magnitude-aware guider takes samples of two dimensions.
    of_guider = (shape[0], shape[1] * shape[2], *shape[3:]) if theirs.startswith("Magnitude") else shape
    outputs = {branch: torch.randn(shape) for branch in branches}
    x = torch.randn(shape)
    table = create_sampler("linear", "ddim", num_inference_steps=STEPS, guidance_scale=1.0, clip_sample=False).table
    guider = getattr(guiders, theirs)(**options)
    given = [output.reshape(of_guider) for output in outputs.values()]
    guider.set_state(5, 10, torch.tensor(500))
    guider.prepare_inputs({})
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    loops: dict[str, Any] = {}

    def ours() -> object:
        loop = loops.get("ours")
        if loop is None or loop.done:
            loop = loops["ours"] = GuidedStepper(table, method)
        return loop.step(x, outputs)

    def unguided() -> object:
        loop = loops.get("plain")
        if loop is None or loop.done:
            loop = loops["plain"] = Stepper(table)
        return loop.step(x, outputs["cond"])

    def combine() -> object:
        return guider.forward(*given).pred

    def both() -> object:
        return scheduler.step(guider.forward(*given).pred.reshape(shape), 500, x).prev_sample

    return {"ours": ours, "unguided": unguided, "guider": combine, "guider and step": both}


@torch.no_grad()
def measure(name: str, shape: tuple[int, ...], rounds: int, calls: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the medians of each side in microseconds, and the ratios of rounds."""
    made = sides(name, shape)
    times: dict[str, list[float]] = {side: [] for side in made}
    for turn in range(rounds + 1):
        for side, call in made.items():
            number = max(1, calls // 20) if side.startswith("guider") and name == "tangential" else calls
            started = clock()
            for _ in range(number):
                call()
            if turn > 0:  # the first round fills the caches
                times[side].append((clock() - started) / number * 1e6)
    median = {side: statistics.median(values) for side, values in times.items()}
    with_step = [a / b for a, b in zip(times["guider and step"], times["ours"], strict=True)]
    alone = [a / b for a, b in zip(times["guider"], times["ours"], strict=True)]
    return {
        "name": name,
        "microseconds": median,
        "guider and step over ours": statistics.median(with_step),
        "guider alone over our whole step": statistics.median(alone),
        "guider over what guidance adds": median["guider"] / max(median["ours"] - median["unguided"], 0.1),
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 4, 64, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="time of the thread, for a machine with other work")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    names = [name for name in PAIRS if name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None]
    for name in PAIRS.keys() - names:
        print(f"{name} is left out: {NEEDS[name]} is not installed", file=sys.stderr)
    lines = [measure(name, tuple(options.shape), options.rounds, options.calls, clock) for name in names]
    if options.json:
        print(json.dumps(lines))
        return
    print(f"{'method':22}{'ours µs':>9}{'guider µs':>11}{'+ step µs':>11}{'whole':>8}{'alone':>8}{'added':>8}")
    for line in lines:
        us = line["microseconds"]
        print(
            f"{line['name']:22}{us['ours']:9.1f}{us['guider']:11.1f}{us['guider and step']:11.1f}"
            f"{line['guider and step over ours']:8.1f}{line['guider alone over our whole step']:8.1f}"
            f"{line['guider over what guidance adds']:8.1f}"
        )


if __name__ == "__main__":
    main()
