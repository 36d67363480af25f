# SPDX-License-Identifier: MIT
"""Noise drawn outside the step: torch's random numbers, Brownian paths, noise from per-sample seeds.

The modules::

    generators.py     noise from torch generators, one for the batch or one per sample
    torch_normals.py  the numbers of torch.randn on the CPU, drawn by the extension
    brownian_path.py  Brownian increments from per-sample seeds
    brownian_tree.py  increments of torchsde's Brownian trees, drawn by the extension
    sample_seeds.py   seeds of training samples, from their ids
    seeded_draws.py   context manager in which torch.randn draws from per-sample seeds
"""

from .brownian_path import BrownianPath
from .generators import Generators
from .sample_seeds import sample_seeds
from .seeded_draws import SeededDraws
from .torch_normals import randn_like_diffusers, torch_randn

__all__ = [
    "BrownianPath",
    "Generators",
    "SeededDraws",
    "randn_like_diffusers",
    "sample_seeds",
    "torch_randn",
]
