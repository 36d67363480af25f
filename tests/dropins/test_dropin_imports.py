# SPDX-License-Identifier: MIT
"""The classes of fastdiff.diffusers: where a package is missing, and where somebody builds on one."""

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
    with pytest.raises(AttributeError, match=name):
        getattr(fastdiff.diffusers, name)


class Doubled(fastdiff.diffusers.CLASSES["DDIMScheduler"]):  # type: ignore[misc]
    """A class over a fused one, with a step of its own."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * value for value in super().step(*args, **kwargs, return_dict=False))


def test_a_class_over_a_fused_one_keeps_what_it_overrides() -> None:
    x, output = torch.randn(2, 1, 4, 8, 8).unbind()
    plain, doubled = fastdiff.diffusers.DDIMScheduler(), Doubled()
    for scheduler in (plain, doubled):
        scheduler.set_timesteps(3)
    once = plain.step(output, plain.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(doubled.step(output, doubled.timesteps[0], x)[0], 2 * once)
    copied = pickle.loads(pickle.dumps(doubled))
    assert type(copied) is Doubled
    assert torch.equal(copied.step(output, copied.timesteps[0], x)[0], 2 * once)
