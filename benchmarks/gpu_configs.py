# SPDX-License-Identifier: MIT
"""Which sizes of blocks a GPU takes best: ``python -m benchmarks.gpu_configs`` sweeps them, prints the table's lines.

Every kernel of both backends is taken at several shapes and dtypes with every candidate.  Candidates take turns, round
by round; each launch reads other tensors than the one before, more of them than the last-level cache holds; launches
are replayed from a CUDA graph and timed by events; a figure is the median of its rounds.  A candidate whose results are
not the default's, bit for bit, ends the run.  ``--rehearse`` runs all of it without a GPU, at tiny sizes, with Triton's
interpreter and the host's clock: its figures mean nothing, and it prints no line for the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.command import CommandParser, run_command
from fastdiff.errors import error_message
from fastdiff.files import check_writable, write_whole
from fastdiff.ops import backends
from fastdiff.row_layout import PREV_SAMPLE, ROW_WIDTH, compute_dtype

KINDS = ("step", "draw", "randn", "sum", "select")
BACKENDS = ("cuda", "triton")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SHAPES = {"image": (1, 4, 64, 64), "batch": (8, 4, 128, 128), "video": (1, 16, 21, 90, 160)}
TINY = {"tiny": (2, 2, 5, 7)}

#: An entry has to be worth its line: less than this is the noise of a run.
WORTH = 0.02

#: A candidate: of Triton `Config`'s fields, of CUDA the one number of its kind.
Candidate = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    backend: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def element_size(self) -> int:
        return torch.empty((), dtype=self.dtype).element_size()

    @property
    def bytes_moved(self) -> int:
        """What one launch has to read and write: x, c, u and x again; the numbers; what is reduced."""
        tensors = {"step": 4, "draw": 4, "randn": 1, "sum": 1, "select": 1}[self.kind]
        return tensors * math.prod(self.shape) * self.element_size


def candidates(backend: str, kind: str, rehearse: bool = False) -> list[Candidate]:
    """What is tried for a kind of kernel, the default among it."""
    if backend == "cuda":
        tried = [(n,) for n in ((4, 8, 16, 32, 64) if kind == "select" else (64, 128, 256, 512))]
    elif kind == "sum":
        tried = [(block, warps) for block in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8) if block >= warps / 2]
    elif kind == "select":
        tried = [(tile, warps, tiles) for tile in (1024, 2048, 4096) for warps in (4, 8) for tiles in (4, 8, 16)]
    else:
        # 4 to 32 elements a thread.
        tried = [(b, w) for b in (512, 1024, 2048, 4096, 8192) for w in (2, 4, 8, 16) if 4 <= b // (32 * w) <= 32]
    default = default_of(backend, kind)
    others = [candidate for candidate in tried if candidate != default]
    return [default, *(others[:1] if rehearse else others)]


def default_of(backend: str, kind: str) -> Candidate:
    """The configuration without an entry."""
    if backend == "cuda":
        return ({"step": 256, "draw": 256, "randn": 256, "sum": 128, "select": 16}[kind],)
    config = importlib.import_module("fastdiff.kernels.config").DEFAULT[kind]
    return (config.block, config.num_warps, config.tiles) if kind == "select" else (config.block, config.num_warps)


@contextlib.contextmanager
def configured(backend: str, kind: str, candidate: Candidate) -> Iterator[None]:
    """Launch with a candidate inside a ``with`` block."""
    if backend == "triton":
        module = importlib.import_module("fastdiff.kernels.config")
        with module.override(**{kind: module.Config(*candidate)}):
            yield
        return
    extension = backends.extension
    assert extension is not None
    sizes = {name: default_of("cuda", name)[0] for name in KINDS}
    extension._set_cuda_config([*{**sizes, kind: candidate[0]}.values()])
    try:
        yield
    finally:
        extension._set_cuda_config(None)


def work_of(case: Case, device: torch.device) -> Callable[[], Tensor]:
    """One launch on tensors of its own; the same values in every call, so that candidates can be compared."""
    x, c, u = torch.randn(3, *case.shape, device=device).to(case.dtype).unbind()
    batch = case.shape[0]
    seeds = torch.arange(batch, device=device)
    if case.kind == "randn":
        return lambda: ops.randn(case.shape, seeds, 1, dtype=case.dtype, backend=case.backend)
    if case.kind == "sum":
        return lambda: ops.std(x, backend=case.backend)
    if case.kind == "select":
        return lambda: ops.quantile(x, 0.995, absolute=True, backend=case.backend)
    table = torch.zeros(1, ROW_WIDTH, dtype=compute_dtype(case.dtype), device=device)
    table[0, PREV_SAMPLE : PREV_SAMPLE + 2] = torch.tensor([0.75, 0.5])
    guidance, out = torch.full((1,), 3.0, dtype=table.dtype, device=device), torch.empty_like(x)
    drawn: dict[str, Any] = {}
    if case.kind == "draw":
        table[0, PREV_SAMPLE + 7] = 0.25
        drawn = {"seeds": seeds, "noise_step": 1}
    return lambda: ops.step(
        x, c, table, 0, uncond=u, guidance_scale=guidance, out=(out,), backend=case.backend, **drawn
    )[0]  # fmt: skip


class Timer:
    """Launches of one candidate over rotating tensors: from a graph on a GPU, by the host's clock elsewhere."""

    def __init__(self, works: Sequence[Callable[[], Tensor]], device: torch.device, replays: int) -> None:
        self._works, self._replays, self._graph = works, replays, None
        if device.type == "cpu":
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for work in works[:2]:  # compiles
                work()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            # Results are kept until the end of the capture, or their memory would be one.
            self._kept = [work() for work in works]
        self._graph.replay()
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Of one launch, in one round."""
        launches = len(self._works) * self._replays
        if self._graph is None:
            begin = time.perf_counter()
            for _ in range(self._replays):
                for work in self._works:
                    work()
            return (time.perf_counter() - begin) / launches * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / launches * 1e3


def measure(case: Case, device: torch.device, rounds: int, rehearse: bool) -> list[dict[str, Any]]:
    """Every candidate of a case, the default first.

    Raises:
        RuntimeError: a candidate's result is not the default's to the bit.
    """
    cache = 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    copies = 2 if rehearse else max(2, min(4096, math.ceil(4 * cache / case.bytes_moved)))
    works = [work_of(case, device) for _ in range(copies)]
    expected, timers = None, []
    tried = candidates(case.backend, case.kind, rehearse)
    for candidate in tried:
        with configured(case.backend, case.kind, candidate):
            result = works[0]().clone()
            expected = result if expected is None else expected
            if not torch.equal(result.view(torch.uint8), expected.view(torch.uint8)):
                raise RuntimeError(
                    error_message(
                        "gpu_configs",
                        f"{case.kind} of {case.backend} with {candidate}",
                        "has other bits than with the default",
                        "the same bits whatever the configuration",
                        "report it with this line: it is a fault of the kernel",
                    )
                )
            timers.append(Timer(works, device, replays=1 if rehearse else max(1, 200 // copies)))
    times: list[list[float]] = [[] for _ in tried]
    for turn in range(rounds):
        order = range(len(tried)) if turn % 2 == 0 else reversed(range(len(tried)))
        for i in order:
            with configured(case.backend, case.kind, tried[i]):
                times[i].append(timers[i].microseconds())
    return [
        {
            "backend": case.backend,
            "kind": case.kind,
            "dtype": str(case.dtype).removeprefix("torch."),
            "element_size": case.element_size,
            "shape": list(case.shape),
            "config": list(candidate),
            "microseconds": statistics.median(own),
            "gigabytes_a_second": case.bytes_moved / statistics.median(own) / 1e3,
        }
        for candidate, own in zip(tried, times, strict=True)
    ]


def best(results: Sequence[dict[str, Any]], backend: str, kind: str, element_size: int | None = None) -> Candidate:
    """The candidate with the least geometric mean of its times over the default's; the default, unless worth a line."""
    default = default_of(backend, kind)
    ratios: dict[Candidate, list[float]] = {}
    by_case: dict[tuple[Any, ...], dict[Candidate, float]] = {}
    for line in results:
        if (line["backend"], line["kind"]) == (backend, kind) and element_size in (None, line["element_size"]):
            key = (line["dtype"], tuple(line["shape"]))
            by_case.setdefault(key, {})[tuple(line["config"])] = line["microseconds"]
    for times in by_case.values():
        for candidate, own in times.items():
            ratios.setdefault(candidate, []).append(own / times[default])
    means = {candidate: statistics.geometric_mean(own) for candidate, own in ratios.items()}
    chosen = min(means, key=lambda candidate: means[candidate], default=default)
    return chosen if means.get(chosen, 1.0) < 1.0 - WORTH else default


def entries(results: Sequence[dict[str, Any]], chip: str) -> list[str]:
    """The lines for kernels/triton/config.py and csrc/cuda/config.h; none where the defaults are as good."""
    lines = []
    sizes = sorted({line["element_size"] for line in results})
    found = {
        (kind, size): best(results, "triton", kind, size)
        for kind in KINDS
        for size in sizes
        if any((r["backend"], r["kind"], r["element_size"]) == ("triton", kind, size) for r in results)
    }
    found = {key: config for key, config in found.items() if config != default_of("triton", key[0])}
    if found:
        inside = ", ".join(f'("{kind}", {size}): Config{config}' for (kind, size), config in found.items())
        lines.append(f'"{chip}": {{{inside}}},')
    chosen = [best(results, "cuda", kind)[0] for kind in KINDS]
    if chip.startswith("sm_") and chosen != [default_of("cuda", kind)[0] for kind in KINDS]:
        lines.append(f"{{{chip.removeprefix('sm_')}, {{{', '.join(map(str, chosen))}}}}},")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.gpu_configs", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    add("--rounds", type=int, default=15)
    add("--json", type=Path, help="write every figure")
    add("--rehearse", action="store_true", help="without a GPU: tiny sizes, no figure worth keeping")
    options = parser.parse_args(arguments)
    if options.json is not None:
        check_writable(options.json, operation="gpu_configs", argument="--json")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Sweep, print the table and its lines, write what was asked for.

    Raises:
        RuntimeError: there is no GPU and this is no rehearsal, or a candidate changes a result.
    """
    options = parse(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        raise RuntimeError(
            error_message(
                "gpu_configs", "the GPU", "is missing", "one that torch finds", "run it there, or pass --rehearse"
            )
        )
    device = torch.device("cpu" if options.rehearse else "cuda")
    shapes = TINY if options.rehearse else {name: SHAPES[name] for name in options.shapes}
    report: dict[str, Any] = {"rehearsal": options.rehearse, "chip": "none", "absent": {}, "results": []}
    for backend in options.backends:
        reason = backends.why_missing(backend)
        if not reason and not backends._serves(backend, device):
            reason = f"it does not serve {device.type}"
        if reason:
            report["absent"][backend] = reason
            print(f"{backend} is absent: {reason}", file=sys.stderr)
            continue
        if backend == "triton" or report["chip"] == "none":
            report["chip"] = _chip(device)
        for kind in options.kinds:
            for dtype in options.dtypes:
                for shape in shapes.values():
                    case = Case(backend, kind, DTYPES[dtype], shape)
                    print(f"{backend} {kind} {dtype} {'x'.join(map(str, shape))}", file=sys.stderr, flush=True)
                    report["results"] += measure(case, device, options.rounds, options.rehearse)
    report["entries"] = [] if options.rehearse else entries(report["results"], report["chip"])
    _print(report)
    if options.json is not None:
        text = json.dumps(report, indent=1) + "\n"
        write_whole(options.json, text.encode(), operation="gpu_configs", argument="--json")
    return report


def _chip(device: torch.device) -> str:
    if device.type == "cpu":
        return "none"
    if torch.version.hip is not None:
        return str(importlib.import_module("fastdiff.kernels.config").chip(torch.device("cuda", 0)))
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _print(report: dict[str, Any]) -> None:
    columns = "{:8} {:7} {:9} {:16} {:>16} {:>10} {:>8}"
    print(columns.format("backend", "kind", "dtype", "shape", "configuration", "us", "GB/s"))
    for line in report["results"]:
        shape, config = "x".join(map(str, line["shape"])), ", ".join(map(str, line["config"]))
        print(
            columns.format(
                line["backend"], line["kind"], line["dtype"], shape, config, f"{line['microseconds']:.2f}",
                f"{line['gigabytes_a_second']:.0f}",
            )
        )  # fmt: skip
    if report["rehearsal"]:
        print("a rehearsal: these figures say nothing of any GPU, and none is for the table")
        return
    print(
        "\n".join(report["entries"]) or f"the defaults are within {100 * WORTH:.0f} % of the best on {report['chip']}"
    )


def _command() -> None:
    main()


if __name__ == "__main__":
    sys.exit(run_command("gpu_configs", _command))
