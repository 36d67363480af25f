# SPDX-License-Identifier: MIT
"""Pictures of noise schedules and of the timesteps that loops visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...errors import checked_integer, error_message, unknown_name
from ...schedules import BaseNoiseScheduler, create_noise_scheduler
from ...schedules.levels import VariancePreservingPath
from ...schedules.timesteps import SIGMA_SPACINGS, TIMESTEP_SPACINGS, sigma_schedule, timestep_schedule
from .figures import legend_beside, new_figure, series_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_schedules(schedules: Mapping[str, BaseNoiseScheduler] | Sequence[str]) -> Figure:
    """Draw β, ᾱ, SNR = ᾱ/(1 − ᾱ) and σ̂ = √((1 − ᾱ)/ᾱ) of noise schedules by timestep.

    Args:
        schedules: schedulers by label, or names for `create_noise_scheduler`.

    Raises:
        ValueError: there is no schedule, or no such name.
        ImportError: matplotlib is missing.
    """
    operation = "plot_schedules"
    named = schedules if isinstance(schedules, Mapping) else {name: create_noise_scheduler(name) for name in schedules}
    if not named:
        raise ValueError(error_message(operation, "schedules", "is empty", "one or more", "pass ['linear', 'cosine']"))
    figure = new_figure(9.5, 6.0, operation)
    axes: Any = figure.subplots(2, 2)
    for i, (label, scheduler) in enumerate(named.items()):
        alphas_cumprod = scheduler.alphas_cumprod
        snr = alphas_cumprod / (1 - alphas_cumprod)
        style = {**series_style(i), "marker": None}
        panels = (scheduler.betas, alphas_cumprod, snr, scheduler.sigmas)
        for axis, values in zip(axes.flat, panels, strict=True):
            finite = torch.where(torch.isfinite(values) & (values > 0), values, torch.nan)
            axis.plot(range(len(values)), finite.tolist(), label=label, **style)
    titles = ("β, variance added by a step", "ᾱ, share of signal", "SNR = ᾱ/(1 − ᾱ)", "σ̂ = √((1 − ᾱ)/ᾱ)")
    for axis, title, scale in zip(axes.flat, titles, ("log", "linear", "log", "log"), strict=True):
        axis.set(title=title, yscale=scale, xlabel="timestep t")
        axis.grid(alpha=0.3)
    legend_beside(figure, axes[0, 0])
    return figure


def plot_spacings(scheduler: BaseNoiseScheduler, steps: int = 10, spacings: Sequence[str] | None = None) -> Figure:
    """Draw the timesteps and the noise levels σ̂ that each spacing visits, a row a spacing.

    Args:
        scheduler: the noise schedule.
        steps: of the loop.
        spacings: names among `TIMESTEP_SPACINGS` and `SIGMA_SPACINGS`; None for all, but for ``"beta"`` without scipy.

    Raises:
        ValueError: an unknown name, or too many steps.
        ImportError: matplotlib is missing, or scipy for ``"beta"``.
    """
    operation = "plot_spacings"
    checked_integer(operation, "steps", steps, 1)
    known = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS)
    chosen = list(known if spacings is None else spacings)
    for name in chosen:
        if name not in known:
            raise unknown_name(operation, "spacings", name, known)
    path = VariancePreservingPath(scheduler.alphas_cumprod)
    total = len(scheduler.alphas_cumprod)
    figure = new_figure(10.0, 1.2 + 0.32 * len(chosen), operation)
    axes: Any = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(chosen):
        if name in TIMESTEP_SPACINGS:
            offset = scheduler.config.steps_offset
            levels = [path.at_timestep(t) for t in timestep_schedule(name, steps, total, offset).tolist()]
        else:
            levels = [path.at_ratio(s) for s in sigma_schedule(name, steps, *path.ratio_range).tolist()]
        style = {**series_style(i), "linestyle": "none"}
        axes[0].plot([level.timestep for level in levels], [i] * len(levels), **style)
        finite = [level.noise_ratio for level in levels if level.alpha > 0.0 < level.sigma]
        axes[1].plot(finite, [i] * len(finite), **style)
    axes[0].set(yticks=range(len(chosen)), xlabel="timestep t", title=f"{steps} model calls by timestep")
    axes[0].set_yticklabels(chosen)
    axes[0].set_ylim(len(chosen) - 0.5, -0.5)
    axes[1].set(xscale="log", xlabel="σ̂", title="the same by noise level")
    for axis in axes:
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    return figure
