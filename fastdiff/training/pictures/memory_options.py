# SPDX-License-Identifier: MIT
"""Memory options of a pipeline, passed to diffusers' own methods.

Each function checks that the option exists for the given parts and returns the call that turns it on.  A caller with
several options can therefore find out that one is missing before any has been turned on.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import error_message, require
from ..config import DiffusionConfig
from ..model.diffusion_model import attention_layers

#: Turns one option on.
Call = Callable[[], object]

#: Attention processors of diffusers that compute what `AttnProcessor2_0` computes.
_EQUIVALENT = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


class MemoryOptions:
    """The memory options that a pipeline's parts have.

    Args:
        operation: for messages.
        parts: the modules by name; others among the values are left out.
        pipe: the pipeline of diffusers, which has CPU offload; None for a model alone.
    """

    def __init__(self, operation: str, parts: Mapping[str, Any], pipe: Any = None) -> None:
        self.operation, self.pipe = operation, pipe
        self.parts: dict[str, Any] = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def of_config(self, config: DiffusionConfig) -> list[Call]:
        """Return the calls for the options of a settled configuration, the last named of attention options last.

        Raises:
            ImportError, ValueError: one of them does not exist here.
        """
        options = (
            (config.use_vae_slicing, self.vae_slicing),
            (config.use_attention_slicing, self.attention_slicing),
            (config.use_memory_efficient_attention, self.memory_efficient_attention),
            (config.use_xformers, self.xformers),
            (config.use_cpu_offload, self.cpu_offload),
        )
        return [option() for wanted, option in options if wanted]

    def attention_slicing(self, slice_size: int | str | None = "auto") -> Call:
        """Return the call that computes attention in slices; None for slice_size turns slicing off.

        Raises:
            ValueError: no part slices its attention.
        """
        sliced = [part for part in self.parts.values() if hasattr(part, "set_attention_slice")]
        if not sliced:
            self._refuse("attention slicing", "use memory-efficient attention instead")
        if self.pipe is not None:
            return functools.partial(self.pipe.enable_attention_slicing, slice_size)
        return lambda: [part.set_attention_slice(slice_size) for part in sliced]

    def vae_slicing(self) -> Call:
        """Return the call that lets the VAE take one image at a time.

        Raises:
            ValueError: there is no VAE, or it cannot.
        """
        enable: Call | None = getattr(self.parts.get("vae"), "enable_slicing", None)
        if enable is None:
            self._refuse("VAE slicing", "leave it out, or pass a pipeline with such a VAE")
        return enable

    def memory_efficient_attention(self) -> Call:
        """Return the call that computes attention by torch's scaled_dot_product_attention.

        Raises:
            ImportError: diffusers is missing.
            ValueError: no part lets its attention be chosen.
        """
        processors = require("diffusers.models.attention_processor", "diffusers", self.operation)
        calls: list[Call] = []
        for part in self.parts.values():
            layers = attention_layers(part)
            kinds = {type(layer.processor).__name__ for layer in layers}
            if kinds and kinds <= set(_EQUIVALENT):
                calls += [functools.partial(layer.set_processor, processors.AttnProcessor2_0()) for layer in layers]
            elif kinds and hasattr(part, "set_attention_backend"):
                calls.append(functools.partial(part.set_attention_backend, "native"))
        if not calls:
            self._refuse("memory-efficient attention", "leave it out")
        return lambda: [call() for call in calls]

    def xformers(self) -> Call:
        """Return the call that computes attention by xFormers.

        Raises:
            ImportError: xFormers is missing.
            ValueError: there is no CUDA device, or no part has the method.
        """
        remedy = "install xformers beside a CUDA build of torch, or use memory-efficient attention"
        if importlib.util.find_spec("xformers") is None:
            got = "needs the package 'xformers', which is not installed"
            raise ImportError(error_message(self.operation, "xFormers", got, "it to be installed", remedy))
        if not torch.cuda.is_available():
            got = "needs a CUDA device, and there is none"
            raise ValueError(error_message(self.operation, "xFormers", got, "a CUDA device", remedy))
        name = "enable_xformers_memory_efficient_attention"
        if self.pipe is not None:
            enable: Call = getattr(self.pipe, name)
            return enable
        calls = [getattr(part, name) for part in self.parts.values() if hasattr(part, name)]
        if not calls:
            self._refuse("xFormers", "leave it out")
        return lambda: [call() for call in calls]

    def cpu_offload(self, *, sequential: bool = False) -> Call:
        """Return the call that keeps models on the CPU while they are not used.

        Args:
            sequential: move single layers instead of whole models: less memory, and much slower.

        Raises:
            ImportError: accelerate is missing.
            ValueError: there is no pipeline of several models, or no accelerator to move them to.
        """
        if self.pipe is None:
            self._refuse("CPU offload", "move the model with to(device)")
        require("accelerate", "training", self.operation)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            got, remedy = "needs an accelerator, and there is none", "leave it out: the models are on the CPU already"
            raise ValueError(error_message(self.operation, "CPU offload", got, "an accelerator", remedy))
        pipe = self.pipe
        enable = pipe.enable_sequential_cpu_offload if sequential else pipe.enable_model_cpu_offload
        return functools.partial(enable, device=accelerator.type)

    def _refuse(self, option: str, remedy: str) -> NoReturn:
        holder = "the model" if self.pipe is None else f"a {type(self.pipe).__name__}"
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in self.parts.items())
        got = f"does not exist for {holder} with {parts or 'no modules'}"
        raise ValueError(error_message(self.operation, option, got, "a part that has it", remedy))
