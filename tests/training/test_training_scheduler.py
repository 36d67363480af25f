# SPDX-License-Identifier: MIT
"""The scheduler of a configuration: DDIM steps against the formula in float64, and the forward process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.training import AdvancedScheduler, DiffusionConfig, DiffusionScheduler

SHAPE = (2, 3, 4, 4)


def make(**fields: object) -> AdvancedScheduler:
    return AdvancedScheduler(DiffusionConfig(num_timesteps=100, **fields))  # type: ignore[arg-type]


def ddim(
    bars: Tensor, t: int, s: int | None, x: Tensor, output: Tensor, kind: str, eta: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """arXiv 2010.02502, eq. 12 and 16."""
    bar = float(bars[t])
    before = 1.0 if s is None else float(bars[s])
    alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
    x0 = {
        "epsilon": (x - sigma * output) / alpha,
        "v_prediction": alpha * x - sigma * output,
        "sample": output,
    }[kind]
    epsilon = (x - alpha * x0) / sigma
    noise = eta * math.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
    result = math.sqrt(before) * x0 + math.sqrt(1 - before - noise**2) * epsilon
    return result if z is None else result + noise * z


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_loop_follows_ddim(kind: str, eta: float) -> None:
    scheduler = make(prediction_type=kind, eta=eta, scheduler_type="cosine")
    scheduler.set_timesteps(5, device="cpu")
    assert scheduler.timesteps.tolist() == [80, 60, 40, 20, 0]
    assert (scheduler.num_inference_steps, scheduler.init_noise_sigma, len(scheduler)) == (5, 1.0, 100)
    x = torch.randn(SHAPE, dtype=torch.float64) * scheduler.init_noise_sigma
    visited = [*scheduler.timesteps.tolist(), None]
    generator, same = (torch.Generator().manual_seed(4) for _ in range(2))
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.scale_model_input(x, t) is x
        output = torch.randn(SHAPE, dtype=torch.float64)
        noisy = eta > 0 and visited[i + 1] is not None
        z = torch.randn(SHAPE, generator=same, dtype=torch.float64) if noisy else None
        expected = ddim(scheduler.alphas_cumprod, visited[i], visited[i + 1], x, output, kind, eta, z)
        found = scheduler.step(output, t, x, generator=generator)
        assert found.prev_sample is found[0]
        torch.testing.assert_close(found.prev_sample, expected, rtol=1e-10, atol=1e-10)
        x = found.prev_sample


def test_every_timestep_is_visited_before_any_is_chosen() -> None:
    scheduler = make()
    x, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    found = scheduler.step(output, 50, x).prev_sample
    expected = ddim(scheduler.alphas_cumprod, 50, 49, x, output, "epsilon")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert scheduler.timesteps.tolist() == list(range(99, -1, -1))
    assert scheduler.num_inference_steps is None


def test_timestep_is_found_by_place_or_value() -> None:
    scheduler = make()
    scheduler.set_timesteps(4)
    x, output = torch.randn(2, *SHAPE)
    expected = scheduler.step(output, 50, x).prev_sample
    own = scheduler.timesteps[1]
    for timestep in (own, torch.tensor(50), torch.tensor([50], dtype=torch.int32), 50.0):
        assert torch.equal(scheduler.step(output, timestep, x).prev_sample, expected)
    for timestep in (51, torch.tensor(51), torch.tensor([50, 25])):
        with pytest.raises(ValueError, match=r"AdvancedScheduler.step: timestep .* one of 4 visited timesteps"):
            scheduler.step(output, timestep, x)


def test_learned_variance_is_left_out_of_ddim_steps() -> None:
    scheduler = make(in_channels=2, out_channels=4)
    x, output = torch.randn(2, 2, 4, 4), torch.randn(2, 4, 4, 4)
    expected = scheduler.step(output[:, :2], 7, x).prev_sample
    assert torch.equal(scheduler.step(output, 7, x).prev_sample, expected)
    with pytest.raises(ValueError, match=r"model_output has shape \[2, 4, 4, 4\]"):
        make().step(output, 7, x)
    with pytest.raises(ValueError, match=r"eta is 0\.5, expected the configuration's 0.0"):
        scheduler.step(output, 7, x, eta=0.5)


def test_clip_denoised_clamps_x0() -> None:
    scheduler = make(clip_denoised=True, prediction_type="sample")
    x, output = torch.randn(SHAPE, dtype=torch.float64), 3 * torch.randn(SHAPE, dtype=torch.float64)
    found = scheduler.step(output, 0, x).prev_sample
    torch.testing.assert_close(found, output.clamp(-1, 1), rtol=1e-10, atol=1e-10)


def test_forward_process_has_two_forms() -> None:
    config = DiffusionConfig(num_timesteps=100, scheduler_type="cosine")
    advanced, plain = AdvancedScheduler(config), DiffusionScheduler(config)
    x0, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 99])
    bars = advanced.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    expected = (bars.sqrt() * x0.double() + (1 - bars).sqrt() * noise.double()).float()
    # One float32 rounding of two scalars, two products and a sum.
    torch.testing.assert_close(advanced.add_noise(x0, t, noise), expected, rtol=1e-6, atol=1e-6)
    noisy, returned = plain.add_noise(x0, t, noise)
    assert torch.equal(noisy, advanced.add_noise(x0, t, noise))
    assert returned is noise
    noisy, drawn = plain.add_noise(x0, t, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noisy, advanced.add_noise(x0, t, drawn))
    velocity = (bars.sqrt() * noise.double() - (1 - bars).sqrt() * x0.double()).float()
    found = plain.get_velocity(x_start=x0, noise=noise, timesteps=t)
    torch.testing.assert_close(found, velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_fused_operations_take_the_scheduler(name: str) -> None:
    scheduler = AdvancedScheduler(DiffusionConfig(num_timesteps=100, beta_schedule=name))
    x0, output = torch.randn(SHAPE), torch.randn(SHAPE)
    for t in [torch.tensor([3, 70])] + ([torch.tensor([0.1, 0.9])] if name == "flow" else []):
        options = {"prediction_type": scheduler.config.prediction_type, "seeds": torch.arange(2)}
        found = fastdiff.ops.diffusion_loss(output, x0, t, scheduler, **options)
        assert torch.equal(found, fastdiff.ops.diffusion_loss(output, x0, t, scheduler.schedule, **options))
    assert hasattr(scheduler, "times") == (name == "flow")


def test_flow_loop_walks_straight() -> None:
    scheduler = AdvancedScheduler(DiffusionConfig(beta_schedule="flow"))
    scheduler.set_timesteps(4)
    x = start = torch.randn(SHAPE, dtype=torch.float64)
    velocity = torch.randn(SHAPE, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity, t, x).prev_sample
    torch.testing.assert_close(x, start - velocity, rtol=1e-10, atol=1e-10)


def test_flow_timesteps_are_found_by_value() -> None:
    scheduler = AdvancedScheduler(DiffusionConfig(beta_schedule="flow"))
    scheduler.set_timesteps(7)  # no float32 is a seventh
    x, output = torch.randn(2, *SHAPE)
    for t in scheduler.timesteps[1:]:
        expected = scheduler.step(output, t, x).prev_sample
        for timestep in (t.clone(), t.item(), t.double()):
            assert torch.equal(scheduler.step(output, timestep, x).prev_sample, expected)
    with pytest.raises(ValueError, match="one of 7 visited timesteps"):
        scheduler.step(output, 0.5, x)


def test_refused_number_of_steps_changes_nothing() -> None:
    scheduler = make()
    scheduler.set_timesteps(4)
    for device in ("no such device", "fpga"):  # the second is a name that torch knows
        with pytest.raises(RuntimeError):
            scheduler.set_timesteps(2, device=device)
    for count in (0, 101):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == [75, 50, 25, 0]
    with pytest.raises(TypeError, match=r"AdvancedScheduler: config is a dict"):
        AdvancedScheduler({})  # type: ignore[arg-type]
