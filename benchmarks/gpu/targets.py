# SPDX-License-Identifier: MIT
"""Performance targets, each met, not met or not measured, with its figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .launchers import NAMES

#: The default launcher, for which the targets hold.
_DEFAULT = NAMES[0]

SHARE, HOST, GRAPH = 0.90, 10.0, 3.0


def evaluate_targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line per target: the target, the figure, and one of "met", "not met", "not measured".

    For a dry run a line with a figure says "rehearsal".
    """
    lines: list[dict[str, Any]] = []
    cases = report.get("cases", [])
    for shape, dtype in (((64, 16, 128, 128), "bfloat16"), ((1, 16, 21, 90, 160), "bfloat16"),
                         ((1, 16, 21, 90, 160), "float32")):  # fmt: skip
        line = _find(cases, "ddim", shape, dtype, "cold")
        target = f"{_dimensions(shape)} {dtype}, guidance, DDIM: at least {SHARE:.0%} of a copy's bandwidth"
        lines.append(_line(target, _median(line, "share_of_copy", _DEFAULT), lambda value: value >= SHARE, "{:.1%}"))
    for op in ("ddim", "dpmsolver++2m"):
        line = _find(cases, op, (1, 4, 128, 128), "float32", "warm")
        target = f"1x4x128x128, {op}, eager: at most {HOST:.0f} µs of the host a step"
        lines.append(_line(target, _median(line, "host", _DEFAULT), lambda value: value <= HOST, "{:.1f} µs"))
        target = f"1x4x128x128, {op}, in a graph: at most {GRAPH:.0f} µs of the device a step"
        lines.append(_line(target, _median(line, "elapsed", "CUDA graph"), lambda value: value <= GRAPH, "{:.2f} µs"))
    most = _most_kernels(cases)
    lines.append(_line("one kernel a step, whatever the solver", most, lambda value: value == 1.0, "{:.2f} at most"))
    waits = _most(cases, "waits")
    lines.append(_line("no wait for the device in a step", waits, lambda value: value == 0.0, "{:.2f} at most"))
    for backend in ("cuda", "triton"):
        found = report.get("noise", {}).get("backends", {}).get(backend)
        values = found["mismatches"] if found and found["compared"] else None
        compared = f" of {found['compared']:,}" if found else ""
        lines.append(
            _line(
                f"noise by {backend}: the bits of the CPU", values, lambda value: value == 0, f"{{}} differ{compared}"
            )
        )
    if report.get("rehearsal", True):
        return [{**line, "verdict": "rehearsal"} if line["figure"] != "–" else line for line in lines]
    return lines


def show(lines: Iterable[dict[str, Any]]) -> str:
    """Return the targets as text, one per line."""
    return "\n".join(f"{line['verdict']:>12}  {line['figure']:>24}  {line['target']}" for line in lines)


def _line(target: str, value: float | None, holds: Any, form: str) -> dict[str, Any]:
    if value is None:
        return {"target": target, "figure": "–", "verdict": "not measured"}
    return {"target": target, "figure": form.format(value), "verdict": "met" if holds(value) else "not met"}


def _find(
    cases: list[dict[str, Any]], op: str, shape: tuple[int, ...], dtype: str, cache: str
) -> dict[str, Any] | None:
    for line in cases:
        named = (line["op"], tuple(line["shape"]), line["dtype"], line["cache"])
        if named == (op, shape, dtype, cache) and not line.get("model_input"):
            return line
    return None


def _median(line: dict[str, Any] | None, section: str, way: str) -> float | None:
    figure = None if line is None else (line.get(section) or {}).get(way)
    return None if figure is None else float(figure["median"])


def _counts(cases: list[dict[str, Any]], field: str) -> list[float]:
    found = [line.get("counts", {}).get(way, {}).get(field) for line in cases for way in NAMES]
    return [value for value in found if value is not None]


def _most(cases: list[dict[str, Any]], field: str) -> float | None:
    return max(_counts(cases, field), default=None)


def _most_kernels(cases: list[dict[str, Any]]) -> float | None:
    """Return the number of kernels and copies of a step that is furthest from 1, above or below."""
    kernels = [
        counts["kernels"] + counts["copies"]
        for line in cases
        for way in NAMES
        if "kernels" in (counts := line.get("counts", {}).get(way, {}))
    ]
    return max(kernels, key=lambda value: abs(value - 1.0), default=None)


def _dimensions(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
