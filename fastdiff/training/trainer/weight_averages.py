# SPDX-License-Identifier: MIT
"""Averages of the trained weights, and the blocks in which they take the place of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ...errors import error_message, require
from ..model.conditioning import TrainedModules


class WeightAverages:
    """Exponential moving averages of the weights by diffusers' `EMAModel`, or none.

    Args:
        modules: what is trained.
        parameters: the trainable ones of `modules`.
        decay: None for no averages.

    Attributes:
        ema: the `EMAModel`, or None.
    """

    def __init__(self, modules: TrainedModules, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self._modules, self._parameters, self._in_place = modules, parameters, False
        self.ema: Any = None
        if decay is not None:
            averaging = require("diffusers.training_utils", "training", "Trainer")
            self.ema = averaging.EMAModel(parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """Take the weights after an optimizer step into the averages."""
        if self.ema is not None:
            self.ema.step(self._parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[TrainedModules]:
        """Give the modules the averages, if there are any, and evaluation mode within a block; blocks may be nested."""
        if self._in_place:
            yield self._modules
            return
        modes = [(module, module.training) for module in self._modules.modules()]
        if self.ema is not None:
            self.ema.store(self._parameters)
            self.ema.copy_to(self._parameters)
        self._in_place = True
        try:
            yield self._modules.eval()
        finally:
            self._in_place = False
            for module, mode in modes:
                module.training = mode
            if self.ema is not None:
                self.ema.restore(self._parameters)

    def check_not_in_place(self, operation: str) -> None:
        """Refuse what would change or store the averages in place of the trained weights.

        Raises:
            ValueError: a block of `in_place` is open.
        """
        if self._in_place:
            got, remedy = "are the averaged ones", "leave the block of averaged_weights first"
            raise ValueError(error_message(operation, "the weights", got, "those in training", remedy))
