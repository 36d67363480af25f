# SPDX-License-Identifier: MIT
"""What the documents show runs, and what they point to is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_code_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    exec("\n".join(blocks), {})
    assert "torch.Size([1, 4, 64, 64])" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


#: What makes an example short, and what it leaves behind: a picture, or lines that it prints.
EXAMPLES = {
    "own_loop.py": ([], "*.png"),
    "diffusion_policy.py": (["--iterations", "2", "--steps", "3", "--rounds", "1"], "DDPMScheduler"),
}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, left = EXAMPLES[example.name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    assert left in capsys.readouterr().out or list(tmp_path.glob(left))
