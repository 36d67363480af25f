# SPDX-License-Identifier: MIT
"""Command ``python -m benchmarks.gpu``, used by `make gpu`: bench, host, dropins, noise, timeline, tests, table."""

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

from . import dropins, host, machine, noise, pytest_log, results, table, targets

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command and its options.

    Raises:
        ValueError: an option is unknown, or a number is out of range.
        RuntimeError: there is no GPU and no --rehearse.
    """
    parser = CommandParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("bench", "measure the cases of the targets, and print the targets; --full: all cases"),
        ("host", "measure the host's time of a call beside torch.add"),
        ("dropins", "measure loops of the drop-in schedulers beside diffusers'"),
        ("noise", "compare all backends' noise bit by bit"),
        ("timeline", "draw host and device over a few steps"),
        ("tests", "store the outcome of pytest's verbose log"),
        ("stage", "store the outcome of a stage of make gpu"),
        ("show", "print the stored targets"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("--rehearse", action="store_true", help="dry run without a GPU: small tensors, host clock")
        command.add_argument("--json", type=Path, metavar="OUT", help="file of the results")
        if name in ("bench", "host", "dropins", "noise"):
            command.add_argument("--seconds", type=float, metavar="S", help="time limit; what is beyond it is listed")
        if name in ("bench", "host", "dropins"):
            command.add_argument("--rounds", type=int, default=9, help="rounds in which all alternate")
        if name == "host":
            command.add_argument("--pure", action="store_true", help="this is an install without the extension")
        if name == "tests":
            command.add_argument("log", type=Path)
        if name == "bench":
            command.add_argument("--full", action="store_true", help="all cases and implementations, copies, noise")
            command.add_argument("--samplers", nargs="+", metavar="NAME", help="only these samplers")
            command.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
        if name == "timeline":
            command.add_argument("--picture", type=Path, metavar="OUT", help="a .png")
        if name == "stage":
            command.add_argument("name")
            command.add_argument("outcome")
    command = commands.add_parser("table", help="put the tables of runs into docs/performance.md")
    command.add_argument("files", type=Path, nargs="+", metavar="file")
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
    """Run a command; return 1 if a comparison failed.

    Raises:
        ValueError, RuntimeError, ImportError: the message is one sentence for the user.
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
        full=options.full,
    )
    stored = run.measure_all(options.samplers)
    _show(options)
    for name, reason in stored["failed"].items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if stored["failed"] else 0


def _host(options: Any) -> int:
    section = host.measure(
        options.device,
        options.json,
        rehearse=options.rehearse,
        rounds=options.rounds,
        seconds=options.seconds or 60.0,
        pure=options.pure,
    )
    print(host.show(section))
    return 1 if section["failed"] else 0


def _dropins(options: Any) -> int:
    section = dropins.Run(
        options.device,
        options.json,
        rehearse=options.rehearse,
        rounds=options.rounds,
        seconds=options.seconds or 240.0,
    ).measure_all()
    print(dropins.show(section))
    return 1 if section["failed"] else 0


def _tests(options: Any) -> int:
    found = pytest_log.read(options.log)
    results.store(options.json, options.rehearse, tests={**found, "machine": machine.machine(options.device)})
    stopped = "" if found["whole"] else "; the run was stopped before its end"
    print(f"tests: {found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped{stopped}")
    for name in found["failed"]:
        print(f"failed: {name}")
    return 1 if found["failed"] or not found["whole"] else 0


def _noise(options: Any) -> int:
    conditions = machine.machine(options.device)
    found = noise.compare(
        options.device,
        options.seconds or (2.0 if options.rehearse else 60.0),
        store=lambda found: results.store(options.json, options.rehearse, noise={**found, "machine": conditions}),
    )
    for name, figures in found["backends"].items():
        text = f"missing: {figures['missing']}" if figures["missing"] else (
            f"{figures['compared']:,} numbers compared with the CPU's, {figures['mismatches']:,} differ in a bit, by "
            f"{figures['largest_difference']:.3g} at most"
        )  # fmt: skip
        print(f"noise: {name}: {text}")
    failures = noise.failures(found, options.device)
    for failure in failures:
        print(f"noise: {failure}; seed {found['seed']} repeats it", file=sys.stderr)
    return 1 if failures else 0


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
    lines = targets.evaluate_targets(report)
    results.store(options.json, options.rehearse, verdict=lines)
    for name, reason in report.get("absent", {}).items():
        print(f"absent: {name}: {reason}")
    for name in report.get("not_measured", []):
        print(f"not measured, for want of time: {name}")
    if options.rehearse:
        print("a rehearsal: small tensors on the host's clock; no figure of it means anything")
    print(targets.show(lines))
    print(f"stored: {options.json}")
    return 0


def _table(options: Any) -> int:
    table.write([results.load(file) for file in options.files], options.document)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.gpu", main))
