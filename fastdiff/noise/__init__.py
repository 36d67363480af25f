# SPDX-License-Identifier: MIT
"""Noise that is drawn outside the step: torch's own numbers, Brownian paths, draws by seeds.

The modules::

    generators.py     torch's generators, one for the batch or one a sample
    torch_normals.py  the numbers of torch.randn on the CPU, drawn by the extension
    brownian_path.py  Brownian increments by the samples' seeds
    brownian_tree.py  the trees of torchsde, drawn by the extension
    seeded_draws.py   a block in which torch.randn draws by the samples' seeds
"""

from .brownian_path import BrownianPath
from .generators import Generators
from .seeded_draws import SeededDraws
from .torch_normals import randn_like_diffusers, torch_randn

__all__ = [
    "BrownianPath",
    "Generators",
    "SeededDraws",
    "randn_like_diffusers",
    "torch_randn",
]
