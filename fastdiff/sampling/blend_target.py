# SPDX-License-Identifier: MIT
"""The target of a blend: known samples at the noise level of each step, as one more map of the table's rows.

A masked step blends prev_sample with the row's second kept map (`fastdiff.ops.step`).  That map becomes
α_s·known + σ_s·noise, with the two tensors in history slots that the table leaves free, so that no tensor of noised
samples is made and none is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import error_message
from ..row_layout import COLUMNS, KEEP_1, NUM_REGISTERS
from ..solvers.table import StepTable

_FIRST = KEEP_1 + COLUMNS.index("history_0")


@dataclass(frozen=True)
class BlendTarget:
    """Known samples and the noise that is added to them.

    Args:
        known: x0, ``[B, ...]`` like the samples of the loop, of any of the four dtypes.
        noise: ε, likewise, the same for all steps; None where every σ is 0.
        weights: α and σ of the level that each row reaches: ``(α_s, σ_s)``, one pair a row.
    """

    known: Tensor
    noise: Tensor | None
    weights: Sequence[tuple[float, float]]

    def free_slots(self, table: StepTable) -> tuple[int, int] | None:
        """Return the history slots for `known` and `noise`, or None where a step of the table has no room for them."""
        used = {slot for slots in (*table.read_slots, *table.kept_slots, table.provided_slots) for slot in slots}
        free = [slot for slot in range(NUM_REGISTERS) if slot not in used]
        crowded = any(len(slots) > 1 for slots in table.kept_slots) or len(free) < 2
        return None if crowded else (free[-2], free[-1])

    def slots(self, table: StepTable) -> tuple[int, int]:
        """Return the slots of `free_slots`.

        Raises:
            ValueError: there is no room, or there are not as many weights as rows.
        """
        found = self.free_slots(table)
        if found is None:
            got = "keeps two outputs a step, or more than two history slots"
            remedy = "blend in a second pass, with fastdiff.editing.blend, or choose a solver that keeps less"
            raise ValueError(error_message("step", "table", got, "room for the target of a mask", remedy))
        if len(self.weights) != len(table):
            got = f"holds {len(self.weights)} pairs"
            raise ValueError(
                error_message("step", "weights", got, f"{len(table)}, one a row", "give alpha and sigma of each row")
            )
        return found

    def coefficients(self, table: StepTable) -> Tensor:
        """Return the table's coefficients with the target's map, float64 ``[R, 32]`` on the CPU."""
        known, noise = self.slots(table)
        found = table.coefficients.clone()
        weights = torch.tensor([tuple(pair) for pair in self.weights], dtype=torch.float64, device="cpu")
        found[:, _FIRST + known], found[:, _FIRST + noise] = weights[:, 0], weights[:, 1]
        return found
