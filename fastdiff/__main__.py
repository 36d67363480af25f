# SPDX-License-Identifier: MIT
"""The entry point of ``fastdiff`` and ``python -m fastdiff``."""

from __future__ import annotations

import sys

from .command import REFUSED, run_command
from .errors import error_message, require


def main() -> None:
    """Run the command line; `fastdiff.command` lists the exit codes."""
    sys.exit(run_command("fastdiff", _run))


def _run() -> int | None:
    require("typer", "cli", "fastdiff")
    from .cli import app

    try:
        code: int | None = app(prog_name="fastdiff", standalone_mode=False)
    except Exception as error:
        # What typer's parser complains of; the class lies in click or in typer itself, by version.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return REFUSED
        context = getattr(error, "ctx", None)
        name, path = ("fastdiff", "fastdiff") if context is None else (context.info_name, context.command_path)
        got = f"is wrong ({error.format_message().rstrip('.')})"
        raise ValueError(error_message(name, "the command line", got, "known options", f"see {path} --help")) from error
    return code


if __name__ == "__main__":
    main()
