# SPDX-License-Identifier: MIT
"""Time of a step on the device and on the host: the cases of the targets, then torch.compile beside them.

A full run adds copies, further cases and implementations, mixed rows, noise and reductions. The implementations of a
part alternate round by round, so that a change of the device's speed affects all. The results are stored after each
part; parts that do not fit into the time limit are listed as not measured.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff import ops

from ..copy_bandwidth import copies_for
from ..timing import quantiles, ratios
from . import copy_bandwidth, mixed_rows, results, standalone_ops
from .cases import SHAPES, SMALL, GpuCase, absent_packages, footprint, select_cases
from .clock import Clock, Unit, clock_for
from .counting import count
from .implementations import COMPILING, PEERS, units
from .launchers import NAMES
from .machine import l2_bytes, machine
from .targets import evaluate_targets

#: Launches in the queue beyond which the host may have to wait for the device.
QUEUE_LIMIT = 900


class Run:
    """One run: its clock, its report and its time limit."""

    def __init__(
        self,
        device: str,
        path: Path,
        *,
        rehearse: bool,
        rounds: int,
        seconds: float,
        compile_peers: bool = True,
        full: bool = True,
    ) -> None:
        self.device, self.path, self.rehearse, self.rounds = device, path, rehearse, rounds
        self.clock: Clock = clock_for(device)
        self.absent: dict[str, str] = absent_packages()
        #: Names of the parts not measured yet; they are stored with the report, even if the run is killed.
        self.not_measured: list[str] = []
        self.failed: dict[str, str] = {}
        self.report: dict[str, Any] = {"machine": machine(device), "ceilings": [], "cases": [], "pieces": []}
        #: The case of each line of the report.
        self._lines: dict[int, GpuCase | mixed_rows.MixedCase] = {}
        self._deadline = time.monotonic() + seconds
        self._compile_peers, self._full = compile_peers, full

    def measure_all(self, only: list[str] | None = None) -> dict[str, Any]:
        """Measure and store all parts, or only those of some samplers; return the stored report."""
        selected = select_cases(self.device, self.rehearse, only, full=self._full)
        mixed = self._mixed_cases() if self._full and only is None else []
        parts: list[tuple[str, Callable[[], None]]] = [
            (f"{case.name}, {cache}", lambda case=case, cache=cache: self._case(case, cache))  # type: ignore[misc]
            for case in selected
            for cache in self._caches(case.tensor_bytes)
        ]
        if self._compile_peers:
            parts += [
                (f"{case.name}, compiled", lambda case=case: self._compiled(case))  # type: ignore[misc]
                for case in selected
                if case.core
            ]
        if self._full and only is None:
            parts.insert(0, ("copies", self._copy_bandwidth))
            parts += [(case.name, lambda case=case: self._mixed(case)) for case in mixed]  # type: ignore[misc]
            parts.append(("noise and reductions", self._standalone_ops))
        # Last, because the profiler may slow down launches after it has been used.
        counted = [*selected, *mixed] if self._full else selected[:4]
        parts += [(f"counting {case.name}", lambda case=case: self._count(case)) for case in counted]  # type: ignore[misc]
        self.not_measured = [name for name, _ in parts]
        self.store()
        grad, collecting = torch.is_grad_enabled(), gc.isenabled()
        torch.set_grad_enabled(False)
        gc.disable()
        try:
            for name, part in parts:
                if time.monotonic() > self._deadline:
                    break
                print(name, file=sys.stderr, flush=True)
                try:
                    part()
                except Exception as error:  # one failing part must not end the run
                    self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    traceback.print_exc()
                self.not_measured.remove(name)
                self.store()
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()
        finally:
            torch.set_grad_enabled(grad)
            if collecting:
                gc.enable()
        return self.store()

    def store(self) -> dict[str, Any]:
        """Write the report so far, with the targets."""
        sections = {**self.report, "absent": self.absent, "not_measured": self.not_measured, "failed": self.failed}
        stored = results.store(self.path, self.rehearse, **sections)
        return results.store(self.path, self.rehearse, verdict=evaluate_targets(stored))

    # ------------------------------------------------------------------------------------------------------- the parts

    def _copy_bandwidth(self) -> None:
        sizes = copy_bandwidth.SIZES[:1] if self.rehearse else copy_bandwidth.SIZES
        if copy_bandwidth.why_missing():
            self.absent["copy, Triton"] = copy_bandwidth.why_missing()
        for size in (size >> 8 if self.rehearse else size for size in sizes):
            for cache in ("warm", "cold"):
                times = self._in_turns(copy_bandwidth.copy_units(size, cache, self.device), host=False)["elapsed"]
                best = min(times, key=lambda name: quantiles(times[name])["median"])
                self.report["ceilings"].append(
                    {
                        "bytes": size,
                        "cache": cache,
                        "microseconds": {name: quantiles(values) for name, values in times.items()},
                        "best": best,
                        "bytes_a_second": size / quantiles(times[best])["median"] * 1e6,
                    }
                )

    def _case(self, case: GpuCase, cache: str) -> None:
        sets = case.tensors(self._copies(cache, footprint(case)))
        made = units(case, sets, self.absent, self._implementations(case))
        copies = copy_bandwidth.copy_units(case.bytes_a_step, cache, self.device)
        line: dict[str, Any] = {
            "op": case.op,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "cache": cache,
            "default": ops.backend_for(sets[0].sample),
            "model_input": case.model_input,
            "steps": len(case.table),
            "bytes": case.bytes_a_step,
        }
        self._lines[len(self.report["cases"])] = case
        self.report["cases"].append({**line, **self._measured(made, copies)})

    def _compiled(self, case: GpuCase) -> None:
        """Measure the compiled implementations beside fastdiff's, into the case's line with the last cache state."""
        cache = self._caches(case.tensor_bytes)[-1]
        line = next(
            (self.report["cases"][i] for i, found in reversed(self._lines.items()) if found == case),
            None,
        )
        if line is None:
            raise RuntimeError("the case itself was not measured")
        dtype = "float32" if len(case.shape) == 4 else "bfloat16"
        names = ["torch.compile of the reference"]
        if self._full:
            names.append("ours, torch.compile")
            # diffusers' step compiles for each set of tensors.
            names += ["diffusers, torch.compile"] if (cache, case.op, case.dtype) == ("warm", "ddim", dtype) else []
        sets = case.tensors(self._copies(cache, footprint(case)))
        times = self._in_turns(units(case, sets, self.absent, [*NAMES[:2], *names]))
        line["compiled"] = _all_quantiles(times)
        for way in NAMES[:2]:
            peer = times["elapsed"].get(names[0])
            if way in times["elapsed"] and peer is not None:
                line["compiled"].setdefault("over_compiled", {})[way] = quantiles(ratios(times["elapsed"][way], peer))

    def _mixed(self, case: mixed_rows.MixedCase) -> None:
        tensor_bytes = torch.Size(case.shape).numel() * {"float32": 4, "bfloat16": 2}[case.dtype]
        cache = self._caches(tensor_bytes)[-1]
        made, moved = mixed_rows.units(
            case, self._copies(cache, 7 * tensor_bytes), self.absent, 1 if self.rehearse else 8
        )
        for unit in made.values():
            unit.run()
        copies = copy_bandwidth.copy_units(moved, cache, self.device)
        line = {
            "op": "mixed rows",
            "shape": list(case.shape),
            "dtype": case.dtype,
            "cache": cache,
            "model_input": False,
            "bytes": moved,
        }
        self._lines[len(self.report["cases"])] = case
        self.report["cases"].append({**line, **self._measured(made, copies)})

    def _standalone_ops(self) -> None:
        for kind, shape, made in standalone_ops.groups(self.device, self.rehearse):
            for unit in made.values():
                unit.run()
            times = self._in_turns(made)
            self.report["pieces"].append(
                {"op": kind, "shape": list(shape), "dtype": "float32", **_all_quantiles(times)}
            )

    # -------------------------------------------------------------------------------------------------------- helpers

    def _measured(self, made: dict[str, Unit], copies: dict[str, Unit]) -> dict[str, Any]:
        """Time the units and the copies, and compute the share of the best copy's bandwidth."""
        for unit in copies.values():
            unit.run()
        times = self._in_turns({**made, **copies})
        elapsed = times["elapsed"]
        best = min(copies, key=lambda name: quantiles(elapsed[name])["median"])
        return {
            "counts": {},
            **_all_quantiles({kind: {name: taken[name] for name in made} for kind, taken in times.items()}),
            "copy": {"best": best, **quantiles(elapsed[best])},
            "share_of_copy": {name: quantiles(ratios(elapsed[best], elapsed[name])) for name in made},
        }

    def _count(self, case: GpuCase | mixed_rows.MixedCase) -> None:
        """Count kernels, copies and waits of a case's steps into its first line, if it has one."""
        line = next((self.report["cases"][i] for i, found in self._lines.items() if found == case), None)
        if line is None:
            return
        if isinstance(case, mixed_rows.MixedCase):
            made, _ = mixed_rows.units(case, 1, self.absent)
        else:
            made = units(case, case.tensors(), self.absent, self._implementations(case))
        counts = line["counts"]
        for name, unit in made.items():
            unit.run()
            try:
                counts[name] = count(unit, self.device)
            except RuntimeError as error:
                self.absent[f"counts: {name}"] = str(error).splitlines()[0][:300]
        full = [name for name, counted in counts.items() if counted.get("launches", 0) * made[name].steps > QUEUE_LIMIT]
        if full:
            line["host_may_have_waited"] = full

    def _implementations(self, case: GpuCase) -> list[str]:
        """Return the implementations to measure besides the compiled ones.

        A run that is not full has the other libraries in DDIM at the small shape and at the first wide one.
        """
        everywhere = [name for name in (*NAMES, "CUDA graph", *PEERS) if name not in COMPILING]
        first = case.op == "ddim" and case.shape in (SHAPES["image-128"], SHAPES["latents-64"])
        return everywhere if self._full or first else [*NAMES[:2], "CUDA graph"]

    def _in_turns(self, made: Mapping[str, Unit], host: bool = True) -> dict[str, dict[str, list[float]]]:
        """Return for each unit microseconds per step of each round: on the host, and elapsed on the device."""
        names = list(made)
        taken: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in names} for kind in ("host", "elapsed")}
        for turn in range(self.rounds + 1):
            for name in names if turn % 2 == 0 else reversed(names):
                on_host = self.clock.host(made[name])
                elapsed = self.clock.elapsed(made[name], on_host)
                self.clock.synchronize()
                if turn > 0:  # the first round is a warm-up
                    taken["host"][name].append(on_host)
                    taken["elapsed"][name].append(elapsed)
        return taken if host else {"elapsed": taken["elapsed"]}

    def _caches(self, tensor_bytes: int) -> tuple[str, ...]:
        """Return the cache states to measure: cold only from an eighth of the cache on, where memory is the limit."""
        if self.rehearse:
            return ("warm",) if tensor_bytes > 100 else ("warm", "cold")
        if tensor_bytes < l2_bytes() // 8:
            return ("warm",)
        return ("warm", "cold") if self._full else ("cold",)

    def _copies(self, cache: str, of_bytes: int) -> int:
        return copies_for(cache, of_bytes, 1024 if self.rehearse else l2_bytes())

    def _mixed_cases(self) -> list[mixed_rows.MixedCase]:
        shapes = [SMALL["image-128"]] if self.rehearse else [SHAPES["images-64"], SHAPES["latents-64"]]
        return [
            mixed_rows.MixedCase(shape, dtype, self.device)
            for shape, dtype in zip(shapes, ("float32", "bfloat16"), strict=False)
        ]


def _all_quantiles(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    return {kind: {name: quantiles(values) for name, values in taken.items()} for kind, taken in times.items()}
