# SPDX-License-Identifier: MIT
"""Everybody who takes the steps of a case, each as a unit that a clock can time.

A unit is the loop without its first step: that one puts the samples back to the start, which is not part of a step.
With several sets of tensors each step is taken on one after the other, so that none is in a cache when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.row_layout import NUM_REGISTERS

from .. import compiled_peer, diffusers_peer, k_diffusion_peer
from ..cases import GUIDANCE, Tensors
from ..peers import Walk, fastdiff_walk
from .cases import GpuCase
from .clock import Unit
from .launchers import Launcher, launchers

#: Ours, then those whom we are held against, by the names of the results. Who compiles is measured on core cases alone.
COMPILING = ("ours, torch.compile", "torch.compile of the reference", "diffusers, torch.compile")
PEERS = (
    "ours, torch.compile",
    "reference",
    "torch.compile of the reference",
    "diffusers",
    "diffusers, torch.compile",
    "k-diffusion",
)

Advance = Callable[[], object]


def units(
    case: GpuCase, sets: Sequence[Tensors], absent: dict[str, str], only: Sequence[str] | None = None
) -> dict[str, Unit]:
    """A unit for each way that takes this case here, warmed up; `absent` is told of the others, and why.

    Args:
        sets: one set of tensors for a warm cache, more for a cold one.
        only: names of ways, to build those alone.
    """
    makers: dict[str, Callable[[], Unit]] = {}
    for name, launcher in launchers(case.device).items():
        if launcher.missing:
            absent[name] = launcher.missing
        else:
            makers[name] = functools.partial(_ours, case, sets, launcher)
    # A graph holds whichever launcher filled it: one is enough, the one that users get.
    if case.device == "cuda":
        makers["CUDA graph"] = functools.partial(_graph, case, sets)
    else:
        absent["CUDA graph"] = "graphs need a CUDA device"
    if not case.model_input:
        makers |= {name: functools.partial(_peer, name, case, sets) for name in PEERS}
    made = {}
    for name, make in makers.items():
        if (only is not None and name not in only) or (name in COMPILING and not case.core):
            continue
        try:
            unit = make()
            unit.prepare()
            unit.run()  # compiles, allocates, brings tables to the device
        except Exception as error:  # of many kinds, by what a peer or its compiler lacks; a run must not end with it
            absent[f"{name}: {case.name}"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        made[name] = unit
    return made


def eager(walks: Sequence[Walk], rows: int) -> Unit:
    """Steps 2 to `rows` of each walk, in turns; a walk of whole loops is taken whole."""
    if walks[0].steps > 1:
        return Unit(lambda: None, walks[0].advance, walks[0].steps)
    advances = [walk.advance for walk in walks]
    turns = advances * (rows - 1)

    def first() -> None:
        for advance in advances:
            advance()

    def rest() -> None:
        for advance in turns:
            advance()

    return Unit(first, rest, len(turns))


def _ours(case: GpuCase, sets: Sequence[Tensors], launcher: Launcher) -> Unit:
    walks = [Walk(fastdiff_walk(case, tensors, launcher.backend, model_input=_model_input(case))) for tensors in sets]
    return launcher.hold(eager(walks, len(case.table)))


def _graph(case: GpuCase, sets: Sequence[Tensors]) -> Unit:
    """The same steps, captured once and replayed."""
    samples = [torch.empty_like(tensors.sample) for tensors in sets]
    walks = [
        Walk(fastdiff_walk(case, tensors, None, sample=sample, model_input=_model_input(case)))
        for tensors, sample in zip(sets, samples, strict=True)
    ]
    unit = eager(walks, len(case.table))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # everything is made and loaded before it is captured
        unit.prepare()
        unit.run()
        unit.prepare()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unit.run()

    def restore() -> None:  # replays go on from where the last one ended, and would grow without end
        for sample, tensors in zip(samples, sets, strict=True):
            sample.copy_(tensors.sample)

    # What the graph reads and writes must outlive it.
    return Unit(restore, functools.partial(_replay, graph, unit), unit.steps)


def _replay(graph: Any, keeps_alive: Unit) -> None:
    graph.replay()


def _peer(name: str, case: GpuCase, sets: Sequence[Tensors]) -> Unit:
    rows = len(case.table)
    if name == "ours, torch.compile":
        return eager([Walk(compiled_walk(case, tensors)) for tensors in sets], rows)
    if name == "reference":
        return eager([Walk(fastdiff_walk(case, tensors, "reference")) for tensors in sets], rows)
    if name == "torch.compile of the reference":
        return eager(compiled_peer.walks(case, sets), rows)
    if name == "k-diffusion":
        return eager(k_diffusion_peer.walks(case, sets), rows)
    return eager(diffusers_peer.walks(case, sets, compiled=name == "diffusers, torch.compile"), rows)


def compiled_walk(case: GpuCase, tensors: Tensors, sample: Tensor | None = None) -> Advance:
    """One compiled function a step, its row in a tensor: one graph for all rows. It writes `sample`."""
    start, cond, uncond = tensors
    sample = torch.empty_like(start) if sample is None else sample
    table = case.table.shared_coefficients(start.dtype, start.device)
    used = {j for slots in case.table.kept_slots for j in slots}
    registers = [torch.zeros_like(start) if j in used else None for j in range(NUM_REGISTERS)]
    scale = torch.full((1,), GUIDANCE, dtype=table.dtype, device=start.device)
    seeds = torch.arange(case.shape[0], device=start.device) if case.recipe.seeded else None
    rows = list(torch.arange(len(case.table), device=start.device)[:, None].unbind())
    step = torch.compile(_one_step, fullgraph=True, dynamic=False)
    position = len(rows)

    def advance() -> None:
        nonlocal position
        if position == len(rows):
            sample.copy_(start)
            position = 0
        step(sample, cond, uncond, table, rows[position], registers, scale, seeds)
        position += 1

    return advance


def _one_step(
    sample: Tensor, cond: Tensor, uncond: Tensor, table: Tensor, row: Tensor, registers: Any, scale: Tensor, seeds: Any
) -> Tensor:
    step = 0 if seeds is None else row
    return ops.step_rows(
        sample,
        cond,
        table,
        row,
        registers,
        uncond=uncond,
        guidance_scale=scale,
        seeds=seeds,
        noise_step=step,
        out=sample,
    )


def _model_input(case: GpuCase) -> Tensor | None:
    if not case.model_input:
        return None
    return torch.empty((2 * case.shape[0], *case.shape[1:]), dtype=case.torch_dtype, device=case.device)
