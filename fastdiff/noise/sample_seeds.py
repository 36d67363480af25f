# SPDX-License-Identifier: MIT
"""Seeds of training samples: noise that belongs to a run's seed, a sample's id and an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import checked_integer, checked_type, error_message, shown

_BITS = 2**64
#: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the increment, and
#: the shifts and multipliers of its output function.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))


def sample_seeds(seed: int, sample_ids: Tensor | Sequence[int], epoch: int = 0) -> Tensor:
    """Return one seed a sample, a hash of (seed, sample id, epoch), for ``seeds=`` of `fastdiff.ops`.

    A sample then has the same noise in whichever batch, at whichever place, on whichever rank, and in a resumed run,
    and other noise in the next epoch.  For one seed and epoch the hash is a bijection of 64 bits: different ids have
    different seeds.

    Args:
        seed: of the run, 0 to 2⁶⁴ − 1.
        sample_ids: ``[B]``, an integer tensor on any device or ints of 64 bits, with a sign or without, such as places
            in the data set.
        epoch: 0 to 2⁶⁴ − 1; any number of passes over the data.

    Returns:
        int64 ``[B]`` on the ids' device, without a host sync.

    Raises:
        TypeError: an argument is no integer.
        ValueError: out of range, or the ids are not ``[B]``.
    """
    seed, epoch = _checked_word("seed", seed), _checked_word("epoch", epoch)
    if not isinstance(sample_ids, Tensor):
        checked_type("sample_seeds", "sample_ids", sample_ids, Sequence, "ints or a tensor", "pass one id a sample")
        sample_ids = _as_tensor(sample_ids)
    if sample_ids.is_floating_point() or sample_ids.is_complex() or sample_ids.dtype == torch.bool:
        got = f"has dtype {sample_ids.dtype}"
        raise TypeError(error_message("sample_seeds", "sample_ids", got, "int64", "pass whole numbers"))
    if sample_ids.dim() != 1:
        got = f"has shape {list(sample_ids.shape)}"
        raise ValueError(error_message("sample_seeds", "sample_ids", got, "[B]", "give one id a sample"))
    start = _mixed_int(_mixed_int(seed + _INCREMENT) + epoch * _INCREMENT + 1)
    return _mixed(sample_ids.to(torch.int64) + _signed(start))


def _checked_word(name: str, value: int) -> int:
    number = checked_integer("sample_seeds", name, value, 0)
    if number >= _BITS:
        got = f"is {shown(number)}"
        raise ValueError(error_message("sample_seeds", name, got, "0 to 2**64 - 1", "take it modulo 2**64"))
    return number


def _as_tensor(sample_ids: Sequence[int]) -> Tensor:
    """Return ids as int64 ``[B]`` of the same 64 bits."""
    numbers = []
    for sample_id in sample_ids:
        if isinstance(sample_id, bool) or not hasattr(sample_id, "__index__"):
            got = f"holds a {type(sample_id).__name__}"
            raise TypeError(error_message("sample_seeds", "sample_ids", got, "ints", "pass whole numbers"))
        number = sample_id.__index__()
        if not -(_BITS // 2) <= number < _BITS:
            got, expected = f"holds {shown(number)}", "-2**63 to 2**64 - 1"
            raise ValueError(error_message("sample_seeds", "sample_ids", got, expected, "take it modulo 2**64"))
        numbers.append(_signed(number))
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _signed(value: int) -> int:
    value %= _BITS
    return value - _BITS if value >= _BITS // 2 else value


def _mixed_int(value: int) -> int:
    """Return SplitMix64's output function of a number modulo 2⁶⁴."""
    value %= _BITS
    for shift, multiplier in _ROUNDS:
        value ^= value >> shift
        value = value if multiplier is None else value * multiplier % _BITS
    return value


def _mixed(values: Tensor) -> Tensor:
    """Return the same function of int64 numbers, whose products wrap around 2⁶⁴."""
    for shift, multiplier in _ROUNDS:
        # An arithmetic shift, without the copies of the sign.
        values = values ^ ((values >> shift) & (2 ** (64 - shift) - 1))
        values = values if multiplier is None else values * _signed(multiplier)
    return values
