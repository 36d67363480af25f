# SPDX-License-Identifier: MIT
"""The recorder of a captured loop: a CUDA graph with its streams; and the checks of a graph's options."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..errors import error_message, unknown_name

#: "loop": all rows in one graph, one launch a loop.  "step": one row in a graph, launched once a row.
GRAPH_MODES = ("loop", "step")
#: torch's recommendation: so often does a body run on a side stream before it is captured.
WARM_UPS = 3
#: Two captures at a time would see each other's allocations and synchronisations.
ONE_CAPTURE = threading.RLock()

Body = Callable[[], None]


class Recorder(Protocol):
    """Records the work of a body and replays it: CUDA graphs, and in tests their emulation."""

    def warm_up(self, body: Body) -> None:
        """Run the body as it will be captured, to let it compile, tune and allocate what it keeps."""

    def capture(self, body: Body) -> None:
        """Record the body's work; whether it is also done is left open."""

    def replay(self) -> None:
        """Do the recorded work, on the same memory."""

    def turn(self, buffers: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A block that uses the buffers, after all blocks before it, whichever stream those were on."""


class CudaGraph:
    """A CUDA graph with memory of its own (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._home = torch.cuda.current_stream()
        self._last: torch.cuda.Event | None = None

    def warm_up(self, body: Body) -> None:
        with torch.cuda.device(self._device):
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                body()
            torch.cuda.current_stream().wait_stream(self._side)

    def capture(self, body: Body) -> None:
        # A stream of its own: torch's default for captures is one of whichever device came first.  "thread_local": what
        # other threads do to the device meanwhile, allocations and all, is their own affair.
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(self._graph, stream=self._side, capture_error_mode="thread_local"):
                    body()
            finally:
                # After a failed capture torch leaves its stream the current one.
                torch.cuda.set_stream(before)

    def replay(self) -> None:
        self._graph.replay()

    @contextmanager
    def turn(self, buffers: Sequence[Tensor]) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            if stream != self._home:
                for buffer in buffers:
                    buffer.record_stream(stream)
            try:
                yield
            finally:
                self._last = stream.record_event()


#: The recorder for each type of device.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraph}


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Let autocast convert weights anew at each use: those it keeps go when its block ends, and a graph reads on."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def can_capture_on(device: torch.device) -> bool:
    """Return True for a device that has graphs."""
    return device.type in RECORDERS


def check_can_capture(mode: object, latents: Tensor) -> None:
    """Refuse an unknown mode, and a device without graphs."""
    if mode not in GRAPH_MODES:
        raise unknown_name("sample", "cuda_graph", mode, GRAPH_MODES)
    if latents.device.type not in RECORDERS:
        raise ValueError(
            error_message(
                "sample",
                "latents",
                f"is on {latents.device}",
                "a CUDA device, which CUDA graphs are for",
                "move model and inputs there, or leave out cuda_graph",
            )
        )


def check_graph_options(generator: object, check_finite: bool | None, every: int = 0) -> None:
    """Refuse options of `sample` that a graph cannot have."""
    if every:
        got, expected = "is given beside cuda_graph, whose replays keep no frames", "no trajectory"
        remedy = "leave cuda_graph out, or copy the frames in a callback with cuda_graph='step'"
        raise ValueError(error_message("sample", "return_trajectory", got, expected, remedy))
    if generator is not None:
        remedy = "pass a seed for each sample, such as seeds=fastdiff.spawn_seeds(seed, batch)"
        raise ValueError(
            error_message(
                "sample", "generator", "is given beside cuda_graph", "seeds, which a graph can read anew", remedy
            )
        )
    if check_finite:
        expected = "None, for the finished samples alone, or False"
        remedy = "leave out cuda_graph to find where it happens"
        raise ValueError(
            error_message(
                "sample", "check_finite", "is True beside cuda_graph, and looking is a sync", expected, remedy
            )
        )


def check_can_show(mode: str, callback: object, progress: bool | None) -> None:
    """Refuse to show the steps of a loop that is one launch."""
    for name, given in (("callback", callback is not None), ("progress", bool(progress))):
        if given and mode == "loop":
            raise ValueError(
                error_message(
                    "sample",
                    name,
                    "is given, and cuda_graph='loop' runs all steps in one launch",
                    "none",
                    "choose cuda_graph='step', one launch a step",
                )
            )
