# SPDX-License-Identifier: MIT
"""Reductions on a real GPU: the bits of the CPU for sums in one order and for quantiles found by selection.

A fixed number of calls, so that they can run under tools that slow a kernel down a hundred times; test_reductions.py
takes as many as its properties want.
"""

from __future__ import annotations

import pytest
import torch

from fastdiff import ops
from fastdiff.ops import backends
from support.on_gpu import BACKENDS, skip_where_missing
from support.oracle import DTYPES, assert_same_bits
from support.reduction_cases import KINDS, call, numbers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.answers,
    pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with"),
]

#: One block of 1024 and its ends, several blocks, and several programs; none but the second a multiple of a vector.
SIZES = (1, 1024, 1025, 5003, 140_001)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that a GPU may have here."""
    name: str = request.param
    skip_where_missing(name)
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reductions_on_gpu_give_the_bits_of_the_cpu(backend: str, kind: str, dtype: torch.dtype) -> None:
    for seed, size in enumerate(SIZES):
        x, y = (numbers(2 * seed + i, (3, size), dtype, "wide") for i in range(2))
        got = call(kind, x.cuda(), y.cuda(), 0.5, backend=backend).cpu()
        assert_same_bits([got], [call(kind, x, y, 0.5, backend="cpu")])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantile_on_gpu_gives_the_bits_of_the_cpu(backend: str, dtype: torch.dtype) -> None:
    for seed, size in enumerate(SIZES):
        x = numbers(seed, (3, size), dtype, ("normal", "few", "wide")[seed % 3])
        for q, absolute in ((0.0, False), (0.37, False), (0.995, True), (1.0, True)):
            got = ops.quantile(x.cuda(), q, absolute, backend=backend).cpu()
            assert_same_bits([got], [ops.quantile(x, q, absolute, backend="cpu")])
