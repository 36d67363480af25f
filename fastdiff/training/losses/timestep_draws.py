# SPDX-License-Identifier: MIT
"""Draws of training timesteps: uniform or logit-normal, shifted towards noise; by a generator or by a seed a sample.

From seeds (`fastdiff.noise.sample_seeds`) a sample's timestep belongs to (seed, sample id, epoch): it is the same in
whichever batch, on whichever rank, and in a resumed run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...device_copy import to_device
from ...errors import checked_float, checked_integer, error_message, unknown_name
from ...philox import Purpose, as_seeds, normals
from ..config_checks import TIMESTEP_SAMPLINGS
from ..seeded_uniforms import seeded_uniforms

__all__ = ["draw_timesteps", "shift_times"]


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards the noise: s·t/(1 + (s − 1)·t) (arXiv 2403.03206, eq. 23); s below 1 towards data.

    Args:
        times: any shape, floating point.
        shift: s, above 0.

    Returns:
        Like `times`.
    """
    checked_float("shift_times", "shift", shift, 0.0, strict=True)
    return shift * times / (1 + (shift - 1) * times)


def draw_timesteps(
    batch_size: int,
    num_train_timesteps: int | None = None,
    *,
    sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a timestep for each sample.

    A time u in (0, 1) is drawn, shifted by `shift_times`, and cut into T equal parts: t = ⌊u·T⌋.

    Args:
        batch_size: B.
        num_train_timesteps: T; None for the times u themselves, for flow matching.
        sampling: ``uniform``, or ``logit_normal``: u = 1/(1 + e^−z), z normal (Esser et al. 2024, arXiv 2403.03206,
            section 3.1).
        logit_mean, logit_std: of z.
        shift: as in `shift_times`; 1 changes nothing.
        generator: source of the draws, on its device; None for torch's default one.
        seeds: instead of it, int64 ``[B]`` or ints: each sample draws from its own.
        device: of the result; the seeds' or the generator's, else the CPU, where None.

    Returns:
        int64 ``[B]`` in [0, T − 1]; or float32 ``[B]`` in (0, 1) without T.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    operation = "draw_timesteps"
    checked_integer(operation, "batch_size", batch_size, 0)
    if num_train_timesteps is not None:
        checked_integer(operation, "num_train_timesteps", num_train_timesteps, 1)
    if sampling not in TIMESTEP_SAMPLINGS:
        raise unknown_name(operation, "sampling", sampling, TIMESTEP_SAMPLINGS)
    checked_float(operation, "logit_mean", logit_mean, -math.inf)
    checked_float(operation, "logit_std", logit_std, 0.0, strict=True)
    normal = sampling == "logit_normal"
    if seeds is not None:
        if generator is not None:
            remedy = "leave one of the two out"
            raise ValueError(error_message(operation, "seeds", "is given beside generator", "one of them", remedy))
        drawn = _from_seeds(as_seeds(seeds, batch_size, seeds.device if isinstance(seeds, Tensor) else "cpu"), normal)
    else:
        where = device or "cpu" if generator is None else generator.device
        draw = torch.randn if normal else torch.rand
        drawn = draw(batch_size, generator=generator, dtype=torch.float64, device=where)
    times = torch.sigmoid(logit_mean + logit_std * drawn) if normal else drawn
    times = times if shift == 1 else shift_times(times, shift)
    if num_train_timesteps is None:
        # The ends are no times: at 0 there is no noise, at 1 no signal.
        smallest = torch.finfo(torch.float32).eps / 2
        result = times.to(torch.float32).clamp(smallest, 1 - smallest)
    else:
        result = (times * num_train_timesteps).to(torch.int64).clamp(max=num_train_timesteps - 1)
    return result if device is None else to_device(result, device)


def _from_seeds(seeds: Tensor, normal: bool) -> Tensor:
    """Return one number a seed, float64 ``[B]``: standard normal, or uniform in (0, 1)."""
    if normal:
        return normals(seeds, 0, Purpose.TIMESTEP, 1)[:, 0].double()
    return seeded_uniforms(seeds, Purpose.TIMESTEP, 1)[:, 0]
