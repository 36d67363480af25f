# SPDX-License-Identifier: MIT
"""Time of a step under autograd, and of its gradient, beside the formula in plain torch.

The step is DDPM's with its noise given, unguided and guided.  Bytes, in tensors of the samples' size: the unguided step
reads x, the model's output and the noise and writes one, 4; the formula makes three products and two sums, of 2 and 3
tensors each, 12.  The gradient of the model's output is one product on both sides, 2 tensors.  With guidance it is 5
beside 20, and the gradients of both outputs are 3 beside 7.  So large samples should take a third of the time, and
small ones what autograd's own work takes: about 20 µs for its engine.

Both sides take turns on one thread, see benchmarks/pair_table.py.  Run it with ``python -m benchmarks.step_gradient``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import create_sampler, ops
from fastdiff.row_layout import COLUMNS, PREV_SAMPLE

from . import pair_table
from .pair_table import Run

SHAPES = ((2, 64), (1, 4, 64, 64), (8, 4, 128, 128))
_ROW, _SCALE = 5, 7.5


def pairs(shape: tuple[int, ...]) -> dict[str, tuple[Run, Run]]:
    """Return for each line of the table fastdiff's call and the formula that gives the same."""
    table = create_sampler("linear", "ddpm", num_inference_steps=10).table.coefficients_as(torch.float32)
    a, b, s = (float(table[_ROW, PREV_SAMPLE + COLUMNS.index(name)]) for name in ("sample", "model_output", "noise"))
    x, cond, uncond, noise, grad = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    cond.requires_grad_()
    uncond.requires_grad_()

    def fused(**guidance: object) -> Tensor:
        return ops.step(x, cond, table, _ROW, noise=noise, **guidance)[0]  # type: ignore[arg-type]

    def plain() -> Tensor:
        return a * x + b * cond + s * noise

    def guided() -> Tensor:
        return a * x + b * (uncond + _SCALE * (cond - uncond)) + s * noise

    both = {"uncond": uncond, "guidance_scale": _SCALE}
    return {
        "step, recorded": (fused, plain),
        "step and its gradient": (
            lambda: torch.autograd.grad(fused(), cond, grad),
            lambda: torch.autograd.grad(plain(), cond, grad),
        ),
        "guided step and the gradients of both outputs": (
            lambda: torch.autograd.grad(fused(**both), (cond, uncond), grad),
            lambda: torch.autograd.grad(guided(), (cond, uncond), grad),
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    pair_table.run(__doc__, pairs, ("fastdiff, µs", "torch, µs", "its ratio"), SHAPES, 0.02, arguments)


if __name__ == "__main__":
    main()
