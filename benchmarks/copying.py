# SPDX-License-Identifier: MIT
"""What the machine's memory allows: a plain vectorised copy of as many bytes as a step must move.

By fastdiff's own kernel (csrc/bench/copy_loop.inc) on the same threads, with the same instruction set, with stores
into the caches and past them; the better of the two counts.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import torch

from fastdiff import ops

from .peers import Walk

STORES = {"ordinary": False, "streaming": True}

#: Bytes that one call should move at least, so that the way from Python does not count.
_CALL = 4 << 20


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1] in "KMG" else int(text))
    if not sizes and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        sizes = [os.sysconf("SC_LEVEL3_CACHE_SIZE")]
    return max(sizes, default=0) or 64 << 20


def copies_for(cache: str, footprint: int, holds: int | None = None) -> int:
    """How many sets of `footprint` bytes to go round: one for a warm cache; for a cold one twice the last level's
    worth and one more, so that whatever is used was evicted since it was used last. `holds`: the bytes of that level,
    where it is not the processor's."""
    return 1 if cache == "warm" else 1 + math.ceil(2 * (holds or last_level_cache()) / footprint)


def why_absent() -> str:
    """Why there is no copy to hold a step against; empty where there is."""
    if ops.backends.extension is None:
        return ops.backends.extension_error
    return (
        "" if hasattr(ops.backends.extension, "_copy_kernel") else "the extension is older than the benchmark: build it"
    )


def copy_walk(moved: float, cache: str, stores: str) -> Walk:
    """A walk whose steps each read and write `moved` bytes in all, in the same memory or going round."""
    assert ops.backends.extension is not None
    half = max(1, round(moved / 2))
    pitch = -(-half // 64) * 64  # rows begin where tensors would
    if cache == "warm":
        calls = max(1, min(1024, int(_CALL // moved)))
        src, dst = (torch.ones(pitch, dtype=torch.uint8)[:half].expand(calls, half) for _ in range(2))
    else:
        calls = copies_for(cache, 2 * half)
        src, dst = (torch.ones(calls, pitch, dtype=torch.uint8)[:, :half] for _ in range(2))
    return Walk(functools.partial(ops.backends.extension._copy_kernel, src, dst, STORES[stores]), calls)
