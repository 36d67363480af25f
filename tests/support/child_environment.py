# SPDX-License-Identifier: MIT
"""Environment variables of interpreters that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import fastdiff


def child_environment(**variables: str) -> dict[str, str]:
    """Return the environment for a child process that imports the same fastdiff and the tests' modules.

    The child does not search its current folder or its script's folder: a checkout there may contain a fastdiff without
    the kernels, which were built elsewhere.

    Args:
        variables: further variables, which override those set here.
    """
    folders = [
        str(Path(fastdiff.__file__).parents[1]),
        str(Path(__file__).parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    paths = os.pathsep.join(folder for folder in folders if folder)
    return {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", **variables}
