# SPDX-License-Identifier: MIT
"""What fastdiff has to do beside some version of torch: one check a process, run by tools/compat.py.

    python tools/compat_checks.py CHECK

A check that fails raises. All run on the CPU, on every backend that is here.
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
    """The backends that have to be here; the first answers where none is named."""
    return ["cpu", "reference"] if BUILT else ["reference"]


def same(found: Any, expected: Any, what: str) -> None:
    """Require the same bits of two tensors, or of two lists of them."""
    if isinstance(found, Tensor):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        if not torch.equal(one, other):
            raise AssertionError(f"{what}: results differ by {(one.double() - other.double()).abs().max().item()}")


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_import() -> None:
    """The package and each of its operators are there, and so is the extension where one was built."""
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
    """Every sampler draws the same on every backend, within float32's rounding of a loop."""
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
        # Backends lie within one rounding a step of each other, 2⁻²³ of values below 100, which a step doubles at most.
        torch.testing.assert_close(drawn[0], drawn[-1], rtol=0.0, atol=2.0**6 * 100 * 2.0**-23)


def check_quantile() -> None:
    """The quantile is torch's, to the bit; torch fuses its interpolation for AVX2 and AVX-512 alone."""
    from fastdiff import ops

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise AssertionError("this processor has neither AVX2 nor AVX-512")
    for dtype in (torch.float32, torch.float64):
        for count in range(2, 300, 7):
            x, q = normal(count, (3, count), dtype), (count * 0.618) % 1.0
            for backend in backends():
                what = f"quantile {q} of {count} numbers of {dtype} by {backend}"
                same(ops.quantile(x, q, backend=backend), torch.quantile(x, q, dim=1), what)


def check_gradients() -> None:
    """Gradients of the fused step, and vmap, are those of the reference."""
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
    same(
        torch.func.vmap(lambda x, m: ops.step(x, m, rows, 0)[0])(x, m),
        torch.stack([ops.step(a, b, rows, 0)[0] for a, b in zip(x, m, strict=True)]),
        "vmap",
    )


def check_compile() -> None:
    """The step in every form, noise and reductions compile in one graph to the eager call's bits."""
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
            ours, its = arguments(), arguments()
            found = torch.compile(function, fullgraph=True, backend=compiler)(*its)
            same(found, function(*ours), f"{function.__name__} in {compiler}")
            same(list(its[-written:]), list(ours[-written:]), f"what {function.__name__} writes in {compiler}")


class Loop(torch.nn.Module):
    """Steps of a small model."""

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
        same(one.module()(normal(2), inputs[1]), module(normal(2), inputs[1]), "the exported module")


def check_export() -> None:
    """A module that takes steps exports without strict."""
    _export(False)


def check_strict_export() -> None:
    """And with it."""
    _export(True)


def check_dropins() -> None:
    """Drop-in schedulers draw what diffusers' own do."""
    import diffusers

    import fastdiff.diffusers

    draws = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "FlowMatchEulerDiscrete")
    for name in (*draws, "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep"):
        drawn = []
        # The second loop of ours takes the plans that the first has made.
        for module in (diffusers, fastdiff.diffusers, fastdiff.diffusers):
            scheduler = getattr(module, f"{name}Scheduler")()
            scheduler.set_timesteps(6)
            given = {"generator": torch.Generator().manual_seed(3)} if name in draws else {}
            x = normal(1)
            for t in scheduler.timesteps:
                scaled = x if name.startswith("Flow") else scheduler.scale_model_input(x, t)
                x = scheduler.step(torch.tanh(scaled), t, x, **given).prev_sample
            drawn.append(x)
        # Six steps of rounding to float32, 2⁻²³ of the largest value, which a step doubles at most.
        bound = 2.0**6 * 2.0**-23 * drawn[0].abs().max().item()
        for x in drawn[1:]:
            torch.testing.assert_close(x, drawn[0], rtol=0.0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def check_compiled_dropins() -> None:
    """A compiled loop over a drop-in scheduler is one graph where it is one over diffusers' own class."""
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
            same(outcomes[1], outcomes[0], name)
    assert whole > 0, "diffusers' own classes give no graph here"


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"check_{sys.argv[1]}"]()
