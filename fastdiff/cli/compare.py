# SPDX-License-Identifier: MIT
"""``fastdiff compare``: sampling methods beside one another, as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..files import write_whole
from . import options
from .app import app

METHODS = "ddim,dpmsolver++,unipc"


@app.command()
def compare(
    methods: Annotated[
        str, typer.Option(help="Names with commas, options behind colons: ddim,unipc:power=1.75,dpmsolver++.")
    ] = METHODS,
    steps: Annotated[str, typer.Option(help="Numbers of steps with commas.")] = "5,10,20,50",
    out: Annotated[Path, typer.Option(help="The folder for index.html and figures.json.")] = Path("report"),
    model: options.Model = "digits",
    n: options.Samples = 50,
    guidance_scale: options.Guidance = 1.0,
    seed: options.Seed = 0,
    reference: Annotated[str, typer.Option(help="The method whose many-step solution is the reference.")] = "ddim",
    reference_steps: Annotated[
        int | None, typer.Option(help="Its steps; every timestep of the schedule where left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds that the times are medians of.")] = 3,
    features: Annotated[
        bool, typer.Option(help="Metrics in the space of the digits' encoder; needs scikit-learn.")
    ] = True,
    quiet: options.Quiet = False,
) -> None:
    """Compare sampling methods at several numbers of steps, and write one HTML file that opens without a network."""
    from ..analysis import compare_methods, write_report
    from ..analysis.compare import checked_methods
    from ..analysis.report import check_report_folder, closest_to_baseline
    from ..errors import require

    operation = "compare"
    names = options.parse_names(methods, operation, "--methods")
    counts = options.parse_counts(steps, operation, "--steps")
    require("matplotlib.figure", "plots", operation)
    workload = options.load_workload(
        model, operation, n=n, guidance_scale=guidance_scale, seed=seed, features=features and model == "digits"
    )
    # All that can be refused is refused here, before the folder is made and anything is sampled.
    for spec in checked_methods(operation, [*names, reference]):
        for count in counts:
            spec.sampler(workload, count)
    page = check_report_folder(out, operation=operation, argument="--out")
    comparison = compare_methods(
        workload,
        names,
        counts,
        reference=reference,
        reference_steps=reference_steps,
        rounds=rounds,
        progress=not quiet,
    )
    write_report(comparison, page)
    text = json.dumps(comparison.figures(), indent=1) + "\n"
    write_whole(page.with_name("figures.json"), text.encode(), operation=operation, argument="--out")
    baseline = "ddim" if "ddim" in comparison.methods else comparison.reference
    if baseline in comparison.methods:
        for sentence in closest_to_baseline(comparison, baseline):
            print(sentence)
    print(f"{len(comparison.rows)} runs of {len(workload.latents)} samples; {page}")
