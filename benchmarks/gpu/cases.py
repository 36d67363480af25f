# SPDX-License-Identifier: MIT
"""What is measured on a GPU: steps of whole loops with guidance, from one image latent to batches and videos."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff.errors import unknown_name
from fastdiff.sampling.stepper import Stepper
from fastdiff.schedules.levels import levels_from_flow_times
from fastdiff.solvers import Prediction, ddim

from ..cases import Case, Op, Tensors

#: Of the paper's straight path, Euler is DDIM; k-diffusion's Euler takes the same update on σ.
FLOW_EULER = Op({}, ("FlowMatchEulerDiscreteScheduler", {}), ("sample_euler", {}))

SHAPES: dict[str, tuple[int, ...]] = {
    "image-64": (1, 4, 64, 64),
    "image-128": (1, 4, 128, 128),
    "images-8": (8, 4, 128, 128),
    "images-64": (64, 4, 128, 128),
    "latents-64": (64, 16, 128, 128),
    "video": (1, 16, 21, 90, 160),
}
#: A rehearsal's: loops of so many steps at so small sizes, for Triton's interpreter takes 10 ms a step.
SMALL: dict[str, tuple[int, ...]] = {"image-128": (2, 2, 4, 4), "video": (1, 2, 3, 2, 2)}
REHEARSED = (
    ("image-128", "float32", "dpmsolver++2m", True),
    ("video", "float32", "ddim", False),
    ("video", "bfloat16", "flow-euler", False),
    ("image-128", "float32", "ddpm (philox)", False),
)
REHEARSED_STEPS = 4

#: Everybody takes these; of the others torch.compile would take the longest part of a run.
CORE = (
    ("image-128", "float32", "ddim"),
    ("image-128", "float32", "dpmsolver++2m"),
    ("latents-64", "bfloat16", "ddim"),
    ("video", "bfloat16", "ddim"),
    ("video", "float32", "ddim"),
    ("video", "float32", "dpmsolver++2m"),
)
EAGER = (
    *(("image-128", "float32", op) for op in ("euler", "dpmsolver++3m", "heun", "flow-euler")),
    *(("image-128", "float32", op) for op in ("ddpm (philox)", "euler-ancestral (philox)")),
    *(("image-64", "float32", op) for op in ("ddim", "dpmsolver++2m")),
    *(("images-8", "float32", op) for op in ("ddim", "ddpm (philox)")),
    *(("images-64", "float32", op) for op in ("ddim", "dpmsolver++2m", "euler-ancestral (philox)")),
    *(("latents-64", "bfloat16", op) for op in ("dpmsolver++2m", "ddpm (philox)", "flow-euler")),
    *(("video", "bfloat16", op) for op in ("dpmsolver++2m", "dpmsolver++3m", "heun", "ddpm (philox)", "flow-euler")),
    ("video", "float32", "euler-ancestral (philox)"),
)


@dataclass(frozen=True)
class GpuCase(Case):
    """A case that may also write the next model input, doubled for guidance.

    Args:
        core: whether those who compile are measured too.
        model_input: whether each step writes the next model input, ``[2·B, ...]`` in the samples' dtype.
    """

    core: bool = field(default=False, compare=False, repr=False)
    model_input: bool = False

    @property
    def recipe(self) -> Op:
        return FLOW_EULER if self.op == "flow-euler" else super().recipe

    @functools.cached_property
    def table(self) -> Any:
        if self.op != "flow-euler":
            return self.sampler.stepper().table
        times = torch.linspace(1.0, 0.0, self.steps + 1, dtype=torch.float64).tolist()
        return ddim(levels_from_flow_times(times), Prediction("flow_prediction"))

    def stepper(self, backend: str | None = None, **options: Any) -> Any:
        if self.op != "flow-euler":
            return super().stepper(backend, **options)
        return Stepper(self.table, backend=backend, **options)

    @property
    def bytes_a_step(self) -> float:
        return super().bytes_a_step + (2 * self.tensor_bytes if self.model_input else 0)

    @property
    def name(self) -> str:
        return super().name + (" + model input" if self.model_input else "")


def chosen(device: str, rehearse: bool, only: list[str] | None = None) -> list[GpuCase]:
    """The cases of a run in their order: those that the targets speak of come first.

    Raises:
        ValueError: `only` names a sampler that there is not.
    """
    steps = {"steps": REHEARSED_STEPS} if rehearse else {}
    listed = [(*entry, True) for entry in CORE] + [(*entry, False) for entry in EAGER]
    made = [
        GpuCase(op, (SMALL if rehearse else SHAPES)[shape], dtype, device=device, core=core, **steps)
        for shape, dtype, op, core in (REHEARSED if rehearse else listed)
    ]
    inputs = [dataclasses.replace(case, model_input=True, core=False) for case in made[:4] if case.op == "ddim"]
    made += inputs
    for name in only or ():
        if name not in {case.op for case in made}:
            raise unknown_name("gpu", "--samplers", name, {case.op for case in made})
    return [case for case in made if not only or case.op in only]


def footprint(case: Case) -> int:
    """Bytes of one set of tensors that a step reads, for choosing how many sets no cache holds."""
    return len(Tensors._fields) * case.tensor_bytes


def absent_packages() -> dict[str, str]:
    """Peers that are not installed here, by the name that the results use."""
    modules = {"diffusers": "diffusers", "k-diffusion": "k_diffusion"}
    return {peer: "not installed" for peer, module in modules.items() if importlib.util.find_spec(module) is None}
