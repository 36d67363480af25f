# SPDX-License-Identifier: MIT
"""The lines of the demo and of DDPM from scratch as people type them, each against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.classroom import (
    DDPMSampler,
    FastSampler,
    SamplingComparison,
    compute_sample_variance,
    compute_sharpness,
)

T = 100
device = torch.device("cpu")


class Denoiser(torch.nn.Module):
    """Predicts the noise of normal data with deviation 0.5, and keeps dropout that would show in training mode."""

    in_channels, image_size = 2, 4

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", alphas_cumprod.float())
        self.dropout = torch.nn.Dropout(0.5)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        assert t.dtype == torch.int64
        signal = self.levels[t].reshape(-1, *[1] * (x.dim() - 1))
        noise: Tensor = self.dropout(self.scale * x) * (1 - signal).sqrt() / (0.25 * signal + 1 - signal)
        return noise


def formula(
    model: Callable[[Tensor, Tensor], Tensor],
    signal: Tensor,
    timesteps: list[int],
    shape: tuple[int, ...],
    clip: float = float("inf"),
    shift: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    seed: int = 1,
) -> list[Tensor]:
    """arXiv 2006.11239, eq. 6, 7 and 11, in float64, from each listed timestep to the next, with torch's noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).double()
    trajectory = [x]
    for i, t in enumerate(timesteps):
        a = float(signal[t])
        previous = float(signal[timesteps[i + 1]]) if i + 1 < len(timesteps) else 1.0
        times = torch.full(shape[:1], t)
        epsilon = model(x.float(), times).detach().double()
        x0 = ((x - (1 - a) ** 0.5 * epsilon) / a**0.5).clamp(-clip, clip)
        alpha = a / previous
        mean = previous**0.5 * (1 - alpha) / (1 - a) * x0 + alpha**0.5 * (1 - previous) / (1 - a) * x
        variance = (1 - previous) / (1 - a) * (1 - alpha)
        if shift is not None:
            mean = mean + shift(x, times, variance)
        x = mean
        if i + 1 < len(timesteps):
            x = x + variance**0.5 * torch.randn(shape, generator=generator).double()
        trajectory.append(x)
    return trajectory


def assert_same(found: Tensor, expected: Tensor) -> None:
    # The loop rounds each of at most 100 samples to float32, a relative 6e-8, and single steps amplify that tenfold.
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=2e-4)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(params=["fastdiff", "diffusers"])
def noise_scheduler(request: pytest.FixtureRequest) -> Any:
    if request.param == "fastdiff":
        return fastdiff.create_noise_scheduler("linear", num_train_timesteps=T)
    return diffusers.DDPMScheduler(num_train_timesteps=T, clip_sample=False)


@pytest.fixture
def model(noise_scheduler: Any) -> Denoiser:
    return Denoiser(noise_scheduler.alphas_cumprod).eval()


def scratch_model() -> Denoiser:
    return Denoiser((1 - torch.linspace(1e-4, 0.02, T)).cumprod(0)).eval()


def evenly(count: int) -> list[int]:
    """Timesteps from T − 1 to 0, evenly spaced and rounded."""
    return [round((T - 1) * (count - 1 - i) / (count - 1)) for i in range(count)]


def test_step_goes_from_one_timestep_to_the_next(noise_scheduler: Any, model: Denoiser) -> None:
    sampler = DDPMSampler(noise_scheduler, 50)
    assert len(sampler.timesteps) == 50
    sampler.set_timesteps(10, "linear")
    assert sampler.timesteps.tolist() == evenly(10)
    sampler.set_timesteps(10, schedule="cosine")
    steps = sampler.timesteps.tolist()
    assert steps == sorted(set(steps), reverse=True)
    assert (steps[0], steps[-1], len(steps)) == (T - 1, 0, 10)
    assert steps[0] - steps[1] < steps[4] - steps[5] > steps[-2] - steps[-1]  # dense at both ends

    generator = seeded()
    sample = torch.randn(3, 2, 4, 4, generator=generator)
    for timestep, expected in zip(
        sampler.timesteps, formula(model, noise_scheduler.alphas_cumprod, steps, (3, 2, 4, 4))[1:], strict=True
    ):
        model_output = model(sample, timestep.expand(3)).detach()
        previous = sampler.step(model_output, timestep, sample, generator=generator)
        assert isinstance(previous, Tensor)
        assert_same(previous, expected)
        sample = previous


def test_call_draws_images_with_and_without_their_trajectory(noise_scheduler: Any, model: Denoiser) -> None:
    sampler = DDPMSampler(noise_scheduler, 50)
    model.train()
    images = sampler(model, batch_size=4, num_inference_steps=50, schedule="cosine", device=device, generator=seeded())
    assert model.training
    assert model.dropout.training
    model.eval()
    assert images.shape == (4, 2, 4, 4)
    visited = sampler.timesteps.tolist()
    assert_same(images, formula(model, noise_scheduler.alphas_cumprod, visited, (4, 2, 4, 4))[-1])

    images, trajectory = FastSampler(noise_scheduler)(
        model, batch_size=4, device=device, schedule="linear", generator=seeded()
    )
    expected = formula(model, noise_scheduler.alphas_cumprod, evenly(50), (4, 2, 4, 4))
    assert len(trajectory) == len(expected) == 51
    for found, wanted in zip(trajectory, expected, strict=True):
        assert_same(found, wanted)
    assert torch.equal(images, trajectory[-1])


def test_comparison_starts_each_setting_from_the_same_noise(noise_scheduler: Any, model: Denoiser) -> None:
    comparison = SamplingComparison(noise_scheduler, seed=1)
    found = comparison.compare_schedules(model, num_steps=50, device=device)
    assert list(found) == ["linear", "cosine"]
    signal = noise_scheduler.alphas_cumprod
    expected = formula(model, signal, evenly(50), (4, 2, 4, 4))
    assert_same(found["linear"]["samples"], expected[-1])
    assert len(found["cosine"]["trajectory"]) == 51
    assert torch.equal(found["linear"]["trajectory"][0], found["cosine"]["trajectory"][0])
    assert not torch.equal(found["linear"]["samples"], found["cosine"]["samples"])

    counts = comparison.compare_step_counts(model, steps_list=[10, 50, 100], device=device)
    assert list(counts) == [10, 50, 100]
    for steps, result in counts.items():
        assert_same(result["samples"], formula(model, signal, evenly(steps), (4, 2, 4, 4))[-1])
        assert result["seconds"] > 0

    trajectory = [frame[:, :1] for frame in found["linear"]["trajectory"]]  # one channel: a grey picture
    figure = SamplingComparison.visualize_trajectory(trajectory, title="Denoising Process")
    assert figure.get_suptitle() == "Denoising Process"
    samples = found["linear"]["samples"]
    assert compute_sample_variance(samples) == pytest.approx(float(samples.double().flatten(1).var(0).mean()))
    assert compute_sharpness(samples[0]) > 0


def test_ddpm_from_scratch() -> None:
    model = scratch_model()
    sampler = DDPMSampler(model, n_timesteps=100, beta_start=1e-4, beta_end=0.02, device=device)
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    for found, expected in (
        (sampler.betas, betas),
        (sampler.alphas_cumprod, signal),
        (sampler.alphas_cumprod_prev, before),
        (sampler.sqrt_one_minus_alphas_cumprod, (1 - signal).sqrt()),
        (sampler.posterior_var, betas * (1 - before) / (1 - signal)),
    ):
        assert found.device == device
        # The scheduler's betas are the same line in float64; the attribute is rounded to float32, a relative 6e-8.
        torch.testing.assert_close(found.double(), expected, atol=0, rtol=1e-7)

    everything = list(range(T - 1, -1, -1))
    samples, trajectory = sampler.sample((500, 2), return_trajectory=True, generator=seeded())
    expected = formula(model, signal, everything, (500, 2), clip=1.0)
    assert len(trajectory) == T + 1
    assert_same(samples, expected[-1])
    assert_same(trajectory[37], expected[37])
    samples = sampler.sample((500, 2), show_progress=False, clip_denoised=False, generator=seeded())
    assert_same(samples, formula(model, signal, everything, (500, 2))[-1])


@pytest.mark.parametrize("clip_denoised", [True, False])
def test_p_sample_takes_one_timestep_or_one_a_sample(clip_denoised: bool) -> None:
    model = scratch_model()
    sampler = DDPMSampler(model, n_timesteps=100, beta_start=1e-4, beta_end=0.02, device=device)
    signal = sampler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(5)
    x_t, z = torch.randn(6, 2, generator=generator), torch.randn(6, 2, generator=torch.Generator().manual_seed(7))
    t = torch.tensor([0, 1, 40, 99, 3, 0])
    x = sampler.p_sample(x_t, t, clip_denoised=clip_denoised, generator=torch.Generator().manual_seed(7))
    for i, time in enumerate(t.tolist()):
        a, previous = float(signal[time]), float(signal[time - 1]) if time else 1.0
        epsilon = model(x_t[i : i + 1], t[i : i + 1]).detach().double()[0]
        x0 = (x_t[i].double() - (1 - a) ** 0.5 * epsilon) / a**0.5
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        alpha = a / previous
        expected = previous**0.5 * (1 - alpha) / (1 - a) * x0 + alpha**0.5 * (1 - previous) / (1 - a) * x_t[i].double()
        expected = expected + ((1 - previous) / (1 - a) * (1 - alpha)) ** 0.5 * z[i].double()
        torch.testing.assert_close(x[i].double(), expected, atol=2e-6, rtol=1e-5)  # one step in float32
    same = sampler.p_sample(x_t, 40, clip_denoised, generator=torch.Generator().manual_seed(7))
    every = sampler.p_sample(x_t, torch.full((6,), 40), clip_denoised, generator=torch.Generator().manual_seed(7))
    assert torch.equal(same, every)


def test_guidance_shifts_each_mean_by_scale_variance_gradient() -> None:
    """arXiv 2105.05233, algorithm 1, with the gradient of −3·|x − (t/100)|² written out."""
    model = scratch_model()
    sampler = DDPMSampler(model, n_timesteps=100, beta_start=1e-4, beta_end=0.02, device=device)

    def guidance_fn(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        return -3 * ((x - t[:, None] / T) ** 2).sum(1)

    samples = sampler.sample_with_guidance(
        (500, 2), guidance_fn, guidance_scale=2.0, clip_denoised=False, generator=seeded()
    )
    expected = formula(
        model,
        sampler.alphas_cumprod.double(),
        list(range(T - 1, -1, -1)),
        (500, 2),
        shift=lambda x, t, variance: 2.0 * variance * -6 * (x - t[:, None] / T),
    )[-1]
    assert_same(samples, expected)
    unguided = sampler.sample((500, 2), show_progress=False, clip_denoised=False, generator=seeded())
    still = sampler.sample_with_guidance((500, 2), guidance_fn, 0.0, clip_denoised=False, generator=seeded())
    assert torch.equal(still, unguided)
