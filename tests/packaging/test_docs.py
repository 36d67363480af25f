# SPDX-License-Identifier: MIT
"""Documentation: its code runs, and its links resolve."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    exec("\n".join(blocks), {})
    assert "torch.Size([1, 4, 64, 64])" in capsys.readouterr().out


def test_code_of_editing_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "editing.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 8
    exec("\n".join(blocks), {})


def test_code_of_many_processes_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "many_processes.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("ShardReport(drawn=3, skipped=0, remade=0, images=10, manifest=")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def _anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and MkDocs spell them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_name_a_heading(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text()):
        assert anchor in _anchors(document.parent / target if target else document), f"{target}#{anchor}"


def test_api_targets_exist() -> None:
    """Each module that docs/api.md shows can be imported, and has the members listed for it."""
    shown: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        if target := re.fullmatch(r"::: (\S+)", line):
            members = shown[target[1]] = []
        elif one_line := re.fullmatch(r" +members: \[(.+)\]", line):
            members += one_line[1].split(", ")
        elif item := re.fullmatch(r" +- (\w+)", line):
            members.append(item[1])
    assert len(shown) > 15
    missing = [
        f"{name}.{member}"
        for name, members in shown.items()
        for member in members
        if not hasattr(importlib.import_module(name), member)
    ]
    assert missing == []


def test_concepts_are_defined_in_the_files_named() -> None:
    """Each concept of docs/life_of_a_plan.md is a class of the file beside it, or described by one."""
    text = (ROOT / "docs" / "life_of_a_plan.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| [A-Z].+ \| `(\S+)` \|$", text, flags=re.MULTILINE)
    assert 10 <= len(rows) <= 15
    for name, file in rows:
        source = (ROOT / file if file.startswith("csrc/") else ROOT / "fastdiff" / "diffusers" / file).read_text()
        kind = rf"\b(class|struct) {name}\b" if name[0].isupper() else rf"(?i)\b{name}\b"
        assert re.search(kind, source), f"{name} in {file}"


def test_files_named_in_the_diagrams_exist() -> None:
    """Each file and function of a diagram in docs/design.md is there."""
    diagrams = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), flags=re.DOTALL)
    assert len(diagrams) == 4
    for diagram in diagrams:
        nodes = re.findall(r'\["(\S+)<br>([^"]+)"\]', diagram)
        assert 3 <= len(nodes) <= 5, "at most four hops"
        for file, functions in nodes:
            path = next(base / file for base in (ROOT, ROOT / "fastdiff") if (base / file).is_file())
            for function in functions.split(", "):
                name = re.split(r"\.|::", function)[-1]
                assert re.search(rf"\b{name}\b", path.read_text()), f"{function} in {file}"


#: Examples that need more than arguments, with the test that runs each.
RUN_ELSEWHERE = {
    "serve_fastapi.py": "packaging/test_example_server.py",
    "train_digits.py": "examples/test_training_examples.py",
    "train_fashion_mnist.py": "examples/test_training_examples.py",
    "train_ddp.py": "examples/test_training_examples.py",
}

#: What makes an example short, and what it leaves behind: a picture, or lines that it prints.
EXAMPLES = {
    "own_loop.py": ([], "*.png"),
    "compiled_loop.py": (["--steps", "3", "--rounds", "1", "--device", "cpu", "--without-compile"], "eager, fastdiff"),
    "lightning_module.py": (["--max-steps", "2"], "validation loss"),
    "train_toy_2d.py": (["--steps", "20", "--samples", "64"], "*.png"),
    "custom_loss.py": (["--steps", "2"], "usual loss on held-out digits"),
    "diffusion_policy.py": (["--iterations", "2", "--steps", "3", "--rounds", "1"], "DDPMScheduler"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys() | RUN_ELSEWHERE.keys()
    for name, test in RUN_ELSEWHERE.items():
        assert name.removesuffix(".py") in (ROOT / "tests" / test).read_text(), f"{test} does not run {name}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, left = EXAMPLES[name]
    example = ROOT / "examples" / name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    assert left in capsys.readouterr().out or list(tmp_path.glob(left))
