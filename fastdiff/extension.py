# SPDX-License-Identifier: MIT
"""The compiled extension ``fastdiff._C``, or the reason why it is missing; loaded once, on import of this module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from .built_for import why_unfit
from .environment import why_absent


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        spec = importlib.util.find_spec("fastdiff._C")
        if spec is not None and spec.origin is not None:
            unfit = why_unfit(Path(spec.origin))
            if unfit:
                return None, unfit
        return importlib.import_module("fastdiff._C"), ""
    except ImportError as error:
        return None, why_absent(error)


extension, extension_error = _load_extension()


def cpu_build() -> str | None:
    """Return the build of the C++ loops in use: "generic", "avx2" or "avx512"; None without the extension."""
    return None if extension is None else str(extension.cpu_build)
