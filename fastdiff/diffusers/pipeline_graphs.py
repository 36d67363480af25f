# SPDX-License-Identifier: MIT
"""CUDA graphs for the denoising loops of pipelines: one graph of the model, which all steps replay.

A step of such a loop is model, guidance and scheduler.  The model launches hundreds of kernels, guidance a few and the
fused step one; the graph is the model's.  The step stays outside: its row is another one each time, and its history and
noise belong to the scheduler, so that a graph would need a copy of each in and out, more launches than the step itself.
The pipeline's own Python runs as before, callbacks and changes of guidance included.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..errors import error_message
from ..graphs import CapturedForward, can_capture_on, why_not_captured
from .find import walk

#: The names by which pipelines know the model that a step calls.
_DENOISERS = ("unet", "transformer", "prior")
#: The beginnings of the names of models that run before the loop or after it, or are merged into the one of the loop.
_BESIDE_THE_LOOP = (
    "vae", "vqvae", "movq", "text_encoder", "image_encoder", "bert", "language_model", "projection_model", "adapter",
    "motion_adapter", "safety_checker", "vocoder",
)  # fmt: skip


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Return the name and the model of a pipeline whose step is model, guidance and scheduler.

    Raises:
        TypeError, ValueError: it is no pipeline, or one of another kind; the message says what it has.
    """
    kind = getattr(sys.modules.get("diffusers.pipelines.pipeline_utils"), "DiffusionPipeline", None)
    if kind is None or not isinstance(pipe, kind):
        raise TypeError(_refusal(pipe, "is none of diffusers' pipelines", "capture its loop by a sampler's cuda_graph"))
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    denoisers = [name for name in models if name in _DENOISERS]
    others = [name for name in models if name not in _DENOISERS and not name.startswith(_BESIDE_THE_LOOP)]
    if not denoisers:
        got = f"has no {' or '.join(_DENOISERS)}"
    elif len(denoisers) > 1 or others:
        got = f"has {', '.join([*denoisers[1:], *others])} beside {denoisers[0]}, so that a step is more than one model"
    else:
        return denoisers[0], models[denoisers[0]]
    raise ValueError(_refusal(pipe, got, "patch it without cuda_graph"))


def check_can_capture(pipe: Any, name: str, model: nn.Module, not_fused: str | None) -> None:
    """Refuse a pipeline whose model cannot be captured, or whose scheduler stays diffusers' own.

    Args:
        pipe: the pipeline.
        name, model: of its denoiser.
        not_fused: why its scheduler is not fused; None if it is, or will be.

    Raises:
        ValueError: the reason is in the message.
    """
    if not_fused is not None:
        got = f"has a scheduler that is not fused ({not_fused})"
        raise ValueError(_refusal(pipe, got, "give it one of fastdiff.diffusers, or patch it without cuda_graph"))
    reason = why_not_captured(model)
    if reason is not None:
        raise ValueError(_refusal(pipe, f"has a {name} that {reason}", "undo that, or patch it without cuda_graph"))
    device = next(model.parameters()).device
    if not can_capture_on(device):
        got = f"has its {name} on {device}, and CUDA graphs are for CUDA devices"
        raise ValueError(_refusal(pipe, got, "move it there first, or patch it without cuda_graph"))


def capture(model: nn.Module) -> bool:
    """Let a model's forward run as a graph from now on; return False where it does already."""
    if is_captured(model):
        return False
    vars(model)["forward"] = CapturedForward(model)
    return True


def release(model: nn.Module) -> bool:
    """Undo `capture`; return False where there was none."""
    if not is_captured(model):
        return False
    del vars(model)["forward"]
    return True


def is_captured(model: nn.Module) -> bool:
    """Return True if a model's forward runs as a graph."""
    return isinstance(vars(model).get("forward"), CapturedForward)


def captured_models(holder: Any) -> list[tuple[str, nn.Module]]:
    """Return the models that an object holds whose forward runs as a graph, each with its path."""
    return [(path, value) for path, value in walk(holder) if isinstance(value, nn.Module) and is_captured(value)]


def _refusal(pipe: Any, got: str, remedy: str) -> str:
    expected = "a pipeline of one model whose step is model, guidance and a fused scheduler, beside cuda_graph=True"
    return error_message("patch", "pipe", f"is a {type(pipe).__name__} that {got}", expected, remedy)
