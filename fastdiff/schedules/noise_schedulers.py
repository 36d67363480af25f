# SPDX-License-Identifier: MIT
"""Noise schedules: how much signal is left at each training timestep, and the forward process that follows from it.

A schedule is computed once, in float64 on the CPU, from a :class:`NoiseSchedulerConfig`; the numbers are rounded to
the computing dtype when they are applied to samples. The formulas are in :mod:`fastdiff.schedules.betas`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import error_message, unknown_name
from . import betas as formulas
from .betas import check_floating, rescale_zero_terminal_snr
from .config import NoiseSchedulerConfig, NoiseScheduleType

__all__ = [
    "BaseNoiseScheduler",
    "CosineNoiseScheduler",
    "CustomNoiseScheduler",
    "ExponentialNoiseScheduler",
    "KarrasNoiseScheduler",
    "LaplaceNoiseScheduler",
    "LinearNoiseScheduler",
    "LinearRescaledNoiseScheduler",
    "NoiseScheduleType",
    "NoiseSchedulerConfig",
    "QuadraticNoiseScheduler",
    "ScaledLinearNoiseScheduler",
    "SigmoidNoiseScheduler",
    "create_noise_scheduler",
    "rescale_zero_terminal_snr",
]


def _check_config(operation: str, config: object) -> None:
    if config is not None and not isinstance(config, NoiseSchedulerConfig):
        got, remedy = f"has type {type(config).__name__}", "pass the fields as keywords"
        raise TypeError(error_message(operation, "config", got, "a NoiseSchedulerConfig", remedy))


def _configure(operation: str, config: NoiseSchedulerConfig | None, given: dict[str, Any]) -> NoiseSchedulerConfig:
    known = [field.name for field in fields(NoiseSchedulerConfig)]
    for name in given:
        if name not in known:
            raise unknown_name(operation, "field", name, known)
    return NoiseSchedulerConfig(**given) if config is None else replace(config, **given)


class BaseNoiseScheduler(ABC):
    """A noise schedule and its forward process. A subclass names its kinds and supplies the betas.

    Make one from a :class:`NoiseSchedulerConfig`, from its fields as keywords, or from both (keywords win). The class
    decides the kind: a config left at the default ``"linear"`` is taken to mean the kind of the class.

    Attributes:
        config: the configuration, with ``schedule_type`` settled.
        schedule_type: the kind.
        num_train_timesteps: T.
        betas: float64 ``[T]`` on the CPU, as are the next three.
        alphas: 1 − β.
        alphas_cumprod: ᾱ, the running product of ``alphas``.
        sigmas: √((1 − ᾱ)/ᾱ), the noise level in the variance-exploding sense; infinite where ᾱ is 0.

    Raises:
        TypeError: ``config`` is no configuration, or a field has the wrong type.
        ValueError: an unknown field, a value out of range, or a config of another kind.
    """

    schedule_types: ClassVar[tuple[NoiseScheduleType, ...]]

    def __init__(self, config: NoiseSchedulerConfig | None = None, **config_fields: Any) -> None:
        operation = type(self).__name__
        _check_config(operation, config)
        if config is None or config.schedule_type == "linear":
            own = self.schedule_types[0].value if len(self.schedule_types) == 1 else "custom"
            config_fields.setdefault("schedule_type", own)
        self.config = _configure(operation, config, config_fields)
        self.schedule_type = NoiseScheduleType.parse(self.config.schedule_type)
        if self.schedule_type not in self.schedule_types:
            expected = " or ".join(repr(kind.value) for kind in self.schedule_types)
            got, remedy = f"is {self.schedule_type.value!r}", "use create_noise_scheduler, which picks the class"
            raise ValueError(error_message(operation, "schedule_type", got, expected, remedy))
        self.num_train_timesteps = self.config.num_train_timesteps
        # Tensors made in inference mode could not be used for training later.
        with torch.inference_mode(False), torch.no_grad():
            self.betas = self._betas()
            self.alphas_cumprod = self._alphas_cumprod()
            if self.config.rescale_betas_zero_snr:
                self.alphas_cumprod = rescale_zero_terminal_snr(self.alphas_cumprod)
                self.betas = formulas.betas_from_alphas_cumprod(self.alphas_cumprod)
            self.alphas = 1 - self.betas
            self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
            self._scales = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()])
        self._scales_like: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def _betas(self) -> Tensor:
        """β of ``self.config`` before any rescaling, float64 ``[T]`` on the CPU."""

    def _alphas_cumprod(self) -> Tensor:
        """ᾱ before any rescaling, float64 ``[T]`` on the CPU; overridden where it is given rather than derived."""
        return (1 - self.betas).cumprod(0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """The forward process in one go, ``√ᾱ_t·x0 + √(1 − ᾱ_t)·ε``: arXiv 2006.11239, eq. 4.

        The coefficients are rounded once, from float64 to the computing dtype: float64 for float64 samples, float32
        for all others. The arithmetic runs in that dtype and the result is rounded once to the dtype of the samples.
        Differentiable in both tensors.

        Args:
            original_samples: x0 ``[B, …]``, any floating dtype and device.
            noise: ε, like ``original_samples`` in shape, dtype and device.
            timesteps: integers in [0, T − 1]: an int or 0-d tensor for all samples, or ``[B]`` (or ``[1]``), on any
                device. Checking a tensor that is not on the CPU waits for its device; compiled code skips the check.

        Returns:
            ``[B, …]`` in the dtype and on the device of ``original_samples``.

        Raises:
            TypeError: the samples are not floating point, the noise has another dtype, the timesteps are no integers.
            ValueError: shapes or devices differ, or a timestep is out of range.
        """
        signal, sigma = self._scales_at("add_noise", "original_samples", original_samples, noise, timesteps)
        return (signal * original_samples.to(signal.dtype) + sigma * noise.to(signal.dtype)).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """The target of v-prediction, ``√ᾱ_t·ε − √(1 − ᾱ_t)·x0``: Salimans & Ho 2022 (arXiv 2202.00512, appendix D).

        Args:
            sample: x0 ``[B, …]``; it, ``noise``, ``timesteps``, the result and the errors are as in :meth:`add_noise`.
            noise: ε, like ``sample``.
            timesteps: int, 0-d, ``[B]`` or ``[1]``.
        """
        signal, sigma = self._scales_at("get_velocity", "sample", sample, noise, timesteps)
        return (signal * noise.to(signal.dtype) - sigma * sample.to(signal.dtype)).to(sample.dtype)

    def q_sample(
        self, x0: Tensor, t: Tensor | int, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``x_t ~ q(x_t | x0)`` and return it with the noise that went into it.

        Args:
            x0: clean samples ``[B, …]``.
            t: timesteps, as in :meth:`add_noise`.
            noise: ε to use; drawn from N(0, 1) in the dtype of ``x0`` if absent.
            generator: source of the drawn noise. The noise is drawn on its device, so that a CPU generator gives the
                same numbers whatever device the samples are on.

        Returns:
            ``(x_t, noise)``, both like ``x0``.

        Raises:
            ValueError: both ``noise`` and ``generator`` are given; and what :meth:`add_noise` raises.
        """
        if noise is not None and generator is not None:
            got, remedy = "is given beside noise", "leave one of them out"
            raise ValueError(
                error_message("q_sample", "generator", got, "noise or a generator to draw it with", remedy)
            )
        check_floating("q_sample", "x0", x0)
        if noise is None:
            device = x0.device if generator is None else generator.device
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device).to(x0.device)
        signal, sigma = self._scales_at("q_sample", "x0", x0, noise, t, time_name="t")
        return (signal * x0.to(signal.dtype) + sigma * noise.to(signal.dtype)).to(x0.dtype), noise

    def get_schedule_info(self) -> dict[str, Any]:
        """Describe the schedule in plain Python values; ranges are ``(lowest, highest)`` over the timesteps.

        SNR is ᾱ/(1 − ᾱ), infinite where ᾱ is 1; ``log_snr_range`` starts at −inf where ᾱ reaches 0.
        """
        signal = self.alphas_cumprod
        snr = signal / (1 - signal)
        log_snr = signal.log() - torch.log1p(-signal)

        def span(values: Tensor) -> tuple[float, float]:
            return float(values.min()), float(values.max())

        return {
            "schedule_type": self.schedule_type.value,
            "num_train_timesteps": self.num_train_timesteps,
            "timestep_spacing": self.config.timestep_spacing,
            "rescale_betas_zero_snr": self.config.rescale_betas_zero_snr,
            "betas_range": span(self.betas),
            "alphas_cumprod_range": span(signal),
            "sigmas_range": span(self.sigmas),
            "snr_range": span(snr),
            "log_snr_range": span(log_snr),
            "terminal_snr": float(snr[-1]),
            "zero_terminal_snr": bool(signal[-1] == 0),
        }

    def _scales_at(
        self,
        operation: str,
        name: str,
        samples: Tensor,
        noise: Tensor,
        timesteps: Tensor | int,
        time_name: str = "timesteps",
    ) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t) in the computing dtype, shaped to multiply ``samples``, after checking all arguments."""
        check_floating(operation, name, samples)
        check_floating(operation, "noise", noise)
        if noise.dtype != samples.dtype:
            got, expected = f"has dtype {noise.dtype}", f"{samples.dtype} like {name}"
            raise TypeError(error_message(operation, "noise", got, expected, f"draw it with torch.randn_like({name})"))
        if noise.shape != samples.shape:
            got, expected = f"has shape {list(noise.shape)}", f"{list(samples.shape)} like {name}"
            raise ValueError(error_message(operation, "noise", got, expected, f"draw it with torch.randn_like({name})"))
        if noise.device != samples.device:
            got, expected = f"is on {noise.device}", f"{samples.device} like {name}"
            raise ValueError(error_message(operation, "noise", got, expected, f"move it with noise.to({name}.device)"))
        index = self._checked_timesteps(operation, time_name, name, samples, timesteps)
        dtype = torch.float64 if samples.dtype == torch.float64 else torch.float32
        # Gathered where the timesteps are, so that none but the few chosen numbers moves between devices.
        table = self._scales_like.get((index.device, dtype))
        if table is None:
            with torch.inference_mode(False), torch.no_grad():
                table = self._scales.to(index.device, dtype, copy=True)
            self._scales_like[index.device, dtype] = table
        chosen = table.index_select(1, index.reshape(-1)).to(samples.device)
        shape = [-1] + [1] * (samples.dim() - 1) if index.dim() else []
        return chosen[0].reshape(shape), chosen[1].reshape(shape)

    def _checked_timesteps(
        self, operation: str, argument: str, name: str, samples: Tensor, timesteps: Tensor | int
    ) -> Tensor:
        last = self.num_train_timesteps - 1
        expected = f"integers in [0, {last}]"
        if not isinstance(timesteps, Tensor):
            if isinstance(timesteps, bool) or not hasattr(timesteps, "__index__"):
                got, remedy = f"has type {type(timesteps).__name__}", "pass an int or an int64 tensor"
                raise TypeError(error_message(operation, argument, got, expected, remedy))
            # On the CPU even for a default device elsewhere: the check below should cost no round trip.
            timesteps = torch.tensor(timesteps.__index__(), dtype=torch.int64, device="cpu")
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
            got, remedy = f"has dtype {timesteps.dtype}", "round and convert with .long()"
            raise TypeError(error_message(operation, argument, got, expected, remedy))
        batch = samples.shape[:1]
        if timesteps.dim() and (not batch or tuple(timesteps.shape) not in ((1,), tuple(batch))):
            got = f"has shape {list(timesteps.shape)}"
            wanted = f"{list(batch)}, one per sample of {name}, or 0-d"
            raise ValueError(
                error_message(operation, argument, got, wanted, "pass one timestep per sample or a single int")
            )
        index = timesteps.to(torch.int64)
        if not torch.compiler.is_compiling() and bool(((index < 0) | (index > last)).any()):
            got, remedy = f"spans [{int(index.min())}, {int(index.max())}]", f"draw it below {last + 1}"
            raise ValueError(error_message(operation, argument, got, expected, remedy))
        return index


class LinearNoiseScheduler(BaseNoiseScheduler):
    """``linear``: :func:`fastdiff.schedules.betas.linear`."""

    schedule_types = (NoiseScheduleType.LINEAR,)

    def _betas(self) -> Tensor:
        return formulas.linear(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class ScaledLinearNoiseScheduler(BaseNoiseScheduler):
    """``scaled_linear`` as diffusers means it: :func:`fastdiff.schedules.betas.scaled_linear`."""

    schedule_types = (NoiseScheduleType.SCALED_LINEAR,)

    def _betas(self) -> Tensor:
        return formulas.scaled_linear(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class LinearRescaledNoiseScheduler(BaseNoiseScheduler):
    """``linear_rescaled``, ends multiplied by 1000/T: :func:`fastdiff.schedules.betas.linear_rescaled`."""

    schedule_types = (NoiseScheduleType.LINEAR_RESCALED,)

    def _betas(self) -> Tensor:
        return formulas.linear_rescaled(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class CosineNoiseScheduler(BaseNoiseScheduler):
    """``cosine``, or ``squaredcos_cap_v2``: :func:`fastdiff.schedules.betas.cosine`.

    Does not use beta_start and beta_end.
    """

    schedule_types = (NoiseScheduleType.COSINE,)

    def _betas(self) -> Tensor:
        return formulas.cosine(self.config.num_train_timesteps)


class QuadraticNoiseScheduler(BaseNoiseScheduler):
    """``quadratic``, the same formula as ``scaled_linear``: :func:`fastdiff.schedules.betas.scaled_linear`."""

    schedule_types = (NoiseScheduleType.QUADRATIC,)

    def _betas(self) -> Tensor:
        return formulas.scaled_linear(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class SigmoidNoiseScheduler(BaseNoiseScheduler):
    """``sigmoid``: :func:`fastdiff.schedules.betas.sigmoid`."""

    schedule_types = (NoiseScheduleType.SIGMOID,)

    def _betas(self) -> Tensor:
        return formulas.sigmoid(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class ExponentialNoiseScheduler(BaseNoiseScheduler):
    """``exponential``, a line in log β: :func:`fastdiff.schedules.betas.exponential`."""

    schedule_types = (NoiseScheduleType.EXPONENTIAL,)

    def _betas(self) -> Tensor:
        return formulas.exponential(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class LaplaceNoiseScheduler(BaseNoiseScheduler):
    """``laplace``: :func:`fastdiff.schedules.betas.laplace`. Does not use beta_start and beta_end."""

    schedule_types = (NoiseScheduleType.LAPLACE,)

    def _betas(self) -> Tensor:
        return formulas.laplace(self.config.num_train_timesteps)


class KarrasNoiseScheduler(BaseNoiseScheduler):
    """``karras``: :func:`fastdiff.schedules.betas.karras_alphas_cumprod`. Does not use beta_start and beta_end."""

    schedule_types = (NoiseScheduleType.KARRAS,)

    def _betas(self) -> Tensor:
        return formulas.betas_from_alphas_cumprod(self._alphas_cumprod())

    def _alphas_cumprod(self) -> Tensor:
        return formulas.karras_alphas_cumprod(self.config.num_train_timesteps)


class CustomNoiseScheduler(BaseNoiseScheduler):
    """The caller's own ``custom_betas`` or ``custom_alphas_cumprod``, whichever of the two is given."""

    schedule_types = (NoiseScheduleType.CUSTOM_BETAS, NoiseScheduleType.CUSTOM_ALPHAS_CUMPROD)

    def _betas(self) -> Tensor:
        if self.schedule_type is NoiseScheduleType.CUSTOM_BETAS:
            return torch.tensor(self.config.custom_betas, dtype=torch.float64, device="cpu")
        return formulas.betas_from_alphas_cumprod(self._alphas_cumprod())

    def _alphas_cumprod(self) -> Tensor:
        if self.schedule_type is NoiseScheduleType.CUSTOM_BETAS:
            return super()._alphas_cumprod()
        # The given values: the product of the betas would round each of them.
        return torch.tensor(self.config.custom_alphas_cumprod, dtype=torch.float64, device="cpu")


_SCHEDULERS: dict[NoiseScheduleType, type[BaseNoiseScheduler]] = {
    kind: scheduler
    for scheduler in (
        LinearNoiseScheduler,
        ScaledLinearNoiseScheduler,
        LinearRescaledNoiseScheduler,
        CosineNoiseScheduler,
        QuadraticNoiseScheduler,
        SigmoidNoiseScheduler,
        ExponentialNoiseScheduler,
        LaplaceNoiseScheduler,
        KarrasNoiseScheduler,
        CustomNoiseScheduler,
    )
    for kind in scheduler.schedule_types
}


def create_noise_scheduler(
    type: str | NoiseScheduleType | NoiseSchedulerConfig, **config_fields: Any
) -> BaseNoiseScheduler:
    """Make the scheduler of a kind.

    Args:
        type: a :class:`NoiseScheduleType` or its name, ``"custom"`` for whichever custom field is given, or a whole
            :class:`NoiseSchedulerConfig`.
        config_fields: fields of the configuration; they replace those of a given configuration.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the kind or a field is unknown, the kind is given twice, or a value is out of range.
    """
    operation = "create_noise_scheduler"
    if isinstance(type, NoiseSchedulerConfig):
        config = _configure(operation, type, config_fields)
    else:
        if "schedule_type" in config_fields:
            got, remedy = f"is given beside type {type!r}", "leave schedule_type out"
            raise ValueError(error_message(operation, "schedule_type", got, "one name", remedy))
        config = _configure(operation, None, {**config_fields, "schedule_type": type})
    return _SCHEDULERS[NoiseScheduleType.parse(config.schedule_type)](config)
