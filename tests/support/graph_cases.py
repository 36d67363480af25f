# SPDX-License-Identifier: MIT
"""What captured loops are tested with: every kind of sampler, a smooth model, random inputs of one form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import BaseSampler
from support.solver_cases import FORMS

SHAPE = (3, 2, 4, 5)
GUIDANCE = ("none", "batched", "sequential", "sequential without a negative")


#: One form for each method, mode, algorithm and order; which of two formulas of an order it is does not matter here.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    name.removesuffix("-midpoint"): (form.method.value, form.options)
    for name, form in FORMS.items()
    if not name.endswith(("-heun", "-exact", "-lower_final"))
}
STOCHASTIC = (
    "ddpm-fixed_small", "ddim-1.0", "multistep-sde-dpmsolver++-2", "euler-churn", "heun-churn", "ancestral-1.0"
)  # fmt: skip


class Model(nn.Module):
    """Smooth, different for each timestep, condition and channel; with two outputs where a variance is learned."""

    def __init__(self, outputs: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.outputs = outputs
        gains = torch.linspace(0.4, 0.7, SHAPE[1], dtype=dtype).reshape(-1, 1, 1)
        self.gains = nn.Parameter(gains)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        inner = x if condition is None else x + condition.to(x.dtype).reshape(-1, 1, 1, 1)
        time = (t.to(x.dtype) / 2000).reshape(-1, 1, 1, 1)
        output = self.gains.to(x.dtype) * torch.tanh(inner) + time
        if shift is not None:
            output = output + shift.to(x.dtype)
        return output if self.outputs == 1 else torch.cat([output, torch.sigmoid(inner)], dim=1)


class Inputs:
    """Random inputs of one form: latents, conditions, a scale and seeds."""

    def __init__(self, seed: int, guidance: str = "none", dtype: torch.dtype = torch.float32) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(SHAPE, generator=gen, dtype=torch.float64).to(dtype)
        self.conditions: list[Tensor] = []
        if guidance != "none":
            pair = torch.randn(2, SHAPE[0], generator=gen).unbind()
            self.conditions = list(pair[:1] if "without" in guidance else pair)
        self.scale = 1.0 if guidance == "none" else 1.5 + float(torch.rand((), generator=gen))
        self.seeds = torch.randint(-(2**62), 2**62, (SHAPE[0],), generator=gen)

    def keywords(self) -> dict[str, Any]:
        return {"guidance_scale": self.scale, "seeds": self.seeds}


def sampler_of(name: str, guidance: str = "none", steps: int = 5, **fields: Any) -> BaseSampler:
    method, options = METHODS[name]
    mode = "sequential" if guidance.startswith("sequential") else "batched"
    return fastdiff.create_sampler(
        "linear", method, num_inference_steps=steps, timestep_spacing="trailing", guidance_mode=mode,
        **{"prediction_type": "v_prediction", **options, **fields},
    )  # fmt: skip


def model_of(name: str) -> Model:
    return Model(2 if "learned" in name else 1)
