# SPDX-License-Identifier: MIT
"""Count the references to a tensor and to its memory, to find out whether somebody has kept it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def reference_counts(tensor: Tensor) -> tuple[int, ...] | None:
    """Count who holds a tensor or its memory; compare two counts that the same function has taken.

    A second name for the tensor, a view, a slice, a detached or a NumPy view, a DLPack capsule, a storage object and a
    tensor that autograd has saved each raise one of the counts. A raw pointer does not.

    Returns:
        The references to the Python object, to torch's tensor, to the storage's Python object and to torch's storage;
        None where a tensor has no storage of its own, so that nothing is known.
    """
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None
    in_use: int = torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), sys.getrefcount(storage), in_use  # type: ignore[attr-defined]
