# SPDX-License-Identifier: MIT
"""The size and warps of a program: looked up in a table, by kind of kernel, chip and element size.

A table rather than an autotuner: the same call takes the same time on every run, the first one compiles one kernel and
not ten, and a captured graph holds what was measured.  Results are the same bits whatever the configuration.

`MEASURED` is empty: no configuration has been measured on a GPU yet, and every chip takes `DEFAULT`.  An entry is one
line, printed by ``python -m benchmarks.gpu_configs`` on that chip.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

import triton

from .launch import on_device


@dataclasses.dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        block: elements a program (step, draw, randn); blocks of 1024 elements a program (sum); elements a tile
            (select).
        num_warps: of a program.
        tiles: a program takes one after another (select alone).

    Raises:
        ValueError: a number that the kernels cannot take.
    """

    block: int
    num_warps: int
    tiles: int = 1

    def __post_init__(self) -> None:
        for name, most in (("block", 2**16), ("num_warps", 32), ("tiles", 2**10)):
            value = getattr(self, name)
            if not (isinstance(value, int) and 1 <= value <= most and value & (value - 1) == 0):
                raise ValueError(f"Config: {name} is {value!r}, expected a power of two from 1 to {most}; choose one")


#: Kinds of kernel: a step that draws no noise, one that does, normal numbers alone, sums, selection.
KINDS = ("step", "draw", "randn", "sum", "select")

DEFAULT = {
    # 8 elements a thread: one 16-byte access of half types and two of float32.
    "step": Config(1024, 4),
    "draw": Config(1024, 4),
    "randn": Config(1024, 4),  # two chunks a thread
    "sum": Config(4, 4),  # two lanes a thread
    "select": Config(2048, 8, tiles=8),
}

#: Per chip, as `chip` names it, the kind and the bytes of an element: ``"sm_90": {("step", 4): Config(2048, 8)}``.
MEASURED: dict[str, dict[tuple[str, int], Config]] = {}

#: Kernels of one program a sample, whose work is small.
FEW_WARPS = 4

_chosen: dict[tuple[str, int, int], Config] = {}
_override: dict[str, Config] = {}
#: True inside a block of `override`: launches from C++ have the table's configuration.
_overridden = False


def config_for(kind: str, x: Tensor) -> Config:
    """The configuration of a kind of kernel for tensors like this one."""
    key = (kind, x.element_size(), x.get_device())
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _override.get(kind) or lookup(chip(x.device), kind, x.element_size())
    return found


def lookup(name: str, kind: str, element_size: int) -> Config:
    """Return the table's configuration for a chip; the default where it has none."""
    return MEASURED.get(name, {}).get((kind, element_size), DEFAULT[kind])


def chip(device: torch.device) -> str:
    """The chip of a device as Triton's compiler calls it, such as "sm_90" or "gfx942"; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    with on_device(device):
        target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Take these configurations inside a ``with`` block, by kind: ``override(step=Config(2048, 8))``.

    Raises:
        ValueError: there is no such kind of kernel, or it cannot take that size.
    """
    for kind, config in configs.items():
        if kind not in KINDS:
            raise ValueError(f"override: the kind is {kind!r}, expected one of {', '.join(KINDS)}; correct the name")
        if kind in ("draw", "randn") and config.block < 4:
            raise ValueError(f"override: block is {config.block} for {kind!r}, expected 4 or more; raise it")
    global _overridden
    before = dict(_override)
    _override.update(configs)
    _overridden = True
    _chosen.clear()
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
        _overridden = bool(before)
        _chosen.clear()
