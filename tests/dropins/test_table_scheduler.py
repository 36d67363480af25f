# SPDX-License-Identifier: MIT
"""A table inside diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.diffusers import TableScheduler


def unet(x: torch.Tensor, t: Any) -> torch.Tensor:
    return (x * (float(t) / 1000 + 0.5)).tanh()


@pytest.mark.parametrize(("method", "options"), [("ddim", {}), ("dpm_solver", {"solver_order": 3}), ("heun", {})])
def test_loop_equals_the_samplers_own(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    sampler = fastdiff.create_sampler("scaled_linear", method, num_inference_steps=6, **options)
    sampler.table.save(tmp_path / "table.json")
    scheduler = TableScheduler(tmp_path / "table.json")
    latents = torch.randn(2, 4)
    expected = sampler.sample(lambda x, t: unet(x, t[0]), latents, progress=False).samples
    for _ in range(2):
        scheduler.set_timesteps(len(sampler.table), device="cpu")
        x = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        assert torch.equal(x, expected)


def test_pipeline_runs_with_a_table() -> None:
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipe = diffusers.DDIMPipeline(unet=model, scheduler=diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TableScheduler(fastdiff.create_sampler("linear", "ddim", num_inference_steps=2).table)
    found = []
    for scheduler in (pipe.scheduler, diffusers.DDIMScheduler(clip_sample=False)):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(1)
        found.append(pipe(batch_size=1, num_inference_steps=2, generator=generator, output_type="np").images)
    # Both are DDIM with leading timesteps, and round to float32 in each step.
    assert abs(found[0] - found[1]).max() < 1e-4


def test_noise_comes_from_the_generator() -> None:
    table = fastdiff.create_sampler("linear", "ddpm", num_inference_steps=5).table
    latents, results = torch.randn(2, 3), []
    for seed in (1, 1, 2):
        scheduler, generator, x = TableScheduler(table), torch.Generator().manual_seed(seed), latents
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t), t, x, generator=generator).prev_sample
        results.append(x)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_refusals_change_nothing(tmp_path: Path) -> None:
    table = fastdiff.create_sampler("linear", "dpm_solver", num_inference_steps=3).table
    scheduler, x = TableScheduler(table), torch.randn(2, 3)
    t = scheduler.timesteps
    for call, message in (
        (lambda: scheduler.step(x, 5, x), "that of row 0"),
        (lambda: scheduler.step(x, t[0], x, eta=0.5), "eta is 0.5"),
        (lambda: scheduler.step(x[:1], t[0], x), "model_output"),
        (lambda: scheduler.set_timesteps(4), "3, the table's rows"),
        (lambda: TableScheduler(3), "a StepTable or a path"),  # type: ignore[arg-type]
        (
            lambda: TableScheduler(
                fastdiff.create_sampler("linear", "ddpm", num_inference_steps=3, variance_type="learned").table
            ),
            "fixed",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    first = scheduler.step(x, t[0], x, eta=0.0, use_clipped_model_output=None).prev_sample
    assert torch.equal(first, TableScheduler(table).step(x, t[0], x).prev_sample)
    assert len(scheduler) == 1000
