# SPDX-License-Identifier: MIT
"""Pictures, metrics and the choice of a sampler.

The modules::

    workload.py           the task that methods are compared on, and methods by name with options
    compare.py            several methods at several numbers of steps
    report.py             a comparison as one HTML file
    recommend.py          solver, spacing and steps for a model and a budget
    convergence.py        order of convergence on a mixture of known score
    mixture.py            that mixture
    metrics.py            distances and scores of samples, features and logits
    sample_statistics.py  variance and sharpness of samples
    plots/                pictures of schedules, spacings, clouds, quality and convergence
    film_strip.py         trajectories as film strips
    images.py             samples as a grid
    progress.py           progress bars
"""

from .compare import Comparison, ComparisonRow, compare_methods
from .convergence import Convergence, measure_convergence
from .film_strip import visualize_trajectory
from .images import save_grid
from .metrics import frechet_distance, inception_score, precision_recall, reference_distance
from .mixture import GaussianMixture
from .plots import plot_cloud, plot_convergence, plot_quality, plot_schedules, plot_spacings, save_figure
from .recommend import Candidate, Recommendation, recommend
from .report import write_report
from .sample_statistics import compute_sample_variance, compute_sharpness
from .workload import MethodSpec, Workload, parse_method

__all__ = [
    "Candidate",
    "Comparison",
    "ComparisonRow",
    "Convergence",
    "GaussianMixture",
    "MethodSpec",
    "Recommendation",
    "Workload",
    "compare_methods",
    "compute_sample_variance",
    "compute_sharpness",
    "frechet_distance",
    "inception_score",
    "measure_convergence",
    "parse_method",
    "plot_cloud",
    "plot_convergence",
    "plot_quality",
    "plot_schedules",
    "plot_spacings",
    "precision_recall",
    "recommend",
    "reference_distance",
    "save_figure",
    "save_grid",
    "visualize_trajectory",
    "write_report",
]
