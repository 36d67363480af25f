# SPDX-License-Identifier: MIT
"""Own sampling loops in k-diffusion's manner: one function a method.

Each takes ``(model, x, sigmas, extra_args=None, callback=None, disable=None, …)``:

- ``model(x, sigma, **extra_args)`` returns the denoised samples, x0 of x = x0 + σ·ε.  x is ``[B, ...]`` in float16,
  bfloat16, float32 or float64; σ is ``[B]`` in the dtype of x.  The classes of denoisers.py make one from a model that
  predicts ε, v, x0 or a flow.
- ``x``: the samples at the first level, not written to.  A loop writes over its own later samples, unless the model or
  the callback keeps them.
- ``sigmas``: n + 1 descending levels, a tensor ``[n + 1]`` or numbers; `fastdiff.schedules.sigmas` makes them.
- ``callback``: called in each step after its first model call, with ``x`` (before the step), ``i``, ``sigma``,
  ``sigma_hat`` (where churn has raised σ) and ``denoised``.
- ``disable``: True shows no progress bar; None shows tqdm's on a terminal, where tqdm is installed.
- ``noise_sampler``: ``noise_sampler(sigma, sigma_next)`` returns standard normal noise like x.  Without it, noise is
  torch's, from the default generator.
- ``seeds``: one for each sample, as in `fastdiff.randn`, in place of a noise sampler.  A sample's noise then has the
  same bits alone and at any place of any batch.  The DPM-Solver++ SDE methods take the increments of `BrownianPath`,
  which do not depend on the levels either; without seeds they draw one for each sample from torch's default generator.

All run on the fused step: a method is a table that its solver in `fastdiff.solvers` compiles once for given sigmas and
options; the next loop finds it again.

The modules::

    first_order.py, runge_kutta.py, multistep.py, dpm_solvers.py, exponential.py, cfg_pp.py   the functions
    adaptive.py    DPM-Solver with a step size that the error chooses
    likelihood.py  log-likelihoods by the probability-flow ODE
    denoisers.py   wrappers for models
    noise.py       torchsde's Brownian tree as a noise sampler
    program.py     a table with the facts of each model call
    run.py         the loop
"""

from .adaptive import sample_dpm_adaptive
from .cfg_pp import (
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2s_ancestral_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
    sample_gradient_estimation_cfg_pp,
    sample_res_multistep_ancestral_cfg_pp,
    sample_res_multistep_cfg_pp,
)
from .denoisers import (
    ContinuousVDenoiser,
    Denoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    FlowPathDenoiser,
    SampleDenoiser,
    VDenoiser,
)
from .dpm_solvers import (
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2m_sde_heun,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
)
from .exponential import (
    sample_er_sde,
    sample_exp_heun_2_x0,
    sample_exp_heun_2_x0_sde,
    sample_res_2s,
    sample_res_3s,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_seeds_2,
    sample_seeds_3,
)
from .first_order import (
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_euler_ancestral,
    sample_flow_euler,
    sample_lcm,
    sample_tcd,
)
from .likelihood import log_likelihood
from .multistep import (
    sample_deis,
    sample_gradient_estimation,
    sample_ipndm,
    sample_ipndm_v,
    sample_lms,
    sample_sa_solver,
    sample_unipc,
    sample_unipc_bh2,
)
from .noise import BrownianTreeNoiseSampler
from .runge_kutta import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpm_fast,
    sample_flow_heun,
    sample_heun,
    sample_heunpp2,
    sample_restart,
)

__all__ = [
    "BrownianTreeNoiseSampler",
    "ContinuousVDenoiser",
    "Denoiser",
    "EpsilonDenoiser",
    "FlowDenoiser",
    "FlowPathDenoiser",
    "SampleDenoiser",
    "VDenoiser",
    "log_likelihood",
    "sample_ddim",
    "sample_ddpm",
    "sample_deis",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2m_sde_heun",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_er_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
    "sample_exp_heun_2_x0",
    "sample_exp_heun_2_x0_sde",
    "sample_flow_euler",
    "sample_flow_heun",
    "sample_gradient_estimation",
    "sample_gradient_estimation_cfg_pp",
    "sample_heun",
    "sample_heunpp2",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_lcm",
    "sample_lms",
    "sample_res_2s",
    "sample_res_3s",
    "sample_res_multistep",
    "sample_res_multistep_ancestral",
    "sample_res_multistep_ancestral_cfg_pp",
    "sample_res_multistep_cfg_pp",
    "sample_restart",
    "sample_sa_solver",
    "sample_seeds_2",
    "sample_seeds_3",
    "sample_tcd",
    "sample_unipc",
    "sample_unipc_bh2",
]
