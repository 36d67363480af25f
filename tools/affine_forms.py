# SPDX-License-Identifier: MIT
"""Writes csrc/cpu/affine_forms.inc: the forms of rows that the CPU's affine loop is compiled for.

    python tools/affine_forms.py            # write the file; then build the extension again
    python tools/affine_forms.py --check    # report what would change; exit status 1 if anything does

It takes every row that fastdiff ships (tests/support/affine_cases.py) through the extension, which records the term
masks of each run of the affine loop. Any extension of these sources will do: forms that it has no loop for are recorded
too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.affine_cases import Form, Runs, groups, record  # noqa: E402

TARGET = ROOT / "csrc" / "cpu" / "affine_forms.inc"
#: What the lines of compiled forms and of the others begin with.
COMPILED, RUNTIME = "FASTDIFF_AFFINE_FORM(", "// runtime ("
#: Bits of a term mask, as affine_loop.inc names them.
NAMES = ("X", "M", "D", "I0", "I1", "I2", "I3", "I4")
#: Options of drop-ins and forms of solvers that are too rare for loops of their own: a form that only they lead to runs
#: with run-time terms. A compiled form takes 25 kB of the extension. docs/performance.md has the times of both.
RARE = {
    "SASolver": (
        "'predictor_order': 3", "'predictor_order': 4", "'corrector_order': 1", "'corrector_order': 3",
        "'corrector_order': 4", "'prediction_type': 'sample'",
    ),
    "RePaint": ("'clip_sample': False", "'eta': 0.5", "'eta': 1.0"),
    "solvers": ("pndm-prk",),
}  # fmt: skip
HEADER = """// SPDX-License-Identifier: MIT
// Written by tools/affine_forms.py; do not edit. Included by affine_loop.inc.
//
// One entry per form of row: the term masks of prev_sample, keep_0 and keep_1. X is the sample, M the model output,
// D the prediction, I0 to I4 are the other inputs of the row. The comment names the first group of calls in
// tests/support/affine_cases.py that takes the form.
// clang-format off
"""
RUNTIME_HEADER = """
// Forms of rare options, which run with run-time terms (RARE in tools/affine_forms.py).
"""


def text(form: Form) -> str:
    """A form as the arguments of FASTDIFF_AFFINE_FORM."""
    return ", ".join(" | ".join(name for bit, name in enumerate(NAMES) if mask >> bit & 1) for mask in form)


def rare(group: str, calls: list[str]) -> bool:
    """Return true if every call has a rare option of its group."""
    return all(any(option in call for option in RARE.get(group, ())) for call in calls)


def render(runs: Mapping[str, Runs]) -> str:
    """Return the file for the runs of each group."""
    users: dict[Form, list[str]] = {}
    usual: set[Form] = set()
    for group, found in runs.items():
        for form, calls in found.users.items():
            if 0 not in form:  # affine_loop.inc has no loop for an output without terms
                users.setdefault(form, []).append(group)
                if not rare(group, calls):
                    usual.add(form)
    ordered = sorted(users, key=lambda form: (len(form), form))
    compiled = [f"FASTDIFF_AFFINE_FORM({text(form)})  // {users[form][0]}\n" for form in ordered if form in usual]
    runtime = [f"{RUNTIME}{text(form)})  // {users[form][0]}\n" for form in ordered if form not in usual]
    return HEADER + "".join(compiled) + (RUNTIME_HEADER + "".join(runtime) if runtime else "")


def listed(content: str, prefix: str) -> dict[str, str]:
    """The forms of the lines that begin with `prefix`, each with the group that its comment names."""
    lines = [line.removeprefix(prefix) for line in content.splitlines() if line.startswith(prefix)]
    return {form: group for form, _, group in (line.partition(")  // ") for line in lines)}


def main() -> int:
    """Record the runs and write or compare the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the file would change")
    check = parser.parse_args().check
    old, new = TARGET.read_text(encoding="utf-8"), render({name: record(calls()) for name, calls in groups().items()})
    before, after = (listed(content, COMPILED).keys() for content in (old, new))
    for sign, forms in (("+", after - before), ("-", before - after)):
        for form in sorted(forms):
            print(sign, form)
    if not check:
        TARGET.write_text(new, encoding="utf-8")
        print(f"{TARGET.relative_to(ROOT)}: {len(after)} compiled forms; build the extension again where any changed")
    return int(check and old != new)


if __name__ == "__main__":
    sys.exit(main())
