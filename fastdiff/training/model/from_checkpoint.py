# SPDX-License-Identifier: MIT
"""Models of checkpoints: the checkpoint that a folder means, and a model with its averaged weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...errors import error_message
from ..checkpoints import (
    ATTEMPTS,
    Checkpoint,
    is_checkpoint,
    latest_checkpoint,
    read_checkpoint,
    read_state,
    unsteady,
)
from ..config import DiffusionConfig
from ..state_tensors import check_same_tensors, load_module_tensors, module_tensors
from .diffusion_model import AdvancedUNet
from .text_encoder import SmallTextEncoder, TextEncoder
from .trained_parts import check_configured_schedule

_ROUND = re.compile(r"steps-(\d{4,})")


class TrainedModel(NamedTuple):
    """The model of a checkpoint.

    Attributes:
        folder: of the checkpoint.
        digest: see `Checkpoint`.
        config: the settled configuration of the training.
        network: a `DigitUNet` or an `AdvancedUNet`, with averaged weights where there are any.
        text_encoder: for prompts; None for a model without.
    """

    folder: Path
    digest: str
    config: DiffusionConfig
    network: nn.Module
    text_encoder: TextEncoder | None


def round_folder(out: Path, steps: int) -> Path:
    """Return the folder of the round of a progressive distillation whose student takes so many steps."""
    return out / f"steps-{steps:04d}"


def find_checkpoint(folder: str | Path) -> Path:
    """Return the checkpoint that a folder means.

    The first of these that there is: the folder itself; the latest in its ``checkpoints/``; the latest in it; the
    latest of the last complete round of a progressive distillation.  Else the folder itself, which `read_checkpoint`
    then refuses.

    Raises:
        ValueError: there are rounds, and none is complete.
    """
    path = Path(folder)
    if is_checkpoint(path):
        return path
    found = latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)
    if found is not None or not path.is_dir():
        return found or path
    rounds = sorted((int(match[1]), entry) for entry in path.iterdir() if (match := _ROUND.fullmatch(entry.name)))
    for _, entry in rounds:  # the last round has the fewest steps
        found = latest_checkpoint(entry / "checkpoints")
        if found is not None and _is_complete(read_state(found)):
            return found
    if rounds:
        got, remedy = f"is {str(path)!r}, where no round is complete", "go on with --resume, or name a round's folder"
        raise ValueError(error_message("find_checkpoint", "folder", got, "a distillation with a student", remedy))
    return path


def _is_complete(state: Mapping[str, Any]) -> bool:
    """Return True for the state at the end of a training."""
    return int(state["step"]) >= int(state["config"]["max_train_steps"])


def read_folder(folder: str | Path) -> tuple[Path, Checkpoint]:
    """Return the checkpoint that a folder means and what it holds, without the state of the optimizer.

    Where a training removes the latest one before it is read, the folder is looked through again.

    Raises:
        FileNotFoundError: there is none, or it was removed or replaced again and again.
        ValueError: as `find_checkpoint` and `read_checkpoint`.
    """
    for _ in range(ATTEMPTS):
        path = None
        try:
            path = find_checkpoint(folder)
            return path, read_checkpoint(path, without=("optimizer",))
        except FileNotFoundError:
            if path == Path(folder):
                raise
    raise unsteady(Path(folder))


def load_folder_weights(
    folder: str | Path, parts: Mapping[str, nn.Module], operation: str
) -> tuple[Path, dict[str, Any]]:
    """Copy the weights of the checkpoint that a folder means into modules; return the checkpoint and its JSON values.

    Args and errors as in `read_folder` and `load_weights`.
    """
    path, found = read_folder(folder)
    load_weights(found, parts, operation)
    return path, found.state


def load_weights(found: Checkpoint, parts: Mapping[str, nn.Module], operation: str) -> None:
    """Copy the averaged tensors of a checkpoint into modules, or the trained ones where there are no averages.

    Args:
        found: the checkpoint.
        parts: modules by their names in the checkpoint, ``model`` and ``text_encoder``.
        operation: for messages.

    Raises:
        ValueError: a module has other tensors; all modules are then unchanged.
    """
    averaged = "ema" in found.tensors
    files = {name: {"model": "ema"}.get(name, f"ema_{name}") if averaged else name for name in parts}
    for name, module in parts.items():
        check_same_tensors(module_tensors(module), found.tensors[files[name]], operation, name)
    for name, module in parts.items():
        load_module_tensors(module, found.tensors[files[name]], operation, name)


def load_trained_model(
    folder: str | Path, text_encoder: TextEncoder | None = None, *, operation: str, argument: str
) -> TrainedModel:
    """Read the model of a trainer's checkpoint.

    Args:
        folder: see `find_checkpoint`.
        text_encoder: a module gets the checkpoint's weights, another callable is used as it is.  Where None, a
            checkpoint with a text encoder brings a `SmallTextEncoder`.
        operation, argument: for messages.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no whole checkpoint of a trainer, or of another model than `DigitUNet` and `AdvancedUNet`, or
            was trained on another noise schedule than its configuration has.
    """
    try:
        path, found = read_folder(folder)
    except FileNotFoundError as error:
        if Path(folder).exists():
            raise
        got, remedy = f"is {str(folder)!r}, which does not exist", "check the path"
        expected = "a folder of fastdiff train, or of a trainer's checkpoint"
        raise FileNotFoundError(error_message(operation, argument, got, expected, remedy)) from error
    if "config" not in found.state:
        got, remedy = f"is {str(path)!r}, which has no configuration", "load it with load_checkpoint into a model"
        raise ValueError(error_message(operation, argument, got, "a trainer's checkpoint", remedy))
    config = DiffusionConfig.from_dict(found.state["config"]).validate()
    check_configured_schedule(found.state, config, path, operation, argument)
    network = _untrained_network(config, found)
    parts: dict[str, nn.Module] = {"model": network}
    if "text_encoder" in found.tensors:
        text_encoder = SmallTextEncoder(config.context_dim) if text_encoder is None else text_encoder
        if isinstance(text_encoder, nn.Module):
            parts["text_encoder"] = text_encoder
    load_weights(found, parts, operation)
    return TrainedModel(path, found.digest, config, network, text_encoder)


def _untrained_network(config: DiffusionConfig, found: Checkpoint) -> nn.Module:
    """Return a network of the kind that a checkpoint holds, told by the names of its tensors."""
    from ...digits import DigitUNet

    digits = DigitUNet()
    return digits if module_tensors(digits).keys() == found.tensors["model"].keys() else AdvancedUNet(config)
