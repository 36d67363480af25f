# SPDX-License-Identifier: MIT
"""setup.py as a module, for the tests of what it decides and of what its flags compile."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_setup() -> ModuleType:
    """Run setup.py under a name of its own, so that it builds nothing."""
    path = Path(__file__).resolve().parents[2] / "setup.py"
    spec = importlib.util.spec_from_file_location("fastdiff_setup", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
