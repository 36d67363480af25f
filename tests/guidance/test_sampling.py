# SPDX-License-Identifier: MIT
"""`sample(guidance=)` beside a loop of one's own: results, model calls, x0, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import create_sampler
from fastdiff.guidance import (
    AutoGuidance,
    ClassifierGuidance,
    DualGuidance,
    LossGuidance,
    MixedGuidance,
    PerturbedGuidance,
    PlainGuidance,
    ProjectedGuidance,
    ResidualGuidance,
    ZeroStarGuidance,
)
from fastdiff.sampling import GuidedStepper

SHAPE = (3, 2, 4, 5)
STEPS = 5
E = {name: torch.randn(3, 2, dtype=torch.float64) for name in ("cond", "uncond", "partial")}
CLEAN = torch.randn(SHAPE, dtype=torch.float64)


class Model:
    """A model that records the size of each batch; `strength` makes another one."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength, self.sizes = strength, []

    def __call__(self, x: Tensor, t: Tensor, embeds: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        shift = 0.0 if embeds is None else embeds.reshape(len(x), 2, 1, 1)
        return torch.sin(self.strength * x + shift + t.reshape(-1, 1, 1, 1) / 900.0)


def sampler_of(**options: Any) -> Any:
    return create_sampler("linear", **{"method": "ddim", "num_inference_steps": STEPS, "clip_sample": False, **options})


WEAK = Model(0.5)
CASES: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    "plain": (PlainGuidance(4.0), {}, [6] * 5),
    "interval": (PlainGuidance(4.0, start=0.4), {}, [3, 3, 6, 6, 6]),
    "per sample": (PlainGuidance(torch.tensor([1.0, 3.0, 1.0])), {}, [4] * 5),
    "momentum": (ProjectedGuidance(4.0, momentum=-0.5), {}, [6] * 5),
    "zero star": (ZeroStarGuidance(4.0), {}, [6] * 4),
    "auto": (AutoGuidance(2.0), {"weak": WEAK}, [3] * 5),
    "dual": (DualGuidance(4.0), {"partial": E["partial"]}, [9] * 5),
    "perturbed": (PerturbedGuidance(4.0, perturbed_stop=0.4), {"perturbed": Model(0.7)}, [6] * 5),
    "residual": (ResidualGuidance(1.5), {"reference": CLEAN}, [3] * 5),
    "onetime": (ResidualGuidance(1.5, negative="onetime"), {}, [6, 3, 3, 3, 3]),
    "mixed": (
        MixedGuidance([PlainGuidance(1.0), DualGuidance(3.0), PlainGuidance(2.0)]),
        {"partial": E["partial"]},
        [6] * 5,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"clip_sample": True}, {"method": "dpm_solver"}])
def test_sample_equals_an_own_loop(name: str, options: dict[str, Any]) -> None:
    method, branches, sizes = CASES[name]
    sampler, model = sampler_of(**options), Model()
    x = torch.randn(SHAPE, dtype=torch.float64)
    result = sampler.sample(model, x, E["cond"], E["uncond"], guidance=method, branches=branches, progress=False)
    assert model.sizes == sizes

    guided = GuidedStepper(sampler.table, method)
    plain = Model()
    for t in sampler.timesteps:
        t = t.expand(len(x))
        outputs = {}
        for branch in guided.branches:
            given = branches.get(branch)
            if branch == "reference":
                outputs[branch] = CLEAN
            elif callable(given):
                outputs[branch] = given(x, t, E["cond"])
            else:
                outputs[branch] = plain(x, t, E[branch])
        x = guided.step(x, outputs)
    torch.testing.assert_close(result.samples, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "momentum", "dual", "onetime"])
def test_streamed_x0_is_the_guided_one(name: str) -> None:
    method, branches, _ = CASES[name]
    sampler = sampler_of()
    x = torch.randn(SHAPE, dtype=torch.float64)
    stream = sampler.stream(Model(), x, E["cond"], E["uncond"], guidance=method, branches=branches)
    levels = sampler.levels(STEPS)
    for i, info in enumerate(stream):
        # DDIM goes to α'·x0 + σ'·ε with x = α·x0 + σ·ε.
        here, there = levels[i], levels[i + 1]
        noise = (x - here.alpha * info.x0) / here.sigma
        torch.testing.assert_close(info.sample, there.alpha * info.x0 + there.sigma * noise, rtol=1e-8, atol=1e-8)
        x = info.sample


def test_terms_of_a_classifier_and_a_loss() -> None:
    sampler = sampler_of()
    x = torch.randn(SHAPE, dtype=torch.float64)
    terms = [
        ClassifierGuidance(lambda x, t: -x.square().flatten(1).sum(1), 0.2),
        LossGuidance(lambda x0: (x0 - CLEAN).square().flatten(1).sum(1), 0.01),
    ]
    result = sampler.sample(
        Model(), x, E["cond"], E["uncond"], guidance_scale=2.0, guidance_terms=terms, progress=False
    )
    levels, model = sampler.levels(STEPS), Model()
    for i, t in enumerate(sampler.timesteps):
        x = x.detach().requires_grad_()
        c, u = (model(x, t.expand(3), E[name]) for name in ("cond", "uncond"))
        here, there = levels[i], levels[i + 1]
        guided = u + 2.0 * (c - u)
        x0 = (x - here.sigma * guided) / here.alpha
        (grad,) = torch.autograd.grad((x0 - CLEAN).square().sum(), x)
        eps = (guided - 0.2 * here.sigma * (-2.0 * x)).detach()
        x = x.detach()
        x = there.alpha * (x - here.sigma * eps) / here.alpha + there.sigma * eps - 0.01 * grad
    torch.testing.assert_close(result.samples, x, rtol=1e-8, atol=1e-8)


def test_what_does_not_fit_is_named() -> None:
    sampler, x = sampler_of(), torch.randn(SHAPE)
    embeds = [E["cond"].float(), E["uncond"].float()]
    for options, words in (
        ({"guidance": PlainGuidance(2.0), "guidance_scale": 3.0}, "guidance_scale"),
        ({"guidance": AutoGuidance(2.0)}, "branches"),
        ({"branches": {"weak": WEAK}}, "branches"),
        ({"guidance": PlainGuidance(2.0), "cuda_graph": True}, "guidance"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler.sample(Model(), x, *embeds, progress=False, **options)
    with pytest.raises(ValueError, match="prompt_embeds"):
        sampler.sample(Model(), x, guidance=PlainGuidance(2.0), progress=False)
    with pytest.raises(TypeError, match="guidance"):
        sampler.sample(Model(), x, *embeds, guidance=AutoGuidance, progress=False)
