# SPDX-License-Identifier: MIT
"""The environment of interpreters that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import fastdiff


def child_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment for a child that imports the same fastdiff and the tests' modules.

    The folder in which a child is started, or its script lies, is not searched first: a checkout's may hold a fastdiff
    without the kernels that were built elsewhere.

    Args:
        variables: more of the environment, in place of what is set here.
    """
    folders = [
        str(Path(fastdiff.__file__).parents[1]),
        str(Path(__file__).parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    paths = os.pathsep.join(folder for folder in folders if folder)
    return {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", **variables}
