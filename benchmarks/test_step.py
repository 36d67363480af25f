# SPDX-License-Identifier: MIT
"""The cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:case``.

It times a whole loop; divide by the steps.  Peers of one case run one after another here; `python -m benchmarks` takes
them in turn, which is what figures are quoted from.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import PEERS, SAMPLERS, Case


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", ["image", "video"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loop(benchmark: Any, sampler: str, shape: str, peer: str) -> None:
    if peer == "diffusers":
        pytest.importorskip("diffusers")
    case = Case(sampler, shape)
    benchmark.group = case.name
    benchmark.extra_info["steps"] = case.calls
    torch.set_num_threads(1)
    loop = case.loop(peer)
    with torch.no_grad():
        small = shape == "image"
        last = benchmark.pedantic(loop, rounds=20 if small else 3, iterations=5 if small else 1, warmup_rounds=1)
    assert bool(torch.isfinite(last).all())
