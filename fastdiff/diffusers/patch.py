# SPDX-License-Identifier: MIT
"""Patch pipelines: give their schedulers and guiders the fused classes in place, and undo it.

`patch` changes the class of an object and keeps the object.  Replacing the object would only update the pipeline's own
reference: pipelines made from one another's components share a scheduler, combined pipelines hold theirs twice, a
components manager goes by identity, and a running loop has its own reference.  All of them see a change of class.  The
state is the object's `__dict__`, so nothing is copied, in the middle of a loop either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import error_message
from . import pipeline_graphs
from .compiler.inputs import CACHE
from .find import find_parts, guiders_loaded, may_be_empty
from .mixin import FusedScheduler
from .registry import CLASSES

#: Attribute of an object whose class `patch` changed; `unpatch` changes no other.
_PATCHED = "_patched"


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
    """The result of `patch` or `unpatch`.

    Attributes:
        replaced: the parts whose class was changed.
        left: those that were not, each with the reason.
        captured: the models whose forward runs as a CUDA graph from now on; of `unpatch`, no longer does.
    """

    operation: str
    replaced: tuple[Part, ...]
    left: tuple[Part, ...]
    captured: tuple[Part, ...] = ()

    def __str__(self) -> str:
        if not self.replaced and not self.left and not self.captured:
            return f"{self.operation}: found no scheduler and no guider"
        graph = "captured" if self.operation == "patch" else "released"
        groups = (("replaced", self.replaced), ("left", self.left), (graph, self.captured))
        return "\n".join(f"{self.operation}: {verb} {part}" for verb, parts in groups for part in parts)


def patch(pipe: Any, *, cuda_graph: bool = False) -> PatchReport:
    """Give the schedulers and guiders of a pipeline their fused classes, in place.

    Each keeps its identity, configuration and state, in the middle of a loop too, and is saved as before.  A second
    call changes nothing.  A scheduler that the pipeline creates later is not changed: `DDIMPipeline`, for example,
    creates its own when it is constructed, so patch it after that.

    Args:
        pipe: a pipeline, a modular pipeline or its blocks, a module, a scheduler, a guider, an object with an attribute
            `scheduler` or `noise_scheduler`, or a dict, list or tuple of those.  What they hold is included.  The
            change applies to every other holder of the same scheduler.
        cuda_graph: also run the model of the pipeline's denoising loop as one CUDA graph, which all steps replay
            (docs/graphs.md); for a pipeline whose step is one model, guidance and a scheduler.

    Raises:
        TypeError: it is none of these, and has no scheduler and no guider; or no pipeline, beside `cuda_graph`.
        ValueError: `cuda_graph` is set for a pipeline of another kind, or a model that cannot be captured.  Nothing
            has been changed then.
    """
    found = _parts("patch", pipe)
    originals = {fused.original: fused for fused in _fused_classes()}
    left = [
        Part(where, type(part).__name__, _why_left(type(part), originals))
        for where, part in found
        if type(part) not in originals
    ]
    captured = []
    if cuda_graph:
        name, model = pipeline_graphs.denoiser_of(pipe)
        scheduler = dict(found).get("scheduler")
        fused = type(scheduler) in originals or isinstance(scheduler, FusedScheduler)
        reason = None if fused else _why_left(type(scheduler), originals)
        pipeline_graphs.check_can_capture(pipe, name, model, reason)
        if pipeline_graphs.capture(model):
            captured.append(Part(name, type(model).__name__))
        else:
            left.append(Part(name, type(model).__name__, "captured already"))
    replaced = []
    for where, part in found:
        kind = type(part)
        if kind in originals:
            part.__class__ = originals[kind]
            vars(part)[_PATCHED] = True
            replaced.append(Part(where, kind.__name__))
    return PatchReport("patch", tuple(replaced), tuple(left), tuple(captured))


def unpatch(pipe: Any) -> PatchReport:
    """Undo `patch`: give the same objects diffusers' classes back, with their present state, and drop the graphs.

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
    released = [
        Part(name, type(model).__name__)
        for name, model in pipeline_graphs.captured_models(pipe)
        if pipeline_graphs.release(model)
    ]
    return PatchReport("unpatch", tuple(replaced), tuple(left), tuple(released))


def _fused_classes() -> list[Any]:
    if not guiders_loaded():
        return list(CLASSES.values())
    from .guiders import GUIDERS

    return [*CLASSES.values(), *GUIDERS.values()]


def _why_left(kind: type, originals: Mapping[type, type]) -> str:
    if kind in originals.values():
        return "fused already"
    if issubclass(kind, FusedScheduler):
        return f"a subclass in {kind.__qualname__} of a fused class, which is left to its author"
    base = next((base for base in kind.__mro__ if base in originals), None)
    if base is not None:
        return f"a class of its own over {base.__name__}, whose changes a fused class would not have"
    return "no fused class of that name; see docs/diffusers.md"


def _parts(operation: str, holder: Any) -> list[tuple[str, Any]]:
    """Return the schedulers and guiders of an object, each once, with its path; refuse one that has none."""
    found = find_parts(holder)
    if not found and not may_be_empty(holder):
        raise TypeError(
            error_message(
                operation,
                "pipe",
                f"is a {type(holder).__name__} without a scheduler or a guider",
                "a diffusers pipeline, scheduler or guider",
                "pass the pipeline itself, or the object that holds the scheduler",
            )
        )
    return found
