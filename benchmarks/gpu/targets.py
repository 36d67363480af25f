# SPDX-License-Identifier: MIT
"""Performance targets, each met, not met or not measured, with its figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .dropins import CLASSES
from .host import DROPINS, GUIDED
from .launchers import NAMES

#: Device time of a step over that of a copy of as many bytes; with noise drawn in the step, which takes arithmetic.
COPY, COPY_DRAWN = 1.05, 1.25
#: Microseconds of the device for a step on one image's latent.
SMALL = 2.5
#: Device time over that of torch.compile of the same formula.
COMPILED = 1.0
#: Host time over the yardstick's: C++, Triton, a drop-in's step, one with torch's noise, an install without a compiler.
CPP, TRITON, DROPIN, DROPIN_DRAWS, PURE = 1.0, 1.5, 1.5, 2.0, 5.0
#: Time of diffusers' loop over a drop-in's: the geometric mean over the classes, and the least.
MEAN, LEAST = 15.0, 3.0

WIDE = (((64, 16, 128, 128), "bfloat16"), ((1, 16, 21, 90, 160), "bfloat16"), ((1, 16, 21, 90, 160), "float32"))
#: The launcher that answers for a default backend.
_LAUNCHER = {"cuda": NAMES[0], "cpu": NAMES[0], "triton": NAMES[1]}

Line = dict[str, Any]


def evaluate_targets(report: dict[str, Any]) -> list[Line]:
    """Return a line per target: the target, the figure, and one of "met", "not met", "not measured".

    For a dry run a line with a figure says "rehearsal".
    """
    lines = [*_correct(report), *_device(report.get("cases", [])), *_host(report), *_dropins(report)]
    if report.get("rehearsal", True):
        return [{**line, "verdict": "rehearsal"} if line["figure"] != "–" else line for line in lines]
    return lines


def show(lines: Iterable[Line]) -> str:
    """Return the targets as text, one per line."""
    return "\n".join(f"{line['verdict']:>12}  {line['figure']:>24}  {line['target']}" for line in lines)


def _correct(report: dict[str, Any]) -> list[Line]:
    tests = report.get("tests")
    run = None if tests is None or not (tests["whole"] or tests["failed"]) else len(tests["failed"])
    passed = 0 if tests is None else tests["passed"]
    lines = [_line("every test that needs a GPU passes", run, lambda n: n == 0, f"{{}} failed, {passed:,} passed")]
    for backend in ("cuda", "triton"):
        found = report.get("noise", {}).get("backends", {}).get(backend)
        values = found["mismatches"] if found and found["compared"] else None
        compared = f" of {found['compared']:,}" if found else ""
        lines.append(
            _line(f"noise by {backend}: the bits of the CPU", values, lambda n: n == 0, f"{{}} differ{compared}")
        )
    return lines


def _device(cases: list[Line]) -> list[Line]:
    lines = []
    for op, limit in (("ddim", COPY), ("dpmsolver++2m", COPY), ("flow-euler", COPY), ("ddpm (philox)", COPY_DRAWN)):
        for shape, dtype in WIDE:
            line = _find(cases, op, shape, dtype, "cold")
            share = _median(line, "share_of_copy", _default(line))
            over = None if share is None else 1 / share
            target = f"{_dimensions(shape)} {dtype}, {op}: at most {limit} of a copy's time"
            lines.append(_line(target, over, lambda value, limit=limit: value <= limit, "{:.2f}"))
    for op in ("ddim", "dpmsolver++2m"):
        line = _find(cases, op, (1, 4, 128, 128), "float32", "warm")
        for way in (_default(line), "CUDA graph"):
            how = "in a graph" if way == "CUDA graph" else "eager"
            target = f"1x4x128x128, {op}, {how}: at most {SMALL} µs of the device"
            lines.append(_line(target, _median(line, "elapsed", way), lambda value: value <= SMALL, "{:.2f} µs"))
    slowest = [
        (line["compiled"]["over_compiled"][_default(line)]["median"], f"{line['op']} {_dimensions(line['shape'])}")
        for line in cases
        if _default(line) in line.get("compiled", {}).get("over_compiled", {})
    ]
    over, where = max(slowest, default=(None, ""))
    target = "never slower than torch.compile of the formula"
    lines.append(_line(target, over, lambda value: value <= COMPILED, f"{{:.2f}}, {where}"))
    most = _most_kernels(cases)
    lines.append(_line("one kernel a step, whatever the solver", most, lambda value: value == 1.0, "{:.2f} at most"))
    waits = max(_counts(cases, "waits"), default=None)
    lines.append(_line("no wait for the device in a step", waits, lambda value: value == 0.0, "{:.2f} at most"))
    return lines


def _host(report: dict[str, Any]) -> list[Line]:
    entries = report.get("host", {}).get("entries", {})
    pure = report.get("host_pure", {}).get("entries", {})
    lines = []
    for backend, limit in (("C++", CPP), ("Triton", TRITON)):
        for call in ("ops.step", "Stepper.step"):
            figure = _median(entries, f"{call}, {backend}", "times")
            target = f"{call}, {backend}: host time at most {limit} of torch.add's"
            lines.append(_line(target, figure, lambda value, limit=limit: value <= limit, "{:.2f}"))
        for draws, limit, what in ((False, DROPIN, "a drop-in's step"), (True, DROPIN_DRAWS, "with torch's noise")):
            named = [f"{dropin.name}.step, {backend}" for dropin in DROPINS if dropin.draws == draws]
            found = [(_median(entries, name, "times"), name.split(".")[0]) for name in named]
            known = [(value, name) for value, name in found if value is not None]
            worst, where = max(known) if len(known) == len(named) else (None, "")
            target = f"{what}, {backend}: host time at most {limit} of torch.add's"
            lines.append(_line(target, worst, lambda value, limit=limit: value <= limit, f"{{:.2f}}, {where}"))
        figure = _median(entries, f"{GUIDED}.guided_step, {backend}", "over_step")
        target = f"guided_step, {backend}: host time no more than step's"
        lines.append(_line(target, figure, lambda value: value <= 1.0, "{:.2f}"))
    figure = _median(pure, "ops.step, Triton", "times")
    target = f"ops.step without a compiled extension: host time at most {PURE} of torch.add's"
    lines.append(_line(target, figure, lambda value: value <= PURE, "{:.2f}"))
    return lines


def _dropins(report: dict[str, Any]) -> list[Line]:
    classes = report.get("dropins", {}).get("classes", {})
    lines = []
    for kind in ("plain", "guided"):
        times = {name: line[kind]["times"]["median"] for name, line in classes.items()}
        # A mean over some of the classes is no figure of the target.
        mean = report["dropins"][f"geometric_mean_{kind}"] if len(times) == len(CLASSES) else None
        target = f"drop-ins, {kind}: geometric mean over {len(CLASSES)} classes at least {MEAN:.0f} times diffusers"
        lines.append(_line(target, mean, lambda value: value >= MEAN, "{:.1f}×"))
        least, where = min(((value, name) for name, value in times.items()), default=(None, ""))
        target = f"drop-ins, {kind}: no class under {LEAST:.0f} times diffusers"
        line = _line(target, least, lambda value: value >= LEAST, f"{{:.1f}}×, {where.removesuffix('Scheduler')}")
        if len(times) < len(CLASSES) and line["verdict"] == "met":  # of those that were measured
            line = {**line, "verdict": "not measured"}
        lines.append(line)
    return lines


def _line(target: str, value: float | None, holds: Callable[[Any], bool], form: str) -> Line:
    if value is None:
        return {"target": target, "figure": "–", "verdict": "not measured"}
    return {"target": target, "figure": form.format(value), "verdict": "met" if holds(value) else "not met"}


def _default(line: Line | None) -> str:
    """Return the launcher of the backend that is the default for a case."""
    return NAMES[0] if line is None else _LAUNCHER.get(line.get("default", "cuda"), NAMES[0])


def _find(cases: list[Line], op: str, shape: tuple[int, ...], dtype: str, cache: str) -> Line | None:
    for line in cases:
        named = (line["op"], tuple(line["shape"]), line["dtype"], line["cache"])
        if named == (op, shape, dtype, cache) and not line.get("model_input"):
            return line
    return None


def _median(line: Line | None, section: str, way: str) -> float | None:
    figure = None if line is None else (line.get(section) or {}).get(way)
    return None if figure is None else float(figure["median"])


def _counts(cases: list[Line], field: str) -> list[float]:
    found = [line.get("counts", {}).get(way, {}).get(field) for line in cases for way in NAMES]
    return [value for value in found if value is not None]


def _most_kernels(cases: list[Line]) -> float | None:
    """Return the number of kernels and copies of a step that is furthest from 1, above or below."""
    kernels = [
        counts["kernels"] + counts["copies"]
        for line in cases
        for way in NAMES
        if "kernels" in (counts := line.get("counts", {}).get(way, {}))
    ]
    return max(kernels, key=lambda value: abs(value - 1.0), default=None)


def _dimensions(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape)
