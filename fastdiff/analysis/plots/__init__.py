# SPDX-License-Identifier: MIT
"""Pictures as matplotlib figures that belong to no window: ``figure.savefig("x.png")`` writes one, a notebook shows it.

The modules::

    figures.py      new figures, colours and markers, files
    schedules.py    β, ᾱ, SNR and σ of noise schedules; the timesteps of spacings
    clouds.py       points in two dimensions from noise to data
    quality.py      distance and other metrics against model calls and time
    convergence.py  errors against steps, with slopes

Film strips of images are in `fastdiff.analysis.film_strip`.
"""

from .clouds import plot_cloud
from .convergence import plot_convergence
from .figures import figure_bytes, save_figure
from .quality import METRICS, plot_quality
from .schedules import plot_schedules, plot_spacings

__all__ = [
    "METRICS",
    "figure_bytes",
    "plot_cloud",
    "plot_convergence",
    "plot_quality",
    "plot_schedules",
    "plot_spacings",
    "save_figure",
]
