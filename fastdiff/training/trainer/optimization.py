# SPDX-License-Identifier: MIT
"""AdamW with decay by the type of module, and the learning rate: a warm-up, then a cosine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...errors import require

#: Modules whose own parameters are scales and shifts.  `is_norm` adds those of other packages by their class's name.
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def is_norm(module: nn.Module) -> bool:
    """Return True for a normalization layer: torch's classes, and any class whose name ends with ``Norm``."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of parameters for an optimizer: with weight decay, and without.

    Biases and the parameters of normalization layers are not decayed.  Each parameter is in one group, once, also where
    two modules share it; a shared parameter is not decayed if any of its owners says so.

    Args:
        modules: their trainable parameters are taken, in order.
        weight_decay: of the first group.
    """
    decayed: dict[nn.Parameter, bool] = {}
    for module in modules:
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.requires_grad:
                    wanted = not (is_norm(part) or name.endswith("bias"))
                    decayed[parameter] = decayed.get(parameter, True) and wanted
    groups = (
        ([parameter for parameter, wanted in decayed.items() if wanted], weight_decay),
        ([parameter for parameter, wanted in decayed.items() if not wanted], 0.0),
    )
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def create_optimizer(modules: Iterable[nn.Module], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101) over `parameter_groups`, fused: one pass over each parameter.

    Args:
        modules: what is trained, with float parameters on the CPU or on an accelerator.
        learning_rate: step size.
        weight_decay: of the decayed parameters.
    """
    return torch.optim.AdamW(parameter_groups(modules, weight_decay), lr=learning_rate, fused=True)


def create_learning_rate(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> Any:
    """Make a learning rate that rises from 0 over the warm-up and falls to 0 along half a cosine.

    Args:
        optimizer: whose rate is set.
        warmup_steps: optimizer steps of the rise.
        total_steps: optimizer steps of the rise and the fall together.

    Returns:
        diffusers' schedule ``"cosine"``, a `torch.optim.lr_scheduler.LambdaLR`.
    """
    optimization = require("diffusers.optimization", "training", "create_learning_rate")
    return optimization.get_scheduler(
        "cosine", optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
