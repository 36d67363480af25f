# SPDX-License-Identifier: MIT
"""The code of docs/training.md on configuration, model, losses and timesteps runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
SECTIONS = ("The configuration", "The model", "The losses", "The timesteps")


def test_code_of_the_page_runs() -> None:
    sections = dict(part.split("\n", 1) for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:])
    names: dict[str, Any] = {}
    for section in SECTIONS:
        blocks = re.findall(r"```python\n(.*?)```", sections[section], flags=re.DOTALL)
        assert blocks, section
        for block in blocks:
            exec(block, names)
    assert names["samples"].shape == names["latents"].shape == (4, 3, 16, 16)
    assert names["per_sample"].shape == names["t"].shape == names["times"].shape == (4,)
    names["loss"].backward()
    assert bool(torch.isfinite(names["output"].grad).all())
