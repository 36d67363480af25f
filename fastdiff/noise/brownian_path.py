# SPDX-License-Identifier: MIT
"""A sampler of Brownian noise whose paths belong to the samples' own seeds.

SDE solvers take noise of an interval of noise levels: the increment of a Brownian path W.  Here each sample's path is a
function of its 64-bit seed alone, with a value at every float32 time whatever the schedule.

The time axis is divided as float32 numbers are: octaves [2ᵉ, 2ᵉ⁺¹) of 2²³ equal parts each, and a range [0, 2⁻²⁰)
below them, divided likewise.  The increment over an octave of length h is √h·Z, with a Z of its own.  Inside, an
interval that is halved draws a Z for its middle (Lévy's construction of the Brownian bridge; its basis functions are
Schauder's).  With x the place of t in its octave, 0 ≤ x < 1, and x_d the fractional part of 2ᵈ·x,

    W(t) = Σ √h·Z over the octaves below + R(t),    R(t) = √h·x·Z + Σ_{d < 23} ½·√(h·2⁻ᵈ)·(1 − |2·x_d − 1|)·Z_d

R(t) is a sum of at most 24 draws.  It does not depend on the times asked for before, so neither does an increment.
Negative times have another path, which starts at W(0) = 0 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import error_message
from ..ops import randn
from ..philox import Purpose, as_seeds

#: log2 of the number of parts of an octave, as float32 has it, and the number.
_DEPTH = 23
_PARTS = 1 << _DEPTH
#: log2 of the start of the first octave, and of the end of times: the counter has room for 127 octaves.
_LOWEST = -20
_END = 106

#: The `step` of a draw of `fastdiff.randn`, and the weight of the draw in a sum.
_Draw = tuple[int, float]


class Time(NamedTuple):
    """A time rounded to 24 significant bits, or to a multiple of 2⁻⁴³ below 2⁻²⁰.

    Attributes:
        negative: the sign.
        octave: 0 for [0, 2⁻²⁰), n for [2ⁿ⁻²¹, 2ⁿ⁻²⁰).
        part: the number of whole parts between the octave's start and the time.
    """

    negative: bool
    octave: int
    part: int

    @classmethod
    def of(cls, value: float) -> Time:
        """Round a number.

        Raises:
            ValueError: the number is NaN, or its magnitude is 2¹⁰⁶ or more.
        """
        magnitude = abs(value)
        if not magnitude < 2.0**_END:
            raise ValueError(
                error_message(
                    "BrownianPath", "time", f"is {value}", "a number of magnitude below 2**106",
                    "pass finite noise levels",
                )
            )  # fmt: skip
        exponent = max(math.frexp(magnitude)[1] - 1, _LOWEST) if magnitude > 0.0 else _LOWEST
        parts = round(math.ldexp(magnitude, _DEPTH - exponent))
        octave, part = divmod(parts + (exponent - _LOWEST) * _PARTS, _PARTS)
        return cls(value < 0.0 and octave + part > 0, octave, part)

    @property
    def value(self) -> float:
        """The time as a number."""
        start = _length(self.octave) if self.octave > 0 else 0.0
        magnitude = start + _length(self.octave) * (self.part / _PARTS)
        return -magnitude if self.negative else magnitude

    def since_octave(self) -> Iterator[_Draw]:
        """The draws of R, the increment between the octave's start and the time."""
        if self.part == 0:
            return
        step, length = _octave_step(self.negative, self.octave), _length(self.octave)
        yield step, math.sqrt(length) * (self.part / _PARTS)
        for depth in range(_DEPTH):
            place = (self.part << depth) % _PARTS / _PARTS
            if place == 0.0:
                return  # the time is where this interval starts
            node = 2**depth + (self.part >> (_DEPTH - depth))
            yield step + node, 0.5 * math.sqrt(length * 0.5**depth) * (1.0 - abs(2.0 * place - 1.0))


def _length(octave: int) -> float:
    return math.ldexp(1.0, _LOWEST + max(octave - 1, 0))


def _octave_step(negative: bool, octave: int) -> int:
    """The step of an octave's own draw; the 2²³ − 1 after it are those of its bridge."""
    return negative << 31 | octave << 24


def _octaves_between(start: Time, end: Time) -> Iterator[_Draw]:
    """The draws of the increment between the starts of two times' octaves."""
    common = min(start.octave, end.octave) if start.negative == end.negative else 0
    for time, sign in ((start, -1.0), (end, 1.0)):
        for octave in range(common, time.octave):
            yield _octave_step(time.negative, octave), sign * math.sqrt(_length(octave))


class BrownianPath:
    """Draw normalized increments of a Brownian path, each sample's from a seed of its own.

    An instance is called as diffusers' `BrownianTreeNoiseSampler` is.  A sample's increment is the same bits alone and
    at any place of any batch, whatever was asked before, and for any range and number of noise levels.  The numbers of
    ``fastdiff.randn(..., purpose=Purpose.PATH)`` are multiplied and added up one after another, so the bits are the
    same on every device.

    A new time costs at most 24 draws.  The sums of the last interval's two times are kept, since a loop asks next for
    an interval that begins with one of them.

    Args:
        shape: of the samples, ``[B, ...]``.
        seeds: one for each sample, as in `fastdiff.randn`.
        device: of the noise; the seeds' own where they are a tensor, else the CPU.
        dtype: of the noise.  Sums are float32, or float64 for float64, and rounded once.
        transform: a monotonic function from a noise level, a tensor ``[]``, to a time; None for the level itself.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seeds: int | Sequence[int] | Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        transform: Callable[[Tensor], Tensor | float] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        randn(self.shape[:1] and (*self.shape[:1], 0), seeds, device=device, dtype=dtype)  # checks the arguments
        if device is None:
            device = seeds.device if isinstance(seeds, Tensor) else "cpu"
        self.seeds = as_seeds(seeds, self.shape[0], device)
        self.dtype, self.transform = dtype, transform
        self._sum_dtype = torch.promote_types(dtype, torch.float32)
        #: R at the last interval's two times. Replaced, never changed: threads may share a path.
        self._kept: dict[Time, Tensor] = {}

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Return (W(t1) − W(t0)) / √|t1 − t0|, negated where `transform` decreases, as diffusers' sampler does.

        Args:
            sigma, sigma_next: noise levels.  The increment between two levels of one time is zero.

        Returns:
            ``[B, ...]``.

        Raises:
            ValueError: a time is NaN or beyond ±2¹⁰⁶.
        """
        before, after = sorted((self._time(sigma), self._time(sigma_next)), key=lambda time: time.value)
        noise = self._increment(before, after)
        if before != after:
            sign = -1.0 if float(sigma) > float(sigma_next) else 1.0
            noise *= sign / math.sqrt(after.value - before.value)
        return noise.to(self.dtype)

    def increment(self, start: float, end: float) -> Tensor:
        """Return W(end) − W(start), ``[B, ...]``, in float32, or in float64 where the noise is float64.

        Args:
            start, end: times, in any order.
        """
        return self._increment(Time.of(start), Time.of(end))

    def _time(self, sigma: float | Tensor) -> Time:
        return Time.of(float(sigma if self.transform is None else self.transform(torch.as_tensor(sigma))))

    def _increment(self, start: Time, end: Time) -> Tensor:
        rests = {time: self._rest(time) for time in (start, end)}
        self._kept = rests
        return self._add(rests[end] - rests[start], _octaves_between(start, end))

    def _rest(self, time: Time) -> Tensor:
        kept = self._kept.get(time)
        if kept is not None:
            return kept
        return self._add(torch.zeros(self.shape, dtype=self._sum_dtype, device=self.seeds.device), time.since_octave())

    def _add(self, total: Tensor, draws: Iterable[_Draw]) -> Tensor:
        for step, weight in draws:
            drawn = randn(self.shape, self.seeds, step, Purpose.PATH, dtype=self._sum_dtype)
            # Product and sum are rounded each: whether torch's add_(alpha=) fuses them depends on an element's place.
            total += drawn.mul_(weight)
        return total
