# SPDX-License-Identifier: MIT
"""Time of the forward process and of the training loss beside diffusers and plain torch.

Bytes, in tensors of the samples' size that a pass reads or writes.  With noise given `noise_and_target` reads x0 and
the noise and writes two results: 4.  diffusers' ``add_noise`` and ``get_velocity`` are two products and a sum each, and
a sum reads two tensors and writes one: 14.  So 3.5 times less moves, where memory decides.  With drawn noise it is 3
tensors beside 15, and fastdiff's own Philox beside ``torch.randn``, which takes about five times as long.

A training step's loss with the noise drawn again reads the output (and x0 for v) and writes nothing; its gradient reads
them again and writes one tensor: 3 tensors for ε and 5 for v, and two draws.  ``mse_loss`` reads output and target,
writes the squares and reads them for the mean; its gradient reads both and writes one: 7 tensors, after the target was
made.  A draw takes longer than reading a tensor from a cache, so on a CPU the loss saves memory first, and time where
the plain way draws by ``torch.randn``.

Both sides take turns on one thread, see benchmarks/pair_table.py.  Run it with
``python -m benchmarks.forward_process``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import require

from . import pair_table
from .pair_table import Run

SHAPES = ((64, 4, 64, 64), (64, 1, 8, 8), (1, 4, 64, 64), (8, 4, 128, 128))


def pairs(shape: tuple[int, ...]) -> dict[str, tuple[Run, Run]]:
    """Return for each line of the table fastdiff's call and the one of diffusers and torch that gives the same."""
    schedule = require("diffusers", "diffusers", "benchmarks.forward_process").DDPMScheduler()
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.randint(1000, shape[:1], generator=generator)
    output = torch.randn(shape, generator=generator).requires_grad_()
    seeds = torch.arange(shape[0])
    kind = "v_prediction"

    def given(noise: Tensor) -> tuple[Tensor, Tensor]:
        return schedule.add_noise(x0, noise, t), schedule.get_velocity(x0, noise, t)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, output)[0]

    def fused(loss: str, **source: Tensor) -> tuple[Tensor, Tensor]:
        noisy = ops.add_noise(x0, t, schedule, **source)
        return noisy, gradient(ops.diffusion_loss(output, x0, t, schedule, kind, **source, loss=loss, huber_c=0.1))

    def plain(loss: str, noise: Tensor) -> tuple[Tensor, Tensor]:
        noisy, target = given(noise)
        if loss == "l2":
            return noisy, gradient(torch.nn.functional.mse_loss(output, target))
        return noisy, gradient((((output - target) ** 2 + 0.1**2).sqrt() - 0.1).mean())

    def loss_alone(target: Tensor) -> Tensor:
        return gradient(torch.nn.functional.mse_loss(output, target))

    target = given(noise)[1]
    return {
        "noisy samples and target, noise drawn": (
            lambda: ops.noise_and_target(x0, t, schedule, kind, seeds=seeds),
            lambda: given(torch.randn(shape)),
        ),
        "noisy samples and target, noise given": (
            lambda: ops.noise_and_target(x0, t, schedule, kind, noise=noise),
            lambda: given(noise),
        ),
        "noisy samples, l2 loss, gradient, noise drawn": (
            lambda: fused("l2", seeds=seeds),
            lambda: plain("l2", torch.randn(shape)),
        ),
        "noisy samples, l2 loss, gradient, noise given": (
            lambda: fused("l2", noise=noise),
            lambda: plain("l2", noise),
        ),
        "noisy samples, pseudo-Huber loss, gradient, noise drawn": (
            lambda: fused("huber", seeds=seeds),
            lambda: plain("huber", torch.randn(shape)),
        ),
        "l2 loss and gradient, noise given": (
            lambda: gradient(ops.diffusion_loss(output, x0, t, schedule, kind, noise=noise)),
            lambda: loss_alone(target),
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    pair_table.run(__doc__, pairs, ("fastdiff, µs", "diffusers and torch, µs", "their ratio"), SHAPES, 0.02, arguments)


if __name__ == "__main__":
    main()
