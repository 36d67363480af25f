# SPDX-License-Identifier: MIT
"""The memory that the extension keeps for new outputs on the CPU: how much, how to bound it, how to have it back.

A step makes its outputs anew, and a loop drops those of the step before.  The extension keeps what is dropped and
hands it out again: fresh memory costs more than a step does, since the system zeroes every page of it
(csrc/bindings/output_allocator.h).  ``FASTDIFF_KEEP_MIB`` bounds what may be kept, in MiB; 0 keeps nothing.
"""

from __future__ import annotations

import os

from ..errors import error_message
from . import backends

_MOST_MIB = 1 << 30


def keep_limit(text: str) -> int:
    """Bytes that a value of ``FASTDIFF_KEEP_MIB`` stands for.

    Raises:
        ValueError: it is no whole number of MiB from 0 on.
    """
    digits = text.lstrip("0") or "0"
    # So long a number that Python would not read it is too large anyway.
    if not (text.isascii() and text.isdigit()) or len(digits) > 10 or int(digits) > _MOST_MIB:
        raise ValueError(
            error_message(
                "fastdiff",
                "FASTDIFF_KEEP_MIB",
                f"is {text!r}",
                f"a whole number of MiB from 0 to {_MOST_MIB}",
                "write one, 0 to keep no memory for new outputs, or unset it",
            )
        )
    return int(digits) << 20


def held_memory() -> int:
    """Bytes that are kept for new outputs on the CPU at this moment; those in use are their tensors' own."""
    return 0 if backends.extension is None else int(backends.extension.held_memory())


def kept_memory_limit() -> int:
    """Bytes that may be kept, 256 MiB by default; 0 without the extension."""
    return 0 if backends.extension is None else int(backends.extension.kept_memory_limit())


def release_memory() -> int:
    """Give back what is kept for new outputs on the CPU; returns its bytes.

    Tensors are not touched: only memory that nothing uses is kept.  A loop that goes on keeps anew.
    """
    return 0 if backends.extension is None else int(backends.extension.release_memory())


if os.environ.get("FASTDIFF_KEEP_MIB"):
    _limit = keep_limit(os.environ["FASTDIFF_KEEP_MIB"])
    if backends.extension is not None:
        backends.extension.limit_kept_memory(_limit)
