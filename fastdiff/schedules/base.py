# SPDX-License-Identifier: MIT
"""The base of all noise schedules: its arrays, the forward process, and the timesteps that a loop visits.

A schedule is computed once, in float64 on the CPU, from a :class:`NoiseSchedulerConfig`; the numbers are rounded to
the computing dtype when they are applied to samples. The formulas are in :mod:`fastdiff.schedules.betas`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from ..errors import error_message, unknown_name
from . import betas as formulas
from .betas import check_floating, rescale_zero_terminal_snr
from .config import NoiseSchedulerConfig, NoiseScheduleType
from .levels import Path, VariancePreservingPath
from .timesteps import timestep_schedule


def _check_config(operation: str, config: object) -> None:
    if config is not None and not isinstance(config, NoiseSchedulerConfig):
        got, remedy = f"has type {type(config).__name__}", "pass the fields as keywords"
        raise TypeError(error_message(operation, "config", got, "a NoiseSchedulerConfig", remedy))


def configure(operation: str, config: NoiseSchedulerConfig | None, given: dict[str, Any]) -> NoiseSchedulerConfig:
    """Return a configuration with some fields replaced, after a check of their names."""
    known = [field.name for field in fields(NoiseSchedulerConfig)]
    for name in given:
        if name not in known:
            raise unknown_name(operation, "field", name, known)
    return NoiseSchedulerConfig(**given) if config is None else replace(config, **given)


class BaseNoiseScheduler(ABC):
    """A noise schedule and its forward process. A subclass names its kinds and supplies the betas.

    Make one from a :class:`NoiseSchedulerConfig`, from its fields as keywords, or from both (keywords win). The class
    decides the kind: a config left at the default ``"linear"`` is taken to mean the kind of the class, with its usual
    timestep_spacing where that is left at the default as well.

    Attributes:
        config: the configuration, with ``schedule_type`` settled.
        schedule_type: the kind.
        num_train_timesteps: T.
        betas: float64 ``[T]`` on the CPU, as are the next seven.
        alphas: 1 − β.
        alphas_cumprod: ᾱ, the running product of ``alphas``.
        alphas_cumprod_prev: ᾱ of the timestep before, 1 before the first.
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: √ᾱ and √(1 − ᾱ).
        posterior_variance: β_t·(1 − ᾱ_{t−1})/(1 − ᾱ_t), arXiv 2006.11239, eq. 7; 0 at the first timestep.
        sigmas: √((1 − ᾱ)/ᾱ), the noise level in the variance-exploding sense; infinite where ᾱ is 0.
        timesteps: those of the last :meth:`set_timesteps`, at first all of them, descending. Samplers have their own.
        num_inference_steps: the number of the last :meth:`set_timesteps`, None before.

    Raises:
        TypeError: ``config`` is no configuration, or a field has the wrong type.
        ValueError: an unknown field, a value out of range, or a config of another kind.
    """

    schedule_types: ClassVar[tuple[NoiseScheduleType, ...]]
    #: The timestep_spacing of a configuration that leaves it at None.
    usual_spacing: ClassVar[str] = "leading"

    def __init__(self, config: NoiseSchedulerConfig | None = None, **config_fields: Any) -> None:
        operation = type(self).__name__
        _check_config(operation, config)
        if config is None or config.schedule_type == "linear":
            own = self.schedule_types[0].value if len(self.schedule_types) == 1 else "custom"
            config_fields.setdefault("schedule_type", own)
            if config is not None and config.timestep_spacing == BaseNoiseScheduler.usual_spacing:
                config_fields.setdefault("timestep_spacing", self.usual_spacing)
        self.config = configure(operation, config, config_fields)
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
            self._derive()
        self._scales_like: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.num_train_timesteps - 1, -1, -1, dtype=torch.int64, device="cpu")

    def _derive(self) -> None:
        """Compute the arrays that follow from ``betas`` and ``alphas_cumprod``."""
        signal = self.alphas_cumprod
        self.alphas_cumprod_prev = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
        self.sqrt_alphas_cumprod = signal.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - signal).sqrt()
        # 0/0 where no step has added noise yet: nothing is left to draw there.
        self.posterior_variance = (self.betas * (1 - self.alphas_cumprod_prev) / (1 - signal)).nan_to_num(nan=0.0)
        self._scales = self._forward_scales()

    def _forward_scales(self) -> Tensor:
        """α and σ of the forward process x = α·x0 + σ·ε, float64 ``[2, T]`` on the CPU."""
        return torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod])

    @property
    def forward_scales(self) -> Tensor:
        """α and σ of the forward process x = α·x0 + σ·ε at each training timestep, float64 ``[2, T]`` on the CPU."""
        return self._scales

    @functools.cached_property
    def path(self) -> Path:
        """The path of this schedule through its noise levels, for the solvers."""
        return VariancePreservingPath(self.alphas_cumprod)

    def inference_timesteps(self, num_inference_steps: int) -> list[float]:
        """Return the model's time arguments of a loop of so many steps, descending, by ``config.timestep_spacing``.

        Raises:
            TypeError, ValueError: as :func:`fastdiff.schedules.timesteps.timestep_schedule`.
        """
        spacing = str(self.config.timestep_spacing)
        chosen = timestep_schedule(spacing, num_inference_steps, self.num_train_timesteps, self.config.steps_offset)
        return [float(timestep) for timestep in chosen.tolist()]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set ``timesteps`` to those of a loop of so many steps, for loops of one's own.

        Args:
            num_inference_steps: 1 to T.
            device: where ``timesteps`` is put; None for the CPU.

        Raises:
            TypeError, ValueError: as :meth:`inference_timesteps`; the scheduler is then as it was.
        """
        chosen = torch.tensor(self.inference_timesteps(num_inference_steps), dtype=torch.float64, device="cpu")
        dtype = torch.int64 if bool((chosen == chosen.round()).all()) else torch.float32
        self.timesteps = chosen.to(dtype).to("cpu" if device is None else device)
        self.num_inference_steps = num_inference_steps

    @abstractmethod
    def _betas(self) -> Tensor:
        """β of ``self.config`` before any rescaling, float64 ``[T]`` on the CPU."""

    def _alphas_cumprod(self) -> Tensor:
        """ᾱ before any rescaling, float64 ``[T]`` on the CPU; overridden where it is given rather than derived."""
        return (1 - self.betas).cumprod(0)

    @overload
    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int, *, generator: None = None
    ) -> Tensor: ...
    @overload
    def add_noise(
        self, original_samples: Tensor, noise: Tensor | int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def add_noise(
        self, original_samples: Tensor, *, timesteps: Tensor | int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def add_noise(
        self,
        original_samples: Tensor,
        noise: Tensor | int | None = None,
        timesteps: Tensor | int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The forward process in one go, ``√ᾱ_t·x0 + √(1 − ᾱ_t)·ε``: arXiv 2006.11239, eq. 4.

        In two forms: ``noisy = add_noise(x0, noise, t)``, and ``noisy, noise = add_noise(x0, t)``, which draws the
        noise as :meth:`q_sample` does and returns it beside the noisy samples.

        The coefficients are rounded once, from float64 to the computing dtype: float64 for float64 samples, float32
        for all others. The arithmetic runs in that dtype and the result is rounded once to the dtype of the samples.
        Differentiable in both tensors.

        Args:
            original_samples: x0 ``[B, …]``, any floating dtype and device.
            noise: ε, like ``original_samples`` in shape, dtype and device; or the timesteps of the second form.
            timesteps: integers in [0, T − 1]: an int or 0-d tensor for all samples, or ``[B]`` (or ``[1]``), on any
                device. Checking a tensor that is not on the CPU waits for its device; compiled code skips the check.
            generator: source of the noise that the second form draws.

        Returns:
            ``[B, …]`` in the dtype and on the device of ``original_samples``; in the second form that and the noise.

        Raises:
            TypeError: the samples are not floating point, the noise has another dtype, the timesteps are no integers.
            ValueError: shapes or devices differ, a timestep is out of range, or a generator is given beside noise.
        """
        if noise is None or timesteps is None:
            return self._draw_and_add(
                "add_noise", original_samples, noise if timesteps is None else timesteps, generator
            )
        if generator is not None:
            got, expected, remedy = (
                "is given beside noise",
                "noise or a generator to draw it with",
                "leave one of them out",
            )
            raise ValueError(error_message("add_noise", "generator", got, expected, remedy))
        signal, sigma = self._scales_at("add_noise", "original_samples", original_samples, noise, timesteps)
        assert isinstance(noise, Tensor)
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
        if noise is None:
            return self._draw_and_add("q_sample", x0, t, generator, name="x0", time_name="t")
        signal, sigma = self._scales_at("q_sample", "x0", x0, noise, t, time_name="t")
        return (signal * x0.to(signal.dtype) + sigma * noise.to(signal.dtype)).to(x0.dtype), noise

    def _draw_and_add(
        self,
        operation: str,
        samples: Tensor,
        timesteps: Any,
        generator: torch.Generator | None,
        name: str = "original_samples",
        time_name: str = "timesteps",
    ) -> tuple[Tensor, Tensor]:
        """Return noisy samples and the noise that is drawn for them, after all checks."""
        check_floating(operation, name, samples)
        self._checked_timesteps(operation, time_name, name, samples, timesteps)
        device = samples.device if generator is None else generator.device
        noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype, device=device).to(samples.device)
        signal, sigma = self._scales_at(operation, name, samples, noise, timesteps, time_name=time_name)
        return (signal * samples.to(signal.dtype) + sigma * noise.to(signal.dtype)).to(samples.dtype), noise

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
        noise: Any,
        timesteps: Tensor | int,
        time_name: str = "timesteps",
    ) -> tuple[Tensor, Tensor]:
        """α_t and σ_t of the forward process in the computing dtype, shaped to multiply ``samples``, after checks."""
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
