# SPDX-License-Identifier: MIT
"""The examples of docs/guidance.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guidance.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["x"], torch.Tensor)
    assert bool(names["x"].isfinite().all())
