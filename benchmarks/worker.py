# SPDX-License-Identifier: MIT
"""Worker process of base_commit.py: run this benchmark with the fastdiff found on PYTHONPATH.

It reads one JSON object per line and answers each with one: ``prepare`` sets a case up, ``time`` times it once. It uses
only names that old versions of fastdiff have, and answers ``absent`` for a case that a version lacks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from typing import Any

import torch

import fastdiff

from .cases import Case
from .copy_bandwidth import copies_for
from .peers import repeating_loops
from .timing import Rotation


def prepare(order: dict[str, Any]) -> Rotation:
    """Return the calibrated rotation of one case."""
    torch.set_num_threads(order["threads"])
    case = Case(order["op"], tuple(order["shape"]), order["dtype"])
    sets = case.tensors(copies_for(order["cache"], 3 * case.tensor_bytes))
    rotation = Rotation(repeating_loops("fastdiff", case, sets), len(case.table))
    rotation.calibrate(order["seconds"])
    return rotation


def main() -> None:
    """Answer orders until the end of the input."""
    answers = sys.stdout
    torch.set_grad_enabled(False)
    gc.disable()
    rotation: Rotation | None = None
    print(json.dumps({"fastdiff": fastdiff.__file__}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        with contextlib.redirect_stdout(sys.stderr):
            if order["do"] == "prepare":
                rotation = None  # free its memory before the next one allocates
                gc.collect()
                try:
                    rotation = prepare(order)
                except Exception as error:  # an old fastdiff may raise any type
                    answer["absent"] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                assert rotation is not None
                rotation.time(1)  # refill the shared caches after the other process
                answer["microseconds"] = rotation.time()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
