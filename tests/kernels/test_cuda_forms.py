# SPDX-License-Identifier: MIT
"""Steps that fastdiff ships have a form in the list of compiled CUDA kernels, or are excepted from it."""

from __future__ import annotations

import pytest

from fastdiff import extension
from support.load_tool import load_tool
from support.step_forms import LIST, MOST_TENSORS, StepForm, groups, listed

REMEDY = "run `python tools/cuda_forms.py` and build the extension again"
LISTED = listed(LIST.read_text(encoding="utf-8"))
GROUPS = groups()


tool = load_tool("cuda_forms")


@pytest.mark.slow
@pytest.mark.skipif(extension.extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("group", GROUPS)
def test_forms_of_shipped_steps_are_listed(group: str) -> None:
    calls = GROUPS[group]()
    assert any(calls.values()), f"{group}: no call has a form"
    wanted = tool.compiled(group, calls)
    assert wanted <= LISTED.keys(), f"{group}: unlisted forms; {REMEDY}"
    named = {form for form, first in LISTED.items() if first == group}
    assert named <= wanted, f"{group}: listed forms that nothing takes; {REMEDY}"


def test_listed_forms_name_a_group() -> None:
    assert LISTED
    assert all(form.tensors <= MOST_TENSORS for form in LISTED)
    if "guiders" in GROUPS:  # diffusers is installed
        assert set(LISTED.values()) <= GROUPS.keys()


def test_rare_and_large_forms_are_not_compiled() -> None:
    rare, large = StepForm("kByValue", "kGiven", False, 2, 3), StepForm("kByValue", "kGiven", True, 3, 3)
    assert tool.compiled("SASolver", {"SASolver {'predictor_order': 3} {}": {rare}}) == set()
    calls = {"SASolver {} {}": {rare, large}}
    assert tool.compiled("SASolver", calls) == {rare}
    assert listed(tool.render({"SASolver": calls})) == {rare: "SASolver"}
