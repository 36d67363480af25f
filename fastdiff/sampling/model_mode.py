# SPDX-License-Identifier: MIT
"""Put a model in evaluation mode for a loop, and every module of it back afterwards."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()


class _Held:
    """A model that loops have put in evaluation mode: their number, and the modules that were in training mode."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.loops = 0
        self.training = [module for module in model.modules() if module.training]


_HELD: weakref.WeakKeyDictionary[torch.nn.Module, _Held] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(model: object, keep_mode: bool = False) -> Iterator[None]:
    """Run a block with a model in evaluation mode, then put each of its modules back, also after an error.

    Loops in several threads share a model: the last one puts it back.

    Args:
        model: a torch.nn.Module, a method of one or a functools.partial of either; any other callable is left alone.
        keep_mode: leave the model as it is.
    """
    while isinstance(model, functools.partial):
        model = model.func
    module = getattr(model, "__self__", model)
    if keep_mode or not isinstance(module, torch.nn.Module):
        yield
        return
    with _LOCK:
        held = _HELD.get(module)
        if held is None:
            held = _HELD[module] = _Held(module)
            if held.training:
                module.eval()
        held.loops += 1
    try:
        yield
    finally:
        with _LOCK:
            held.loops -= 1
            if held.loops == 0:
                del _HELD[module]
                training = set(held.training)
                if module in training:
                    module.train()
                for each in module.modules() if training else ():
                    each.training = each in training
