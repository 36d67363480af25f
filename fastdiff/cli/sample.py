# SPDX-License-Identifier: MIT
"""``fastdiff sample``: digits by the model that ships, or images of a trained one; a picture or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import ops
from ..errors import error_message
from ..philox import spawn_seeds
from ..sharding import process_rank
from .app import app
from .sample_shards import BATCH_SIZE, draw_shards
from .sample_sources import SampleSource, packaged_source, trained_source
from .samplers import SAMPLERS

#: Images that one picture has at most: they are one batch, of about 0.2 MiB an image.
MOST_IMAGES = 10_000


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or on which it cannot hold a tensor here.

    Raises:
        ValueError: it is one of these.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            error_message(
                "sample",
                "--device",
                f"is {device!r}, which torch cannot use ({why})",
                "cpu or a device that this machine and this torch have",
                "pass --device cpu, or install a torch for that device",
            )
        ) from error


@app.command()
def sample(
    sampler: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(SAMPLERS)}.", show_default="dpmsolver++; the run's with --weights"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the loop.", show_default="20; the run's with --weights")
    ] = None,
    order: Annotated[int, typer.Option(help="Order of a DPM-Solver.")] = 2,
    eta: Annotated[float | None, typer.Option(help="Noise that DDIM or Euler-ancestral adds back.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            "--guidance",
            help="Classifier-free guidance scale; 1 for none.",
            show_default="3; the run's with --weights",
        ),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Digits to draw: 0-9, 3 or 1,4,7-9.", show_default="0-9")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of fastdiff train, or a checkpoint in it, to sample instead.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --weights of a model with a text encoder: what to draw.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to guide away from.")] = None,
    # --images for torchrun, whose parser takes --n for an abbreviation of several options of its own, and refuses it.
    n: Annotated[int, typer.Option("--n", "--images", help="How many images, shared out among the classes.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The picture to write.", show_default="samples.png")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Write each image into this folder instead; all processes of torchrun share it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --folder: images per batch.")] = BATCH_SIZE,
    file_format: Annotated[
        str, typer.Option("--format", help="With --folder: png, or safetensors for a file per batch.")
    ] = "png",
    threads: Annotated[
        int, typer.Option(help="With --folder: CPU threads per process; other ones may change bits.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(help="With --folder: address of a Ray cluster that draws; auto, local or HOST:PORT.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="With --ray: workers; all CPUs or GPUs by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to sample: cpu, cuda, ...")] = "cpu",
    backend: Annotated[str | None, typer.Option(help=f"Force one of {', '.join(ops.BACKENDS)}.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Draw handwritten digits with the model that ships with fastdiff, or images of a model of fastdiff train."""
    given = {
        "--out": out,
        "--folder": folder,
        "--ray": ray,
        "--workers": workers,
        "--prompt": prompt,
        "--negative-prompt": negative_prompt,
        "--weights": weights,
    }
    check_combination({name for name, value in given.items() if value is not None})
    more = {"solver_order": order, "eta": eta}
    if weights is None:
        source = packaged_source(sampler, steps, guidance_scale, more, classes)
    else:
        conditions = {"classes": classes, "prompt": prompt, "negative_prompt": negative_prompt}
        source = trained_source(weights, sampler, steps, guidance_scale, more, **conditions)
    check_channels(source, None if folder is None else file_format)
    common: dict[str, Any] = {"n": n, "seed": seed, "device": device, "backend": backend, "progress": not quiet}
    if folder is None:
        draw_picture(source, out=out or Path("samples.png"), **common)
        return
    draw_shards(
        source,
        folder=folder,
        batch_size=batch_size,
        file_format=file_format,
        ray=ray,
        workers=workers,
        threads=threads,
        check_device=check_device,
        **common,
    )


def check_combination(given: set[str]) -> None:
    """Refuse options that do not fit together, and several processes that would write one picture.

    Raises:
        ValueError: there are such options or processes.
    """
    needs = {
        "--ray": "--folder",
        "--workers": "--ray",
        "--prompt": "--weights",
        "--negative-prompt": "--weights",
    }
    for name, needed in needs.items():
        if name in given and needed not in given:
            raise ValueError(error_message("sample", name, f"is given without {needed}", "both", f"add {needed}"))
    if {"--out", "--folder"} <= given:
        raise ValueError(error_message("sample", "--out", "is given beside --folder", "one of them", "leave one out"))
    _, world_size = process_rank()
    if world_size > 1 and ("--folder" not in given or "--ray" in given):
        got = f"is {world_size}" + (" beside --ray" if "--ray" in given else " without --folder")
        remedy = "add --folder, and leave --ray to a single process"
        raise ValueError(error_message("sample", "the variable WORLD_SIZE", got, "1", remedy))


def check_channels(source: SampleSource, file_format: str | None) -> None:
    """Refuse pictures of samples that are neither grey nor of three colours.

    Args:
        source: the model.
        file_format: of the files of a folder; None for one picture.

    Raises:
        ValueError: it cannot be written.
    """
    channels = source.shape[0]
    if channels not in (1, 3) and file_format != "safetensors":
        got, remedy = f"draws samples of {channels} channels", "pass --folder with --format safetensors"
        raise ValueError(error_message("sample", "--weights", got, "1 or 3 for pictures", remedy))


def draw_picture(
    source: SampleSource, *, n: int, seed: int, out: Path, device: str, backend: str | None, progress: bool
) -> None:
    """Sample images in one batch and write them as a grid; see ``fastdiff sample --help``."""
    from ..analysis.images import check_grid_path, save_grid

    # All that can be refused is refused here, before anything is drawn.
    if not 1 <= n <= MOST_IMAGES:
        raise ValueError(
            error_message("sample", "--n", f"is {n}", f"1 to {MOST_IMAGES}", "ask for as many, or call twice")
        )
    if not 0 <= seed < 2**32:
        raise ValueError(error_message("sample", "--seed", f"is {seed}", f"0 to {2**32 - 1}", "stay in that range"))
    batches = source.make_batches(n, device=device, backend=backend)
    grid = {"columns": source.columns(n), "scale": max(1, 32 // source.shape[1])}
    check_device(device)
    ops.backend_for(torch.empty(0, device=device), backend, "sample")
    check_grid_path(out, (n, *source.shape), **grid, operation="sample", argument="--out")
    # An image's noise is its own, however many are drawn beside it.
    result = batches.sample(range(n), spawn_seeds(seed, n), progress=progress)
    save_grid(result.samples, out, **grid)
    backend = ops.backend_for(result.samples, backend)
    print(
        f"{n} images in {result.processing_time:.2f} s: {n / result.processing_time:.1f} images/s, "
        f"{100 * result.step_share:.2f} % of the time in the step ({backend} backend), "
        f"{batches.sampler.config.method}, {result.steps} steps; {out}"
    )
