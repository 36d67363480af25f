# SPDX-License-Identifier: MIT
"""Brownian noise sampler in which each sample's path is a function of its seed.

SDE solvers take the noise of an interval of noise levels: the increment of a Brownian path W.  Here each sample's path
is a function of its 64-bit seed alone, with a value at every float32 time, independent of the schedule.

The time axis is divided like the float32 numbers: octaves [2ᵉ, 2ᵉ⁺¹) of 2²³ equal parts each, and a range [0, 2⁻²⁰)
below them with as many parts.  The increment over an octave of length h is √h·Z, with one Z per octave.  Within an
octave, each interval that is halved draws a Z for its midpoint (Lévy's construction of the Brownian bridge; the basis
functions are Schauder's).  With x the relative position of t in its octave, 0 ≤ x < 1, and x_d the fractional part of
2ᵈ·x,

    W(t) = Σ √h·Z over the octaves below + R(t),    R(t) = √h·x·Z + Σ_{d < 23} ½·√(h·2⁻ᵈ)·(1 − |2·x_d − 1|)·Z_d

R(t) is a sum of at most 24 draws.  It does not depend on earlier calls, and neither does an increment.  Negative times
have a path of their own, which also starts at W(0) = 0.
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

#: log2 of the number of parts of an octave (the mantissa bits of float32), and that number.
_DEPTH = 23
_PARTS = 1 << _DEPTH
#: log2 of the start of the first octave, and of the end of the time range: the counter has room for 127 octaves.
_LOWEST = -20
_END = 106

#: The `step` argument of a draw of `fastdiff.randn`, and the weight of the draw in a sum.
_Draw = tuple[int, float]


class Time(NamedTuple):
    """A time rounded to 24 significant bits, or to a multiple of 2⁻⁴³ below 2⁻²⁰.

    Attributes:
        negative: whether the time is below zero.
        octave: 0 for [0, 2⁻²⁰), n for [2ⁿ⁻²¹, 2ⁿ⁻²⁰).
        part: the number of whole parts between the octave's start and the time.
    """

    negative: bool
    octave: int
    part: int

    @classmethod
    def from_float(cls, value: float) -> Time:
        """Round a number to a time.

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
        """Return the time as a number."""
        start = _length(self.octave) if self.octave > 0 else 0.0
        magnitude = start + _length(self.octave) * (self.part / _PARTS)
        return -magnitude if self.negative else magnitude

    def draws_since_octave_start(self) -> Iterator[_Draw]:
        """Yield the draws of R, the increment between the octave's start and the time."""
        if self.part == 0:
            return
        step, length = _octave_step(self.negative, self.octave), _length(self.octave)
        yield step, math.sqrt(length) * (self.part / _PARTS)
        for depth in range(_DEPTH):
            position = (self.part << depth) % _PARTS / _PARTS
            if position == 0.0:
                return  # the time is the start of this interval
            node = 2**depth + (self.part >> (_DEPTH - depth))
            yield step + node, 0.5 * math.sqrt(length * 0.5**depth) * (1.0 - abs(2.0 * position - 1.0))


def _length(octave: int) -> float:
    return math.ldexp(1.0, _LOWEST + max(octave - 1, 0))


def _octave_step(negative: bool, octave: int) -> int:
    """Return the step of the draw for a whole octave; the 2²³ − 1 steps after it belong to the octave's bridge."""
    return negative << 31 | octave << 24


def _draws_between_octave_starts(start: Time, end: Time) -> Iterator[_Draw]:
    """Yield the draws of the increment between the starts of two times' octaves."""
    common = min(start.octave, end.octave) if start.negative == end.negative else 0
    for time, sign in ((start, -1.0), (end, 1.0)):
        for octave in range(common, time.octave):
            yield _octave_step(time.negative, octave), sign * math.sqrt(_length(octave))


class BrownianPath:
    """Draw normalized increments of a Brownian path, each sample's from its own seed.

    An instance has the call signature of diffusers' `BrownianTreeNoiseSampler`.  A sample's increment has the same bits
    at any position of any batch, after any earlier calls, and for any range and number of noise levels.  The numbers of
    ``fastdiff.randn(..., purpose=Purpose.PATH)`` are multiplied and added one after another, so the bits are the same
    on every device.

    A new time costs at most 24 draws.  The sums for both times of the last interval are cached, since a loop usually
    asks next for an interval that begins at one of them.

    Args:
        shape: shape of the samples, ``[B, ...]``.
        seeds: one seed per sample, see `fastdiff.randn`.
        device: device of the noise; by default that of a seeds tensor, else the CPU.
        dtype: dtype of the noise.  Sums are float32 (float64 for float64) and are rounded once.
        transform: monotonic function from a noise level, a tensor ``[]``, to a time; None for the identity.

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
        #: R at both times of the last interval. The dict is replaced, never mutated: threads may share a path.
        self._cached: dict[Time, Tensor] = {}

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Return (W(t1) − W(t0)) / √|t1 − t0|, with the sign of diffusers' sampler: negated if `transform` decreases.

        Args:
            sigma, sigma_next: noise levels.  The increment is zero if both have the same time.

        Returns:
            Noise, ``[B, ...]``.

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
        """Return W(end) − W(start), ``[B, ...]``, in float32, or in float64 if the noise is float64.

        Args:
            start, end: times, in any order.
        """
        return self._increment(Time.from_float(start), Time.from_float(end))

    def _time(self, sigma: float | Tensor) -> Time:
        return Time.from_float(float(sigma if self.transform is None else self.transform(torch.as_tensor(sigma))))

    def _increment(self, start: Time, end: Time) -> Tensor:
        within = {time: self._since_octave_start(time) for time in (start, end)}
        self._cached = within
        return self._add_draws(within[end] - within[start], _draws_between_octave_starts(start, end))

    def _since_octave_start(self, time: Time) -> Tensor:
        """Return R(time), from the cache if it is there."""
        cached = self._cached.get(time)
        if cached is not None:
            return cached
        zeros = torch.zeros(self.shape, dtype=self._sum_dtype, device=self.seeds.device)
        return self._add_draws(zeros, time.draws_since_octave_start())

    def _add_draws(self, total: Tensor, draws: Iterable[_Draw]) -> Tensor:
        for step, weight in draws:
            drawn = randn(self.shape, self.seeds, step, Purpose.PATH, dtype=self._sum_dtype)
            # Round the product and the sum separately: torch's add_(alpha=) fuses them for some element positions only.
            total += drawn.mul_(weight)
        return total
