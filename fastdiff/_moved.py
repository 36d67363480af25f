# SPDX-License-Identifier: MIT
"""The modules that have moved: an import by the old name gives the module of the new one, with a warning.

The old name is an alias of the same module object, so pickles that name it are read as well.  The aliases go with the
next release.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

#: The new name of each module, by its old one.
MOVED = {
    f"{__package__}.{old}": f"{__package__}.{new}"
    for old, new in {
        "affine": "solvers.affine",
        "base_sampler": "samplers.base",
        "betas": "schedules.betas",
        "brownian_path": "noise.brownian_path",
        "call": "ops.call",
        "diffusers.brownian": "noise.brownian_tree",
        "diffusers.patching": "diffusers.patch",
        "diffusers.schedulers": "diffusers.registry",
        "images": "analysis.images",
        "levels": "schedules.levels",
        "loop": "sampling.loop",
        "manager": "samplers.manager",
        "measure": "sampling.timing",
        "memory": "ops.memory",
        "ops.built_for": "built_for",
        "ops.functional": "sampling.single_steps",
        "ops.fused": "ops.step",
        "ops.gradients": "ops.autograd",
        "ops.library": "ops.custom_ops",
        "ops.run": "ops.dispatch",
        "reductions_reference": "ops.reductions_reference",
        "reference": "ops.reference",
        "references": "sampling.reference_counts",
        "rng": "noise.generators",
        "sampling_config": "sampling.config",
        "schedule_config": "schedules.config",
        "seeded_draws": "noise.seeded_draws",
        "stepper": "sampling.stepper",
        "table": "solvers.table",
        "thresholding": "ops.thresholding",
        "timesteps": "schedules.timesteps",
        "torch_noise": "noise.torch_normals",
        "transfer": "device_copy",
    }.items()
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old names of `MOVED`, and puts the module of the new name in the place of the one that is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        # The frames of the import system do not count: the warning names the line that imports.
        sys.modules[module.__name__] = _moved(module.__name__, stacklevel=3)


def _moved(old: str, stacklevel: int) -> ModuleType:
    message = f"{old} has moved to {MOVED[old]}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel)
    return importlib.import_module(MOVED[old])


def install() -> None:
    """Let the old names be found; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def attribute(package: str, name: str) -> ModuleType:
    """The moved submodule that was an attribute of a package.

    Raises:
        AttributeError: no submodule of that name has moved.
    """
    old = f"{package}.{name}"
    if old not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    if old not in sys.modules:
        sys.modules[old] = _moved(old, stacklevel=4)
    setattr(sys.modules[package], name, sys.modules[old])
    return sys.modules[old]
