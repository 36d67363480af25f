# SPDX-License-Identifier: MIT
"""``fastdiff sample``: digits by the model that ships, as one picture or as a folder of images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import ops
from ..digits import IMAGE_SHAPE, NUM_CLASSES
from ..digits.batches import DigitBatches
from ..errors import error_message, unknown_name
from ..philox import spawn_seeds
from ..sharding import process_rank
from ..solvers import SamplingMethod
from .app import app
from .sample_shards import BATCH_SIZE, draw_shards

#: Fields of SamplingConfig by the names of samplers: those of the registry, and the values of `SamplingMethod` besides.
SAMPLERS: dict[str, dict[str, Any]] = {
    name: fields for method in SamplingMethod for name, fields in method.presets.items()
}
ALIASES: dict[str, dict[str, Any]] = {
    method.value: {"method": method} for method in SamplingMethod if method.value not in SAMPLERS
}

#: Images that one picture has at most: they are one batch, of about 0.2 MiB an image.
MOST_IMAGES = 10_000


def parse_classes(text: str, count: int) -> list[int]:
    """Return class labels from text such as ``"0-9"``, ``"3"`` or ``"1,4,7-9"``, in order, each once."""
    labels: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        first, last = (0, -1) if found is None else (int(found[1]), int(found[2] or found[1]))
        if last < first:
            raise ValueError(
                error_message(
                    "sample", "--classes", f"is {text!r}", "labels and ranges such as 0-9 or 1,4", "write it so"
                )
            )
        if last >= count:
            raise ValueError(
                error_message("sample", "--classes", f"asks for {last}", f"0 to {count - 1}", "stay within the classes")
            )
        labels += range(first, last + 1)
    return list(dict.fromkeys(labels))


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


def sampler_fields(name: str) -> dict[str, Any]:
    """Return the fields of `SamplingConfig` for a sampler's name."""
    known = {**SAMPLERS, **ALIASES}
    if name not in known:
        raise unknown_name("sample", "--sampler", name, known)
    return known[name]


@app.command()
def sample(
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")] = "dpmsolver++",
    steps: Annotated[int, typer.Option(help="Steps of the loop.")] = 20,
    order: Annotated[int, typer.Option(help="Order of a DPM-Solver.")] = 2,
    eta: Annotated[float | None, typer.Option(help="Noise that DDIM or Euler-ancestral adds back.")] = None,
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", "--guidance", help="Classifier-free guidance scale; 1 for none.")
    ] = 3.0,
    classes: Annotated[str, typer.Option(help="Digits to draw: 0-9, 3 or 1,4,7-9.")] = "0-9",
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
    """Draw handwritten digits with the class-conditional U-Net that ships with fastdiff."""
    sampling = {**sampler_fields(sampler), "num_inference_steps": steps, "solver_order": order, "eta": eta}
    given = {"--out": out, "--folder": folder, "--ray": ray, "--workers": workers}
    check_combination({name for name, value in given.items() if value is not None})
    common: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "classes": classes,
        "n": n,
        "seed": seed,
        "device": device,
        "backend": backend,
        "progress": not quiet,
    }
    if folder is None:
        draw_digits(sampling, out=out or Path("samples.png"), **common)
        return
    common["classes"] = parse_classes(classes, NUM_CLASSES)
    draw_shards(
        sampling,
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
    needs = {"--ray": "--folder", "--workers": "--ray"}
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


def draw_digits(
    sampling: dict[str, Any],
    *,
    guidance_scale: float,
    classes: str,
    n: int,
    seed: int,
    out: Path,
    device: str,
    backend: str | None,
    progress: bool,
) -> None:
    """Sample digits and write them as a grid; see ``fastdiff sample --help``."""
    from ..analysis.images import check_grid_path, save_grid

    # All that can be refused is refused here, before anything is drawn.
    labels = parse_classes(classes, NUM_CLASSES)
    if not 1 <= n <= MOST_IMAGES:
        raise ValueError(
            error_message("sample", "--n", f"is {n}", f"1 to {MOST_IMAGES}", "ask for as many, or call twice")
        )
    if not 0 <= seed < 2**32:
        raise ValueError(error_message("sample", "--seed", f"is {seed}", f"0 to {2**32 - 1}", "stay in that range"))
    digits = DigitBatches(labels, n, sampling, guidance_scale=guidance_scale, device=device, backend=backend)
    # Rows of one class: each class its share, the first ones one more where n does not divide.
    shares = [n // len(labels) + (i < n % len(labels)) for i in range(len(labels))]
    grid = {"columns": max(shares) if n >= len(labels) else n, "scale": 4}
    check_device(device)
    ops.backend_for(torch.empty(0, device=device), backend, "sample")
    check_grid_path(out, (n, *IMAGE_SHAPE), **grid, operation="sample", argument="--out")
    # An image's noise is its own, however many are drawn beside it.
    result = digits.sample(range(n), spawn_seeds(seed, n), progress=progress)
    save_grid(result.samples, out, **grid)
    backend = ops.backend_for(result.samples, backend)
    print(
        f"{n} images in {result.processing_time:.2f} s: {n / result.processing_time:.1f} images/s, "
        f"{100 * result.step_share:.2f} % of the time in the step ({backend} backend), "
        f"{result.steps} steps; {out}"
    )
