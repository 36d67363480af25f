# SPDX-License-Identifier: MIT
"""Aliases for moved modules: an import by the old name returns the module of the new name, with a DeprecationWarning.

The old name is an alias of the same module object, so pickles that contain it can be read.  The next release removes
the aliases.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

#: New module names by old name.
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
    """Import finder and loader for the old names in `MOVED`; loading one puts the new module into `sys.modules`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        # `warnings` skips the frames of the import system, so this level is the importing line.
        sys.modules[module.__name__] = _import_moved(module.__name__, stacklevel=3)


def _import_moved(old: str, stacklevel: int) -> ModuleType:
    message = f"{old} has moved to {MOVED[old]}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel)
    return importlib.import_module(MOVED[old])


def install() -> None:
    """Add the finder for the old names, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def attribute(package: str, name: str) -> ModuleType:
    """Return a moved submodule that used to be an attribute of a package.

    Raises:
        AttributeError: the package had no such submodule that moved.
    """
    old = f"{package}.{name}"
    if old not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    if old not in sys.modules:
        sys.modules[old] = _import_moved(old, stacklevel=4)
    setattr(sys.modules[package], name, sys.modules[old])
    return sys.modules[old]
