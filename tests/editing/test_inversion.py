# SPDX-License-Identifier: MIT
"""Inversion and the way back, and interpolation between noises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.digits import IMAGE_SHAPE, load_digit_unet
from fastdiff.editing import Process, interpolate_seeds, invert, reconstruct, slerp
from fastdiff.guidance import GuidedModel
from fastdiff.schedules.levels import VariancePreservingPath
from fastdiff.solvers import Prediction
from fastdiff.solvers.inversion import ddim_inversion
from support.gaussian_model import GaussianModel, sampler_of
from support.oracle import assert_same_bits

#: The mixture: means, deviations and weights of an element.
MEANS, STDS, WEIGHTS = (torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.5], [0.15, 0.2], [0.4, 0.6]))


def mixture_model(path: VariancePreservingPath, x: Tensor, t: Tensor) -> Tensor:
    """Return ε = −σ·∇log p of the mixture."""
    level = path.at_timestep(float(t[0]))
    variance = (level.alpha * STDS) ** 2 + level.sigma**2
    apart = x.double()[..., None] - level.alpha * MEANS
    share = (WEIGHTS.log() - 0.5 * variance.log() - 0.5 * apart**2 / variance).softmax(-1)
    return (level.sigma * (share * apart / variance).sum(-1)).to(x.dtype)


def mixture_images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 8, 8)
    which = (torch.rand(shape, generator=generator) < 0.6).long()
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (MEANS[which] + STDS[which] * z).float()


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(4.0 / float(((a - b) ** 2).mean()))  # images are in [−1, 1]


@pytest.mark.parametrize(
    ("method", "fields", "options"),
    [("ddim", {}, {}), ("ddim", {}, {"iterations": 3, "corrections": 0}), ("euler", {}, {}), ("dpm_solver", {}, {}),
     ("dpm_solver", {}, {"corrections": 0}), ("dpm_solver", {"algorithm_type": "dpmsolver"}, {}),
     ("dpm_solver", {"algorithm_type": "dpmsolver", "solver_order": 3}, {}), ("unipc", {}, {}), ("heun", {}, {}),
     ("dpm_solver", {"solver_mode": "singlestep"}, {}),
     ("dpm_solver", {"solver_order": 3, "timestep_spacing": "trailing"}, {}),
     ("dpm_solver", {"solver_order": 3, "sigma_spacing": "karras"}, {})],
    ids=str,
)  # fmt: skip
def test_round_trip_of_50_steps_keeps_35_db(method: str, fields: dict[str, Any], options: dict[str, int]) -> None:
    sampler, images = sampler_of(method, 50, **fields), mixture_images()
    before, path = images.clone(), VariancePreservingPath(sampler.scheduler.alphas_cumprod)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return mixture_model(path, x, t)

    latents = invert(sampler, model, images, **options)
    assert psnr(images, reconstruct(sampler, model, latents)) >= 35.0
    # Latents look like noise: the deviation of 384 numbers is known to 4 %, and the way up has errors of its own.
    assert 0.75 < float(latents.std()) < 1.25
    assert_same_bits([images], [before])


@pytest.mark.parametrize(
    ("fields", "one_to_one"),
    [({"solver_order": 2}, True), ({"solver_order": 3}, False),
     ({"solver_order": 3, "timestep_spacing": "trailing"}, True)],
    ids=str,
)  # fmt: skip
def test_third_order_folds_where_last_finite_step_is_long(fields: dict[str, Any], one_to_one: bool) -> None:
    """The true flow of a scalar ascends from noise to image; only a map that ascends too has an inverse to find."""
    sampler = sampler_of("dpm_solver", 50, **fields)
    path = VariancePreservingPath(sampler.scheduler.alphas_cumprod)
    noise = torch.linspace(-4, 4, 801, dtype=torch.float64)[None]
    image = reconstruct(sampler, lambda x, t: mixture_model(path, x, t), noise)
    assert bool((image.diff() > 0).all()) is one_to_one
    lengths = [b.half_log_snr - a.half_log_snr for a, b in itertools.pairwise(sampler.levels(50).points[:-1])]
    long = fields.get("timestep_spacing") is None
    assert (lengths[-1] > 3 * lengths[-2]) is long  # three lengths of extrapolation; trailing timesteps have 1.6


@pytest.mark.parametrize("order", [1, 2])
def test_round_trip_of_digits_keeps_35_db(order: int) -> None:
    settings = {"num_inference_steps": 50, "prediction_type": "v_prediction", "clip_sample": False}
    sampler = fastdiff.create_sampler("cosine", "dpm_solver", solver_order=order, **settings)  # order 1 is DDIM
    model = GuidedModel(load_digit_unet(), torch.tensor([3, 7]))
    few = Process(sampler.levels(10), prediction=Prediction("v_prediction"))
    drawn = reconstruct(few, model, fastdiff.randn((2, *IMAGE_SHAPE), [1, 2]))
    # Each image beside its neighbours, under new noise: images that the sampler did not make itself.
    images = (0.8 * drawn + 0.2 * drawn.roll(1, -1) + 0.05 * torch.randn(drawn.shape)).clamp(-1, 1)
    latents = invert(sampler, model, images)
    assert psnr(images, reconstruct(sampler, model, latents)) >= 35.0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_inversion_converges_to_ddims_inverse(prediction_type: str) -> None:
    sampler = sampler_of("ddim", 10)
    own, levels = GaussianModel(sampler), sampler.levels(10)
    process = Process(levels, prediction=Prediction(prediction_type))  # type: ignore[arg-type]

    def model(x: Tensor, t: Tensor) -> Tensor:
        epsilon, level = own(x, t), own.level(float(t[0]))
        x0 = (x - level.sigma * epsilon) / level.alpha
        outputs = {"epsilon": epsilon, "v_prediction": level.alpha * epsilon - level.sigma * x0, "sample": x0}
        return outputs.get(prediction_type, epsilon - x0)

    latents = torch.randn(2, 7, dtype=torch.float64)
    image = reconstruct(process, model, latents)
    found = [invert(process, model, image, iterations=count, corrections=0) for count in (1, 4, 8, 40)]
    errors = [float((inverse - latents).abs().max()) for inverse in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9  # 40 contractions by a third or less, ten levels of rounding and their growth
    fewer = invert(process, model, image, iterations=2, corrections=0)
    corrected = invert(process, model, image, iterations=2, corrections=3)
    assert (reconstruct(process, model, corrected) - image).abs().max() < (
        reconstruct(process, model, fewer) - image
    ).abs().max()


def test_inversion_refuses_what_cannot_be_undone() -> None:
    image = torch.zeros(1, 3)
    for sampler, message in (
        (sampler_of("ddim", 4, eta=1.0), "invert: process adds noise"),
        (
            fastdiff.create_sampler("linear", "ddim", num_inference_steps=4, clip_sample=True),
            "ddim_inversion: prediction bounds x0",
        ),
    ):
        with pytest.raises(ValueError, match="^" + message):
            invert(sampler, GaussianModel(sampler), image)
    with pytest.raises(ValueError, match=r"^ddim_inversion: iterations is 0"):
        ddim_inversion(sampler_of("ddim", 4).levels(4), Prediction(), iterations=0)


# --- Interpolation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_slerp_keeps_norms_and_angles(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 4, 50).to(dtype)
    weights = torch.tensor([0.0, 0.3, 1.0])
    got = slerp(a, b, weights).double().flatten(1)
    for i, w in enumerate(weights.double().tolist()):
        first, second = a[i].double().flatten(), b[i].double().flatten()
        angle = math.acos(float(first @ second / (first.norm() * second.norm())))
        expected = (math.sin((1 - w) * angle) * first + math.sin(w * angle) * second) / math.sin(angle)
        # Three roundings of values below 8 in the compute dtype, one in the stored one.
        torch.testing.assert_close(got[i], expected, rtol=0, atol=8 * (3 * 2.0**-24 + torch.finfo(dtype).eps))
    unit = a / a.norm() if dtype == torch.float64 else a
    assert_same_bits([slerp(unit, unit, 0.25)], [unit])  # no angle: a mean of equal samples


def test_interpolated_seeds_keep_variance_and_ends() -> None:
    shape, weights = (4, 64, 64), torch.linspace(0, 1, 5)
    latents = interpolate_seeds(shape, 3, 2**63 + 5, weights)
    ends = [fastdiff.randn((1, *shape), [seed]) for seed in (3, 2**63 + 5)]
    assert_same_bits([latents[:1], latents[-1:]], ends)
    # The variance of 16384 normal numbers is 1 ± 0.011; five times that. A straight mean would have 0.5 in the middle.
    assert (latents.flatten(1).var(1) - 1).abs().max() < 0.055
    with pytest.raises(ValueError, match=r"^slerp: second is \[1, 4\]"):
        slerp(torch.ones(2, 4), torch.ones(1, 4), 0.5)
    with pytest.raises(ValueError, match=r"^slerp: weight has shape \[3\]"):
        slerp(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"^interpolate_seeds: weights has shape \[0\]"):
        interpolate_seeds((4,), 1, 2, [])
