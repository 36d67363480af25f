# SPDX-License-Identifier: MIT
"""Noise, drawn as diffusers draws it: torch's own generators, one for the batch or one a sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..device_copy import to_device
from ..errors import error_message
from .torch_normals import torch_randn

#: One generator for the whole batch, one for each sample, or torch's default.
Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(shape: Sequence[int], generator: Generators = None, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal noise, ``[*shape]``.

    It is drawn in `dtype` on the generator's own device and then moved, so that a CPU generator gives the same noise
    whatever the samples' device.

    Args:
        shape: of the result; its first dimension is the batch.
        generator: one for all, or one a sample, whose noise then does not depend on the rest of the batch.
        dtype, device: of the result.

    Raises:
        ValueError: there are not as many generators as samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        drawn_on = device if generator is None else generator.device
        return to_device(torch_randn(tuple(shape), generator, dtype=dtype, device=drawn_on), device)
    generator = _listed(generator)
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
    one = (1, *shape[1:])
    parts = [to_device(torch_randn(one, g, dtype=dtype, device=g.device), device) for g in generator]
    return torch.cat(parts) if parts else torch.empty(tuple(shape), dtype=dtype, device=device)


def generator_states(generator: Generators) -> list[tuple[torch.Generator, Tensor]]:
    """The states of the given generators, to be put back where a loop fails."""
    if generator is None:
        return []
    listed = [generator] if isinstance(generator, torch.Generator) else _listed(generator)
    return [(g, g.get_state()) for g in listed]


def _listed(generators: object) -> list[torch.Generator]:
    """Return the generators of a sequence, one a sample."""
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
