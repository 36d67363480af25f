# SPDX-License-Identifier: MIT
"""The fused step and the single steps built on it, for people who bring their own loop.

`step` is the one operation that every backend implements; the others make a row of scalars and call it::

    ops/call.py          the arguments of a step, declared once
    ops/step.py          the public step
    ops/checks.py        the checks of a call
    ops/custom_ops.py    the step as operators of torch's dispatcher, for compilers and autograd
    ops/autograd.py      its backward, which is the step with other coefficients
    ops/vmap.py          its batching rules
    ops/dispatch.py      a checked call on the backend that was chosen
    ops/canonicalize.py  one dense layout for all tensors of a call
    ops/layout.py        which tensors share memory, and their strides
    ops/reference.py     the step in plain torch
    ops/random.py        the noise that a step draws, on its own
    ops/backends.py      the implementations: which there are, why one is missing, which one is used
    ops/fallback.py      the choice for a call that runs, with a warning where it falls back to the reference
    ops/built_for.py     the torch that an extension was built for
    ops/functional.py    cfg_combine, ddpm_step, ddim_step, dpm_solver_step, euler_step
    ops/reductions.py    quantile, mean, std, norm, dot: one scalar a sample
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
from .random import randn
from .reductions import dot, mean, norm, quantile, std
from .step import step, step_rows

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
