# SPDX-License-Identifier: MIT
"""Validation: the mean loss over a data set, with timesteps and noise that are the same each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...device_copy import to_device
from ...errors import error_message
from ...noise import sample_seeds
from ..config import DiffusionConfig
from ..data.batches import TrainingBatch, read_batch
from ..data.order import DataOrder
from ..losses.objectives import DenoisingObjective, LossTerms, Objective
from ..model.conditioning import Conditioning, TrainedModules
from ..model.trained_parts import noise_schedule, trained_network

#: Epoch of validation's draws, which no training reaches.
_VALIDATION_EPOCH = 2**33


def mean_loss(
    loss_of: Callable[[TrainingBatch], LossTerms],
    order: DataOrder,
    conditioning: Conditioning,
    config: DiffusionConfig,
    reduce_sum: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return the mean loss over one pass of the data, in the order of the data set.

    Args:
        loss_of: losses of a batch.
        order: the batches; a process may have none.
        conditioning: of the model; no condition is dropped.
        config: the configuration.
        reduce_sum: adds a tensor over processes.
        dtype: of images and embeddings.

    Raises:
        TypeError, ValueError: there is no batch, or one does not fit.
    """
    device = conditioning.device
    kept = Conditioning(conditioning.text_encoder, conditioning.null_label, 0.0, device, always=conditioning.always)
    sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with torch.no_grad():
        for share in order.epoch(0):
            raw = read_batch(share.data, "validate_model", config.in_channels).to_dtype(dtype)
            seeds = sample_seeds(config.seed, share.sample_ids, _VALIDATION_EPOCH)
            condition = kept(raw, seeds, "validate_model")
            images = to_device(raw.images, device)
            batch = TrainingBatch(images, condition, to_device(seeds, device), share.sample_ids, 0, 0)
            losses = loss_of(batch).losses.to(sums.dtype)
            sums += torch.stack([losses.sum(), torch.ones_like(losses).sum()])
    total, count = reduce_sum(sums).tolist()
    if not count:
        remedy = "give a loader that can be read again, with one batch or more"
        raise ValueError(error_message("validate", "val_dataloader", "gave no batch", "one or more", remedy))
    return float(total / count)


def validate_model(
    model: Any,
    val_dataloader: Any,
    device: str | torch.device = "cpu",
    *,
    config: DiffusionConfig | None = None,
    schedule: Any = None,
    objective: Objective | None = None,
    text_encoder: Callable[[Sequence[str]], Tensor] | None = None,
    null_label: int | None = None,
) -> float:
    """Return the mean loss of a model over a data loader.

    Timesteps and noise follow from the seed of the configuration and the number of each sample, so two calls give the
    same number, and two models are compared on the same draws.

    Args:
        model: as `Trainer` takes it; it is moved to the device, and its mode is put back afterwards.
        val_dataloader: batches as `Trainer` takes them.
        device: where to compute.
        config: the model's own if left out, else the defaults.
        schedule, objective, text_encoder, null_label: as `Trainer` takes them.

    Raises:
        TypeError, ValueError: there is no batch, or one does not fit.
    """
    given = config if config is not None else getattr(model, "config", None)
    settled = (given if isinstance(given, DiffusionConfig) else DiffusionConfig()).validate()
    network = trained_network(model)
    place = torch.device(device)
    trained = text_encoder if isinstance(text_encoder, nn.Module) and hasattr(text_encoder, "tokens") else None
    modules = TrainedModules(network, trained).to(place)
    levels = noise_schedule(model, settled) if schedule is None else schedule
    measured = DenoisingObjective(settled, levels) if objective is None else objective
    conditioning = Conditioning(text_encoder, null_label, 0.0, place, always=settled.use_spatial_transformer)
    modes = [(module, module.training) for module in modules.modules()]
    modules.eval()
    try:
        return mean_loss(
            lambda batch: measured(modules, batch),
            DataOrder(val_dataloader, settled.seed),
            conditioning,
            settled,
            lambda sums: sums,
            modules.data_dtype,
        )
    finally:
        for module, mode in modes:
            module.training = mode
