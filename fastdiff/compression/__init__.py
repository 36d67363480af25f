# SPDX-License-Identifier: MIT
"""Smaller models: quantized by torchao, pruned by torch, each with a report of what it costs.

The modules::

    quantization.py  weights of linear layers as integers or short floats
    pruning.py       the smallest weights set to zero
    report.py        size, speed, and the distance of samples from the original's
"""

from .pruning import prune
from .quantization import quantize
from .report import CompressedModel, CompressionReport

__all__ = ["CompressedModel", "CompressionReport", "prune", "quantize"]
