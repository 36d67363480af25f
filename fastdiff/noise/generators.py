# SPDX-License-Identifier: MIT
"""Noise from torch generators, one for the batch or one per sample, with diffusers' rule for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..device_copy import to_device
from ..errors import error_message
from .torch_normals import batched_randn

#: One generator for the whole batch, one for each sample, or torch's default.
Generators = torch.Generator | Sequence[torch.Generator] | None
#: Generators with a state each.
GeneratorStates = list[tuple[torch.Generator, Tensor]]


def draw(shape: Sequence[int], generator: Generators = None, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw standard normal noise, ``[*shape]``.

    The noise is drawn in `dtype` on the generator's device and then moved, so that a CPU generator gives the same noise
    for samples on any device.

    Args:
        shape: shape of the result; its first dimension is the batch.
        generator: one for the batch, or one per sample; a sample's noise then does not depend on the rest of the batch.
        dtype, device: dtype and device of the result.

    Raises:
        ValueError: the number of generators is not the number of samples.
    """
    shape = tuple(shape)
    if generator is None or isinstance(generator, torch.Generator):
        drawn_on = device if generator is None else generator.device
        return to_device(batched_randn(shape, generator, dtype=dtype, device=drawn_on), device)
    generator = _as_list(generator)
    if len(shape) == 0 or len(generator) != shape[0]:
        raise ValueError(
            error_message(
                "step",
                "generator",
                f"is a list of {len(generator)}",
                f"one generator for each sample of shape {list(shape)}",
                "pass one generator a sample, or a single one",
            )
        )
    if not generator:
        return torch.empty(shape, dtype=dtype, device=device)
    if len({g.device for g in generator}) == 1:
        return to_device(batched_randn(shape, generator, dtype=dtype, device=generator[0].device), device)
    return torch.cat([draw((1, *shape[1:]), g, dtype=dtype, device=device) for g in generator])


def generator_states(generator: Generators, default_of: torch.device | None = None) -> GeneratorStates:
    """Return each generator with its current state, to be restored if a loop fails or stops early.

    Args:
        generator: one for the batch, one per sample, or None.
        default_of: where `generator` is None, the CPU or CUDA device whose default generator of torch is meant; None
            for no generator.
    """
    if generator is None:
        kind = "" if default_of is None else default_of.type
        if kind == "cpu":
            generator = torch.default_generator
        elif kind == "cuda" and default_of is not None:
            generator = torch.cuda.default_generators[default_of.index]
        else:
            return []
    listed = [generator] if isinstance(generator, torch.Generator) else _as_list(generator)
    return [(g, g.get_state()) for g in listed]


def restore_generators(states: GeneratorStates) -> None:
    """Put generators back to the states that `generator_states` gave."""
    for generator, state in states:
        generator.set_state(state)


def _as_list(generators: object) -> list[torch.Generator]:
    """Return a sequence of generators as a list.

    Raises:
        TypeError: it is no sequence, or holds something else.
    """
    expected = "a torch.Generator, or one a sample"
    if not isinstance(generators, Iterable):
        raise TypeError(
            error_message(
                "sample", "generator", f"is a {type(generators).__name__}", expected, "make it with torch.Generator()"
            )
        )
    listed = list(generators)
    for one in listed:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                error_message("sample", "generator", f"holds a {type(one).__name__}", expected, "make one a sample")
            )
    return listed
