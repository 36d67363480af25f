# SPDX-License-Identifier: MIT
"""All implementations of a case's steps, each as a unit that a clock can time.

A unit is a loop without its first step, which resets the samples.  With several sets of tensors each step is taken on
one set after the other, so that no set is in a cache when it is used again.
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
from ..peers import RepeatingLoop, fastdiff_loop
from .cases import GpuCase
from .clock import Unit
from .launchers import Launcher, launchers

#: Names in the results, besides the launchers. The compiled implementations are measured on core cases only.
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
    """Return a warmed-up unit for each implementation that can run this case.

    Args:
        case: the case.
        sets: one set of tensors for a warm cache, more for a cold one.
        absent: receives the other implementations and the reason.
        only: names of implementations to make; None for all.
    """
    makers: dict[str, Callable[[], Unit]] = {}
    for name, launcher in launchers(case.device).items():
        if launcher.missing:
            absent[name] = launcher.missing
        else:
            makers[name] = functools.partial(_ours, case, sets, launcher)
    # A graph contains the same kernels for each launcher, so capture only the default one's.
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
            unit.run()  # compile, allocate, copy tables to the device
        except Exception as error:  # a peer or its compiler may raise any type; the run continues
            absent[f"{name}: {case.name}"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        made[name] = unit
    return made


def eager(loops: Sequence[RepeatingLoop], rows: int) -> Unit:
    """Return a unit of steps 2 to `rows` of each loop, alternating; a loop that advances as a whole is timed whole."""
    if loops[0].steps > 1:
        return Unit(lambda: None, loops[0].advance, loops[0].steps)
    advances = [loop.advance for loop in loops]
    turns = advances * (rows - 1)

    def first() -> None:
        for advance in advances:
            advance()

    def rest() -> None:
        for advance in turns:
            advance()

    return Unit(first, rest, len(turns))


def _ours(case: GpuCase, sets: Sequence[Tensors], launcher: Launcher) -> Unit:
    loops = [
        RepeatingLoop(fastdiff_loop(case, tensors, launcher.backend, model_input=_model_input(case)))
        for tensors in sets
    ]
    return launcher.wrap(eager(loops, len(case.table)))


def _graph(case: GpuCase, sets: Sequence[Tensors]) -> Unit:
    """Return a unit that replays a CUDA graph of the same steps."""
    samples = [torch.empty_like(tensors.sample) for tensors in sets]
    loops = [
        RepeatingLoop(fastdiff_loop(case, tensors, None, sample=sample, model_input=_model_input(case)))
        for tensors, sample in zip(sets, samples, strict=True)
    ]
    unit = eager(loops, len(case.table))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # allocate and load everything before the capture
        unit.prepare()
        unit.run()
        unit.prepare()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unit.run()

    def restore() -> None:  # a replay continues from the last one's samples, which would grow without bound
        for sample, tensors in zip(samples, sets, strict=True):
            sample.copy_(tensors.sample)

    # The unit keeps the tensors of the graph alive.
    return Unit(restore, functools.partial(_replay, graph, unit), unit.steps)


def _replay(graph: Any, keeps_alive: Unit) -> None:
    graph.replay()


def _peer(name: str, case: GpuCase, sets: Sequence[Tensors]) -> Unit:
    rows = len(case.table)
    if name == "ours, torch.compile":
        return eager([RepeatingLoop(compiled_loop(case, tensors)) for tensors in sets], rows)
    if name == "reference":
        return eager([RepeatingLoop(fastdiff_loop(case, tensors, "reference")) for tensors in sets], rows)
    if name == "torch.compile of the reference":
        return eager(compiled_peer.repeating_loops(case, sets), rows)
    if name == "k-diffusion":
        return eager(k_diffusion_peer.repeating_loops(case, sets), rows)
    return eager(diffusers_peer.repeating_loops(case, sets, compiled=name == "diffusers, torch.compile"), rows)


def compiled_loop(case: GpuCase, tensors: Tensors, sample: Tensor | None = None) -> Advance:
    """Return a function that takes the next step with one compiled function for all rows; it writes `sample`."""
    start, cond, uncond = tensors
    sample = torch.empty_like(start) if sample is None else sample
    table = case.table.shared_coefficients(start.dtype, start.device)
    used = {j for slots in case.table.kept_slots for j in slots}
    registers = [torch.zeros_like(start) if j in used else None for j in range(NUM_REGISTERS)]
    scale = torch.full((1,), GUIDANCE, dtype=table.dtype, device=start.device)
    seeds = torch.arange(case.shape[0], device=start.device) if case.spec.seeded else None
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
