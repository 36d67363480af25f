# SPDX-License-Identifier: MIT
"""Bitwise comparison of the noise of every available backend with that of compiled code on the CPU.

Requests are random: shapes around the sizes of chunks, vectors and blocks, all dtypes, seeds and counters of all sizes,
drawn alone and by a step, in row-major and channels-last memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.row_layout import COLUMNS, PREV_SAMPLE, blank_row, compute_dtype

_INNER = ((1,), (3,), (4,), (5,), (31,), (64,), (513,), (1027,), (4, 16, 16), (3, 5, 7), (16, 3, 1), (4, 33, 17))
_LARGE = ((4, 128, 128), (16, 5, 40, 30), (100_003,), (2**20,))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Triton's interpreter rounds the product of an fma before the sum: each of 12 sums in the computation of a number
#: below 6.8 may change it by 2⁻²⁴ of its value, twice.
INTERPRETED_BOUND = 24 * 2.0**-24 * 6.8


def compare(
    device: str,
    seconds: float,
    *,
    seed: int | None = None,
    least: int = 8,
    store: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Compare requests for `seconds`, and at least `least` requests; call `store` with the result after each.

    Returns:
        The seed of the requests, and for each backend the count of compared numbers, the count that differ in a bit and
        the largest difference, or why the backend is missing.

    Raises:
        RuntimeError: there is no compiled code on the CPU to compare with.
    """
    missing = backends.why_missing("cpu")
    if missing:
        raise RuntimeError(f"noise: backend 'cpu' is missing: {missing}")
    seed = random.randrange(2**32) if seed is None else seed
    found = {name: _Tally(backends.why_missing(name)) for name in _candidates(device)}
    rng = random.Random(seed)
    deadline, requests = time.monotonic() + seconds, 0
    while requests < least or time.monotonic() < deadline:
        request = _request(rng, device)
        expected = _draw(request, "cpu", "cpu")
        for name, tally in found.items():
            if not tally.missing and not (device == "cpu" and name == "triton" and request["dtype"] == torch.bfloat16):
                tally.add(expected, _draw(request, name, device))
        requests += 1
        result = {
            "seed": seed,
            "requests": requests,
            "backends": {name: tally.figures() for name, tally in found.items()},
        }
        store(result)
    return result


def failures(found: dict[str, Any], device: str) -> list[str]:
    """Return the failures of a comparison: a backend that differs, or an available one that compared nothing."""
    messages = []
    for name, figures in found["backends"].items():
        interpreted = device == "cpu" and name == "triton"
        if figures["missing"]:
            if device == "cuda":
                messages.append(f"{name} is missing: {figures['missing']}")
        elif figures["compared"] == 0:
            messages.append(f"{name} was compared on nothing")
        elif interpreted and figures["largest_difference"] > INTERPRETED_BOUND:
            messages.append(f"{name}, interpreted, is off by {figures['largest_difference']:.3g}")
        elif not interpreted and figures["mismatches"]:
            messages.append(f"{name} differs in {figures['mismatches']} of {figures['compared']} numbers")
    return messages


def _candidates(device: str) -> tuple[str, ...]:
    return ("cuda", "triton", "reference") if device == "cuda" else ("reference", "triton")


class _Tally:
    def __init__(self, missing: str) -> None:
        self.missing = missing
        self.compared = self.mismatches = 0
        self.largest = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        """Count the numbers that differ in a bit, on the device of `got`."""
        expected = expected.to(got.device)
        width = _WIDTHS[got.element_size()]
        differ = int((expected.contiguous().view(width) != got.contiguous().view(width)).sum())
        self.compared += got.numel()
        self.mismatches += differ
        if differ:
            difference = (expected.double() - got.double()).abs().max().item()
            # max() would ignore NaN: count it as infinite.
            self.largest = max(self.largest, difference if difference == difference else float("inf"))

    def figures(self) -> dict[str, Any]:
        return {
            "missing": self.missing,
            "compared": self.compared,
            "mismatches": self.mismatches,
            "largest_difference": self.largest,
        }


def _request(rng: random.Random, device: str) -> dict[str, Any]:
    large = device == "cuda" and rng.random() < 0.3
    inner = rng.choice(_LARGE if large else _INNER)
    batch = rng.choice((1, 2, 3, 5))
    word = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)))
    return {
        "shape": (batch, *inner),
        "seeds": torch.tensor([rng.choice((0, -1, 1, rng.randrange(-(2**63), 2**63))) for _ in range(batch)]),
        "step": word if rng.random() < 0.6 else torch.tensor([rng.randrange(2**32) for _ in range(batch)]),
        "purpose": rng.choice((0, 1, 2**31, 2**32 - 1, rng.randrange(2**32))),
        "dtype": rng.choice(_DTYPES),
        "in_a_step": rng.random() < 0.5,
        "channels_last": len(inner) == 3 and rng.random() < 0.5,
    }


def _draw(request: dict[str, Any], backend: str, device: str) -> Tensor:
    """Draw the request's numbers, alone or by a step whose result is the noise."""
    step = request["step"].to(device) if isinstance(request["step"], Tensor) else request["step"]
    seeds, dtype, shape = request["seeds"].to(device), request["dtype"], request["shape"]
    if not request["in_a_step"]:
        return ops.randn(shape, seeds, step, request["purpose"], dtype=dtype, backend=backend)
    row = torch.tensor([blank_row()], dtype=compute_dtype(dtype))
    row[0, PREV_SAMPLE + COLUMNS.index("noise")] = 1.0
    sample = torch.zeros(shape, dtype=dtype, device=device)
    if request["channels_last"]:
        sample = sample.contiguous(memory_format=torch.channels_last)
    options = {"seeds": seeds, "noise_step": step, "purpose": request["purpose"]}
    return ops.step(sample, sample, row.to(device), 0, **options, backend=backend)[0]
