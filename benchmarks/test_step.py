# SPDX-License-Identifier: MIT
"""The benchmark cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=group``.

A round is a whole loop; divide by the steps in extra_info. Here the peers of a case run one after another, with a warm
cache; `fastdiff bench` alternates them, and published figures come from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .cases import SAMPLER_SPECS, SHAPES, Case
from .copy_bandwidth import STORES, copy_loop, why_absent
from .peers import PEERS, repeating_loops


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("peer", ["fastdiff", *PEERS])
@pytest.mark.parametrize("shape", ["image", "video"])
@pytest.mark.parametrize("op", SAMPLER_SPECS)
def test_loop(benchmark: Any, op: str, shape: str, peer: str) -> None:
    case = Case(op, SHAPES[shape])
    try:
        (loop,) = repeating_loops(peer, case, case.tensors())
    except (ImportError, RuntimeError) as absent:
        pytest.skip(str(absent))

    def run() -> None:
        for _ in range(len(case.table) // loop.steps):
            loop.advance()

    benchmark.group = case.name
    benchmark.extra_info.update(steps=len(case.table), bytes_a_step=case.bytes_a_step)
    small = shape == "image"
    benchmark.pedantic(run, rounds=20 if small else 3, iterations=5 if small else 1, warmup_rounds=1)


@pytest.mark.skipif(bool(why_absent()), reason=why_absent())
@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("shape", ["image", "video"])
def test_copy(benchmark: Any, shape: str, stores: str) -> None:
    case = Case("ddim", SHAPES[shape])
    loop = copy_loop(case.bytes_a_step, "warm", stores)
    benchmark.group = f"copy of as many bytes as {case.name}"
    benchmark.extra_info.update(steps=loop.steps, bytes_a_step=case.bytes_a_step)
    benchmark.pedantic(loop.advance, rounds=20, iterations=1, warmup_rounds=1)
