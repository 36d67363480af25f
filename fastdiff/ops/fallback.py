# SPDX-License-Identifier: MIT
"""The choice of the backend that runs a call, with a warning where the reference answers for a compiled one.

Without the extension, steps on the CPU are torch operations, and drop-ins then take longer than diffusers' own.  The
first call that is so answered warns, once a process for the CPU and once for each other kind of device.

An installation without the extension warns even where ``FASTDIFF_BUILD=none`` built it: nothing in it says whether the
person who runs it chose that, and pip may have taken it from its cache.  ``FASTDIFF_BACKEND=reference`` and
`use_backend` say so.
"""

from __future__ import annotations

import sys
import warnings

from torch import Tensor

from ..errors import error_message
from . import backends

#: Devices that a compiled backend is made for.  No backend is for Apple's, and a meta tensor holds no numbers.
_NEVER_COMPILED = ("mps", "meta")

#: The kinds of device that have been warned of.
_warned: set[str] = set()

#: Packages whose frames stand between a caller and the choice of a backend.
_PASSED_OVER = ("fastdiff", "torch", "diffusers")


class FallbackWarning(RuntimeWarning):
    """The reference in plain torch answers, where a compiled backend was to be expected."""


def backend_to_run(sample: Tensor, backend: str | None = None, operation: str = "step") -> str:
    """Return `backends.operator_backend` of a call that is about to run, and warn where it falls back to the reference.

    Args:
        sample: any tensor on the device in question.
        backend: a forced choice, as in `step`.
        operation: who asks, for messages.

    Raises:
        ValueError, RuntimeError: as `backend_for`.
        FallbackWarning: where the caller's filters turn warnings into errors; nothing has been written then.
    """
    name = backends.operator_backend(sample, backend, operation)
    if name == "reference" and backend is None:
        _warn_once(operation, sample.device.type)
    return name


def why_reference(device_type: str) -> str:
    """Return why the reference answers for tensors of a kind of device in place of a compiled backend, as a clause.

    Empty where one answers, where none is made for such devices, and where a backend was asked for.
    """
    if backends.forced_backend() is not None or device_type in _NEVER_COMPILED:
        return ""
    if device_type == "cpu":
        return backends.why_missing("cpu")
    candidates = ("cuda", "triton") if device_type == "cuda" else ("triton",)
    reasons = [backends.why_missing(name) for name in candidates]
    return "; ".join(dict.fromkeys(reasons)) if all(reasons) else ""


def _warn_once(operation: str, device_type: str) -> None:
    reason = "" if device_type in _warned else why_reference(device_type)
    if not reason:
        return
    _warned.add(device_type)  # first, so that another thread does not warn as well
    compiled = {"cpu": "'cpu'", "cuda": "'cuda' or 'triton'"}.get(device_type, "'triton'")
    message = error_message(
        operation,
        "backend",
        f"is 'reference' for tensors on {device_type}, plain torch and several times slower",
        compiled,
        f"{reason}; set FASTDIFF_BACKEND=reference if the reference is what you want",
    )
    try:
        warnings.warn(message, FallbackWarning, stacklevel=callers_level())
    except FallbackWarning:
        _warned.discard(device_type)  # an error that is passed over once stays an error
        raise


# Dynamo calls such a function while it traces and puts its result, here None, into the graph: a compiled step warns as
# well, and its graph stays whole.  `torch.compiler.assume_constant_result` does no more, but imports all of Dynamo.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def callers_level() -> int:
    """Return the `stacklevel` with which `_warn_once` names the line of the caller's own code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    return level
