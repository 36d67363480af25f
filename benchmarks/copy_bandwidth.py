# SPDX-License-Identifier: MIT
"""Memory bandwidth of the machine: a vectorised copy of as many bytes as a step must move.

The copy is a fastdiff kernel (csrc/bench/copy_loop.inc) on the same threads with the same instruction set, once with
ordinary and once with nontemporal stores; the faster of the two counts.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import torch

from fastdiff import ops

from .peers import RepeatingLoop

STORES = {"ordinary": False, "streaming": True}

#: Minimum number of bytes of a call, so that the call overhead from Python is negligible.
_MIN_CALL_BYTES = 4 << 20


@functools.cache
def last_level_cache() -> int:
    """Return the size in bytes of the first core's largest cache; 64 MiB if the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1] in "KMG" else int(text))
    if not sizes and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        sizes = [os.sysconf("SC_LEVEL3_CACHE_SIZE")]
    return max(sizes, default=0) or 64 << 20


def copies_for(cache: str, footprint: int, cache_bytes: int | None = None) -> int:
    """Return the number of sets of `footprint` bytes to rotate through.

    One for a warm cache.  For a cold cache twice the cache's size and one more set, so that each set has been evicted
    before it is used again.

    Args:
        cache: "warm" or "cold".
        footprint: bytes of a set.
        cache_bytes: size of the cache; by default the processor's last level.
    """
    return 1 if cache == "warm" else 1 + math.ceil(2 * (cache_bytes or last_level_cache()) / footprint)


def why_absent() -> str:
    """Return why the copy kernel is missing; empty if it is available."""
    if ops.backends.extension is None:
        return ops.backends.extension_error
    return (
        "" if hasattr(ops.backends.extension, "_copy_kernel") else "the extension is older than the benchmark: build it"
    )


def copy_loop(moved: float, cache: str, stores: str) -> RepeatingLoop:
    """Return a loop whose steps read and write `moved` bytes in total: the same memory if warm, rotating if cold."""
    assert ops.backends.extension is not None
    half = max(1, round(moved / 2))
    pitch = -(-half // 64) * 64  # rows are aligned like tensors
    if cache == "warm":
        calls = max(1, min(1024, int(_MIN_CALL_BYTES // moved)))
        src, dst = (torch.ones(pitch, dtype=torch.uint8)[:half].expand(calls, half) for _ in range(2))
    else:
        calls = copies_for(cache, 2 * half)
        src, dst = (torch.ones(calls, pitch, dtype=torch.uint8)[:, :half] for _ in range(2))
    return RepeatingLoop(functools.partial(ops.backends.extension._copy_kernel, src, dst, STORES[stores]), calls)
