# SPDX-License-Identifier: MIT
"""Benchmark cases: whole sampling loops with classifier-free guidance and precomputed model outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import SamplingMethod, create_sampler

from .traffic import bytes_a_step

STEPS = 20
GUIDANCE = 3.0

SHAPES: dict[str, tuple[int, ...]] = {
    "digits": (100, 1, 8, 8),
    "image": (1, 4, 64, 64),
    "images": (8, 4, 128, 128),
    "video": (1, 16, 21, 90, 160),
}

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler in fastdiff and in the peers.

    Args:
        config: fields of SamplingConfig.
        diffusers: name of a scheduler class and its arguments; None if there is none.
        k_diffusion: name of a function of k_diffusion.sampling and its arguments; None if there is none.
        seeded: fastdiff's kernel draws the noise from seeds; peers draw it with torch.
    """

    config: dict[str, Any]
    diffusers: tuple[str, dict[str, Any]] | None = None
    k_diffusion: tuple[str, dict[str, Any]] | None = None
    seeded: bool = False


def seeded(spec: SamplerSpec) -> SamplerSpec:
    """Return the same sampler with its noise drawn in the kernel."""
    return dataclasses.replace(spec, seeded=True)


#: Samplers by the name in the table's first column. In k-diffusion's coordinates DDIM is Euler and DDPM is
#: Euler-ancestral; k-diffusion's third-order multistep solver is the SDE solver, which draws no noise with eta 0. A
#: registered method without an entry is measured without peers.
SAMPLER_SPECS: dict[str, SamplerSpec] = {
    "ddim": SamplerSpec({"method": "ddim"}, ("DDIMScheduler", {"clip_sample": False}), ("sample_euler", {})),
    "dpmsolver++2m": SamplerSpec(
        {"method": "dpm_solver", "solver_order": 2},
        ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        ("sample_dpmpp_2m", {}),
    ),
    "dpmsolver++3m": SamplerSpec(
        {"method": "dpm_solver", "solver_order": 3},
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("sample_dpmpp_3m_sde", {"eta": 0.0}),
    ),
    "euler": SamplerSpec({"method": "euler"}, ("EulerDiscreteScheduler", {}), ("sample_euler", {})),
    "heun": SamplerSpec({"method": "heun"}, ("HeunDiscreteScheduler", {}), ("sample_heun", {})),
    "ddpm": SamplerSpec({"method": "ddpm"}, ("DDPMScheduler", {"clip_sample": False}), ("sample_euler_ancestral", {})),
    "euler-ancestral": SamplerSpec(
        {"method": "euler_ancestral"}, ("EulerAncestralDiscreteScheduler", {}), ("sample_euler_ancestral", {})
    ),
}


def _complete(specs: dict[str, SamplerSpec]) -> dict[str, SamplerSpec]:
    """Add the registered methods without a case, and each case that draws noise with its noise drawn in the kernel."""
    measured = {spec.config["method"] for spec in specs.values()}
    for method in SamplingMethod:
        if method.value not in measured:
            specs |= {name: SamplerSpec({**fields, "method": method.value}) for name, fields in method.presets.items()}
    tables = {
        name: create_sampler("linear", num_inference_steps=STEPS, **spec.config).table for name, spec in specs.items()
    }
    return specs | {f"{name} (philox)": seeded(spec) for name, spec in specs.items() if any(tables[name].draws_noise)}


SAMPLER_SPECS = _complete(SAMPLER_SPECS)


class Tensors(NamedTuple):
    """Input tensors of a loop; `sample` is the initial sample and is not written."""

    sample: Tensor
    cond: Tensor
    uncond: Tensor


@dataclass(frozen=True)
class Case:
    """One sampler at one shape and dtype, on one device."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    steps: int = field(default=STEPS, repr=False)
    device: str = field(default="cpu", repr=False)

    @property
    def spec(self) -> SamplerSpec:
        """The sampler of this case."""
        return SAMPLER_SPECS[self.op]

    @property
    def dimensions(self) -> str:
        return "x".join(str(size) for size in self.shape)

    @property
    def name(self) -> str:
        return f"{self.op} {self.dimensions} {self.dtype}"

    @functools.cached_property
    def sampler(self) -> Any:
        return create_sampler("linear", num_inference_steps=self.steps, **self.spec.config)

    @functools.cached_property
    def table(self) -> Any:
        return self.sampler.stepper().table

    def stepper(self, backend: str | None = None, **options: Any) -> Any:
        """Return a stepper at the start of the loop."""
        return self.sampler.stepper(backend, **options)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    @property
    def bytes_a_step(self) -> float:
        """Bytes that a step must move, the mean over the steps of the loop."""
        return bytes_a_step(self.table, self.tensor_bytes, guided=True, noise_in_memory=not self.spec.seeded)

    def tensors(self, copies: int = 1) -> list[Tensors]:
        """Return sets of tensors with equal values in separate memory."""
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(self.shape, generator=generator).to(self.device, self.torch_dtype) for _ in range(3))
        first = Tensors(*drawn)
        return [first] + [Tensors(*(tensor.clone() for tensor in first)) for _ in range(copies - 1)]
