# SPDX-License-Identifier: MIT
"""The entry point of ``fastdiff`` and ``python -m fastdiff``."""

from __future__ import annotations

import sys

from .errors import require


def main() -> None:
    """Run the command line. What the library refuses ends as its one sentence, not as a traceback."""
    try:
        require("typer", "cli", "fastdiff")
        from .cli import app

        app()
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        print(f"fastdiff: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
