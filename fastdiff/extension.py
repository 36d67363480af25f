# SPDX-License-Identifier: MIT
"""The compiled extension ``fastdiff._C``, or why it is missing: loaded once, when this module is imported."""

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
    """Which build of the C++ loops runs here: "generic", "avx2" or "avx512"; None without the extension."""
    return None if extension is None else str(extension.cpu_build)
