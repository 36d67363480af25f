# SPDX-License-Identifier: MIT
"""Arguments of ``fastdiff bench``."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastdiff.command import CommandParser
from fastdiff.errors import error_message, unknown_name
from fastdiff.files import check_writable

from .cases import DTYPES, SAMPLER_SPECS, SHAPES, Case
from .peers import PEERS
from .timing import CACHES

#: Defaults; those of --quick take less than a minute.
FULL: dict[str, Any] = {
    "samplers": list(SAMPLER_SPECS),
    "shapes": list(SHAPES),
    "dtypes": ["float32"],
    "threads": [1],
    "caches": list(CACHES),
    "peers": list(PEERS),
    "rounds": 15,
    "seconds": 0.5,
}
#: Supported file formats of the picture.
PLOT_ENDINGS = (".png", ".svg", ".pdf")

QUICK = {**FULL, "samplers": ["ddim", "dpmsolver++2m"], "shapes": ["digits", "image"], "rounds": 5, "seconds": 0.1}


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse and check the arguments, with defaults filled in.

    Raises:
        ValueError: an unknown option or name, or a number out of range.
    """
    parser = CommandParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure what a step costs: fastdiff beside its reference, torch.compile, diffusers and\n"
        "k-diffusion in one run, and beside a plain copy of the bytes that the step must move.",
        epilog="Lists are separated by spaces: --threads 1 2 --dtypes float32 bfloat16",
    )
    add = parser.add_argument
    add("--samplers", nargs="+", metavar="NAME", help=f"of {', '.join(SAMPLER_SPECS)} (default: all)")
    add("--shapes", nargs="+", metavar="SHAPE", help=f"of {', '.join(SHAPES)}, or such as 2x4x32x32 (default: all)")
    add("--dtypes", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: float32)")
    add("--threads", nargs="+", type=int, metavar="N", help="numbers of threads (default: 1)")
    add(
        "--caches",
        nargs="+",
        metavar="STATE",
        help="warm: the same tensors again; cold: none in a cache (default: both)",
    )
    add("--peers", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)} (default: all that are installed)")
    add("--rounds", type=int, metavar="N", help="rounds in which all take turns (default: 15; quick: 5)")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="for each peer of a line, all rounds together (default: 0.5; quick: 0.1)",
    )
    add("--quick", action="store_true", help="two samplers, two shapes, short rounds")
    add("--json", type=Path, metavar="OUT", help="write everything as JSON")
    add("--plot", type=Path, metavar="OUT", help="draw ratios and shares, as .png, .svg or .pdf")
    add("--base", metavar="REV", help="compare with another commit of this checkout instead, built for the purpose")
    add("--processes", type=int, default=3, metavar="N", help="with --base: fresh pairs of processes (default: 3)")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    _known("--samplers", options.samplers, SAMPLER_SPECS)
    _known("--dtypes", options.dtypes, DTYPES)
    _known("--caches", options.caches, CACHES)
    _known("--peers", options.peers, PEERS)
    options.shapes = [_shape(text) for text in options.shapes]
    cores = os.cpu_count() or 1
    for threads in options.threads:
        if not 1 <= threads <= cores:
            raise ValueError(
                error_message("bench", "--threads", f"is {threads}", f"1 to {cores}, the cores here", "ask for no more")
            )
    for name, least in (("rounds", 1), ("processes", 1)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(error_message("bench", f"--{name}", f"is {value}", f"{least} or more", f"raise --{name}"))
    if not options.seconds > 0:
        raise ValueError(error_message("bench", "--seconds", f"is {options.seconds}", "more than 0", "raise --seconds"))
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None:
            check_writable(path, operation="bench", argument=f"--{name}")
    if options.plot is not None and options.plot.suffix.lower() not in PLOT_ENDINGS:
        expected = f"one that ends in {' or '.join(PLOT_ENDINGS)}"
        raise ValueError(error_message("bench", "--plot", f"is {str(options.plot)!r}", expected, "choose such a file"))


def _known(argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise unknown_name("bench", argument, name, known)


def _shape(text: str) -> tuple[int, ...]:
    if text in SHAPES:
        return SHAPES[text]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise ValueError(
            error_message(
                "bench", "--shapes", f"is {text!r}", f"{', '.join(SHAPES)}, or sizes such as 2x4x32x32", "write it so"
            )
        )
    return tuple(int(size) for size in text.split("x"))


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the selected cases in the order of the table."""
    return [
        Case(op, shape, dtype)
        for shape, dtype, op in itertools.product(options.shapes, options.dtypes, options.samplers)
    ]
