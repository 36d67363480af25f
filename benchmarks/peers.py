# SPDX-License-Identifier: MIT
"""The peers that take the steps: each turns sets of tensors into walks, endless loops by the step."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import Stepper

from .cases import GUIDANCE, Case, Tensors


class Walk(NamedTuple):
    """One loop that never ends: `advance` takes its next `steps` steps, and starts over after the last."""

    advance: Callable[[], object]
    steps: int = 1


#: The table's column, and the module whose `walks` makes its walks.
PEERS = {
    "reference": None,
    "torch.compile": "compiled_peer",
    "diffusers": "diffusers_peer",
    "k-diffusion": "k_diffusion_peer",
}


def walks(peer: str, case: Case, sets: Sequence[Tensors]) -> list[Walk]:
    """Walks of a peer, one a set of tensors where it can stop after a step, else one that changes sets as it goes.

    Raises:
        ImportError, RuntimeError: the peer is not installed, or cannot take these steps.
    """
    module = PEERS.get(peer)
    if module is not None:
        made: list[Walk] = importlib.import_module(f".{module}", __package__).walks(case, sets)
        return made
    backend = None if peer == "fastdiff" else peer
    return [Walk(fastdiff_walk(case, tensors, backend)) for tensors in sets]


def fastdiff_walk(
    case: Case,
    tensors: Tensors,
    backend: str | None,
    *,
    sample: Tensor | None = None,
    model_input: Tensor | None = None,
) -> Callable[[], object]:
    """Takes the next step of a loop that starts over; `sample` and `model_input` are what it writes."""
    start, cond, uncond = tensors
    sample = torch.empty_like(start) if sample is None else sample
    generator: torch.Generator | None = torch.Generator(start.device).manual_seed(0)
    seeds: dict[str, Any] = {}
    if case.recipe.seeded and backend != "reference":
        generator, seeds = None, {"seeds": torch.arange(case.shape[0], device=start.device)}
    stepper: Any = None

    def advance() -> None:
        nonlocal stepper
        if stepper is None or stepper.done:  # a loop's own beginnings are part of its time
            stepper = case.stepper(backend, **seeds)
            sample.copy_(start)
        # In place, as the samplers' own loop does.
        stepper.step(
            sample,
            cond,
            uncond=uncond,
            guidance_scale=GUIDANCE,
            out=sample,
            generator=generator,
            model_input=model_input,
        )

    if "guidance_scale" in inspect.signature(Stepper.step).parameters:
        return advance

    def advance_by_former_names() -> None:  # with --base, a commit from before the argument was renamed
        nonlocal stepper
        if stepper is None or stepper.done:
            stepper = case.stepper(backend, **seeds)
            sample.copy_(start)
        stepper.step(
            sample, cond, uncond=uncond, guidance=GUIDANCE, out=sample, generator=generator, model_input=model_input
        )

    return advance_by_former_names


def version(package: str) -> str:
    """A package's version, or that it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
