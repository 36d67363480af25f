# SPDX-License-Identifier: MIT
"""A trainer's whole state as a checkpoint, and back: the resumed run has the bits of one that was never stopped.

Nothing depends on torch's own generators: the order of data, noise, timesteps, condition dropout and the model's
dropout are functions of the seed and of the numbers that are kept here.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import error_message
from ..checkpoints import read_checkpoint, write_checkpoint
from ..model.trained_parts import equal_levels, schedule_levels
from ..state_tensors import (
    check_same_tensors,
    load_module_tensors,
    load_optimizer_state,
    module_tensors,
    optimizer_state,
)

if TYPE_CHECKING:
    from .trainer import Trainer

#: Fields of the configuration that do not change what a training step computes.
_OF_SAMPLING = frozenset(
    (
        "sampling_method",
        "num_inference_steps",
        "timestep_spacing",
        "guidance_scale",
        "eta",
        "use_vae_slicing",
        "use_cpu_offload",
        "max_train_steps",
    )
)


def save_state(trainer: Trainer, folder: Path) -> None:
    """Write the checkpoint of a trainer, between two optimizer steps.

    Raises:
        OSError: it cannot be written.
    """
    values, tensors = optimizer_state(trainer.optimizer)
    state: dict[str, Any] = {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "global_batch": trainer.global_batch,
        "direct_samples": trainer.direct_samples,
        "skipped_steps": trainer.skipped_steps,
        "loss": trainer.last_loss,
        "optimizer": values,
        "learning_rate": trainer.learning_rate.state_dict(),
        "config": trainer.config.to_dict(),
        "torch": torch.__version__,
    }
    levels = schedule_levels(trainer.schedule)
    if levels is not None:
        state["schedule"] = levels
    modules = trainer.modules
    files = {"model": module_tensors(modules.model), "optimizer": tensors}
    if modules.text_encoder is not None:
        files["text_encoder"] = module_tensors(modules.text_encoder)
    if trainer.scaler is not None:
        state["scaler"] = trainer.scaler.state_dict()
    if trainer.ema is not None:
        held = trainer.ema.state_dict()
        state["ema"] = {name: value for name, value in held.items() if name != "shadow_params"}
        averages = dict(zip(map(id, trainer.parameters), held["shadow_params"], strict=True))
        files["ema"] = _averaged(modules.model, averages)
        if modules.text_encoder is not None:
            files["ema_text_encoder"] = _averaged(modules.text_encoder, averages)
    write_checkpoint(folder, state, files)


def load_state(trainer: Trainer, folder: Path) -> None:
    """Give a trainer the state of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, pickled, or of another model; the trainer is then unchanged.
    """
    found = read_checkpoint(folder)
    state, tensors, modules = found.state, found.tensors, trainer.modules
    operation = "load_checkpoint"
    if "learning_rate" not in state:
        got, remedy = f"is {str(folder)!r}, which save_checkpoint(model, ...) wrote", "load it with load_checkpoint"
        raise ValueError(error_message(operation, "path", got, "a trainer's checkpoint", remedy))
    parts: list[tuple[str, nn.Module]] = [("model", modules.model)]
    if modules.text_encoder is not None:
        parts.append(("text_encoder", modules.text_encoder))
    expected = {name for name, _ in parts} | {"optimizer"}
    if trainer.ema is not None:
        expected |= {"ema"} | ({"ema_text_encoder"} if modules.text_encoder is not None else set())
    if expected != set(tensors) or (trainer.scaler is None) != ("scaler" not in state):
        got = f"is {str(folder)!r} with {', '.join(sorted(tensors))}"
        remedy = "make the trainer with the same text encoder, use_ema and mixed_precision"
        raise ValueError(error_message(operation, "path", got, ", ".join(sorted(expected)), remedy))
    for name, module in parts:
        check_same_tensors(module_tensors(module), tensors[name], operation, name)
    _warn_of_changes(trainer, state)
    load_optimizer_state(trainer.optimizer, state["optimizer"], tensors["optimizer"])
    for name, module in parts:
        load_module_tensors(module, tensors[name], operation, name)
    trainer.learning_rate.load_state_dict(_with_keys_like(state["learning_rate"], trainer.learning_rate.state_dict()))
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(state["scaler"])
    if trainer.ema is not None:
        ids = {id(parameter): i for i, parameter in enumerate(trainer.parameters)}
        shadows: list[Tensor] = list(trainer.ema.shadow_params)
        for name, module in parts:
            averaged = tensors["ema" if name == "model" else "ema_text_encoder"]
            for key, tensor in module_tensors(module).items():
                if id(tensor) in ids:
                    shadows[ids[id(tensor)]].copy_(averaged[key])
        trainer.ema.load_state_dict({**state["ema"], "shadow_params": shadows})
    trainer.step, trainer.epoch, trainer.batch = state["step"], state["epoch"], state["batch"]
    trainer.global_batch, trainer.direct_samples = state["global_batch"], state["direct_samples"]
    trainer.skipped_steps, trainer.last_loss = state["skipped_steps"], state["loss"]


def _with_keys_like(saved: Any, own: Any) -> Any:
    """Return values of JSON with keys that are numbers where those of `own` are: JSON has texts alone as keys."""
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [_with_keys_like(*pair) for pair in zip(saved, own, strict=True)]
    if not isinstance(own, dict) or not isinstance(saved, dict):
        return saved
    numbers = bool(own) and all(isinstance(key, int) for key in own)
    named = {int(key) if numbers else key: value for key, value in saved.items()}
    made = copy.copy(own)  # MultiStepLR has a Counter
    made.clear()
    made.update({key: _with_keys_like(value, own.get(key)) for key, value in named.items()})
    return made


def _averaged(module: nn.Module, averages: dict[int, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module with averages in place of its parameters."""
    return {name: averages.get(id(tensor), tensor) for name, tensor in module_tensors(module).items()}


def _warn_of_changes(trainer: Trainer, state: dict[str, Any]) -> None:
    ours, saved = trainer.config.to_dict(), state["config"]
    changed = [name for name, value in ours.items() if saved.get(name) != value and name not in _OF_SAMPLING]
    levels = schedule_levels(trainer.schedule)
    if not changed and levels is not None and not equal_levels(levels, state.get("schedule", levels)):
        changed = ["the noise schedule"]
    if changed:
        got = f"differs from the checkpoint's in {', '.join(changed)}"
        remedy = "the training goes on with the new values, and not in the bits of the old one"
        warnings.warn(error_message("load_checkpoint", "config", got, "an equal one", remedy), stacklevel=4)
