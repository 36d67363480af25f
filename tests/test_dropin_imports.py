# SPDX-License-Identifier: MIT
"""What fastdiff.diffusers offers where diffusers, or what diffusers wants, is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)
"""


def run(package: str, code: str) -> str:
    """What a process without a package prints, its errors too."""
    script = BLOCK.format(package=package) + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_without_diffusers_the_extra_is_named() -> None:
    said = run("diffusers", "import fastdiff\nimport fastdiff.diffusers")
    assert "fastdiff-kernels[diffusers]" in said, said


def test_without_torchsde_the_other_schedulers_are_there() -> None:
    said = run("torchsde", "import fastdiff.diffusers as f\nprint(f.DDIMScheduler())\nf.DPMSolverSDEScheduler")
    assert "DDIMScheduler {" in said, said
    assert "DPMSolverSDEScheduler is absent" in said, said
    assert "torchsde" in said


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UniPC"])
def test_a_name_that_nobody_has_is_an_attribute_error(name: str) -> None:
    import fastdiff.diffusers

    with pytest.raises(AttributeError, match=name):
        getattr(fastdiff.diffusers, name)
