# SPDX-License-Identifier: MIT
"""Sampling jobs for tests of sharding: small models, and the files of a folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff

SHAPE = (1, 4, 4)


class Drawn:
    """Draws with a stochastic sampler, and keeps the ids that it was called with.

    Args:
        coupled: the model reads the mean of its batch, so that an image depends on the others of its batch.
        pause: seconds that a draw waits.
    """

    def __init__(self, coupled: bool = False, pause: float = 0.0) -> None:
        self.sampler = fastdiff.create_sampler("linear", "ddpm", num_inference_steps=3)
        self.coupled, self.pause = coupled, pause
        self.calls: list[list[int]] = []

    def model(self, x: Tensor, t: Tensor) -> Tensor:
        return x.sin() + x.mean(0, keepdim=True) if self.coupled else x.sin()

    def __call__(self, ids: Sequence[int], seeds: Sequence[int]) -> Tensor:
        self.calls.append(list(ids))
        time.sleep(self.pause)
        latents = fastdiff.randn((len(ids), *SHAPE), seeds)
        return self.sampler.sample(self.model, latents, seeds=seeds, progress=False).samples


class Refuses:
    """A draw that must not be called, or whose error has to arrive."""

    def __call__(self, ids: Sequence[int], seeds: Sequence[int]) -> Any:
        raise ValueError(f"drawn: {list(ids)}")


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, temporary ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat_samples(folder: Path) -> Tensor:
    """Return the samples of all safetensors shards of a folder in the order of their ids."""
    from safetensors.torch import load_file

    shards = [load_file(path) for path in sorted((folder / "shards").glob("*.safetensors"))]
    assert torch.cat([shard["ids"] for shard in shards]).tolist() == list(range(sum(len(s["ids"]) for s in shards)))
    return torch.cat([shard["samples"] for shard in shards])
