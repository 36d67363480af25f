# SPDX-License-Identifier: MIT
"""The measured cases: steps of whole loops with classifier-free guidance, the model's outputs made beforehand."""

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
class Op:
    """A sampler and its counterparts in other libraries.

    Args:
        config: fields of SamplingConfig.
        diffusers: a scheduler's class and its arguments; None where diffusers has none.
        k_diffusion: a function of k_diffusion.sampling and its arguments; None where it has none.
        seeded: the kernel draws the noise itself, from seeds that the step is given; peers draw theirs as ever.
    """

    config: dict[str, Any]
    diffusers: tuple[str, dict[str, Any]] | None = None
    k_diffusion: tuple[str, dict[str, Any]] | None = None
    seeded: bool = False


def seeded(op: Op) -> Op:
    """Return the sampler with its noise drawn in the kernel."""
    return dataclasses.replace(op, seeded=True)


#: By the name of the table's first column. DDIM is Euler, and DDPM Euler-ancestral, in the coordinates of k-diffusion;
#: its third-order multistep solver is the one for SDEs, which with eta 0 draws no noise. A registered method without a
#: line here is measured without peers.
OPS: dict[str, Op] = {
    "ddim": Op({"method": "ddim"}, ("DDIMScheduler", {"clip_sample": False}), ("sample_euler", {})),
    "dpmsolver++2m": Op(
        {"method": "dpm_solver", "solver_order": 2},
        ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        ("sample_dpmpp_2m", {}),
    ),
    "dpmsolver++3m": Op(
        {"method": "dpm_solver", "solver_order": 3},
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("sample_dpmpp_3m_sde", {"eta": 0.0}),
    ),
    "euler": Op({"method": "euler"}, ("EulerDiscreteScheduler", {}), ("sample_euler", {})),
    "heun": Op({"method": "heun"}, ("HeunDiscreteScheduler", {}), ("sample_heun", {})),
    "ddpm": Op({"method": "ddpm"}, ("DDPMScheduler", {"clip_sample": False}), ("sample_euler_ancestral", {})),
    "euler-ancestral": Op(
        {"method": "euler_ancestral"}, ("EulerAncestralDiscreteScheduler", {}), ("sample_euler_ancestral", {})
    ),
}


def _complete(ops: dict[str, Op]) -> dict[str, Op]:
    """Add the registered methods without a case, and each case that draws noise with its noise drawn in the kernel."""
    measured = {op.config["method"] for op in ops.values()}
    for method in SamplingMethod:
        if method.value not in measured:
            ops |= {name: Op({**fields, "method": method.value}) for name, fields in method.presets.items()}
    tables = {name: create_sampler("linear", num_inference_steps=STEPS, **op.config).table for name, op in ops.items()}
    return ops | {f"{name} (philox)": seeded(op) for name, op in ops.items() if any(tables[name].draws_noise)}


OPS = _complete(OPS)


class Tensors(NamedTuple):
    """The inputs of a step; `sample` is the start of a loop, and is not written."""

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
    def recipe(self) -> Op:
        """The sampler and its counterparts."""
        return OPS[self.op]

    @property
    def dimensions(self) -> str:
        return "x".join(str(size) for size in self.shape)

    @property
    def name(self) -> str:
        return f"{self.op} {self.dimensions} {self.dtype}"

    @functools.cached_property
    def sampler(self) -> Any:
        return create_sampler("linear", num_inference_steps=self.steps, **self.recipe.config)

    @functools.cached_property
    def table(self) -> Any:
        return self.sampler.stepper().table

    def stepper(self, backend: str | None = None, **options: Any) -> Any:
        """Return a new stepper over the table."""
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
        """Bytes that a step must move, the mean of the loop's rows."""
        return bytes_a_step(self.table, self.tensor_bytes, guided=True, noise_in_memory=not self.recipe.seeded)

    def tensors(self, copies: int = 1) -> list[Tensors]:
        """Make `copies` sets of tensors of the same values, each in its own memory."""
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(self.shape, generator=generator).to(self.device, self.torch_dtype) for _ in range(3))
        first = Tensors(*made)
        return [first] + [Tensors(*(tensor.clone() for tensor in first)) for _ in range(copies - 1)]
