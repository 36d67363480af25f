# SPDX-License-Identifier: MIT
"""The one JSON file of a GPU: each stage writes its own section, and a rehearsal can never pass for a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdiff.errors import error_message
from fastdiff.files import write_whole

SCHEMA = 1


def load(path: Path) -> dict[str, Any]:
    """What is stored, or the beginning of it.

    Raises:
        ValueError: the file is no report of this schema.
    """
    if not path.exists():
        return {"schema": SCHEMA}
    try:
        report = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise _refusal(path, f"is no JSON ({error})") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise _refusal(path, "is of another schema")
    return report


def store(path: Path, rehearsal: bool, **sections: Any) -> dict[str, Any]:
    """Put sections into the file; the others stay. The file is replaced whole, never half.

    Raises:
        ValueError: the file is of a run and this is a rehearsal, or the other way round.
    """
    report = load(path)
    if report.setdefault("rehearsal", rehearsal) != rehearsal:
        kind = "a rehearsal" if report["rehearsal"] else "a run on a GPU"
        raise _refusal(path, f"holds {kind}")
    report.update(sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode(), operation="gpu", argument="--json")
    return report


def _refusal(path: Path, got: str) -> ValueError:
    remedy = "name another file with --json, or move this one away"
    return ValueError(
        error_message("gpu", str(path), got, f"a report of schema {SCHEMA} of the same kind of run", remedy)
    )
