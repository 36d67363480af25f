# SPDX-License-Identifier: MIT
"""One of two processes that take turns: this benchmark on whichever fastdiff PYTHONPATH leads to.

It reads a JSON object a line and answers with one: ``prepare`` makes a case ready, ``time`` times it once. It asks of
fastdiff only what its oldest versions have, and answers for a case that they lack with ``absent``.
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
from .copying import copies_for
from .measure import Rotation
from .peers import walks


def prepare(order: dict[str, Any]) -> Rotation:
    """The rotation of one case, calibrated."""
    torch.set_num_threads(order["threads"])
    case = Case(order["op"], tuple(order["shape"]), order["dtype"])
    sets = case.tensors(copies_for(order["cache"], 3 * case.tensor_bytes))
    rotation = Rotation(walks("fastdiff", case, sets), len(case.table))
    rotation.calibrate(order["seconds"])
    return rotation


def main() -> None:
    """Answer until there is nothing more to read."""
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
                rotation = None  # its memory, before the next one takes its own
                gc.collect()
                try:
                    rotation = prepare(order)
                except Exception as error:  # of whatever kind an older fastdiff raises
                    answer["absent"] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                assert rotation is not None
                rotation.time(1)  # what the other process has done to shared caches is not ours to pay for
                answer["microseconds"] = rotation.time()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
