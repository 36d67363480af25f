# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu``: bench, noise, timeline, table; what `make gpu` calls."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.command import CommandParser, run_command
from fastdiff.errors import error_message

from . import machine, noise, results, table, verdict

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options.

    Raises:
        ValueError: an unknown one, or a number out of range.
        RuntimeError: there is no GPU and no rehearsal was asked for.
    """
    parser = CommandParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("bench", "measure everything, print the verdict"),
        ("noise", "compare all backends' noise bit by bit"),
        ("timeline", "draw host and device over a few steps"),
        ("stage", "note how a stage of make gpu ended"),
        ("show", "print the verdict that is stored"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("--rehearse", action="store_true", help="without a GPU: small tensors, the host's clock")
        command.add_argument("--json", type=Path, metavar="OUT", help="the results' file")
        if name in ("bench", "noise"):
            command.add_argument("--seconds", type=float, metavar="S", help="what does not fit is left out and listed")
        if name == "bench":
            command.add_argument("--rounds", type=int, default=15, help="rounds in which all take turns")
            command.add_argument("--samplers", nargs="+", metavar="NAME", help="these alone")
            command.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes")
        if name == "timeline":
            command.add_argument("--picture", type=Path, metavar="OUT", help="a .png")
        if name == "stage":
            command.add_argument("name")
            command.add_argument("outcome")
    command = commands.add_parser("table", help="put a run's table into docs/performance.md")
    command.add_argument("file", type=Path)
    command.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.command == "table":
        return
    if not options.rehearse and not torch.cuda.is_available():
        raise RuntimeError(
            error_message("gpu", "torch", "finds no CUDA device", "a GPU", "run there, or pass --rehearse")
        )
    for name in ("rounds", "seconds"):
        value = getattr(options, name, None)
        if value is not None and not value > 0:
            raise ValueError(error_message("gpu", f"--{name}", f"is {value}", "more than 0", f"raise --{name}"))
    options.device = "cpu" if options.rehearse else "cuda"
    if options.json is None:
        folder = ROOT / "build" / "gpu" if options.rehearse else ROOT / "benchmarks" / "results"
        options.json = folder / f"{machine.file_name(options.device)}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked; 1 where a comparison failed.

    Raises:
        ValueError, RuntimeError, ImportError: with one sentence for the user.
    """
    options = parse(arguments)
    return int(globals()[f"_{options.command}"](options))


def _bench(options: Any) -> int:
    run = importlib.import_module(".bench", __package__).Run(
        options.device,
        options.json,
        rehearse=options.rehearse,
        rounds=options.rounds,
        seconds=options.seconds or 480.0,
        compile_peers=not options.no_compile,
    )
    stored = run.everything(options.samplers)
    _show(options)
    for name, reason in stored["failed"].items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if stored["failed"] else 0


def _noise(options: Any) -> int:
    found = noise.compare(options.device, options.seconds or (2.0 if options.rehearse else 60.0))
    results.store(options.json, options.rehearse, noise={**found, "machine": machine.machine(options.device)})
    for name, figures in found["backends"].items():
        text = f"missing: {figures['missing']}" if figures["missing"] else (
            f"{figures['compared']:,} numbers compared with the CPU's, {figures['mismatches']:,} differ in a bit, by "
            f"{figures['largest_difference']:.3g} at most"
        )  # fmt: skip
        print(f"noise: {name}: {text}")
    said = noise.faults(found, options.device)
    for fault in said:
        print(f"noise: {fault}; seed {found['seed']} repeats it", file=sys.stderr)
    return 1 if said else 0


def _timeline(options: Any) -> int:
    picture = options.picture
    if picture is None:
        folder = ROOT / "build" / "gpu" if options.rehearse else ROOT / "docs" / "images"
        picture = folder / "timeline.png"
    lanes = importlib.import_module(".timeline", __package__).draw(options.device, picture, options.rehearse)
    results.store(options.json, options.rehearse, timeline=lanes)
    print(f"timeline: {picture}")
    return 0


def _stage(options: Any) -> int:
    stages = results.load(options.json).get("stages", {})
    results.store(options.json, options.rehearse, stages={**stages, options.name: options.outcome})
    return 0


def _show(options: Any) -> int:
    report = results.load(options.json)
    lines = verdict.verdict(report)
    results.store(options.json, options.rehearse, verdict=lines)
    for name, reason in report.get("absent", {}).items():
        print(f"absent: {name}: {reason}")
    for name in report.get("not_measured", []):
        print(f"not measured, for want of time: {name}")
    if options.rehearse:
        print("a rehearsal: small tensors on the host's clock; no figure of it means anything")
    print(verdict.show(lines))
    print(f"stored: {options.json}")
    return 0


def _table(options: Any) -> int:
    table.write(results.load(options.file), options.document)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.gpu", main))
