# SPDX-License-Identifier: MIT
"""Command ``fastdiff bench``, from a checkout also ``python -m benchmarks``: time the cases and print a table."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from fastdiff.command import run_command
from fastdiff.errors import require
from fastdiff.files import write_whole

from .conditions import conditions
from .options import cases, parse
from .report import render, render_base
from .timing import measure

SCHEMA = 2


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> None:
    """Measure, print the table, and write the requested files.

    Raises:
        ValueError, RuntimeError, ImportError, OSError: the message is one sentence for the user.
    """
    options = parse(arguments, prog)
    require("rich", "cli", "fastdiff bench")  # fail before measuring, not after it
    if options.plot is not None:
        require("matplotlib", "plots", "fastdiff bench --plot")
    report: dict[str, Any] = {"schema": SCHEMA, "conditions": conditions(), "absent": {}, "results": []}
    if options.base is not None:
        importlib.import_module(".base_commit", __package__).compare(options, report)
        render_base(report)
    else:
        _measure_all(options, report)
        render(report, peers=options.peers)
    if options.json is not None:
        text = json.dumps(report, indent=1) + "\n"
        write_whole(options.json, text.encode(), operation="bench", argument="--json")
    if options.plot is not None:
        importlib.import_module(".plots", __package__).plot(report, options.plot)


def _measure_all(options: Any, report: dict[str, Any]) -> None:
    before = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in cases(options):
                for cache in options.caches:
                    print(f"{case.name}, {threads} thread(s), {cache}", file=sys.stderr, flush=True)
                    line = measure(
                        case, cache, options.peers, rounds=options.rounds, seconds=options.seconds,
                        absent=report["absent"],
                    )  # fmt: skip
                    report["results"].append(line)
    finally:
        torch.set_num_threads(before[0])
        torch.set_grad_enabled(before[1])


if __name__ == "__main__":
    sys.exit(run_command("benchmarks", main))
