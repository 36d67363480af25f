# SPDX-License-Identifier: MIT
"""Table of whole loops, from stored runs of benchmarks.end_to_end, written between two marks of a document.

    python -m benchmarks.end_to_end_table benchmarks/results/CPU.json [benchmarks/results/GPU.json]

Without a run on a GPU its columns say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdiff.command import CommandParser, run_command
from fastdiff.errors import error_message
from fastdiff.files import write_whole

BEGIN, END = "<!-- end to end: begin -->", "<!-- end to end: end -->"
DOCUMENTS = ("README.md", "docs/performance.md")
MISSING = "not measured"
HEADS = (
    "loop", "steps", "CPU, ms: diffusers", "fastdiff", "times", "the step's share: diffusers", "fastdiff",
    "GPU, ms: diffusers", "fastdiff", "one CUDA graph",
)  # fmt: skip


def markdown(cpu: dict[str, Any], gpu: dict[str, Any] | None) -> str:
    """Return the table of a run on the CPU, and of one on a GPU if there is one, with their conditions.

    Raises:
        ValueError: a run is of the other device.
    """
    for report, wanted in ((cpu, True), (gpu, False)):
        if report is not None and (report["conditions"]["device"] == "cpu") != wanted:
            got = f"is of {report['conditions']['device']}"
            expected = "a run on the CPU, then one on a GPU"
            raise ValueError(error_message("table", "the report", got, expected, "give the files in that order"))
    on_gpu = {_key(line): line for line in gpu["results"]} if gpu is not None else {}
    text = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for line in cpu["results"]:
        times = line["milliseconds"]
        cells = [line["loop"], str(line["steps"]), _ms(times, "diffusers"), _ms(times, "fastdiff")]
        cells.append(f"{line['times']['median']:.2f}")
        cells += [f"{100 * line['share'][who]['median']:.1f} %" for who in ("diffusers", "fastdiff")]
        other = on_gpu.get(_key(line), {}).get("milliseconds", {})
        cells += [_ms(other, who) for who in ("diffusers", "fastdiff", "graph")]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", *(_conditions(report) for report in (cpu, gpu) if report is not None)])


def write(text: str, document: Path) -> None:
    """Replace the text between the marks.

    Raises:
        ValueError: the document lacks the two marks in order.
    """
    before = document.read_text()
    begin, end = before.find(BEGIN), before.find(END)
    if not 0 <= begin < end:
        got, expected = "lacks the marks", f"{BEGIN} before {END}"
        raise ValueError(error_message("table", str(document), got, expected, "put both where it belongs"))
    written = f"{before[: begin + len(BEGIN)]}\n{text}\n{before[end:]}"
    write_whole(document, written.encode(), operation="table", argument="the document")


def main(arguments: list[str] | None = None) -> None:
    """Write the table into the documents."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu", type=Path, help="a run on the CPU")
    parser.add_argument("gpu", type=Path, nargs="?", help="a run on a GPU")
    parser.add_argument("--documents", type=Path, nargs="+", default=[Path(each) for each in DOCUMENTS])
    chosen = parser.parse_args(arguments)
    cpu, gpu = (None if file is None else json.loads(file.read_text()) for file in (chosen.cpu, chosen.gpu))
    text = markdown(cpu, gpu)
    for document in chosen.documents:
        write(text, document)


def _key(line: dict[str, Any]) -> tuple[str, int]:
    return line["loop"], line["steps"]


def _ms(times: dict[str, Any], who: str) -> str:
    return f"{times[who]['median']:.3g}" if who in times else MISSING


def _conditions(report: dict[str, Any]) -> str:
    found = report["conditions"]
    machine = found["cpu"] if found["device"] == "cpu" else found["device"]
    return (
        f"{machine}, {report['threads']} thread of {found['cores']} cores with other work on them (load average "
        f"{found['load_average'][0]}), torch {found['torch']}, diffusers {found['diffusers']}, {found['date']}; "
        f"medians over {report['rounds']} rounds in which all took turns."
    )


if __name__ == "__main__":
    sys.exit(run_command("end_to_end_table", main))
