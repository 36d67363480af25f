# SPDX-License-Identifier: MIT
"""Ten steps of UniPC against fifty of DDIM on the packaged digits, as docs/analysis.md reports them."""

from __future__ import annotations

import pytest

from fastdiff.analysis import compare_methods
from fastdiff.analysis.report import closest_to_baseline


@pytest.mark.slow
def test_ten_steps_of_unipc_are_as_close_as_fifty_of_ddim() -> None:
    pytest.importorskip("safetensors")
    from fastdiff.digits.workload import digits_workload

    workload = digits_workload(20, features=False)
    found = compare_methods(workload, ["ddim", "unipc:power=1.75"], [10, 50], progress=False)
    ten, fifty = found.row("unipc:power=1.75", 10), found.row("ddim", 50)
    assert found.reference_steps == 1000
    assert ten.model_calls == 10
    assert ten.distance.mean <= fifty.distance.mean
    assert found.resolution < ten.distance.mean / 5, "the reference tells the two apart"
    assert any(sentence.startswith("10 steps of unipc") for sentence in closest_to_baseline(found, "ddim"))
