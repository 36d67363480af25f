# SPDX-License-Identifier: MIT
"""``fastdiff plot``: pictures of schedules, spacings, trajectories, comparisons and orders of convergence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..errors import error_message, require
from ..schedules import create_noise_scheduler
from . import options
from .app import app

if TYPE_CHECKING:
    from matplotlib.figure import Figure

plot_app = typer.Typer(no_args_is_help=True, help="Draw schedules, spacings, trajectories, comparisons and orders.")
app.add_typer(plot_app, name="plot")

#: Schedules without arguments of their own.
SCHEDULES = "linear,scaled_linear,cosine,sigmoid,laplace,karras"

Out = Annotated[Path, typer.Option(help="The picture to write: .png, .svg or .pdf.")]


@plot_app.command("schedule")
def schedule(
    names: Annotated[str, typer.Argument(help="Noise schedules with commas.")] = SCHEDULES,
    out: Out = Path("schedule.png"),
) -> None:
    """Draw β, ᾱ, SNR and σ of noise schedules."""
    from ..analysis.plots import plot_schedules

    chosen = options.parse_names(names, "plot schedule", "names")
    _check(out, "plot schedule")
    _save(plot_schedules(chosen), out, "plot schedule")


@plot_app.command("spacing")
def spacing(
    schedule_type: Annotated[str, typer.Option("--schedule", help="The noise schedule.")] = "cosine",
    steps: Annotated[int, typer.Option(help="Model calls.")] = 10,
    spacings: Annotated[str | None, typer.Option(help="Names with commas; all where left out.")] = None,
    out: Out = Path("spacing.png"),
) -> None:
    """Draw the timesteps and noise levels that each spacing visits."""
    from ..analysis.plots import plot_spacings

    chosen = None if spacings is None else options.parse_names(spacings, "plot spacing", "--spacings")
    scheduler = create_noise_scheduler(schedule_type)
    _check(out, "plot spacing")
    _save(plot_spacings(scheduler, steps, chosen), out, "plot spacing")


@plot_app.command("film")
def film(
    method: Annotated[str, typer.Option(help="A method with options.")] = "dpmsolver++",
    steps: Annotated[int, typer.Option(help="Steps of the loop.")] = 20,
    rows: Annotated[int, typer.Option(help="Samples, a row each.")] = 4,
    frames: Annotated[int, typer.Option(help="Columns.")] = 8,
    model: options.Model = "digits",
    guidance_scale: options.Guidance = 1.0,
    seed: options.Seed = 0,
    out: Out = Path("film.png"),
    quiet: options.Quiet = False,
) -> None:
    """Draw a trajectory from noise to data as a film strip."""
    from ..analysis import parse_method, visualize_trajectory

    operation = "plot film"
    spec = parse_method(method, operation)
    _check(out, operation)
    workload = options.load_workload(model, operation, n=rows, guidance_scale=guidance_scale, seed=seed)
    trajectory = workload.trajectory(spec, steps, progress=not quiet)
    if workload.decode is not None:
        trajectory = [workload.decode(frame) for frame in trajectory]
    figure = visualize_trajectory(trajectory, f"{spec.label}, {steps} steps", frames=frames, samples=rows)
    _save(figure, out, operation)


@plot_app.command("cloud")
def cloud(
    method: Annotated[str, typer.Option(help="A method with options.")] = "dpmsolver++",
    steps: Annotated[int, typer.Option(help="Steps of the loop.")] = 20,
    n: Annotated[int, typer.Option(help="Points.")] = 1500,
    frames: Annotated[int, typer.Option(help="Panels from noise to the end.")] = 5,
    schedule_type: Annotated[str, typer.Option("--schedule", help="The noise schedule.")] = "cosine",
    seed: options.Seed = 0,
    out: Out = Path("cloud.png"),
    quiet: options.Quiet = False,
) -> None:
    """Draw a 2-D cloud from noise to a ring of Gaussians, by their exact score."""
    from ..analysis import GaussianMixture, Workload, parse_method, plot_cloud
    from ..ops import randn
    from ..philox import spawn_seeds

    operation = "plot cloud"
    spec = parse_method(method, operation)
    if not 1 <= n <= 100_000:
        raise ValueError(error_message(operation, "--n", f"is {n}", "1 to 100000", "ask for as many"))
    scheduler = create_noise_scheduler(schedule_type, timestep_spacing="trailing")
    _check(out, operation)
    mixture = GaussianMixture.ring()
    seeds = spawn_seeds(seed, n)
    workload = Workload(mixture.model(scheduler), scheduler, randn((n, 2), seeds), seeds=torch.tensor(seeds))
    trajectory = workload.trajectory(spec, steps, progress=not quiet)
    data = mixture.sample(n, torch.Generator().manual_seed(seed))
    figure = plot_cloud(trajectory, data=data, frames=frames, title=f"{spec.label}, {steps} steps")
    _save(figure, out, operation)


@plot_app.command("quality")
def quality(
    methods: Annotated[str, typer.Option(help="Names with commas, options behind colons.")] = "ddim,dpmsolver++,unipc",
    steps: Annotated[str, typer.Option(help="Numbers of steps with commas.")] = "5,10,20,50",
    metric: Annotated[
        str, typer.Option(help="distance, frechet, inception, precision, recall, variance or sharpness.")
    ] = "distance",
    model: options.Model = "digits",
    n: options.Samples = 50,
    guidance_scale: options.Guidance = 1.0,
    seed: options.Seed = 0,
    reference_steps: Annotated[int | None, typer.Option(help="Steps of the reference.")] = None,
    out: Out = Path("quality.png"),
    quiet: options.Quiet = False,
) -> None:
    """Draw quality against model calls and time."""
    from ..analysis import compare_methods
    from ..analysis.plots import METRICS, plot_quality
    from ..errors import unknown_name

    operation = "plot quality"
    names = options.parse_names(methods, operation, "--methods")
    counts = options.parse_counts(steps, operation, "--steps")
    if metric not in METRICS:
        raise unknown_name(operation, "--metric", metric, METRICS)
    _check(out, operation)
    features = metric in ("frechet", "inception", "precision", "recall")
    workload = options.load_workload(model, operation, n=n, guidance_scale=guidance_scale, seed=seed, features=features)
    comparison = compare_methods(workload, names, counts, reference_steps=reference_steps, progress=not quiet)
    _save(plot_quality(comparison, metric), out, operation)


@plot_app.command("convergence")
def convergence(
    methods: Annotated[
        str, typer.Option(help="Deterministic methods with commas, options behind colons.")
    ] = "ddim,heun,dpmsolver++,dpmsolver++:solver_order=3:third_order=exact",
    steps: Annotated[str, typer.Option(help="Numbers of steps with commas, two or more.")] = "10,20,40,80,160,320",
    out: Out = Path("convergence.png"),
    quiet: options.Quiet = False,
) -> None:
    """Draw errors against steps on a mixture of known score, with the slope of each method."""
    from ..analysis import measure_convergence, plot_convergence

    operation = "plot convergence"
    names = options.parse_names(methods, operation, "--methods")
    counts = options.parse_counts(steps, operation, "--steps")
    _check(out, operation)
    curves = measure_convergence(names, counts, progress=not quiet)
    for curve in curves:
        print(f"{curve.method}: order {curve.slope:.2f}")
    _save(plot_convergence(curves), out, operation)


def _check(out: Path, operation: str) -> None:
    """Refuse a picture that could not be written, before the work."""
    from ..analysis.plots.figures import check_figure_path

    require("matplotlib.figure", "plots", operation)
    check_figure_path(out, operation, "--out")


def _save(figure: Figure | Any, out: Path, operation: str) -> None:
    from ..analysis.plots import save_figure

    save_figure(figure, out, operation=operation, argument="--out")
    print(out)
