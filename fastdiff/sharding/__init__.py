# SPDX-License-Identifier: MIT
"""Sampling jobs over many processes and machines that share a folder.

- `sample_shards`: one process' share of a job, under torchrun or any other launcher.
- `sample_shards_on_ray`: a job on the workers of a Ray cluster.

Both take the same function ``draw(ids, seeds)`` and leave the same files.  A run after an interruption draws what is
missing.
"""

from __future__ import annotations

from .folder import Draw, Outcome, ShardFolder
from .job import ShardJob
from .on_ray import sample_shards_on_ray
from .run import ShardReport, process_rank, sample_shards

__all__ = [
    "Draw",
    "Outcome",
    "ShardFolder",
    "ShardJob",
    "ShardReport",
    "process_rank",
    "sample_shards",
    "sample_shards_on_ray",
]
