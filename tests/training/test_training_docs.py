# SPDX-License-Identifier: MIT
"""The code of docs/training.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
SECTIONS = ("The configuration", "The model", "The losses", "The timesteps", "The trainer")


def _run(*sections: str) -> dict[str, Any]:
    """Run the code of sections one after another and return its names."""
    parts = dict(part.split("\n", 1) for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:])
    names: dict[str, Any] = {}
    for section in sections:
        blocks = re.findall(r"```python\n(.*?)```", parts[section], flags=re.DOTALL)
        assert blocks, section
        for block in blocks:
            exec(block, names)
    return names


def test_tutorial_goes_from_nothing_to_samples() -> None:
    pytest.importorskip("accelerate")
    names = _run("From nothing to samples")
    assert names["samples"].shape == (16, 1, 8, 8)
    assert bool(torch.isfinite(names["samples"]).all())
    assert [report["step"] for report in names["reports"]] == [3]


def test_code_of_the_page_runs() -> None:
    pytest.importorskip("accelerate")
    names = _run(*SECTIONS)
    assert names["samples"].shape == names["latents"].shape == (4, 3, 16, 16)
    assert names["per_sample"].shape == names["t"].shape == names["times"].shape == (4,)
    names["loss"].backward()
    assert bool(torch.isfinite(names["output"].grad).all())
