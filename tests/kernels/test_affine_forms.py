# SPDX-License-Identifier: MIT
"""Every shipped row runs on a compiled affine loop, or is listed as an exception."""

from __future__ import annotations

import os

import pytest

from fastdiff import extension
from support.affine_cases import Runs, groups, record
from support.load_tool import load_tool

pytestmark = [
    pytest.mark.skipif(extension.extension is None, reason="needs the compiled extension"),
    pytest.mark.slow,
]


tool = load_tool("affine_forms")
CONTENT = tool.TARGET.read_text(encoding="utf-8")
COMPILED, RUNTIME = tool.listed(CONTENT, tool.COMPILED), tool.listed(CONTENT, tool.RUNTIME)
REMEDY = "run `python tools/affine_forms.py` and build the extension again"
#: With fixed examples one option of a drop-in at a time: this finds forms that are not listed, but not the listed ones
#: that only combinations take.
ONE_AT_A_TIME = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
GROUPS = groups(most=1 if ONE_AT_A_TIME else 2)


@pytest.mark.parametrize("group", GROUPS)
def test_shipped_rows_run_on_listed_loops(group: str) -> None:
    runs = record(GROUPS[group]())
    assert runs.users, f"{group}: no call ran the affine loop"
    compiled, runtime = (
        {tool.text(form) for form in forms if 0 not in form} for forms in (runs.compiled, runs.runtime)
    )
    assert compiled | runtime <= COMPILED.keys() | RUNTIME.keys(), f"{group}: unlisted forms; {REMEDY}"
    assert compiled <= COMPILED.keys(), f"{group}: the extension has loops that are not listed; {REMEDY}"
    assert runtime <= RUNTIME.keys(), f"{group}: the extension lacks loops that are listed; {REMEDY}"
    if ONE_AT_A_TIME and group not in ("solvers", "single_steps", "guiders"):
        return
    named = {form for form, first in (COMPILED | RUNTIME).items() if first == group}
    assert named <= compiled | runtime, f"{group}: listed forms that nothing takes; {REMEDY}"


def test_listed_forms_name_a_group() -> None:
    assert not COMPILED.keys() & RUNTIME.keys()
    if "guiders" in GROUPS:  # diffusers is installed
        assert {*COMPILED.values(), *RUNTIME.values()} <= GROUPS.keys()


def test_only_rare_forms_use_runtime_terms() -> None:
    rare, usual = (3, 9), (3, 11)
    runs = Runs(users={rare: ["SASolver {'predictor_order': 3} {}"], usual: ["SASolver {} {}"]})
    content = tool.render({"SASolver": runs})
    assert tool.listed(content, tool.COMPILED) == {tool.text(usual): "SASolver"}
    assert tool.listed(content, tool.RUNTIME) == {tool.text(rare): "SASolver"}
    content = tool.render({"SASolver": runs, "solvers": Runs(users={rare: ["euler"]})})
    assert tool.listed(content, tool.COMPILED).keys() == {tool.text(rare), tool.text(usual)}
