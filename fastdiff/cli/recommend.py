# SPDX-License-Identifier: MIT
"""``fastdiff recommend``: which solver, spacing and steps to take for a model, by measurement on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import require
from . import options
from .app import app


@app.command()
def recommend(
    budget_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of a loop over half of the samples, those that are timed.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Or: model calls of a loop.")] = None,
    model: options.Model = "digits",
    methods: Annotated[
        str | None, typer.Option(help="Names with commas; every deterministic method where left out.")
    ] = None,
    n: options.Samples = 32,
    guidance_scale: options.Guidance = 1.0,
    seed: options.Seed = 0,
    reference_steps: Annotated[int | None, typer.Option(help="Steps of the reference; 200 where left out.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each finalist is timed.")] = 3,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model on this machine and say which solver, spacing and number of steps to take."""
    from ..analysis import recommend as search

    operation = "recommend"
    table_class = require("rich.table", "cli", operation).Table
    plain = require("rich.text", "cli", operation).Text  # labels are no markup
    console = require("rich.console", "cli", operation).Console()
    names = None if methods is None else options.parse_names(methods, operation, "--methods")
    workload = options.load_workload(model, operation, n=n, guidance_scale=guidance_scale, seed=seed)
    found = search(
        workload,
        budget_ms=budget_ms,
        steps=steps,
        methods=names,
        reference_steps=reference_steps,
        rounds=rounds,
        progress=not quiet,
    )
    table = table_class(title=f"best of {found.screened} candidates at {found.budget}", title_justify="left")
    for column in ("method", "steps", "model calls", "ms", "distance", "behind the best"):
        name = column == "method"  # a long name is folded, not cut: it is what the user copies
        table.add_column(column, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for candidate in found.candidates:
        behind = f"{candidate.behind.mean:.4f} ± {candidate.behind.error:.4f}" + (" (tied)" if candidate.tied else "")
        table.add_row(
            plain(candidate.method),
            str(candidate.steps),
            str(candidate.model_calls),
            f"{candidate.milliseconds:.1f}",
            f"{candidate.distance.mean:.4f} ± {candidate.distance.error:.4f}",
            "–" if candidate is found.best else behind,
        )
    console.print(table)
    console.print(plain(f"distance: root mean square from {found.reference}, itself known to {found.resolution:.2g}"))
    for key, condition in found.conditions.items():
        console.print(plain(f"{key}: {condition}"))
    if found.stochastic:
        console.print(plain(f"left out, since they draw noise: {', '.join(found.stochastic)}"))
    for left_out, reason in found.unfit.items():
        console.print(plain(f"left out: {left_out} ({reason})"))
    console.print(plain(found.sentence()))
