# SPDX-License-Identifier: MIT
"""A sampling loop of one's own: digits, guided, with a stepper in place of a scheduler.

Run it with ``python examples/own_loop.py``; it writes ``own_loop.png``.
"""

from __future__ import annotations

import torch

from fastdiff import create_sampler
from fastdiff.analysis.images import save_grid
from fastdiff.digits import NULL_CLASS, load_digit_unet


@torch.no_grad()
def main() -> None:
    model = load_digit_unet()
    sampler = create_sampler("cosine", "dpm_solver", prediction_type="v_prediction", num_inference_steps=20)
    labels = torch.arange(10)
    unlabelled = torch.full_like(labels, NULL_CLASS)
    x = torch.randn(10, 1, 8, 8)
    stepper = sampler.stepper()
    for t in sampler.timesteps:
        cond, uncond = model(x, t, labels), model(x, t, unlabelled)
        x = stepper.step(x, cond, uncond=uncond, guidance_scale=3.0, out=x)
    save_grid(x, "own_loop.png", columns=10, scale=4)


if __name__ == "__main__":
    main()
