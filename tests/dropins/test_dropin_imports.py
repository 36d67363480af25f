# SPDX-License-Identifier: MIT
"""Imports from fastdiff.diffusers with missing packages, and subclasses of its classes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

import fastdiff.diffusers

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
    """Return the output of a process without a package, including errors."""
    script = BLOCK.format(package=package) + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_missing_diffusers_names_extra() -> None:
    said = run("diffusers", "import fastdiff\nimport fastdiff.diffusers")
    assert "fastdiff-kernels[diffusers]" in said, said


def test_missing_torchsde_keeps_other_schedulers() -> None:
    said = run("torchsde", "import fastdiff.diffusers as f\nprint(f.DDIMScheduler())\nf.DPMSolverSDEScheduler")
    assert "DDIMScheduler {" in said, said
    assert "DPMSolverSDEScheduler is absent" in said, said
    assert "torchsde" in said


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UniPC"])
def test_unknown_name_is_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(fastdiff.diffusers, name)


class Doubled(fastdiff.diffusers.CLASSES["DDIMScheduler"]):  # type: ignore[misc]
    """Subclass of a fused class with its own step."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * value for value in super().step(*args, **kwargs, return_dict=False))


def test_subclass_of_fused_class_keeps_overrides() -> None:
    x, output = torch.randn(2, 1, 4, 8, 8).unbind()
    plain, doubled = fastdiff.diffusers.DDIMScheduler(), Doubled()
    for scheduler in (plain, doubled):
        scheduler.set_timesteps(3)
    once = plain.step(output, plain.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(doubled.step(output, doubled.timesteps[0], x)[0], 2 * once)
    copied = pickle.loads(pickle.dumps(doubled))
    assert type(copied) is Doubled
    assert torch.equal(copied.step(output, copied.timesteps[0], x)[0], 2 * once)
