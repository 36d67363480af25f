# SPDX-License-Identifier: MIT
"""Cases of the reduction tests, and their values in extended precision with a bound on the rounding error.

Run as a program, this module saves the results of the current CPU build, for a comparison of the builds.
"""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.row_layout import compute_dtype
from support.oracle import DTYPES, ORACLE_ROUNDOFF, UNIT_ROUNDOFF

KINDS = ("mean", "std", "norm", "dot")
DOUBLE = UNIT_ROUNDOFF[torch.float64]
#: Roundings between an element and the total of its block: its product and its sum in each of 16 rounds (compiled
#: backends fuse them; the reference and Triton's interpreter do not), and 6 folds.
IN_A_BLOCK = 2 * 16 + 6


def in_double(inner: int) -> int:
    """Return the number of roundings between a block and the value: its widening, its lane, 6 folds, and a few more."""
    return math.ceil(inner / 1024 / 64) + 6 + 6


def call(kind: str, x: Tensor, y: Tensor, correction: float = 1.0, **options: Any) -> Tensor:
    if kind == "dot":
        return ops.dot(x, y, **options)
    if kind == "std":
        return ops.std(x, correction, **options)
    return getattr(ops, kind)(x, **options)  # type: ignore[no-any-return]


def oracle(kind: str, x: Tensor, y: Tensor, correction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return each sample's value in extended precision, and the bound on a backend's error."""
    u = UNIT_ROUNDOFF[x.dtype] + ORACLE_ROUNDOFF
    a, b = (np.asarray(t.double().flatten(1).numpy(), dtype=np.longdouble) for t in (x, y))
    n = a.shape[1]
    # Second-order terms: fewer than 100 roundings in total.
    block, double = IN_A_BLOCK * u * (1 + 100 * u), in_double(n) * DOUBLE
    total = {"mean": a, "norm": a * a, "dot": a * b, "std": a}[kind]
    value, error = total.sum(1), (block + double) * abs(total).sum(1)
    if kind == "mean":
        value, error = value / n, error / n
    elif kind == "norm":
        value, error = np.sqrt(value), np.sqrt(value + error) - np.sqrt(value)
    elif kind == "std":
        value, error = _spread(a, block, u, double)
        freedom = n - correction
        least = np.sqrt(np.maximum(value - error, 0) / freedom)
        most = np.sqrt((value + error) / freedom)
        value = np.sqrt(value / freedom)
        error = np.maximum(value - least, most - value)
    return value, error + 2 * u * abs(value)  # the last rounding; the oracle's own


def _spread(a: np.ndarray, block: float, u: float, double: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Σ(x−mean)² and the bound on its error.

    A block's c is off its mean by at most e = block·max|x|, so its Σ(x−c)² is at most q = v + n·e² over all blocks.
    Each x − c rounds once: the squares' sum errs by (block + 2u)·q, and Σ(x−c) by r = (block + u)·√(n·q) at most, of
    which own = Σ(x−c)² − Σ(x−c)²/n has 2r/√n·√q and the blocks' distances to the mean, whose squares add up to v or
    less, twice as much. In double, the blocks' means err by double·max|x|.
    """
    n, largest = a.shape[1], abs(a).max(1)
    v = ((a - a.mean(1, keepdims=True)) ** 2).sum(1)
    q = v + n * ((block + 2 * u) * largest) ** 2
    rest = block + u
    error = (block + 2 * u) * q + 2 * rest * q + 4 * rest * np.sqrt(v * q) + (2 * rest) ** 2 * q
    shifted = 2 * double * largest * np.sqrt(n)
    return v, error + 2 * np.sqrt(v) * shifted + shifted**2 + double * q


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype, spread: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if spread == "few":
        x = (2 * x).round()
    elif spread == "narrow":  # equal leading digits, and a mean that is large compared with the deviation
        x = 1 + 1e-3 * x
    elif spread == "wide":
        x = x * torch.exp2(torch.randint(-12, 12, shape, generator=generator))
    return x.to(dtype)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """Return a tensor with the same values in another layout."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "batch inside":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
    if layout == "reversed":
        return x.permute(0, *range(x.dim() - 1, 0, -1)).contiguous().permute(0, *range(x.dim() - 1, 0, -1))
    return x


SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.tuples(st.integers(1, 3), st.sampled_from([63, 64, 65, 1023, 1024, 1025, 3000, 5000])),
    st.just((2, 3, 40, 30)),
)
SPREADS = st.sampled_from(["normal", "few", "narrow", "wide"])
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "batch inside", "gaps", "reversed"])
QUANTILES = st.one_of(st.sampled_from([0.0, 0.5, 0.995, 1.0]), st.floats(0.0, 1.0))


def by_torch(x: Tensor, q: float, absolute: bool) -> Tensor:
    values = x.to(compute_dtype(x.dtype)).flatten(1) if x.dim() > 1 else x.to(compute_dtype(x.dtype))[:, None]
    return torch.quantile(values.abs() if absolute else values, q, dim=1)


def results_of(seed: int) -> list[Tensor]:
    """Return the results of the CPU backend on many cases."""
    rng = random.Random(seed)
    results = []
    for dtype in DTYPES:
        for inner in (1, 7, 64, 1000, 1024, 1025, 5000, 70_001):
            x, y = (numbers(rng.randrange(2**32), (2, inner), dtype, rng.choice(("normal", "wide"))) for _ in range(2))
            results += [call(kind, x, y, 0.5, backend="cpu") for kind in KINDS]
            results += ops.gram([x, y, x], sums=True, backend="cpu")
            results += [ops.quantile(x, q, q > 0.9, backend="cpu") for q in (0.0, rng.random(), 0.995)]
            results += losses_of(x, y, rng)
    return results


def losses_of(x: Tensor, y: Tensor, rng: random.Random) -> list[Tensor]:
    """Return the training losses and their gradients of output, x0 and noise."""
    t = torch.tensor([rng.randrange(1000) for _ in x])
    signal = torch.linspace(0.99, 0.01, 1000)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, y, x.flip(1))]
    results = []
    for loss in ("l2", "l1", "huber"):
        given = rng.random() < 0.5
        source = {"noise": inputs[2]} if given else {"seeds": t}
        value = ops.diffusion_loss(inputs[0], inputs[1], t, signal, "v_prediction", **source, loss=loss, backend="cpu")
        results += [value.detach(), *torch.autograd.grad(value, inputs[: 3 if given else 2])]
    return results


if __name__ == "__main__":
    torch.save(results_of(int(sys.argv[2])), sys.argv[1])
