# SPDX-License-Identifier: MIT
"""docs/own_loops.md: its code runs, and its table names every function."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastdiff import loops

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "own_loops.md").read_text()


def test_code_runs() -> None:
    names: dict[str, object] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)), names)
    assert isinstance(names["samples"], torch.Tensor)
    assert bool(torch.isfinite(names["samples"]).all())


def test_table_names_every_function() -> None:
    rows = re.findall(r"^\| (`.+?) \|", TEXT, flags=re.MULTILINE)
    named = {f"sample_{name}" for row in rows for name in re.findall(r"`(\w+)`", row)}
    forms = re.search(r"^(`euler`.*?) have a form", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert forms is not None
    named |= {f"sample_{name}_cfg_pp" for name in re.findall(r"`(\w+)`", forms[1])}
    functions = {name for name in loops.__all__ if name.startswith("sample_")}
    assert functions <= named
    assert {name for name in named if not hasattr(loops, name)} == set()
