# SPDX-License-Identifier: MIT
"""The command line.  Each module registers its commands with `app`; a new command is a new module, imported here.

The modules::

    app.py          the application
    sample.py       ``fastdiff sample`` draws digits with the packaged model, or images of a trained one
    sample_sources.py  its models and their defaults
    sample_shards.py  its ``--folder``: a share of the images, or all of them with Ray
    samplers.py     names of samplers
    environment.py  ``fastdiff env`` prints versions and backends
    bench.py        ``fastdiff bench`` measures steps
    compare.py      ``fastdiff compare`` writes a report on sampling methods
    recommend.py    ``fastdiff recommend`` chooses solver, spacing and steps
    plot.py         ``fastdiff plot`` draws schedules, trajectories, comparisons and orders
    options.py      options of several commands
    train.py        ``fastdiff train`` trains a model
    table.py        ``fastdiff table`` prints step tables and schedules that are files
"""

from __future__ import annotations

from . import bench as bench
from . import compare as compare
from . import plot as plot
from . import recommend as recommend
from . import table as table
from . import train as train
from .app import app
from .environment import print_environment
from .sample import check_device, sample
from .sample_sources import parse_classes
from .samplers import ALIASES, SAMPLERS, sampler_fields

__all__ = [
    "ALIASES",
    "SAMPLERS",
    "app",
    "check_device",
    "parse_classes",
    "print_environment",
    "sample",
    "sampler_fields",
]
