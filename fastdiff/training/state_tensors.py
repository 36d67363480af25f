# SPDX-License-Identifier: MIT
"""Tensors of modules and optimizers by name, as checkpoints hold them, and back in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import error_message

#: Beginning of the names of tensors of parameter groups, before the group's number.
_GROUP = "group"


#: Part of the names in a module of `torch.compile`; checkpoints have the names of the module that was compiled.
_COMPILED = "_orig_mod."


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and kept buffers of a module by name; of those that are one tensor, the first name alone.

    Raises:
        TypeError: the module keeps state that is no tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            got, remedy = f"keeps a {type(value).__name__} under {name!r}", "keep it in a buffer"
            raise TypeError(error_message("save_checkpoint", "model", got, "tensors alone", remedy))
        if name not in own:
            got, remedy = f"keeps extra state under {name!r}", "keep it in a buffer"
            raise TypeError(error_message("save_checkpoint", "model", got, "parameters and buffers alone", remedy))
        tensor = own[name]
        name = name.replace(_COMPILED, "")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


@torch.no_grad()
def load_module_tensors(module: nn.Module, tensors: Mapping[str, Tensor], operation: str, argument: str) -> None:
    """Copy tensors into those of a module, in place; nothing is changed on an error.

    Raises:
        ValueError: names or shapes differ; the message has the first of them.
    """
    own = module_tensors(module)
    check_same_tensors(own, tensors, operation, argument)
    for name, value in tensors.items():
        own[name].copy_(value)


def check_same_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], operation: str, argument: str) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Raises:
        ValueError: they differ.
    """
    remedy = "make the model with the configuration that the checkpoint was trained with"
    for name in [*own, *tensors]:
        if name not in own or name not in tensors:
            got = f"has {name!r}, which the checkpoint lacks" if name in own else f"lacks {name!r} of the checkpoint"
            raise ValueError(error_message(operation, argument, got, "equal names", remedy))
        if own[name].shape != tensors[name].shape:
            got = f"has {name!r} of shape {list(own[name].shape)}"
            raise ValueError(
                error_message(operation, argument, got, f"{list(tensors[name].shape)} like the checkpoint", remedy)
            )


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of an optimizer as JSON values and tensors; a learning rate that is a tensor is one of them.

    Raises:
        TypeError: it keeps something else.
    """
    held = optimizer.state_dict()
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for index, entries in held["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                values[f"{index}.{name}"] = value
            else:
                got, remedy = f"keeps a {type(value).__name__} under {name!r}", "use AdamW"
                raise TypeError(error_message("save_checkpoint", "optimizer", got, "tensors and numbers", remedy))
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(held["param_groups"]):
        tensors |= {f"{_GROUP}{number}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in group.items() if not isinstance(value, Tensor)}
        groups.append({name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()})
    return {"values": values, "groups": groups}, tensors


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `optimizer_state` returned.

    Raises:
        ValueError: the optimizer has other parameters, or is of another kind.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in own] != [group["params"] for group in state["groups"]]:
        counts = [len(group["params"]) for group in own], [len(group["params"]) for group in state["groups"]]
        got, expected = f"has groups of {counts[0]} parameters", f"{counts[1]} like the checkpoint"
        remedy = "make it as it was made for the training"
        raise ValueError(error_message("load_checkpoint", "optimizer", got, expected, remedy))
    unknown = {name for kept, saved in zip(own, state["groups"], strict=True) for name in saved.keys() - kept.keys()}
    if unknown - {"initial_lr"}:  # which a learning rate's schedule adds
        got, expected = f"is a {type(optimizer).__name__}", f"one with {', '.join(sorted(unknown))} like the checkpoint"
        remedy = "make it as it was made for the training"
        raise ValueError(error_message("load_checkpoint", "optimizer", got, expected, remedy))
    entries: dict[int, dict[str, Any]] = {}
    of_groups: list[dict[str, Any]] = [{} for _ in own]
    for key, value in [*state["values"].items(), *tensors.items()]:
        index, _, name = key.partition(".")
        if index.startswith(_GROUP):
            of_groups[int(index.removeprefix(_GROUP))][name] = value
        else:
            entries.setdefault(int(index), {})[name] = value
    groups = [
        {
            **kept,
            **{name: tuple(value) if isinstance(kept.get(name), tuple) else value for name, value in saved.items()},
            **in_tensors,
        }
        for kept, saved, in_tensors in zip(own, state["groups"], of_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
