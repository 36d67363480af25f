# SPDX-License-Identifier: MIT
"""``python -m benchmarks``: every sampler at every shape, beside the reference and diffusers, in one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .cases import SAMPLERS, SHAPES, all_cases
from .plots import plot_ratios
from .run import conditions, measure


def main() -> None:
    """Measure, print the table as it grows, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which the peers take turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each peer of a case, all rounds together")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--plot", type=Path, help="draw the ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    report = {"conditions": conditions(), "unit": "microseconds a step, guidance included", "results": []}
    print(json.dumps(report["conditions"]))
    print(f"{'case':46} {'fastdiff':>10} {'reference':>10} {'diffusers':>10}   x reference   x diffusers")
    for case in all_cases():
        if case.sampler not in options.samplers or case.shape not in options.shapes:
            continue
        result = measure(case, options.rounds, options.seconds)
        report["results"].append(result)
        times = " ".join(f"{result[peer]['median_us']:10.1f}" for peer in ("fastdiff", "reference", "diffusers"))
        ratios = [result[f"{peer}_over_fastdiff"] for peer in ("reference", "diffusers")]
        print(f"{result['case']:46} {times} {ratios[0]:13.1f} {ratios[1]:13.1f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot_ratios(report, options.plot)


if __name__ == "__main__":
    main()
