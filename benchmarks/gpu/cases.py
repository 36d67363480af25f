# SPDX-License-Identifier: MIT
"""GPU benchmark cases: whole loops with guidance, from one image latent to batches and videos."""

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

from ..cases import Case, SamplerSpec, Tensors

#: On the straight path of flow matching Euler equals DDIM; k-diffusion's Euler is the same update in σ.
FLOW_EULER = SamplerSpec({}, ("FlowMatchEulerDiscreteScheduler", {}), ("sample_euler", {}))

SHAPES: dict[str, tuple[int, ...]] = {
    "image-64": (1, 4, 64, 64),
    "image-128": (1, 4, 128, 128),
    "images-8": (8, 4, 128, 128),
    "images-64": (64, 4, 128, 128),
    "latents-64": (64, 16, 128, 128),
    "video": (1, 16, 21, 90, 160),
}
#: Cases of a dry run: few steps at small sizes, because Triton's interpreter takes 10 ms per step.
SMALL: dict[str, tuple[int, ...]] = {"image-128": (2, 2, 4, 4), "video": (1, 2, 3, 2, 2)}
REHEARSED = (
    ("image-128", "float32", "dpmsolver++2m", False),
    ("video", "float32", "ddim", True),
    ("video", "bfloat16", "flow-euler", False),
    ("image-128", "float32", "ddpm (philox)", False),
)
REHEARSED_STEPS = 4

#: The shapes and dtypes of the bandwidth targets: a batch of image latents and a video's latent.
WIDE = (("latents-64", "bfloat16"), ("video", "bfloat16"), ("video", "float32"))
#: The cases of the targets in order, measured by every run, and beside torch.compile.
CORE = (
    *((shape, dtype, "ddim") for shape, dtype in WIDE),
    *(("image-128", "float32", op) for op in ("ddim", "dpmsolver++2m")),
    *((shape, dtype, op) for op in ("dpmsolver++2m", "flow-euler") for shape, dtype in WIDE),
)
#: Cases of the targets whose noise is drawn in the step, which torch.compile does not draw.
DRAWN = tuple((shape, dtype, "ddpm (philox)") for shape, dtype in WIDE)
#: Cases that a full run adds.
FURTHER = (
    *(("image-128", "float32", op) for op in ("euler", "dpmsolver++3m", "heun", "flow-euler")),
    *(("image-128", "float32", op) for op in ("ddpm (philox)", "euler-ancestral (philox)")),
    *(("image-64", "float32", op) for op in ("ddim", "dpmsolver++2m")),
    *(("images-8", "float32", op) for op in ("ddim", "ddpm (philox)")),
    *(("images-64", "float32", op) for op in ("ddim", "dpmsolver++2m", "euler-ancestral (philox)")),
    *(("video", "bfloat16", op) for op in ("dpmsolver++3m", "heun")),
    ("video", "float32", "euler-ancestral (philox)"),
)


@dataclass(frozen=True)
class GpuCase(Case):
    """A case whose steps may also write the next model input, doubled for guidance.

    Args:
        core: measure torch.compile beside it.
        model_input: each step writes the next model input, ``[2·B, ...]`` in the samples' dtype.
    """

    core: bool = field(default=False, compare=False, repr=False)
    model_input: bool = False

    @property
    def spec(self) -> SamplerSpec:
        return FLOW_EULER if self.op == "flow-euler" else super().spec

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


def select_cases(device: str, rehearse: bool, only: list[str] | None = None, *, full: bool = True) -> list[GpuCase]:
    """Return the cases of a run in order, those of the targets first; a run that is not full has these alone.

    Raises:
        ValueError: `only` contains an unknown sampler.
    """
    steps = {"steps": REHEARSED_STEPS} if rehearse else {}
    listed = [(*entry, True) for entry in CORE] + [(*entry, False) for entry in DRAWN + (FURTHER if full else ())]
    made = [
        GpuCase(op, (SMALL if rehearse else SHAPES)[shape], dtype, device=device, core=core, **steps)
        for shape, dtype, op, core in (REHEARSED if rehearse else listed)
    ]
    if full:
        made += [dataclasses.replace(case, model_input=True, core=False) for case in made[:4] if case.op == "ddim"]
    for name in only or ():
        if name not in {case.op for case in made}:
            raise unknown_name("gpu", "--samplers", name, {case.op for case in made})
    return [case for case in made if not only or case.op in only]


def footprint(case: Case) -> int:
    """Return the bytes of one set of input tensors, for choosing the number of sets of a cold cache."""
    return len(Tensors._fields) * case.tensor_bytes


def absent_packages() -> dict[str, str]:
    """Return the peers that are not installed, by their name in the results."""
    modules = {"diffusers": "diffusers", "k-diffusion": "k_diffusion"}
    return {peer: "not installed" for peer, module in modules.items() if importlib.util.find_spec(module) is None}
