# SPDX-License-Identifier: MIT
"""Outcome of a run of pytest, read from its verbose log, which is whole up to the moment where the run was stopped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
#: "tests/x.py::test_y[z] PASSED [ 3%]", or with workers "[gw1] [  3%] PASSED tests/x.py::test_y[z]".
_ALONE = re.compile(rf"^(\S+::.+?) ({'|'.join(_OUTCOMES)})\b")
_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({'|'.join(_OUTCOMES)}) (.+?)\s*$")
#: "ERROR tests/x.py - ImportError: ..." in the summary: a file that could not be collected.
_FILE = re.compile(r"^ERROR (\S+\.py)( - .*)?$")
#: The last line of a whole run: "3 failed, 12 passed in 5.00s", between signs of equality or not.
_WHOLE = re.compile(r"^(=+ )?(\d+ \w+, )*\d+ (passed|failed|error|errors|skipped|deselected|warnings?)\b.* in \d")


def read(log: Path) -> dict[str, Any]:
    """Return the counts of passed and skipped tests, the names of those that failed, and whether the run was whole."""
    outcomes: dict[str, str] = {}
    whole = False
    for line in log.read_text(errors="replace").splitlines():
        if found := _WORKER.match(line):
            outcomes[found.group(2)] = found.group(1)
        elif found := _ALONE.match(line):
            outcomes[found.group(1)] = found.group(2)
        elif found := _FILE.match(line):
            outcomes[found.group(1)] = "ERROR"
        whole = bool(_WHOLE.match(line)) or whole
    counted = list(outcomes.values())
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR", "XPASS"))
    return {
        "passed": counted.count("PASSED"),
        "skipped": counted.count("SKIPPED"),
        "failed": failed,
        "whole": whole,
    }
