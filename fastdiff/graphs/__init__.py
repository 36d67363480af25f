# SPDX-License-Identifier: MIT
"""Sampling loops as CUDA graphs.

captured.py       a loop, model included, captured once and replayed for other inputs
recorder.py       the CUDA graph itself, its streams, and the checks of its options
static_inputs.py  the memory that a graph reads its inputs from
cache.py          the loops that a sampler keeps
"""

from .cache import GraphCache
from .captured import CapturedLoop
from .recorder import GRAPH_MODES, check_can_capture, check_can_show, check_graph_options

__all__ = [
    "GRAPH_MODES",
    "CapturedLoop",
    "GraphCache",
    "check_can_capture",
    "check_can_show",
    "check_graph_options",
]
