# SPDX-License-Identifier: MIT
"""The Markdown table of a run, put between two marks of docs/performance.md; a rehearsal is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.errors import error_message
from fastdiff.files import write_whole

from .launchers import NAMES
from .ways import PEERS

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
_OURS = (*NAMES, "CUDA graph")


def markdown(report: dict[str, Any]) -> str:
    """The run as Markdown.

    Raises:
        ValueError: it is a rehearsal, or holds no case.
    """
    if report.get("rehearsal", True):
        raise ValueError(
            error_message(
                "table", "the report", "is a rehearsal's", "a run on a GPU", "run `make gpu` where there is one"
            )
        )
    if not report.get("cases"):
        raise ValueError(
            error_message("table", "the report", "holds no case", "a run's", "run `make gpu STAGES=bench`")
        )
    return "\n\n".join(
        [_machine(report), _verdict(report), _times(report), _counts(report), _pieces(report), _rest(report)]
    )


def write(report: dict[str, Any], document: Path) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: the report is no run's, or the document has not the two marks in their order.
    """
    text = document.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(
            error_message(
                "table", str(document), "lacks the marks", f"{BEGIN} before {END}", "put both where it belongs"
            )
        )
    made = markdown(report)
    written = f"{text[: begin + len(BEGIN)]}\n{made}\n{text[end:]}"
    write_whole(document, written.encode(), operation="table", argument="the document")


def _machine(report: dict[str, Any]) -> str:
    m = report["machine"]
    return (
        f"One {m['gpu']} (capability {m['capability']}, {m['multiprocessors']} multiprocessors, "
        f"{m['l2_bytes'] / 2**20:.0f} MiB second-level cache), driver {m['nvidia_smi'].get('driver_version', '?')}, "
        f"CUDA {m['cuda']}, nvcc {m['nvcc']}, torch {m['torch']}, triton {m['triton']}, diffusers {m['diffusers']}, "
        f"{m['date']}, commit {m['commit'][:12]}. Medians over rounds in which all took turns."
    )


def _verdict(report: dict[str, Any]) -> str:
    rows = [f"| {line['target']} | {line['figure']} | {line['verdict']} |" for line in report["verdict"]]
    return "\n".join(["| target | figure | |", "|---|---|---|", *rows])


def _times(report: dict[str, Any]) -> str:
    ways = [way for way in (*_OURS, *PEERS) if any(way in line["elapsed"] for line in report["cases"])]
    head = f"| case | cache | best % of copy | {' | '.join(ways)} |"
    text = ["Device time a step, and host time after the stroke, in µs:", "", head, "|" + "---|" * (len(ways) + 3)]
    for line in report["cases"]:
        shares = [line["share_of_copy"][way]["median"] for way in _OURS if way in line["share_of_copy"]]
        cells = [_pair(line, way) for way in ways]
        best = f"{100 * max(shares):.0f}" if shares else "–"
        text.append(f"| {_name(line)} | {line['cache']} | {best} | {' | '.join(cells)} |")
    return "\n".join(text)


def _counts(report: dict[str, Any]) -> str:
    text = [
        "Kernels and copies a step, waits of the host a step:",
        "",
        "| case | way | kernels | copies | waits |",
        "|" + "---|" * 5,
    ]
    for line in report["cases"]:
        for way, counts in line["counts"].items():
            if "kernels" in counts:
                cells = [f"{counts[field]:.2f}" for field in ("kernels", "copies", "waits")]
                text.append(f"| {_name(line)} | {way} | {' | '.join(cells)} |")
    return "\n".join(text)


def _pieces(report: dict[str, Any]) -> str:
    ways = [way for way in ("torch", *_OURS) if any(way in line["elapsed"] for line in report["pieces"])]
    text = [
        "Noise and reductions, device and host time in µs:",
        "",
        f"| | {' | '.join(ways)} |",
        "|" + "---|" * (len(ways) + 1),
    ]
    for line in report["pieces"]:
        text.append(f"| {_name(line)} | {' | '.join(_pair(line, way) for way in ways)} |")
    return "\n".join(text)


def _rest(report: dict[str, Any]) -> str:
    lines = [f"- absent: {name}: {reason}" for name, reason in report.get("absent", {}).items()]
    lines += [f"- failed: {name}: {reason}" for name, reason in report.get("failed", {}).items()]
    lines += [f"- not measured, for want of time: {name}" for name in report.get("not_measured", [])]
    return "\n".join(lines) or "Nothing was absent."


def _name(line: dict[str, Any]) -> str:
    added = " + model input" if line.get("model_input") else ""
    return f"{line['op']}{added} {'×'.join(map(str, line['shape']))} {line['dtype']}"


def _pair(line: dict[str, Any], way: str) -> str:
    if way not in line["elapsed"]:
        return "–"
    return f"{_number(line['elapsed'][way]['median'])} / {_number(line['host'][way]['median'])}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
