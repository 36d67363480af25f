# SPDX-License-Identifier: MIT
"""Implementations of a loop: fastdiff and its peers. Each makes repeating loops from sets of tensors."""

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


class RepeatingLoop(NamedTuple):
    """A sampling loop that restarts after its last step; `advance` takes its next `steps` steps."""

    advance: Callable[[], object]
    steps: int = 1


#: The name of each peer, and the module whose `repeating_loops` makes its loops.
PEERS = {
    "reference": None,
    "torch.compile": "compiled_peer",
    "diffusers": "diffusers_peer",
    "k-diffusion": "k_diffusion_peer",
}


def repeating_loops(peer: str, case: Case, sets: Sequence[Tensors]) -> list[RepeatingLoop]:
    """Return a peer's loops: one per set of tensors if it can stop after a step, else one that rotates the sets.

    Raises:
        ImportError, RuntimeError: the peer is not installed, or cannot run this case.
    """
    module = PEERS.get(peer)
    if module is not None:
        loops: list[RepeatingLoop] = importlib.import_module(f".{module}", __package__).repeating_loops(case, sets)
        return loops
    backend = None if peer == "fastdiff" else peer
    return [RepeatingLoop(fastdiff_loop(case, tensors, backend)) for tensors in sets]


def fastdiff_loop(
    case: Case,
    tensors: Tensors,
    backend: str | None,
    *,
    sample: Tensor | None = None,
    model_input: Tensor | None = None,
) -> Callable[[], object]:
    """Return a function that takes the next step of a repeating loop; it writes `sample` and `model_input`."""
    start, cond, uncond = tensors
    sample = torch.empty_like(start) if sample is None else sample
    generator: torch.Generator | None = torch.Generator(start.device).manual_seed(0)
    seeds: dict[str, Any] = {}
    if case.spec.seeded and backend != "reference":
        generator, seeds = None, {"seeds": torch.arange(case.shape[0], device=start.device)}
    stepper: Any = None

    def advance() -> None:
        nonlocal stepper
        if stepper is None or stepper.done:  # the time of a loop includes its setup
            stepper = case.stepper(backend, **seeds)
            sample.copy_(start)
        # In place, like the loop of the samplers.
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
    """Return a package's version, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
