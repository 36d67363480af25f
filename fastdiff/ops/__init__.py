# SPDX-License-Identifier: MIT
"""The fused step and the single steps built on it, for people who bring their own loop.

`step` is the one operation that every backend implements; the others make a row of scalars and call it::

    ops/fused.py       the public step
    ops/library.py     the step as operators of torch's dispatcher, for compilers and autograd
    ops/gradients.py   its backward, which is the step with other scalars
    ops/vmap.py        its batching rules
    ops/run.py         a checked call on the backend that was chosen
    ops/checks.py      what a call must satisfy, and the sentences that say so
    ops/layout.py      which tensors share memory, and one dense layout for all
    ops/random.py      the noise that a step draws, on its own
    ops/backends.py    which implementations there are, why one is missing, which one answers
    ops/fallback.py    the choice for a call that runs, with a warning where the reference answers for a compiled one
    ops/built_for.py   which torch an extension was built for
    ops/functional.py  cfg_combine, ddpm_step, ddim_step, dpm_solver_step, euler_step
    ops/reductions.py  quantile, mean, std, norm, dot: one scalar a sample
"""

from .backends import (
    BACKENDS,
    backend_for,
    backend_status,
    cpu_build,
    direct_extension,
    triton_launcher,
    use_backend,
)
from .fallback import FallbackWarning
from .functional import cfg_combine, ddim_step, ddpm_step, dpm_solver_step, euler_step
from .fused import direct_step, step, step_rows
from .random import randn
from .reductions import dot, mean, norm, quantile, std

__all__ = [
    "BACKENDS",
    "FallbackWarning",
    "backend_for",
    "backend_status",
    "cfg_combine",
    "cpu_build",
    "ddim_step",
    "ddpm_step",
    "direct_extension",
    "direct_step",
    "dot",
    "dpm_solver_step",
    "euler_step",
    "mean",
    "norm",
    "quantile",
    "randn",
    "std",
    "step",
    "step_rows",
    "triton_launcher",
    "use_backend",
]
