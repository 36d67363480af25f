# SPDX-License-Identifier: MIT
"""Checks of fastdiff with the installed version of torch: one check per process, run by tools/compat.py.

    python tools/compat_checks.py CHECK

A check that fails raises. All run on the CPU, on every available backend.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BUILT = os.environ.get("FASTDIFF_BUILD", "auto") != "none"
SHAPE = (2, 3, 8, 8)


def backends() -> list[str]:
    """Return the backends that have to be available; the first is the default."""
    return ["cpu", "reference"] if BUILT else ["reference"]


def assert_equal(found: Any, expected: Any, what: str) -> None:
    """Require that two tensors, or two lists of tensors, have equal values."""
    if isinstance(found, Tensor):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        if not torch.equal(one, other):
            raise AssertionError(f"{what}: results differ by {(one.double() - other.double()).abs().max().item()}")


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_import() -> None:
    """Check that the package, each of its operators and, if one was built, the extension can be imported."""
    import fastdiff
    from fastdiff.ops import backends as found

    expected = "available" if BUILT else "was not built"
    if expected not in fastdiff.ops.backend_status()["cpu"]:
        raise AssertionError(f"the cpu backend is {fastdiff.ops.backend_status()['cpu']}, expected: {expected}")
    if found.backend_for(torch.ones(1)) != backends()[0]:
        raise AssertionError(f"{found.backend_for(torch.ones(1))} answers")
    for name in ("step", "step_rows", "randn", "quantile", "mean", "std", "norm", "dot"):
        getattr(torch.ops.fastdiff, name).default  # noqa: B018 (raises where it is missing)


def check_samplers() -> None:
    """Check that the backends agree on every sampler, up to float32 rounding."""
    import fastdiff
    from fastdiff.sampling.config import SamplingMethod

    for method in SamplingMethod:
        sampler = fastdiff.create_sampler("scaled_linear", method.value, num_inference_steps=6, guidance_scale=3.0)
        drawn = []
        for backend in backends():
            with fastdiff.ops.use_backend(backend):
                result = sampler.sample(
                    lambda x, t, cond: torch.tanh(x) + cond.mean(),
                    normal(1),
                    prompt_embeds=torch.ones(2, 4),
                    negative_prompt_embeds=torch.zeros(2, 4),
                    seeds=[1, 2],
                    progress=False,
                )
            drawn.append(result.samples)
        if not drawn[0].isfinite().all():
            raise AssertionError(f"{method.value}: not finite")
        # One rounding per step, 2⁻²³ of values below 100; a step at most doubles a difference.
        torch.testing.assert_close(drawn[0], drawn[-1], rtol=0.0, atol=2.0**6 * 100 * 2.0**-23)


def check_quantile() -> None:
    """Check that the quantile equals torch's bit for bit; torch fuses its interpolation for AVX2 and AVX-512 only."""
    from fastdiff import ops

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise AssertionError("this processor has neither AVX2 nor AVX-512")
    for dtype in (torch.float32, torch.float64):
        for count in range(2, 300, 7):
            x, q = normal(count, (3, count), dtype), (count * 0.618) % 1.0
            for backend in backends():
                what = f"quantile {q} of {count} numbers of {dtype} by {backend}"
                assert_equal(ops.quantile(x, q, backend=backend), torch.quantile(x, q, dim=1), what)


def check_gradients() -> None:
    """Check the gradients of the fused step, and vmap."""
    from fastdiff import ops

    table = normal(2, (1, 32), torch.float64)
    table[:, 2] = float("inf")
    x, m, u = (normal(seed, (2, 5), torch.float64).requires_grad_() for seed in (3, 4, 5))
    for backend in backends():
        torch.autograd.gradcheck(
            lambda x, m, u, backend=backend: ops.step(x, m, table, 0, uncond=u, guidance_scale=2.5, backend=backend)[0],
            (x, m, u),
        )
    x, m = normal(6, (4, 2, 5)), normal(7, (4, 2, 5))
    rows = table.float()
    assert_equal(
        torch.func.vmap(lambda x, m: ops.step(x, m, rows, 0)[0])(x, m),
        torch.stack([ops.step(a, b, rows, 0)[0] for a, b in zip(x, m, strict=True)]),
        "vmap",
    )


def check_training() -> None:
    """Check the forward process and the training loss with its gradient, drawn and given noise, by every backend."""
    import fastdiff
    from fastdiff import ops

    schedule = fastdiff.create_noise_scheduler("cosine")
    x0, noise, t = normal(1, (3, 2, 5)), normal(2, (3, 2, 5)), torch.tensor([0, 400, 999])
    for source in ({"noise": noise}, {"seeds": torch.tensor([5, 6, 7])}):
        for loss in ("l2", "l1", "huber"):
            found = []
            for backend in backends():
                options = {**source, "backend": backend}
                noisy, target = ops.noise_and_target(x0, t, schedule, "v_prediction", **options)
                output = normal(3, (3, 2, 5)).requires_grad_()
                value = ops.diffusion_loss(output, x0, t, schedule, "v_prediction", loss=loss, **options)
                (gradient,) = torch.autograd.grad(value, output)
                found.append((noisy, target, value.detach(), gradient))
            for other in found[1:]:
                # Rounding of numbers up to 10, some of them sums of 30.
                torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def check_compile() -> None:
    """Check that each kind of step, noise and reductions compile to one graph with the bits of the eager call."""
    import fastdiff
    from fastdiff import ops
    from fastdiff.sampling.config import SamplingMethod

    sampler = fastdiff.create_sampler("scaled_linear", "dpm_solver", num_inference_steps=4)
    ancestral = fastdiff.create_sampler("scaled_linear", SamplingMethod.EULER_ANCESTRAL.value, num_inference_steps=4)
    table = sampler.table.coefficients_as(torch.float32)

    def step(x: Tensor, m: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return ops.step(x * 2, m, table, 1, uncond=x, guidance_scale=2.5, history=[h], keeps=1)

    def by_tensor(x: Tensor, m: Tensor, row: Tensor, out: Tensor, model_input: Tensor) -> Tensor:
        seeds = torch.tensor([1, 2])
        return ops.step(x, m, table, row, seeds=seeds, noise_step=row, out=[out], model_input=model_input)[0]

    def by_rows(x: Tensor, m: Tensor, rows: Tensor, h: Tensor) -> Tensor:
        return ops.step_rows(x, m, table, rows, [h])[0]

    def loop(x: Tensor) -> Tensor:
        stepper = fastdiff.Stepper(ancestral.table, seeds=[1, 2])
        while not stepper.done:
            x = stepper.step(x, torch.tanh(x), uncond=x, guidance_scale=3.0)
        return x

    def noise(seeds: Tensor) -> Tensor:
        return fastdiff.randn(SHAPE, seeds, 3) * 2

    def reduced(x: Tensor) -> list[Tensor]:
        x = x.flatten(1)
        return [ops.quantile(x, 0.9, True), ops.mean(x), ops.std(x), ops.norm(x), ops.dot(x, x)]

    cases: list[tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]], int]] = [
        (step, lambda: (normal(1), normal(2), normal(3)), 0),
        (by_tensor, lambda: (normal(1), normal(2), torch.tensor([2]), torch.zeros(SHAPE), torch.zeros(SHAPE)), 2),
        (by_rows, lambda: (normal(1), normal(2), torch.tensor([2, -1]), normal(3)), 1),
        (loop, lambda: (normal(1),), 0),
        (noise, lambda: (torch.tensor([1, 2]),), 0),
        (reduced, lambda: (normal(1),), 0),
    ]
    for compiler in ("eager", "aot_eager"):
        for function, arguments, written in cases:
            torch._dynamo.reset()
            eager, compiled = arguments(), arguments()
            found = torch.compile(function, fullgraph=True, backend=compiler)(*compiled)
            assert_equal(found, function(*eager), f"{function.__name__} in {compiler}")
            outputs = [list(given[-written:]) for given in (compiled, eager)]
            assert_equal(*outputs, f"outputs of {function.__name__} in {compiler}")


class Loop(torch.nn.Module):
    """Three steps of a small model."""

    def __init__(self) -> None:
        import fastdiff

        super().__init__()
        self.model = torch.nn.Conv2d(3, 3, 1).requires_grad_(False)
        sampler = fastdiff.create_sampler("scaled_linear", "ddpm", num_inference_steps=3)
        self.register_buffer("table", sampler.table.coefficients_as(torch.float32))

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        from fastdiff import ops

        for row in range(3):
            (x,) = ops.step(
                x, self.model(x), self.table, row, uncond=x, guidance_scale=3.5, seeds=seeds, noise_step=row
            )
        return x


def _export(strict: bool) -> None:
    module, inputs = Loop(), (normal(1), torch.tensor([1, 2]))
    program = torch.export.export(module, inputs, strict=strict)
    for one in (program, program.run_decompositions()):
        assert_equal(one.module()(normal(2), inputs[1]), module(normal(2), inputs[1]), "the exported module")


def check_export() -> None:
    """Check that a module with steps exports with strict=False."""
    _export(False)


def check_strict_export() -> None:
    """Check that a module with steps exports with strict=True."""
    _export(True)


def check_dropins() -> None:
    """Check that loops of drop-in schedulers equal diffusers' own, up to float32 rounding."""
    import diffusers

    import fastdiff.diffusers

    draws = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "FlowMatchEulerDiscrete")
    for name in (*draws, "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep"):
        drawn = []
        # The second loop of fastdiff's classes uses the plans that the first one made.
        for module in (diffusers, fastdiff.diffusers, fastdiff.diffusers):
            scheduler = getattr(module, f"{name}Scheduler")()
            scheduler.set_timesteps(6)
            given = {"generator": torch.Generator().manual_seed(3)} if name in draws else {}
            x = normal(1)
            for t in scheduler.timesteps:
                scaled = x if name.startswith("Flow") else scheduler.scale_model_input(x, t)
                x = scheduler.step(torch.tanh(scaled), t, x, **given).prev_sample
            drawn.append(x)
        # Six float32 roundings, 2⁻²³ of the largest value; a step at most doubles a difference.
        bound = 2.0**6 * 2.0**-23 * drawn[0].abs().max().item()
        for x in drawn[1:]:
            torch.testing.assert_close(x, drawn[0], rtol=0.0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def check_compiled_dropins() -> None:
    """Check that a loop over a drop-in scheduler compiles to one graph if a loop over diffusers' class does."""
    import diffusers

    import fastdiff.diffusers

    whole = 0
    for name in ("FlowMatchEulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "EulerAncestralDiscrete", "DDIM"):
        outcomes: list[Any] = []
        for module in (diffusers, fastdiff.diffusers):
            scheduler = getattr(module, f"{name}Scheduler")()
            scheduler.set_timesteps(4)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)

            def loop(x: Tensor, scheduler: Any = scheduler) -> Tensor:
                for t in scheduler.timesteps[:2]:
                    x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
                return x

            torch._dynamo.reset()
            torch.manual_seed(0)
            try:
                outcomes.append(torch.compile(loop, backend="eager", fullgraph=True)(normal(1)))
            except Exception as error:
                outcomes.append(type(error).__name__)
        assert isinstance(outcomes[0], str) == isinstance(outcomes[1], str), (name, outcomes)
        if isinstance(outcomes[0], Tensor):
            whole += 1
            assert_equal(outcomes[1], outcomes[0], name)
    assert whole > 0, "diffusers' own classes give no graph here"


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"check_{sys.argv[1]}"]()
