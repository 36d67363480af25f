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

Both sides take turns on one thread, see benchmarks/log_prob.py.  Run it with ``python -m benchmarks.forward_process``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import require

from .conditions import conditions
from .log_prob import measure
from .timing import ratios

SHAPES = ((64, 4, 64, 64), (64, 1, 8, 8), (8, 4, 128, 128))

Run = Callable[[], object]


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

    def fused(loss: str) -> tuple[Tensor, Tensor]:
        noisy = ops.add_noise(x0, t, schedule, seeds=seeds)
        return noisy, gradient(ops.diffusion_loss(output, x0, t, schedule, kind, seeds=seeds, loss=loss, huber_c=0.1))

    def plain(loss: str) -> tuple[Tensor, Tensor]:
        noisy, target = given(torch.randn(shape))
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
        "noisy samples, l2 loss, gradient": (lambda: fused("l2"), lambda: plain("l2")),
        "noisy samples, pseudo-Huber loss, gradient": (lambda: fused("huber"), lambda: plain("huber")),
        "l2 loss and gradient, noise given": (
            lambda: gradient(ops.diffusion_loss(output, x0, t, schedule, kind, noise=noise)),
            lambda: loss_alone(target),
        ),
    }


def table(shapes: tuple[tuple[int, ...], ...], rounds: int, seconds: float) -> str:
    """Measure, and return the lines of a Markdown table."""
    lines = ["| | shape | fastdiff, µs | diffusers and torch, µs | their ratio |", "|---" * 5 + "|"]
    for shape in shapes:
        for name, (ours, peer) in pairs(shape).items():
            a, b = measure(ours, peer, rounds, seconds)
            lines.append(
                f"| {name} | {'×'.join(map(str, shape))} | {statistics.median(a):.1f} | {statistics.median(b):.1f} | "
                f"{statistics.median(ratios(b, a)):.1f}× |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=0.02, help="a round's calls of one implementation")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = tuple(tuple(int(size) for size in shape.split("x")) for shape in given.shapes)
    text = table(shapes, given.rounds, given.seconds)
    print(f"\n{text}\n\n{conditions()}")


if __name__ == "__main__":
    main()
