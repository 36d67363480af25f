# SPDX-License-Identifier: MIT
"""The fused step, the one operation that every backend implements, and reductions to one scalar a sample.

The modules::

    step.py                  the public step
    custom_ops.py            the step as operators of torch's dispatcher, for compilers and autograd
    autograd.py              its backward, which is the step with other coefficients
    recorded_step.py         steps under autograd that the extension takes without the checks in Python
    vmap.py                  its batching rules
    dispatch.py              a checked call on the backend that was chosen
    call.py                  the arguments of a step, declared once
    checks.py                the checks of a call
    canonicalize.py          one dense layout for all tensors of a call
    layout.py                which tensors share memory, and their strides
    random.py                the noise that a step draws, on its own
    backends.py              the implementations: which there are, why one is missing, which one is used
    fallback.py              the choice for a call that runs, with a warning where it falls back to the reference
    reference.py             the step in plain torch: the specification
    reductions.py            quantile, mean, std, norm, dot: one scalar a sample
    reductions_reference.py  the same in plain torch
    gram.py                  all scalar products and norms of a few tensors from one pass
    log_prob.py              the log-probability of a stochastic step, and its replay
    forward_process.py       the forward process of training: noisy samples and targets
    forward_rows.py          its rows, from a schedule
    diffusion_loss.py        the training loss, which draws the noise again
    loss_kernels.py          its execution on a backend, and its reference
    thresholding.py          the threshold of a sample, from a quantile
    memory.py                the memory that the extension keeps for new outputs
"""

from typing import TYPE_CHECKING, Any

from ..extension import cpu_build
from .backends import (
    BACKENDS,
    backend_for,
    backend_status,
    direct_extension,
    triton_launcher,
    use_backend,
)
from .diffusion_loss import diffusion_loss
from .fallback import FallbackWarning
from .forward_process import add_noise, noise_and_target
from .gram import gram, host_gram
from .log_prob import log_prob, step_log_prob
from .random import randn
from .reductions import dot, mean, norm, quantile, std
from .step import step, step_rows

__all__ = [
    "BACKENDS",
    "FallbackWarning",
    "add_noise",
    "backend_for",
    "backend_status",
    "cpu_build",
    "diffusion_loss",
    "direct_extension",
    "dot",
    "gram",
    "host_gram",
    "log_prob",
    "mean",
    "noise_and_target",
    "norm",
    "quantile",
    "randn",
    "std",
    "step",
    "step_log_prob",
    "step_rows",
    "triton_launcher",
    "use_backend",
]

if TYPE_CHECKING:
    from ..sampling.single_steps import cfg_combine as cfg_combine
    from ..sampling.single_steps import ddim_step as ddim_step
    from ..sampling.single_steps import ddpm_step as ddpm_step
    from ..sampling.single_steps import dpm_solver_step as dpm_solver_step
    from ..sampling.single_steps import euler_step as euler_step
else:

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in ("cfg_combine", "ddim_step", "ddpm_step", "dpm_solver_step", "euler_step"):
            from .._moved import attribute

            return attribute(__name__, name)
        from warnings import warn

        warn(
            f"fastdiff.ops.{name} has moved to fastdiff.sampling.{name}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module("fastdiff.sampling.single_steps"), name)
