# SPDX-License-Identifier: MIT
"""End-to-end sampling: the digits are recognized as the requested ones, and they vary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff import create_noise_scheduler, create_sampler
from fastdiff.digits import IMAGE_SHAPE, NULL_CLASS, NUM_CLASSES, load_digit_unet

GUIDANCE = 3.0  # what `fastdiff sample` uses


@pytest.fixture(scope="module")
def classifier() -> Any:
    data = pytest.importorskip("fastdiff.digits.data")
    trained, accuracy = data.train_classifier()
    assert accuracy >= 0.97, "the judge itself must know real digits that it has not seen"
    return trained


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "ddim", "num_inference_steps": 25},
        {"method": "dpm_solver", "solver_order": 2, "num_inference_steps": 20},
    ],
    ids=["DDIM, 25 steps", "DPM-Solver++ 2M, 20 steps"],
)
def test_generated_digits_are_recognised_and_varied(
    fields: dict[str, Any], classifier: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    from fastdiff.digits import data

    scheduler = create_noise_scheduler("cosine", timestep_spacing="trailing")
    sampler = create_sampler(scheduler, prediction_type="v_prediction", guidance_scale=GUIDANCE, **fields)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(50)
    latents = torch.randn((len(labels), *IMAGE_SHAPE))  # fresh noise: the figures must not hang on a seed
    result = sampler.sample(load_digit_unet(), latents, labels, torch.full_like(labels, NULL_CLASS), progress=False)
    share = data.recognised(classifier, result.samples, labels)
    variance = data.variance_ratio(result.samples, labels)
    with capsys.disabled():
        print(
            f"\n{request.node.callspec.id}, guidance {GUIDANCE:g}: {share:.3f} of {len(labels)} digits recognised, "
            f"pixel variance {min(variance):.2f} to {max(variance):.2f} of the real one by class; "
            f"{result.processing_time:.1f} s, {100 * result.step_share:.2f} % of it in the step"
        )
    assert share >= 0.95
    assert min(variance) >= 0.5
