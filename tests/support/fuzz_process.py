# SPDX-License-Identifier: MIT
"""Child process for fuzzed calls, which may crash it, and checks of the memory that they change."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from support.child_environment import child_environment


class Server:
    """Child process that runs `script`, which calls `serve`; started at the first request and again after a crash."""

    process: subprocess.Popen[str] | None = None

    def __init__(self, script: str) -> None:
        self.script = script
        atexit.register(self.close)

    def ask(self, plan: Any) -> str:
        if self.process is None:
            self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115, the process writes to it until it ends
            environment = child_environment(FASTDIFF_BACKEND="", PYTHONFAULTHANDLER="1")
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", self.script], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(plan)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return str(json.loads(answer))
        code = self.process.wait()
        self.stderr.seek(0)
        printed = self.stderr.read()[-6000:]
        self.close()
        raise AssertionError(f"the process ended with {code} in {plan}:\n{printed}")

    def close(self) -> None:
        if self.process is not None:
            with self.stderr, self.process:  # closes its pipes and waits
                pass
            self.process = None


def serve(plan: Callable[..., Any], outcome: Callable[[Any], str]) -> None:
    """Run the child process: read a plan per line and answer with its outcome."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            answer = outcome(plan(**json.loads(line)))
        except BaseException as error:
            traceback.print_exc()
            answer = f"failed: {type(error).__name__}: {error}"[:1500]
        print(json.dumps(answer), flush=True)


def bytes_of(tensor: Tensor) -> Tensor | None:
    """Return all bytes of a tensor's storage; None if it is not in CPU memory."""
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.data_ptr() == 0:
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


class Memory:
    """Snapshot of the bytes of tensors, for a later comparison."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.snapshots = [(now, now.clone()) for tensor in tensors if (now := bytes_of(tensor)) is not None]

    def changed_outside(self, written: Iterable[Tensor]) -> int:
        """Count the bytes that have changed, except those of the tensors in `written`."""
        written = [tensor for tensor in written if bytes_of(tensor) is not None]
        count = 0
        for now, before in self.snapshots:
            changed = now != before
            for tensor in written:
                if tensor.untyped_storage().data_ptr() == now.data_ptr():
                    _ignore(changed, tensor)
            count += int(changed.sum())
        return count


def _ignore(changed: Tensor, written: Tensor) -> None:
    size = written.element_size()
    shape, strides = (*written.shape, size), (*(s * size for s in written.stride()), 1)
    if written.numel():
        changed.as_strided(shape, strides, written.storage_offset() * size).fill_(False)


def copy_of(value: Any) -> Any:
    """Return a contiguous copy of a tensor, or of each entry of a list; other values are returned as they are."""
    if isinstance(value, (list, tuple)):
        return [copy_of(item) for item in value]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return value
    value = value.detach().resolve_neg().as_subclass(Tensor)
    # Not clone(), which preserves shared elements of some layouts.
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)
