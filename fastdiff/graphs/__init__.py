# SPDX-License-Identifier: MIT
"""Sampling loops as CUDA graphs.

captured.py       a loop, model included, captured once and replayed for other inputs
forward.py        a module's forward, captured for each form of its inputs
module_state.py   what a module's graph depends on beside its inputs: weights' addresses, attributes, hooks
recorder.py       the CUDA graph itself, its streams, and the checks of its options
static_inputs.py  the memory that a graph reads its inputs from
cache.py          the loops that a sampler keeps
"""

from .cache import GraphCache
from .captured import CapturedLoop
from .forward import CapturedForward, why_not_captured
from .recorder import GRAPH_MODES, can_capture_on, check_can_capture, check_can_show, check_graph_options

__all__ = [
    "GRAPH_MODES",
    "CapturedForward",
    "CapturedLoop",
    "GraphCache",
    "can_capture_on",
    "check_can_capture",
    "check_can_show",
    "check_graph_options",
    "why_not_captured",
]
