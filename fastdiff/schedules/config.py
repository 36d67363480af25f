# SPDX-License-Identifier: MIT
"""The configuration of a noise schedule: the names of the kinds, the fields and their checks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_bool, checked_float, checked_integer, error_message, parse_choice, unknown_name
from ..json_fields import fields_from_json, fields_to_json, parsed_object
from .betas import check_alphas_cumprod
from .timesteps import FLOW_SPACINGS, TIMESTEP_SPACINGS

_DEFAULT_NUM_TRAIN_TIMESTEPS = 1000
_ALIASES = {"squaredcos_cap_v2": "cosine", "squaredcos": "cosine"}


class NoiseScheduleType(str, Enum):
    """The kinds of noise schedule; the values are the names that a configuration takes.

    ``scaled_linear`` means what it means in diffusers, and ``quadratic`` is the same formula; ``linear_rescaled`` is
    the other schedule known as "scaled linear". See :mod:`fastdiff.schedules.betas` for each formula and its source.
    """

    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    LINEAR_RESCALED = "linear_rescaled"
    COSINE = "cosine"
    QUADRATIC = "quadratic"
    SIGMOID = "sigmoid"
    EXPONENTIAL = "exponential"
    LAPLACE = "laplace"
    KARRAS = "karras"
    FLOW = "flow"
    #: ``custom_betas`` or ``custom_alphas_cumprod``, whichever is given: a configuration settles it.
    CUSTOM = "custom"
    CUSTOM_BETAS = "custom_betas"
    CUSTOM_ALPHAS_CUMPROD = "custom_alphas_cumprod"

    @classmethod
    def parse(cls, value: object, operation: str = "NoiseScheduleType.parse") -> NoiseScheduleType:
        """Return the kind of this name; ``"squaredcos_cap_v2"`` and ``"squaredcos"`` are other names of cosine.

        Raises:
            ValueError: no such name; the message lists the known ones.
        """
        return parse_choice(cls, operation, "schedule_type", value, _ALIASES)


def _custom_values(argument: str, values: object) -> tuple[float, ...]:
    """Turn a custom tensor, array or sequence into floats, and refuse what cannot be a schedule."""
    operation = "NoiseSchedulerConfig"
    try:
        # A plain list would become float32 by default and lose half its digits; a tensor or array has its own dtype.
        tensor = torch.as_tensor(values, dtype=None if hasattr(values, "dtype") else torch.float64, device="cpu")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"dtype {tensor.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"has type {type(values).__name__} and holds no real numbers"
        raise TypeError(
            error_message(operation, argument, got, "a 1-D tensor or sequence of floats", f"pass {argument} as a list")
        ) from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        got = f"has shape {list(tensor.shape)}"
        raise ValueError(
            error_message(operation, argument, got, "[num_train_timesteps]", "pass one value per timestep")
        )
    tensor = tensor.detach().to(torch.float64)
    if argument == "custom_alphas_cumprod":
        check_alphas_cumprod(operation, argument, tensor)
        refused = torch.cat([tensor[:-1] == 0, tensor.new_zeros(1, dtype=torch.bool)])
        expected, remedy = "values in (0, 1], 0 for the last one alone", "cut the schedule where the signal ends"
    else:
        refused = ~((tensor >= 0) & (tensor < 1))
        expected = "values in [0, 1)"
        remedy = "pass the variance of each step; for a last step without signal set rescale_betas_zero_snr=True"
    if bool(refused.any()):
        at = int(refused.nonzero()[0])
        raise ValueError(error_message(operation, f"{argument}[{at}]", f"is {float(tensor[at])!r}", expected, remedy))
    return tuple(tensor.tolist())


@dataclass(frozen=True)
class NoiseSchedulerConfig:
    """The configuration of a noise schedule. Checked when made, immutable, hashable and comparable.

    Args:
        num_train_timesteps: T, at least 1. With a custom schedule it must be the length of that schedule, or be left
            at its default of 1000, which then means that length.
        beta_start: the first β, for the schedules that interpolate; 0 < beta_start ≤ beta_end < 1.
        beta_end: the last β.
        schedule_type: a :class:`NoiseScheduleType` or its name, kept as the name. ``"custom"`` becomes
            ``"custom_betas"`` or ``"custom_alphas_cumprod"``, whichever of the two is given.
        clip_sample: whether samplers clip the predicted x0 to ± ``clip_sample_range``.
        clip_sample_range: above 0.
        sample_max_value: upper bound of the threshold in dynamic thresholding, at least 1. The drop-ins take
            smaller ones, as diffusers does, which are then the threshold of every sample; here they are refused.
        timestep_spacing: which timesteps samplers visit, one of :data:`fastdiff.schedules.timesteps.TIMESTEP_SPACINGS`;
            None takes ``"leading"``, and ``"trailing"`` for a flow schedule, which has ``"linspace"`` besides.
        rescale_betas_zero_snr: rescale so that the last timestep is pure noise, see
            :func:`fastdiff.schedules.betas.rescale_zero_terminal_snr`.
        custom_betas: 1-D tensor or sequence ``[T]`` of β in [0, 1), kept as a tuple of floats.
        custom_alphas_cumprod: 1-D tensor or sequence ``[T]`` of ᾱ in (0, 1] that never rises; the last may be 0. Kept
            as a tuple of floats.
        steps_offset: added to the timesteps of ``"leading"`` spacing, at least 0.
        shift: of a flow schedule, above 0: the times t become shift·t/(1 + (shift − 1)·t) (arXiv 2403.03206, eq. 23).
        shift_mu: μ of a flow schedule's dynamic shift, which is shift = e^μ; see :func:`fastdiff.schedules.flow_mu`.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range or unknown, or fields contradict each other.
    """

    num_train_timesteps: int = _DEFAULT_NUM_TRAIN_TIMESTEPS
    beta_start: float = 1e-4
    beta_end: float = 0.02
    schedule_type: str = "linear"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool = False
    custom_betas: Tensor | Sequence[float] | None = None
    custom_alphas_cumprod: Tensor | Sequence[float] | None = None
    steps_offset: int = 0
    shift: float = 1.0
    shift_mu: float | None = None

    def __post_init__(self) -> None:
        operation = "NoiseSchedulerConfig"
        for name, low in (("num_train_timesteps", 1), ("steps_offset", 0)):
            self._set(name, checked_integer(operation, name, getattr(self, name), low))
        for name in ("clip_sample", "rescale_betas_zero_snr"):
            checked_bool(operation, name, getattr(self, name))
        for name in ("beta_start", "beta_end", "clip_sample_range"):
            self._set(name, checked_float(operation, name, getattr(self, name), 0.0, strict=True))
        self._set("sample_max_value", checked_float(operation, "sample_max_value", self.sample_max_value, 1.0))
        if self.beta_end >= 1:
            remedy = "beta is the variance that one step adds, 0.02 is usual"
            raise ValueError(error_message(operation, "beta_end", f"is {self.beta_end!r}", "a number below 1", remedy))
        if self.beta_start > self.beta_end:
            expected = f"at most beta_end, {self.beta_end!r}"
            raise ValueError(
                error_message(operation, "beta_start", f"is {self.beta_start!r}", expected, "swap the two")
            )
        self._check_custom(operation)
        flow = self.schedule_type == NoiseScheduleType.FLOW.value
        if self.timestep_spacing is None:
            self._set("timestep_spacing", "trailing" if flow else "leading")
        spacings = FLOW_SPACINGS if flow else TIMESTEP_SPACINGS
        if self.timestep_spacing not in spacings:
            raise unknown_name(operation, "timestep_spacing", self.timestep_spacing, spacings)
        self._check_shift(operation, flow)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_shift(self, operation: str, flow: bool) -> None:
        self._set("shift", checked_float(operation, "shift", self.shift, 0.0, strict=True))
        if self.shift_mu is not None:
            self._set("shift_mu", checked_float(operation, "shift_mu", self.shift_mu, -math.inf))
            if self.shift != 1.0:
                expected, remedy = "one of the two", "leave one of them out: shift_mu is the logarithm of shift"
                raise ValueError(error_message(operation, "shift_mu", "is given beside shift", expected, remedy))
        if not flow and (self.shift != 1.0 or self.shift_mu is not None):
            name = "shift" if self.shift_mu is None else "shift_mu"
            got, remedy = f"is given with schedule_type {self.schedule_type!r}", "set schedule_type='flow'"
            raise ValueError(error_message(operation, name, got, "a flow schedule", remedy))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values of standard JSON; `from_dict` makes an equal configuration of them."""
        return fields_to_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedulerConfig:
        """Make a configuration of what `to_dict` gave, checked like any other."""
        return cls(**fields_from_json(cls, values))

    def to_json(self) -> str:
        """Return the fields as one object of standard JSON (RFC 8259)."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> NoiseSchedulerConfig:
        """Make a configuration of what `to_json` gave."""
        return cls.from_dict(parsed_object(cls.__name__, text))

    def _check_custom(self, operation: str) -> None:
        """Settle which custom field belongs to the schedule type, and T with it."""
        customs = (NoiseScheduleType.CUSTOM_BETAS.value, NoiseScheduleType.CUSTOM_ALPHAS_CUMPROD.value)
        given = [name for name in customs if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError(
                error_message(
                    operation, given[1], "is given beside custom_betas", "one of the two", "leave one of them out"
                )
            )
        if self.schedule_type == "custom":
            kind = given[0] if given else "custom"
        else:
            kind = NoiseScheduleType.parse(self.schedule_type, operation).value
        if kind in (*customs, "custom") and kind not in given:
            got, expected = f"is {kind!r} without its values", f"{' or '.join(customs) if kind == 'custom' else kind}"
            raise ValueError(
                error_message(operation, "schedule_type", got, expected, f"pass {expected} as a 1-D tensor")
            )
        self._set("schedule_type", kind)
        if not given:
            return
        if kind not in given:
            got, expected = f"is given with schedule_type {kind!r}", "a custom schedule_type"
            raise ValueError(
                error_message(
                    operation, given[0], got, expected, f"set schedule_type={given[0]!r} or leave {given[0]} out"
                )
            )
        values = _custom_values(kind, getattr(self, kind))
        if self.num_train_timesteps not in (len(values), _DEFAULT_NUM_TRAIN_TIMESTEPS):
            got, expected = f"has {len(values)} values", f"num_train_timesteps={self.num_train_timesteps} of them"
            raise ValueError(
                error_message(operation, kind, got, expected, "leave num_train_timesteps out to take the length")
            )
        self._set("num_train_timesteps", len(values))
        self._set(kind, values)
