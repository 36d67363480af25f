# SPDX-License-Identifier: MIT
"""Calls in a process of their own, which may die, and what memory they may change."""

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

from support.children import child_environment


class Server:
    """The process, started at the first call and again after its death; `script` ends in `serve`."""

    process: subprocess.Popen[str] | None = None

    def __init__(self, script: str) -> None:
        self.script = script
        atexit.register(self.close)

    def ask(self, plan: Any) -> str:
        if self.process is None:
            self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115, the process writes to it until it ends
            environment = child_environment(FASTDIFF_BACKEND="", PYTHONFAULTHANDLER="1")
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", self.script], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(plan)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return str(json.loads(answer))
        code = self.process.wait()
        self.process = None
        self.words.seek(0)
        raise AssertionError(f"the process ended with {code} in {plan}:\n{self.words.read()[-6000:]}")

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def serve(plan: Callable[..., Any], outcome: Callable[[Any], str]) -> None:
    """The process: a plan a line in, its outcome out."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            answer = outcome(plan(**json.loads(line)))
        except BaseException as error:
            traceback.print_exc()
            answer = f"failed: {type(error).__name__}: {error}"[:1500]
        print(json.dumps(answer), flush=True)


def bytes_of(tensor: Tensor) -> Tensor | None:
    """All bytes of a tensor's storage, where it has memory of its own kind."""
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.data_ptr() == 0:
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


class Memory:
    """The bytes of tensors as they were, to be compared with what they are."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.kept = [(now, now.clone()) for tensor in tensors if (now := bytes_of(tensor)) is not None]

    def changed_outside(self, written: Iterable[Tensor]) -> int:
        """How many bytes are not what they were, those of `written` left out."""
        written = [tensor for tensor in written if bytes_of(tensor) is not None]
        count = 0
        for now, before in self.kept:
            changed = now != before
            for tensor in written:
                if tensor.untyped_storage().data_ptr() == now.data_ptr():
                    _leave_out(changed, tensor)
            count += int(changed.sum())
        return count


def _leave_out(changed: Tensor, written: Tensor) -> None:
    size = written.element_size()
    shape, strides = (*written.shape, size), (*(s * size for s in written.stride()), 1)
    if written.numel():
        changed.as_strided(shape, strides, written.storage_offset() * size).fill_(False)


def copy_of(value: Any) -> Any:
    """A tensor's values in memory of its own, contiguous; of lists each entry's."""
    if isinstance(value, (list, tuple)):
        return [copy_of(item) for item in value]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return value
    value = value.detach().resolve_neg().as_subclass(Tensor)
    # Not clone(), which keeps shared elements shared in some layouts.
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)
