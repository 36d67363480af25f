# SPDX-License-Identifier: MIT
"""Samples of distilled digits' models beside those of their teacher, the packaged model.

    fastdiff train --data digits --distill progressive --teacher-steps 32 --student-steps 4 --batch 64 --steps 400 \
        --learning-rate 5e-4 --out few
    fastdiff train --data digits --distill consistency --batch 64 --steps 800 --learning-rate 5e-4 --out one
    fastdiff train --data digits --distill consistency_training --batch 64 --steps 1500 --learning-rate 1e-3 --out none
    python -m benchmarks.few_steps few/steps-0008:ddim:8 few/steps-0004:ddim:4 one:lcm:1 one:lcm:4 none:lcm:4

Each argument is a folder of ``fastdiff train --distill``, a sampler and its steps.  The noise of a seed is the same for
all models.  Printed are means over the seeds of

    recognised   the share of samples that a classifier, trained on the real digits, reads as the digit asked for
    variance     the variance of the samples of a class over that of the real digits, mean over the classes
    nearest      the median distance of a sample to the nearest digit that the teacher was trained on

Few steps blur a model that was not trained for them: its samples are easy to read and alike.  So `recognised` alone
does not show what they lose; `variance` does.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff import create_noise_scheduler, create_sampler
from fastdiff.digits import data, load_digit_unet
from fastdiff.training.model.from_checkpoint import load_trained_model

TEACHER_STEPS = (50, 32, 8, 4)


def draw(model: nn.Module, method: str, steps: int, labels: Tensor, seed: int) -> Tensor:
    """Return a sample ``[1, 8, 8]`` for each label, without guidance."""
    schedule = create_noise_scheduler("cosine", timestep_spacing="trailing")
    fields = {"num_inference_steps": steps, "prediction_type": "v_prediction", "guidance_scale": 1.0}
    sampler = create_sampler(schedule, method, **fields)
    latents = torch.randn((len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    seeds = range(seed * len(labels), (seed + 1) * len(labels))
    return sampler.sample(model, latents, labels, seeds=list(seeds), progress=False).samples


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", metavar="FOLDER:SAMPLER:STEPS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-class", type=int, default=100)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    teacher = load_digit_unet()
    runs: list[tuple[str, nn.Module, str, int]] = [
        (f"teacher, ddim, {steps} steps", teacher, "ddim", steps) for steps in TEACHER_STEPS
    ]
    for text in options.students:
        folder, method, steps = text.rsplit(":", 2)
        student = load_trained_model(folder, operation="few_steps", argument="FOLDER").network.eval()
        runs.append((f"{Path(folder).name}, {method}, {steps} steps", student, method, int(steps)))
    classifier, _ = data.train_classifier()
    labels = torch.arange(10).repeat_interleave(options.per_class)
    print("| model | recognised | variance | nearest |\n|---|---|---|---|")
    for name, model, method, steps in runs:
        rows = []
        for seed in range(options.seeds):
            images = draw(model, method, steps, labels, seed)
            recognised = data.recognised(classifier, images, labels)
            variance = float(data.variance_ratio(images, labels).mean())
            rows.append((recognised, variance, data.nearest_distance(images).generated))
        recognised, variance, nearest = (statistics.mean(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {recognised:.3f} | {variance:.3f} | {nearest:.1f} |", flush=True)


if __name__ == "__main__":
    main()
