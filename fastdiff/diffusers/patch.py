# SPDX-License-Identifier: MIT
"""Patch pipelines: give their schedulers and guiders the fused classes in place, and undo it.

`patch` changes the class of an object and keeps the object.  Replacing the object would only update the pipeline's own
reference: pipelines made from one another's components share a scheduler, combined pipelines hold theirs twice, a
components manager goes by identity, and a running loop has its own reference.  All of them see a change of class.  The
state is the object's `__dict__`, so nothing is copied, in the middle of a loop either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..errors import error_message
from .compiler.inputs import CACHE
from .mixin import FusedScheduler
from .registry import CLASSES

#: Attribute of an object whose class `patch` changed; `unpatch` changes no other.
_PATCHED = "_patched"
#: Classes that hold schedulers and guiders.  Their modules take seconds to import, so they are only looked up among the
#: imported ones: whoever has such an object has imported its module.
_PIPELINES = (
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipelineBlocks"),
)
_GUIDERS = (("diffusers.guiders.guider_utils", "BaseGuidance"),)


@dataclass(frozen=True)
class Part:
    """A scheduler or a guider of a pipeline.

    Attributes:
        where: its path in the pipeline, such as ``scheduler`` or ``prior_pipe.scheduler``; empty for the object itself.
        name: the name of its class.
        reason: why it was left unchanged; empty if it was changed.
    """

    where: str
    name: str
    reason: str = ""

    def __str__(self) -> str:
        at = f"{self.where}: {self.name}" if self.where else self.name
        return f"{at} ({self.reason})" if self.reason else at


@dataclass(frozen=True)
class PatchReport:
    """The result of `patch` or `unpatch`: the parts whose class was changed, and those left, each with the reason."""

    operation: str
    replaced: tuple[Part, ...]
    left: tuple[Part, ...]

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return f"{self.operation}: found no scheduler and no guider"
        groups = (("replaced", self.replaced), ("left", self.left))
        return "\n".join(f"{self.operation}: {verb} {part}" for verb, parts in groups for part in parts)


def patch(pipe: Any) -> PatchReport:
    """Give the schedulers and guiders of a pipeline their fused classes, in place.

    Each keeps its identity, configuration and state, in the middle of a loop too, and is saved as before.  A second
    call changes nothing.  A scheduler that the pipeline creates later is not changed: `DDIMPipeline`, for example,
    creates its own when it is constructed, so patch it after that.

    Args:
        pipe: a pipeline, a modular pipeline or its blocks, a scheduler, a guider, or a dict, list or tuple of those.
            Nested pipelines are included.  The change applies to every other holder of the same scheduler.

    Raises:
        TypeError: it is none of these, and has no scheduler and no guider.
    """
    replaced, left = [], []
    originals = {fused.original: fused for fused in _fused_classes()}
    for where, part in _parts("patch", pipe):
        kind = type(part)
        fused = originals.get(kind)
        if fused is None:
            left.append(Part(where, kind.__name__, _why_left(kind, originals)))
            continue
        part.__class__ = fused
        vars(part)[_PATCHED] = True
        replaced.append(Part(where, kind.__name__))
    return PatchReport("patch", tuple(replaced), tuple(left))


def unpatch(pipe: Any) -> PatchReport:
    """Undo `patch`: give the same objects diffusers' classes back, with their present state.

    A scheduler or guider that was created with a fused class keeps it.  Seeds given by `use_philox` are dropped.

    Args:
        pipe: as for `patch`.

    Raises:
        TypeError: as for `patch`.
    """
    replaced, left = [], []
    fused = frozenset(_fused_classes())
    for where, part in _parts("unpatch", pipe):
        if type(part) not in fused:
            left.append(Part(where, type(part).__name__, "not fused"))
        elif _PATCHED not in vars(part):
            left.append(Part(where, type(part).__name__, "made as a fused one, not by patch"))
        else:
            part.__class__ = original = type(part).original
            for name in (_PATCHED, CACHE):
                vars(part).pop(name, None)
            replaced.append(Part(where, original.__name__))
    return PatchReport("unpatch", tuple(replaced), tuple(left))


def _fused_classes() -> list[Any]:
    if not _loaded(_GUIDERS):
        return list(CLASSES.values())
    from .guiders import GUIDERS

    return [*CLASSES.values(), *GUIDERS.values()]


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type, ...]:
    """Return those classes whose modules have been imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if kind is not None)


def _why_left(kind: type, originals: Mapping[type, type]) -> str:
    if kind in originals.values():
        return "fused already"
    if issubclass(kind, FusedScheduler):
        return f"a subclass in {kind.__qualname__} of a fused class, which is left to its author"
    base = next((base for base in kind.__mro__ if base in originals), None)
    if base is not None:
        return f"a class of its own over {base.__name__}, whose changes a fused class would not have"
    return "no fused class of that name; see docs/diffusers.md"


def _parts(operation: str, pipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schedulers and guiders of a pipeline, each once, with its path."""
    parts, pipelines = (SchedulerMixin, *_loaded(_GUIDERS)), _loaded(_PIPELINES)
    seen: set[int] = set()

    def walk(where: str, value: Any) -> Iterator[tuple[str, Any]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, parts):
            yield where, value
            return
        inner: list[tuple[Any, Any]] = []
        if isinstance(value, Mapping):
            inner = list(value.items())
        elif isinstance(value, (list, tuple)):
            inner = list(enumerate(value))
        elif isinstance(value, pipelines) or not where:
            inner = list(getattr(value, "__dict__", {}).items())
        for name, item in inner:
            if isinstance(item, (*parts, *pipelines, Mapping, list, tuple)):
                yield from walk(f"{where}.{name}" if where else str(name), item)

    found = list(walk("", pipe))
    if not found and not isinstance(pipe, (*pipelines, Mapping, list, tuple)):
        raise TypeError(
            error_message(
                operation,
                "pipe",
                f"is a {type(pipe).__name__} without a scheduler or a guider",
                "a diffusers pipeline, scheduler or guider",
                "pass the pipeline itself",
            )
        )
    return iter(found)
