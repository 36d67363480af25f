# SPDX-License-Identifier: MIT
"""Find the schedulers and guiders that an object holds, each with its path."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

#: Classes that hold schedulers and guiders.  Their modules take seconds to import, so they are only looked up among the
#: imported ones: whoever has such an object has imported its module.
_PIPELINES = (
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipelineBlocks"),
)
_GUIDERS = (("diffusers.guiders.guider_utils", "BaseGuidance"),)
#: The usual attributes for a scheduler.  An object that is no pipeline and no module is searched if it has one of them.
_NAMES = ("scheduler", "noise_scheduler")
#: Attributes of every module that hold no scheduler; its submodules are searched under their own names.
_OF_MODULES = frozenset(vars(torch.nn.Module()))
#: Objects without attributes of interest.
_OPAQUE = (type, FunctionType, ModuleType, torch.Tensor, str, bytes, int, float, complex, type(None))


def find_parts(holder: Any) -> list[tuple[str, Any]]:
    """Return the schedulers and guiders of an object, each once, with its path; the path of the object itself is empty.

    Searched are pipelines, modules and their submodules, dicts, lists and tuples, and other objects with an attribute
    ``scheduler`` or ``noise_scheduler``; of the object itself all attributes.
    """
    parts = _part_classes()
    return [(path, value) for path, value in walk(holder) if isinstance(value, parts)]


def walk(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object and all objects that are searched for schedulers, each once, with its path."""
    parts = _part_classes()
    seen: set[int] = set()

    def visit(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        yield path, value
        if isinstance(value, parts):
            return
        for name, item in _inner(value, outermost=not path):
            if not isinstance(item, _OPAQUE):
                yield from visit(f"{path}.{name}" if path else name, item)

    return visit("", holder)


def _part_classes() -> tuple[type, ...]:
    return SchedulerMixin, *_loaded(_GUIDERS)


def may_be_empty(holder: Any) -> bool:
    """Return True for a pipeline or a collection, which is searched without complaint where nothing is found."""
    return isinstance(holder, (*_loaded(_PIPELINES), Mapping, list, tuple))


def guiders_loaded() -> bool:
    """Return True if diffusers' guiders have been imported."""
    return bool(_loaded(_GUIDERS))


def _inner(value: Any, *, outermost: bool) -> Iterator[tuple[str, Any]]:
    """Yield the entries of an object that may be, or hold, a scheduler or a guider."""
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, torch.nn.Module):
        yield from ((name, item) for name, item in list(vars(value).items()) if name not in _OF_MODULES)
        yield from ((name, item) for name, item in value._modules.items() if item is not None)
    else:
        attributes = getattr(value, "__dict__", {})
        if outermost or isinstance(value, _loaded(_PIPELINES)) or any(name in attributes for name in _NAMES):
            yield from list(attributes.items())
        yield from ((name, getattr(value, name, None)) for name in _NAMES if _is_computed(type(value), name))


def _is_computed(kind: type, name: str) -> bool:
    """Return True for an attribute that is a property or a slot, and therefore not in `__dict__`."""
    found = getattr(kind, name, None)
    return isinstance(found, (property, MemberDescriptorType, GetSetDescriptorType))


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type, ...]:
    """Return those classes whose modules have been imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if kind is not None)
