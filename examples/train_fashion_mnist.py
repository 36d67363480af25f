# SPDX-License-Identifier: MIT
"""Train a text-conditional U-Net on Fashion-MNIST (arXiv 1708.07747) from a local folder, and sample it by prompts.

    python examples/train_fashion_mnist.py FOLDER --steps 20000

FOLDER has ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, also with ``.gz``; nothing is downloaded.
A prompt is the name of a class.  The text encoder is small and trained along, the U-Net is one of diffusers.
It writes checkpoints, the loss curve and ``samples.png``, a row a class.  On an accelerator add ``--precision bf16``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastdiff.analysis.images import save_grid
from fastdiff.training import (
    AdvancedDiffusionTrainer,
    DiffusionConfig,
    DiffusionModel,
    RunOptions,
    fashion_mnist_dataset,
)

PROMPTS = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def with_prompts(items: list[Any]) -> dict[str, Any]:
    """Collate ``(image, label)`` to a batch with prompts."""
    images, labels = zip(*items, strict=True)
    return {"images": torch.stack(images), "prompts": [PROMPTS[int(label)] for label in labels]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64, help="of the first level")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--columns", type=int, default=8, help="samples a class")
    parser.add_argument("--out", type=Path, default=Path("train_fashion_mnist"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    arguments = parser.parse_args()

    config = DiffusionConfig(
        image_size=28,
        in_channels=1,
        model_channels=arguments.channels,
        channel_mult=(1, 2, 2),  # feature maps of 28, 14 and 7 pixels
        num_res_blocks=1,
        attention_resolutions=(7,),
        num_heads=4,
        use_spatial_transformer=True,
        context_dim=256,
        beta_schedule="cosine",
        prediction_type="v_prediction",
        snr_gamma=5.0,
        learning_rate=2e-4,
        lr_warmup_steps=min(500, arguments.steps // 10),
        max_train_steps=arguments.steps,
        mixed_precision=arguments.precision,
        guidance_scale=3.0,
    )
    torch.manual_seed(config.seed)
    model = DiffusionModel(config)
    options = RunOptions(
        output_dir=str(arguments.out), log_every=50, checkpoint_every=500, progress=True, on_nan="skip"
    )
    trainer = AdvancedDiffusionTrainer(model, config, options)
    if arguments.resume:
        trainer.load_checkpoint()
    dataset = fashion_mnist_dataset(arguments.folder)
    loader = DataLoader(dataset, arguments.batch, shuffle=True, drop_last=True, collate_fn=with_prompts)
    reports = trainer.train(loader, max_steps=arguments.steps)

    prompts = [prompt for prompt in PROMPTS for _ in range(arguments.columns)]
    with trainer.averaged_weights() as trained, torch.no_grad():
        tokens = trained.text_encoder.tokens([*prompts, ""]).to(trainer.device)
        *wanted, nothing = trained.text_encoder(tokens)
        samples = model.sample(
            len(prompts),
            arguments.sampling_steps,
            method="dpm_solver",
            prompt_embeds=torch.stack(wanted),
            negative_prompt_embeds=nothing.expand(len(prompts), -1, -1),
            seeds=range(len(prompts)),
        )
    save_grid(samples, arguments.out / "samples.png", columns=arguments.columns, scale=2)
    loss = f"loss {reports[-1]['loss']:.4f}" if reports else "no step was left"
    print(f"{trainer.step} steps on {len(dataset)} images: {loss}; wrote {arguments.out / 'samples.png'}")


if __name__ == "__main__":
    main()
