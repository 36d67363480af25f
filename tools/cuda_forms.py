# SPDX-License-Identifier: MIT
"""Writes csrc/cuda/step_forms.inc: the forms of steps that CUDA kernels are compiled for.

    python tools/cuda_forms.py            # write the file; then build the extension again
    python tools/cuda_forms.py --check    # report what would change; exit status 1 if anything does

It collects the forms of every step that fastdiff ships (tests/support/step_forms.py), options of drop-ins one at a
time. Steps of all other forms run on the general kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from affine_forms import rare  # noqa: E402
from support.step_forms import LIST, MOST_TENSORS, PREFIX, StepForm, groups, listed  # noqa: E402

HEADER = """// SPDX-License-Identifier: MIT
// Written by tools/cuda_forms.py; do not edit. Included by form_launch.h.
//
// One entry per form: the row, the noise, guidance, the numbers of history tensors and of outputs (step_form.h). The
// comment names the first group of steps in tests/support/step_forms.py that has the form.
// clang-format off
"""


def compiled(group: str, calls: Mapping[str, set[StepForm]]) -> set[StepForm]:
    """The forms of a group that a kernel is compiled for: few tensors, and a call without rare options."""
    usual = set().union(*(forms for call, forms in calls.items() if not rare(group, [call])))
    return {form for form in usual if form.tensors <= MOST_TENSORS}


def render(found: Mapping[str, Mapping[str, set[StepForm]]]) -> str:
    """Return the file for the calls of each group."""
    users: dict[StepForm, str] = {}
    for group, calls in found.items():
        for form in compiled(group, calls):
            users.setdefault(form, group)
    ordered = sorted(users, key=lambda form: (form.row != "kByValue", form.noise != "kNone", *form[1:]))
    return HEADER + "".join(f"{PREFIX}{form})  // {users[form]}\n" for form in ordered)


def main() -> int:
    """Collect the forms and write or compare the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the file would change")
    check = parser.parse_args().check
    old = LIST.read_text(encoding="utf-8")
    new = render({name: calls() for name, calls in groups().items()})
    for sign, forms in (("+", listed(new).keys() - listed(old)), ("-", listed(old).keys() - listed(new))):
        for form in sorted(forms):
            print(sign, form)
    if not check:
        LIST.write_text(new, encoding="utf-8")
        print(f"{LIST.relative_to(ROOT)}: {len(listed(new))} forms; build the extension again where any changed")
    return int(check and old != new)


if __name__ == "__main__":
    sys.exit(main())
