# SPDX-License-Identifier: MIT
"""Benchmarks of pairs: both sides give the same, and the command prints a line for each pair and shape."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from benchmarks import forward_process, log_prob, step_gradient

MODULES = (forward_process, log_prob, step_gradient)


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_both_sides_give_the_same(module: ModuleType) -> None:
    if module is forward_process:
        pytest.importorskip("diffusers")
    compared = 0
    for name, (ours, peer) in module.pairs((3, 2, 5)).items():
        if "drawn" in name or "seeds" in name:  # each side draws noise of its own
            continue
        # Sums of up to 30 numbers up to 100 in float32.
        for one, other in zip(_tensors(ours()), _tensors(peer()), strict=False):  # a step gives the sample as well
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared >= 2


def _tensors(result: object) -> list[torch.Tensor]:
    """Return the tensors of a result, flattened: of a step a tuple, of a formula a tensor."""
    found = [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]
    return [tensor.detach().flatten() for tensor in found]


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_command_prints_the_table(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if module is forward_process:
        pytest.importorskip("diffusers")
    threads = torch.get_num_threads()
    try:
        module.main(["--shapes", "2x3x4", "2x6", "--rounds", "2", "--seconds", "0.0001"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    count = len(module.pairs((2, 6)))
    assert sum("| 2×3×4 |" in line for line in lines) == 2 * count  # once while it is measured, once in the table
    assert sum("| 2×6 |" in line for line in lines) == 2 * count
    assert any("load_average" in line for line in lines)
