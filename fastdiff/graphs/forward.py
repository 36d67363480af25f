# SPDX-License-Identifier: MIT
"""A module's forward as CUDA graphs: captured for each form of its inputs, and replayed with the inputs copied in."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..device_copy import to_device
from ..errors import error_message
from .cache import CAPACITY, autocast_state
from .module_state import ModuleState
from .recorder import ONE_CAPTURE, RECORDERS, WARM_UPS, without_autocast_cache
from .static_inputs import COMPARED, Container, StaticTree, leaves, signature

#: The argument that may be a number, or a tensor on the CPU: schedules are kept there, and a loop reads a view of them.
_TIMESTEP = "timestep"


class CapturedForward:
    """Takes the place of a module's `forward`: the first call of a form captures it, all others replay that graph.

    All tensors among the arguments are copied into memory of the graph's own, and the results out of it.  Fixed are
    their shapes, dtypes and strides, all other arguments, autocast, and whatever Python the module runs.  Each call
    compares them, the addresses of the weights and the attributes of all submodules, and captures another graph where
    one differs.  The graphs used last are kept, at most `fastdiff.graphs.cache.CAPACITY`.

    Where gradients are wanted, or while torch traces or captures, the module's own forward runs.

    It serves one caller at a time.  Copies and pickles have no graphs.

    Args:
        module: its class's `forward` is captured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: Callable[..., Any] = type(module).forward
        #: For pipelines that look at a model's arguments.
        self.__signature__ = inspect.signature(self._forward.__get__(module))
        self.names = tuple(self.__signature__.parameters)
        self._graphs: list[_Graph] = []
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> tuple[type[CapturedForward], tuple[nn.Module]]:
        return CapturedForward, (self._module,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given = ((path[0], leaf) for path, leaf in leaves(arguments) if isinstance(leaf, Tensor))
        device = next((tensor.device for name, tensor in given if name != _TIMESTEP), None)
        if device is None or len(arguments) != len(args) + len(kwargs) or self._takes_own_way(arguments, device):
            return self._forward(self._module, *args, **kwargs)  # of wrong arguments it says what is wrong
        if _TIMESTEP in arguments:
            arguments[_TIMESTEP] = _on_device(arguments[_TIMESTEP], device)
        with self._lock, torch.no_grad():
            return self._graph(arguments, device).replay(arguments)

    def _takes_own_way(self, arguments: dict[str, Any], device: torch.device) -> bool:
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return True
        if not torch.is_grad_enabled():
            return False
        given = (leaf for _, leaf in leaves(arguments) if isinstance(leaf, Tensor))
        return any(t.requires_grad for t in given) or any(p.requires_grad for p in self._module.parameters())

    def _graph(self, arguments: dict[str, Any], device: torch.device) -> _Graph:
        """Return the graph for these arguments, moved to the end of the list; captured where there is none."""
        form = tuple((path, signature(leaf)) for path, leaf in leaves(arguments)), *autocast_state()
        # A graph whose weights have moved reads memory that may be another's by now.
        self._graphs = [graph for graph in self._graphs if graph.state.weights_in_place()]
        for graph in self._graphs:
            if graph.form == form and graph.state.unchanged():
                self._graphs.remove(graph)
                break
        else:
            graph = _Graph(self, self._module, self._forward, arguments, form, device)
            self._graphs = self._graphs[1 - CAPACITY :]
        self._graphs.append(graph)
        return graph


class _Graph:
    """One captured forward.

    Attributes:
        form: of the arguments, without the contents of tensors.
        state: the module after the capture.
    """

    def __init__(
        self, owner: CapturedForward, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any],
        form: Any, device: torch.device,
    ) -> None:  # fmt: skip
        self._name = type(module).__name__
        reason = why_not_captured(module)
        if reason is not None:
            raise RuntimeError(self._refusal(reason, "a model without it"))
        if device.type not in RECORDERS:
            raise ValueError(self._refusal(f"is called on {device}", "a CUDA device, which CUDA graphs are for"))
        for path, leaf in leaves(arguments):
            if isinstance(leaf, Tensor) and leaf.device != device:
                got = f"is given {path[0]} on {leaf.device}"
                raise ValueError(self._refusal(got, f"all tensors on {device}, where the first is"))
            if not isinstance(leaf, (Tensor, Container, *COMPARED)):
                got = f"is given {path[0]} with a {type(leaf).__name__}"
                raise TypeError(self._refusal(got, "tensors, numbers, strings, and dicts, lists and tuples of them"))
        self.form = form
        self._results: Any = None
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = StaticTree(arguments, device)
            given = self._inputs.buffers()
            self._buffers = self._inputs.tensors()
            self._recorder = RECORDERS[device.type](device)
            self._record(lambda: forward(module, **given))
        self.state = ModuleState(module, owner)

    def replay(self, arguments: dict[str, Any]) -> Any:
        """Run the graph on other inputs of the same form, and return a copy of its results."""
        with self._recorder.turn(self._buffers):
            self._inputs.fill(arguments)
            self._recorder.replay()
            return pytree.tree_map_only(Tensor, torch.clone, self._results)

    def _record(self, run: Callable[[], Any]) -> None:
        def body() -> None:
            self._results = run()

        with ONE_CAPTURE, without_autocast_cache(), self._recorder.turn(self._buffers):
            for _ in range(WARM_UPS):
                self._recorder.warm_up(body)
            unknown = [leaf for leaf in pytree.tree_leaves(self._results) if not _is_result(leaf)]
            if unknown:
                got = f"returns a {type(unknown[0]).__name__}"
                raise RuntimeError(self._refusal(got, "tensors, numbers, or tuples, dicts and dataclasses of them"))
            self._results = None
            try:
                self._recorder.capture(body)
            except RuntimeError as error:
                got = f"cannot be captured as a CUDA graph ({error})"
                expected = "work for the device alone, the same at every call"
                raise RuntimeError(self._refusal(got, expected)) from error

    def _refusal(self, got: str, expected: str) -> str:
        return error_message("cuda_graph", self._name, got, expected, "unpatch the pipeline, or take that out of it")


def why_not_captured(module: nn.Module) -> str | None:
    """Return the reason why a module's forward is not to be captured, as a verb phrase; None if there is none."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled as a whole, and torch.compile has graphs of its own (mode='reduce-overhead')"
    kinds = {parameter.kind for parameter in inspect.signature(type(module).forward).parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        return "has a forward whose arguments have no names"
    for name, each in module.named_modules():
        where = f" in {name}" if name else ""
        if getattr(each, "_hf_hook", None) is not None:
            return f"has a hook of accelerate{where}, which may move weights at each call"
        if getattr(getattr(each, "_diffusers_hook", None), "hooks", None):
            return f"has a hook of diffusers{where} (a cache, or offloading), which decides anew at each call"
        own = vars(each).get("forward")
        if not (own is None or isinstance(own, CapturedForward) or _is_its_class_own(each, own)):
            return f"has another forward than its class{where}, put there by something else"
    return None


def _is_its_class_own(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def _on_device(timestep: Any, device: torch.device) -> Any:
    if type(timestep) in (int, float):
        # As diffusers' models convert a number.
        timestep = torch.tensor(timestep, dtype=torch.float64 if type(timestep) is float else torch.int64)
    return to_device(timestep, device) if isinstance(timestep, Tensor) and timestep.is_cpu else timestep


def _is_result(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, (Tensor, bool, int, float, str))
