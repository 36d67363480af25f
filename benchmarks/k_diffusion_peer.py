# SPDX-License-Identifier: MIT
"""Peer "k-diffusion": its sampling functions, with a model that combines two precomputed outputs.

The combination is used as the denoised sample; a wrapper around a real model would do more work.

``import k_diffusion`` imports packages for training and evaluation (torchvision, wandb, clean-fid, ...) that its
samplers do not use. Therefore only its sampling.py is loaded, unchanged, with the functions of utils.py that it uses:
currently `append_dims`, four lines. torchdiffeq and torchsde, which sampling.py imports, have to be installed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .cases import GUIDANCE, Case, Tensors
from .peers import RepeatingLoop

_ALONE = "_k_diffusion_alone"


@functools.cache
def load_sampling() -> ModuleType:
    """Import k_diffusion.sampling without the rest of the package.

    Raises:
        ImportError: k-diffusion, or a package that its sampling.py imports, is not installed.
    """
    return load("sampling")


def load(module: str) -> ModuleType:
    """Import a module of k-diffusion that needs its sampling.py and parts of its utils.py at most.

    Raises:
        ImportError: k-diffusion, or a package that the module imports, is not installed.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ImportError("k-diffusion is not installed")
    folder = Path(found.submodule_search_locations[0])
    if _ALONE not in sys.modules:
        used = {
            node.attr
            for name in ("sampling", "external")
            for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "utils"
        }
        source = ast.parse((folder / "utils.py").read_text())
        source.body = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in used]
        package, utils = ModuleType(_ALONE), ModuleType(f"{_ALONE}.utils")
        exec(compile(source, str(folder / "utils.py"), "exec"), vars(utils))
        vars(package).update(__path__=[str(folder)], utils=utils)
        sys.modules[_ALONE] = package
        sys.modules[utils.__name__] = utils
    try:
        return importlib.import_module(f"{_ALONE}.{module}")
    except ImportError:
        del sys.modules[_ALONE]
        raise


def repeating_loops(case: Case, sets: Sequence[Tensors]) -> list[RepeatingLoop]:
    """Return one loop that advances by a whole loop at a time, rotating through the sets of model outputs.

    k-diffusion's functions cannot stop between steps.
    """
    sampling = load_sampling()
    if case.spec.k_diffusion is None:
        raise RuntimeError(f"k-diffusion has no {case.op}")
    name, arguments = case.spec.k_diffusion
    function = getattr(sampling, name)
    sigmas = sampling.get_sigmas_karras(case.steps, 0.03, 14.6, device=case.device)
    outputs = itertools.cycle(sets)

    def model(x: Any, sigma: Any) -> Any:
        _, cond, uncond = next(outputs)
        return uncond + GUIDANCE * (cond - uncond)

    def advance() -> None:
        function(model, sets[0].sample, sigmas, disable=True, **arguments)

    return [RepeatingLoop(advance, len(case.table))]
