# SPDX-License-Identifier: MIT
"""The captured loops that a sampler keeps: one for each form of inputs, the least recently used dropped first."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guidance import GuidedModel, Model
from .captured import CapturedLoop
from .static_inputs import leaves, signature

#: The number of loops that a sampler keeps.  Each holds a few tensors of the latents' size and the activations of one
#: model call.
CAPACITY = 4


@dataclass(frozen=True)
class _Entry:
    loop: CapturedLoop
    model: Callable[[], Model | None]
    #: The objects that the key has by identity, kept alive so that no other object gets their ids.
    kept: tuple[Any, ...]


class GraphCache:
    """Captured loops by what is fixed in them.  A copy or a pickle of it is empty: graphs belong to one process."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, model: GuidedModel, fixed: tuple[Any, ...], make: Callable[[], CapturedLoop]) -> CapturedLoop:
        """Return the loop for this model and these fixed values, captured where there is none yet.

        Models are held weakly: a loop is dropped with its model.
        """
        key = (*fixed, *_form(model))
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                loop = make()
                held = _weakly(model.model, lambda _: self._entries.pop(key, None))
                loop.let_model_go()
                entry = self._entries[key] = _Entry(loop, held, _unhashed(model))
                while len(self._entries) > CAPACITY:
                    self._entries.popitem(last=False)
            else:
                self._entries.move_to_end(key)
            return entry.loop

    def clear(self) -> None:
        """Drop all loops, and with them their memory."""
        with self._lock:
            self._entries.clear()

    def __reduce__(self) -> tuple[type[GraphCache], tuple[()]]:
        return GraphCache, ()


def _form(model: GuidedModel) -> tuple[Any, ...]:
    """Everything of a guided model that a graph fixes: identities, forms of tensors, values of the rest."""
    guided = model.guided
    negative = model.negative_prompt_embeds if guided else None
    kwargs = tuple((path, signature(leaf)) for path, leaf in leaves(dict(model.model_kwargs)))
    conditions = signature(model.prompt_embeds), signature(negative)
    scale_a_sample = guided and isinstance(model.guidance_scale, Tensor)
    flags = guided, scale_a_sample, model.mode, model.channels, model.model_dtype
    return _identity(model.model), _weights(model.model), conditions, kwargs, flags, autocast_state()


def _identity(model: Model) -> tuple[int, ...]:
    if inspect.ismethod(model):  # a new object at each look at the attribute
        return id(model.__self__), id(model.__func__)
    return (id(model),)


def _weights(model: Model) -> tuple[int, ...] | None:
    """The addresses of a module's weights, and its training flag: a graph reads at these addresses."""
    module = getattr(model, "__self__", model)
    if not isinstance(module, torch.nn.Module):
        return None
    held = (*module.parameters(), *module.buffers())
    return module.training, *(tensor.data_ptr() for tensor in held)


def autocast_state() -> tuple[bool, torch.dtype]:
    """Return whether autocast is enabled on CUDA devices, and its dtype: a graph holds the conversions."""
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _unhashed(model: GuidedModel) -> tuple[Any, ...]:
    return tuple(leaf for _, leaf in leaves(dict(model.model_kwargs)) if not isinstance(leaf, Tensor))


def _weakly(model: Model, gone: Callable[[Any], object]) -> Callable[[], Model | None]:
    """A weak reference, to a method's object for a method; a strong one where there is no other."""
    try:
        return weakref.WeakMethod(model, gone) if inspect.ismethod(model) else weakref.ref(model, gone)
    except TypeError:
        return lambda: model
