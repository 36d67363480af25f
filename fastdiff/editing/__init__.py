# SPDX-License-Identifier: MIT
"""Editing with a diffusion model: image-to-image, inpainting, RePaint, inversion, interpolation, parts of samples.

The modules::

    process.py        levels, solver and prediction of a loop, and the walk over a part of it
    masks.py          masks, and the blend in a second pass
    inpainting.py     image-to-image by strength, inpainting
    repaint.py        inpainting with resampling jumps
    inversion.py      from an image back to the noise that a solver makes it from
    interpolation.py  between the noises of two seeds
    parts.py          a noise level for each frame, token or action

All steps are fused ones (`fastdiff.ops.step`), with the solvers' own tables.
"""

from .inpainting import image_to_image, inpaint
from .interpolation import interpolate_seeds, slerp
from .inversion import invert, reconstruct
from .masks import blend, expand_mask
from .parts import FINISHED, WAITING, part_timesteps, pyramid_rows, rolling_rows, sample_parts
from .process import Process, noised
from .repaint import repaint, repaint_schedule

__all__ = [
    "FINISHED",
    "WAITING",
    "Process",
    "blend",
    "expand_mask",
    "image_to_image",
    "inpaint",
    "interpolate_seeds",
    "invert",
    "noised",
    "part_timesteps",
    "pyramid_rows",
    "reconstruct",
    "repaint",
    "repaint_schedule",
    "rolling_rows",
    "sample_parts",
    "slerp",
]
