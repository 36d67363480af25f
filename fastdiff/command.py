# SPDX-License-Identifier: MIT
"""How a command ends: its exit code, and one line on stderr in place of a traceback.

==== ==========================================================================================================
0    done
1    it failed on the way: a full disk, too little memory, a closed pipe; files are whole or as they were
2    refused: an argument that does not fit, a device, a backend or a package that is missing; nothing was written
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
    """argparse, which raises its complaint as one sentence."""

    def error(self, message: str) -> NoReturn:
        operation = self.prog.split()[-1].rpartition(".")[2]
        got = f"is wrong ({message})"
        raise ValueError(error_message(operation, "the command line", got, "known options", f"see {self.prog} --help"))


def run_command(program: str, command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; what the library raises is printed in one line.

    Args:
        program: what the line begins with.
        command: returns its exit code, or None for 0.
    """
    try:
        code = command() or 0
        sys.stdout.flush()  # a full disk shows here, where it can still be said
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough
        _leave_stdout()
        return FAILED
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        _say(program, error)
        _leave_stdout()
        return FAILED
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        _say(program, error)
        return REFUSED


def _say(program: str, error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{program}: {text}", file=sys.stderr)


def _leave_stdout() -> None:
    """Let the interpreter flush what is left to nowhere when it ends, where stdout itself may have failed."""
    with contextlib.suppress(OSError, ValueError):
        stdout, nowhere = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stdout)
        os.close(nowhere)
