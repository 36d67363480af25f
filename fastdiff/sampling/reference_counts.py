# SPDX-License-Identifier: MIT
"""Count the references to a tensor and to its memory, to find out whether somebody has kept it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

#: Count the references to a storage, by its address. Undocumented; torch's own CUDA graph trees use it.
_storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def reference_counts(tensor: Tensor) -> tuple[int, ...] | None:
    """Count who holds a tensor or its memory; compare two counts that the same function has taken.

    A second name for the tensor, a view, a slice, a detached or a NumPy view, a DLPack capsule, a storage object and a
    tensor that autograd has saved each raise one of the counts. A raw pointer does not.

    Returns:
        The references to the Python object, to torch's tensor, to the storage's Python object and to torch's storage;
        None where nothing is known: the tensor has no storage of its own, or torch does not tell.
    """
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None
    if _storage_use_count is None:
        return None
    in_use = _storage_use_count(storage._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), sys.getrefcount(storage), in_use  # type: ignore[attr-defined]
