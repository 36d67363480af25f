# SPDX-License-Identifier: MIT
"""Rows of the forward process: a step from clean samples to noisy ones, whose kept output is the training target.

A row's first map is x_t = α·x0 + σ·z, and the map of its first kept output is the target::

    epsilon          z
    sample           x0
    v_prediction     α·z − σ·x0    (Salimans & Ho 2022, arXiv 2202.00512, appendix D)
    flow_prediction  z − x0        (Liu et al. 2022, arXiv 2209.03003, towards the noise)

All numbers are float64 and are rounded once to the compute dtype.  A table has a row for each training timestep and a
last one of NaN, which stands for a timestep out of range where reading the timesteps would be a host sync.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device_copy import OnDevice, to_device
from ..errors import error_message, shown, unknown_name
from ..row_layout import COLUMNS, KEEP_0, PREV_SAMPLE, blank_row
from . import backends
from .checks import readable_without_sync

TARGETS = ("epsilon", "sample", "v_prediction", "flow_prediction")
#: Other names of targets.
ALIASES = {"x0": "sample", "flow": "flow_prediction"}

_SAMPLE, _NOISE = COLUMNS.index("sample"), COLUMNS.index("noise")
_CPU = torch.device("cpu")
#: Tables that are kept.
_CACHE_SIZE = 64


def parse_target(operation: str, prediction_type: object) -> str:
    """Return the name of a target, from it, an alias or a member of `fastdiff.solvers.prediction.PredictionType`."""
    name = getattr(prediction_type, "value", prediction_type)
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in TARGETS:
        raise unknown_name(operation, "prediction_type", name, [*TARGETS, *ALIASES])
    return str(name)


class ForwardScales(NamedTuple):
    """α and σ of a schedule.

    Attributes:
        tensor: ᾱ ``[T]``, or α and σ ``[2, T]``; None for the times (k + 1)/T of flow matching with a shift.
        steps: T.
        shift: of the times.
        flow: whether α = 1 − t and σ = t, so that t may be continuous.
    """

    tensor: Tensor | None
    steps: int
    shift: float
    flow: bool

    @classmethod
    def of(cls, operation: str, schedule: Any) -> ForwardScales:
        """Read a schedule of fastdiff or diffusers, or ᾱ itself.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(schedule, Tensor):
            if schedule.dim() != 1 or not schedule.is_floating_point() or schedule.numel() == 0:
                got = f"is {schedule.dtype} of shape {list(schedule.shape)}"
                remedy = "pass the running product of 1 - betas"
                raise TypeError(error_message(operation, "schedule", got, "alphas_cumprod [T]", remedy))
            return cls(schedule, schedule.numel(), 1.0, False)
        # Looked up in the class: diffusers' take a microsecond to say that they have no such attribute.
        if hasattr(type(schedule), "forward_scales"):  # fastdiff's own
            scales: Tensor = schedule.forward_scales
            return cls(scales, scales.shape[1], 1.0, hasattr(schedule, "times"))
        config: Any = getattr(schedule, "config", None)
        if getattr(config, "use_flow_sigmas", False) is True and hasattr(config, "flow_shift"):
            return cls._of_flow(config, config.flow_shift)
        signal = getattr(schedule, "alphas_cumprod", None)
        if isinstance(signal, Tensor):
            return cls(signal, signal.numel(), 1.0, False)
        if hasattr(schedule, "scale_noise") and hasattr(config, "shift") and hasattr(config, "num_train_timesteps"):
            # `set_shift` leaves the configuration as it was.
            return cls._of_flow(config, schedule.shift if hasattr(type(schedule), "shift") else config.shift)
        raise TypeError(
            error_message(
                operation,
                "schedule",
                f"is a {type(schedule).__name__} without alphas_cumprod",
                "a noise schedule of fastdiff, a scheduler of diffusers, or alphas_cumprod [T]",
                "make one with fastdiff.create_noise_scheduler",
            )
        )

    @classmethod
    def _of_flow(cls, config: Any, shift: Any) -> ForwardScales:
        """Return the scales of a flow scheduler of diffusers; a dynamic shift belongs to sampling."""
        shift = 1.0 if getattr(config, "use_dynamic_shifting", False) else float(shift)
        return cls(None, int(config.num_train_timesteps), shift, True)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at integer timesteps, float64, on their device."""
        if self.tensor is None:
            time = (t.double() + 1.0) / self.steps
            time = self.shift * time / (1.0 + (self.shift - 1.0) * time)
            return 1.0 - time, time
        chosen = self.tensor.to(t.device)[..., t].double()
        if self.tensor.dim() == 2:
            return chosen[0], chosen[1]
        return chosen.sqrt(), (1.0 - chosen).sqrt()


def rows_of(alpha: Tensor, sigma: Tensor, target: str, dtype: torch.dtype) -> Tensor:
    """Return rows ``[N, 32]`` of noise levels ``[N]``."""
    blank = blank_row()
    rows = alpha.new_zeros(len(alpha), len(blank))
    for column, value in enumerate(blank):
        if value != 0.0:
            rows[:, column] = value
    rows[:, PREV_SAMPLE + _SAMPLE], rows[:, PREV_SAMPLE + _NOISE] = alpha, sigma
    maps: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "v_prediction": (-sigma, alpha),
        "flow_prediction": (-1.0, 1.0),
    }
    of_sample, of_noise = maps[target]
    rows[:, KEEP_0 + _SAMPLE], rows[:, KEEP_0 + _NOISE] = of_sample, of_noise
    return rows.to(dtype)


_cache: dict[tuple[Any, ...], tuple[Tensor | None, OnDevice]] = {}
_lock = threading.Lock()


def _table(scales: ForwardScales, target: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the rows of all timesteps and the row of NaN, ``[T + 1, 32]``; kept, until ᾱ is changed or replaced."""
    tensor = scales.tensor
    kept = tensor is None or not tensor.is_inference()
    version = None if tensor is None or not kept else tensor._version
    key = (id(tensor), version, scales.steps, scales.shift, target, dtype, device)
    found = _cache.get(key)
    if found is not None:
        return found[1].get()
    # Tensors made in inference mode could not be used for training later.
    with torch.inference_mode(False), torch.no_grad():
        where = "cpu" if tensor is None else tensor.device
        alpha, sigma = scales.at(torch.arange(scales.steps, device=where))
        rows = rows_of(alpha, sigma, target, dtype)
        table = OnDevice(torch.cat([rows, torch.full_like(rows[:1], torch.nan)]), device)
    if kept and torch._C._len_torch_dispatch_stack() == 0:  # under a mode its tensors may be fake
        with _lock:
            while len(_cache) >= _CACHE_SIZE:
                _cache.pop(next(iter(_cache)))
            # The tensor is held so that its id stays its own.
            _cache[key] = tensor, table
    return table.get()


def training_table(operation: str, schedule: Any, prediction_type: object) -> Tensor:
    """Return the rows of all timesteps and the row of NaN, float32 ``[T + 1, 32]`` on the CPU.

    Raises:
        TypeError, ValueError: as `forward_rows`.
    """
    scales = ForwardScales.of(operation, schedule)
    return _table(scales, parse_target(operation, prediction_type), torch.float32, _CPU)


def forward_rows(
    operation: str, x0: Tensor, t: Any, schedule: Any, prediction_type: object, dtype: torch.dtype
) -> tuple[Tensor, int | Tensor]:
    """Return a table and the row of each sample in it, an int or int64 ``[1]`` or ``[B]``, on the samples' device.

    Args:
        operation: for messages.
        x0: clean samples ``[B, ...]``.
        t: timesteps, as in `fastdiff.ops.noise_and_target`.
        schedule, prediction_type: likewise.
        dtype: the compute dtype.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    target = parse_target(operation, prediction_type)
    scales = ForwardScales.of(operation, schedule)
    device, number = x0.device, type(t) is int
    if number and not 0 <= t < scales.steps:
        raise _out_of_range(operation, f"is {shown(t)}", f"0 to {scales.steps - 1}")
    if not torch.compiler.is_compiling() and (number or _fits_as_it_is(t, x0, scales.steps)):
        return _table(scales, target, dtype, device), t
    if number:
        t = torch.full((1,), t, dtype=torch.int64, device=device)
    t = _checked_times(operation, x0, t, scales)
    if t.is_floating_point():
        level = to_device(t, device).double()
        if not readable_without_sync(t):
            level = torch.where((level >= 0) & (level <= 1), level, torch.nan)
        return _own_rows(1.0 - level, level, target, dtype)
    if torch.compiler.is_compiling():
        place = to_device(t, device)
        inside = (place >= 0) & (place < scales.steps)
        alpha, sigma = scales.at(place.clamp(0, scales.steps - 1))
        return _own_rows(torch.where(inside, alpha, torch.nan), sigma, target, dtype)
    table = _table(scales, target, dtype, device)
    if readable_without_sync(t):
        return table, to_device(t, device)
    # The last row is NaN, so that a timestep out of range is not read as another.
    return table, to_device(t, device).clamp(-1, scales.steps) % (scales.steps + 1)


def _fits_as_it_is(t: object, x0: Tensor, steps: int) -> bool:
    """Return whether timesteps are int64 ``[1]`` or ``[B]`` in the CPU's memory and in range, by one look at them."""
    return x0.is_cpu and backends.extension is not None and backends.extension.indices_in_range(t, len(x0), steps)


def _own_rows(alpha: Tensor, sigma: Tensor, target: str, dtype: torch.dtype) -> tuple[Tensor, int | Tensor]:
    """Return a row for each sample, made where the levels are; a row of NaN where the level is NaN."""
    with torch.no_grad():
        alpha = alpha.detach()
        rows = rows_of(alpha, sigma.detach(), target, dtype)
        rows = torch.where(alpha.isnan()[:, None], torch.nan, rows)
    return rows, 0 if len(rows) == 1 else torch.arange(len(rows), device=rows.device)


def _checked_times(operation: str, x0: Tensor, given: Any, scales: ForwardScales) -> Tensor:
    """Return timesteps as a tensor ``[1]`` or ``[B]``, int64 or floating point."""
    if isinstance(given, Tensor):
        t = given
    else:
        if isinstance(given, bool) or not (isinstance(given, float) or hasattr(given, "__index__")):
            got = f"is a {type(given).__name__}"
            raise TypeError(error_message(operation, "t", got, "an int or a tensor", "pass one timestep a sample"))
        number = given if isinstance(given, float) else given.__index__()
        t = torch.tensor(number, dtype=torch.float64 if isinstance(given, float) else torch.int64, device="cpu")
    if t.dim() > 1 or t.numel() not in (1, x0.shape[0]):
        choices = f"[{x0.shape[0]}], one a sample, or one number"
        remedy = "give one timestep a sample; flatten frames or tokens into the batch"
        raise ValueError(error_message(operation, "t", f"has shape {list(t.shape)}", choices, remedy))
    return checked_timesteps(operation, t.reshape(-1), scales)


def checked_timesteps(operation: str, t: Tensor, scales: ForwardScales) -> Tensor:
    """Return timesteps as int64, or times of a flow schedule as they are; their range is checked where it can be read.

    Raises:
        TypeError: they are no integers, and no floats on a flow schedule.
        ValueError: one is out of range.
    """
    floats = t.is_floating_point()
    if floats and not scales.flow:
        remedy = "round and convert with .long(), or pass a flow schedule"
        raise TypeError(error_message(operation, "t", f"has dtype {t.dtype}", "integers", remedy))
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(error_message(operation, "t", f"has dtype {t.dtype}", "int64", "convert with .long()"))
    t = t if floats else t.to(torch.int64).contiguous()
    if readable_without_sync(t) and t.numel() > 0:
        low, high = (value.item() for value in t.aminmax())
        last = 1 if floats else scales.steps - 1
        if not (low >= 0 and high <= last):
            raise _out_of_range(operation, f"spans {low} to {high}", f"0 to {last}")
    return t


def _out_of_range(operation: str, got: str, expected: str) -> ValueError:
    return ValueError(error_message(operation, "t", got, expected, "draw it in that range"))
