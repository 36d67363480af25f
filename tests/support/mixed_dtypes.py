# SPDX-License-Identifier: MIT
"""Steps whose tensors have dtypes of their own, and what they are by definition: the step of the widened tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.row_layout import compute_dtype
from support.mixed import Batch, random_batch
from support.oracle import DTYPES, INTERPRETED, Case, Shape, make

SCALARS = ("table", "guidance", "guidance_scale", "threshold")

#: What may become of an output, as `out` takes it.
Target = Tensor | torch.dtype | None


def dtypes_for(backend: str | None) -> tuple[torch.dtype, ...]:
    """Of outputs; Triton's interpreter cuts float32 off to bfloat16 instead of rounding it (oracle.py)."""
    interpreted = backend == "triton" and INTERPRETED
    return tuple(d for d in DTYPES if not (interpreted and d == torch.bfloat16))


def mixed_case(
    plan: Shape, backend: str | None = None, *, double: bool | None = None
) -> tuple[Case, list[torch.dtype]]:
    """A plan's step with a random dtype for each tensor, float64 among them or not; and one for each output."""
    rng = random.Random(plan.seed)
    if double is None:
        double = rng.random() < 0.4
    inputs = [d for d in DTYPES if double or d != torch.float64]
    results = [d for d in dtypes_for(backend) if double or d != torch.float64]
    outs = [rng.choice(results) for _ in range(plan.keeps + 1)]
    used: list[torch.dtype] = []

    def stored(name: str, tensor: Tensor) -> Tensor:
        if name in SCALARS:
            return tensor
        used.append(rng.choice(inputs))
        # Not subnormal in a half type, which the interpreter reads as 0: random numbers are none.
        return tensor.to(used[-1])

    case = make(replace(plan, dtype=torch.float64)).with_tensors(stored)
    compute = compute_dtype(*used, *outs)
    return case.with_tensors(lambda name, t: t.to(compute) if name in SCALARS else t), outs


def widened(case: Case) -> Case:
    """The same numbers, all in the compute dtype."""
    return case.with_tensors(lambda _, tensor: tensor.to(case.table.dtype))


def by_definition(case: Case, outs: Sequence[torch.dtype], backend: str | None = None) -> list[Tensor]:
    """The step of the widened tensors, each result rounded by torch."""
    results = widened(case).run(backend)
    return [result.to(dtype) for result, dtype in zip(results, outs, strict=True)]


def poisoned(case: Case, outs: Sequence[torch.dtype]) -> list[Tensor]:
    return [torch.full_like(case.sample, float("nan"), dtype=dtype) for dtype in outs]


def mixed_batch(seed: int, backend: str | None) -> tuple[Batch, torch.dtype]:
    """As `random_batch` with a dtype for each tensor, and one of prev_sample."""
    rng = random.Random(seed)
    batch = random_batch(seed, torch.float64, dtypes_for(backend))
    double = rng.random() < 0.3
    allowed = [d for d in dtypes_for(backend) if double or d != torch.float64]
    inputs = [d for d in DTYPES if double or d != torch.float64]

    def stored(tensor: Tensor | None, dtypes: list[torch.dtype]) -> Tensor | None:
        return None if tensor is None else tensor.to(rng.choice(dtypes))

    for name in ("sample", "model_output", "uncond", "noise", "variance"):
        batch[name] = stored(batch[name], inputs)
    batch["history"] = [stored(h, allowed) for h in batch["history"]]
    prev = rng.choice(allowed)
    like = [batch[n] for n in ("sample", "model_output", "uncond", "noise", "variance")] + batch["history"]
    compute = compute_dtype(prev, *(t.dtype for t in like if t is not None))
    for name in SCALARS:
        if batch.get(name) is not None:
            batch[name] = batch[name].to(compute)
    return batch, prev
