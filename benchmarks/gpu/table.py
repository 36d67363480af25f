# SPDX-License-Identifier: MIT
"""Markdown tables of runs, written between two marks of docs/performance.md; the results of a dry run are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.errors import error_message
from fastdiff.files import write_whole

from . import dropins
from .implementations import PEERS
from .launchers import NAMES

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
_OURS = (*NAMES, "CUDA graph")
#: Names in files of former runs.
_FORMER = {"Triton, held": "Triton, cached"}


def markdown(report: dict[str, Any]) -> str:
    """Return a run's report as Markdown.

    Raises:
        ValueError: the report is of a dry run, or has no case.
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
    report = _present_names(report)
    parts = [_machine(report), _verdict(report), _times(report), _counts(report), _host(report), _dropins(report)]
    return "\n\n".join(part for part in [*parts, _pieces(report), _rest(report)] if part)


def _present_names(value: Any) -> Any:
    """Return a report with the names that its entries have now."""
    if isinstance(value, dict):
        return {_FORMER.get(name, name): _present_names(entry) for name, entry in value.items()}
    return [_present_names(entry) for entry in value] if isinstance(value, list) else value


def write(reports: Sequence[dict[str, Any]], document: Path) -> None:
    """Replace the text between the marks by the tables of one or several runs.

    Raises:
        ValueError: a report is of a dry run, or the document lacks the two marks in order.
    """
    text = document.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(
            error_message(
                "table", str(document), "lacks the marks", f"{BEGIN} before {END}", "put both where it belongs"
            )
        )
    tables = "\n\n".join(markdown(report) for report in reports)
    written = f"{text[: begin + len(BEGIN)]}\n{tables}\n{text[end:]}"
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
    measured = [line for line in report["verdict"] if line["verdict"] != "not measured"]
    rows = [f"| {line['target']} | {line['figure']} | {line['verdict']} |" for line in measured]
    others = "; ".join(line["target"] for line in report["verdict"] if line["verdict"] == "not measured")
    text = ["| target | figure | |", "|---|---|---|", *rows]
    return "\n".join([*text, "", f"Targets that were not measured: {others}."] if others else text)


def _times(report: dict[str, Any]) -> str:
    ways = [way for way in (*_OURS, *PEERS) if any(_pair(line, way) != "–" for line in report["cases"])]
    head = f"| case | cache | best % of copy | {' | '.join(ways)} |"
    text = ["Device time a step, and host time after the stroke, in µs:", "", head, "|" + "---|" * (len(ways) + 3)]
    for line in report["cases"]:
        shares = [line["share_of_copy"][way]["median"] for way in _OURS if way in line["share_of_copy"]]
        cells = [_pair(line, way) for way in ways]
        best = f"{100 * max(shares):.0f}" if shares else "–"
        text.append(f"| {_name(line)} | {line['cache']} | {best} | {' | '.join(cells)} |")
    return "\n".join(text)


def _counts(report: dict[str, Any]) -> str:
    rows = [
        f"| {_name(line)} | {way} | {' | '.join(f'{counts[field]:.2f}' for field in ('kernels', 'copies', 'waits'))} |"
        for line in report["cases"]
        for way, counts in line["counts"].items()
        if "kernels" in counts
    ]
    head = ["Kernels and copies a step, waits of the host a step:", "", "| case | way | kernels | copies | waits |"]
    return "\n".join([*head, "|" + "---|" * 5, *rows]) if rows else ""


def _host(report: dict[str, Any]) -> str:
    sections = [("", report.get("host")), (", without the extension", report.get("host_pure"))]
    rows = [
        f"| {name}{suffix} | {_number(entry['microseconds']['median'])} | {entry['times']['median']:.2f} |"
        for suffix, section in sections
        if section is not None
        for name, entry in section["entries"].items()
    ]
    head = ["Host time of a call, in µs, and over that of `torch.add(x, y, out=z)`:", "", "| | µs | times |"]
    return "\n".join([*head, "|---|--:|--:|", *rows]) if rows else ""


def _dropins(report: dict[str, Any]) -> str:
    section = report.get("dropins")
    if section is None or not section["classes"]:
        return ""
    shape = "×".join(map(str, section["shape"]))
    loops = f"in loops of {section['steps']}, {shape} float32, in µs"
    return f"Drop-ins beside diffusers, whole time a step {loops}:\n\n{dropins.show(section)}"


def _pieces(report: dict[str, Any]) -> str:
    if not report["pieces"]:
        return ""
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
    missing = [name for name in report.get("not_measured", []) if not name.startswith("counting ")]
    uncounted = len(report.get("not_measured", [])) - len(missing)
    missing += [f"the counts of {uncounted} cases"] if uncounted else []
    lines += [f"- not measured, for want of time: {'; '.join(missing)}"] if missing else []
    return "\n".join(lines) or "Nothing was absent."


def _name(line: dict[str, Any]) -> str:
    added = " + model input" if line.get("model_input") else ""
    return f"{line['op']}{added} {'×'.join(map(str, line['shape']))} {line['dtype']}"


def _pair(line: dict[str, Any], way: str) -> str:
    """Return device and host time; torch.compile's are of the part of a run that compiles."""
    compiled = line.get("compiled", {})
    elapsed, host = ({**compiled.get(kind, {}), **line[kind]} for kind in ("elapsed", "host"))
    return f"{_number(elapsed[way]['median'])} / {_number(host[way]['median'])}" if way in elapsed else "–"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
