# SPDX-License-Identifier: MIT
"""Exit codes and error output of the commands: one line on stderr instead of a traceback.

==== ==========================================================================================================
0    success
1    failure while running: a full disk, too little memory, a closed pipe; files are complete or unchanged
2    refused: an invalid argument, or a missing device, backend or package; nothing was written
130  interrupted
==== ==========================================================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from .errors import error_message

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


class CommandParser(argparse.ArgumentParser):
    """Argument parser that raises its errors as a ValueError with one sentence."""

    def error(self, message: str) -> NoReturn:
        operation = self.prog.split()[-1].rpartition(".")[2]
        got = f"is wrong ({message})"
        raise ValueError(error_message(operation, "the command line", got, "known options", f"see {self.prog} --help"))


def run_command(program: str, command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; print an exception of the library in one line.

    Args:
        program: prefix of that line.
        command: function that returns an exit code, or None for 0.
    """
    try:
        code = command() or 0
        sys.stdout.flush()  # a full disk fails here, where the error can still be reported
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe
        _discard_stdout()
        return FAILED
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        _print_error(program, error)
        _discard_stdout()
        return FAILED
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        _print_error(program, error)
        return REFUSED


def _print_error(program: str, error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{program}: {text}", file=sys.stderr)


def _discard_stdout() -> None:
    """Redirect stdout to the null device, so that the interpreter's flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        stdout, null = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stdout)
        os.close(null)
