# SPDX-License-Identifier: MIT
"""The quantile in Triton: selection by the bits, eleven at a time.

A key is an integer in the order of the numbers: their bits, those of negative numbers but the sign inverted.  A pass
counts the values of the next bits among the keys that agree in those before; the next finds the one that the rank
falls on.  When all bits are known, one more pass finds the smallest key above.  No order of programs matters: counts
are integers, and so is a minimum.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .config import FEW_WARPS, config_for
from .launch import Launcher, blocks_of
from .reduce import float_bits

DIGIT_BITS = 11

_DIGITS = tl.constexpr(2048)
_LARGEST = tl.constexpr(2**63 - 1)
#: The numbers of a sample's state: the bits known so far, the rank among the keys that have them, whether there is a
#: NaN, and the next key.
_STATE = tl.constexpr(4)

#: Per dtype: its integers, and the bits of infinity.
_INTEGERS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


@triton.jit
def _magnitude(bits, WIDTH: tl.constexpr):
    return bits & ((1 << (WIDTH - 1)) - 1)


@triton.jit
def _key(bits, ABSOLUTE: tl.constexpr, WIDTH: tl.constexpr):
    """The order-preserving integer of a number's bits, which come sign-extended; its own inverse."""
    magnitude = _magnitude(bits, WIDTH)
    if ABSOLUTE:  # noqa: SIM108 (Triton compiles only the branch taken)
        key = magnitude
    else:
        key = tl.where(bits < 0, bits ^ ((1 << (WIDTH - 1)) - 1), bits)
    return key


@triton.jit
def _count_kernel(
    bits_ptr,  # [batch, inner], integers
    counts_ptr,  # [batch, 2048], int64, zero
    state_ptr,  # [batch, 4], int64
    inner,
    programs_per_sample,
    FIRST: tl.constexpr,  # whether no bits are known yet
    KNOWN: tl.constexpr,  # the shift of the bits that are known
    SHIFT: tl.constexpr,  # and of those to count
    INFINITY: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // programs_per_sample
    start = (program % programs_per_sample) * (TILE * TILES)
    state = state_ptr + b * _STATE
    known = tl.load(state)
    nan = tl.zeros((TILE,), tl.int64)
    counts = tl.zeros((2 * _DIGITS,), tl.int32)
    for tile in range(TILES):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        mask = offsets < inner
        bits = tl.load(bits_ptr + b * inner + offsets, mask=mask, other=0).to(tl.int64)
        key = _key(bits, ABSOLUTE, WIDTH)
        if FIRST:
            nan |= (_magnitude(bits, WIDTH) > INFINITY).to(tl.int64)
            digit = (key >> SHIFT) + _DIGITS // 2
        else:
            mask = mask & ((key >> KNOWN) == known)
            digit = (key >> SHIFT) & ((1 << (KNOWN - SHIFT)) - 1)
        # Elements that are not counted go into the upper half of the bins.
        counts += tl.histogram(tl.where(mask, digit, _DIGITS).to(tl.int32), 2 * _DIGITS)
    bins = tl.arange(0, 2 * _DIGITS)
    tl.atomic_add(counts_ptr + b * _DIGITS + bins, counts.to(tl.int64), mask=(bins < _DIGITS) & (counts > 0))
    if FIRST:
        tl.atomic_max(state + 2, tl.max(nan, axis=0))


@triton.jit
def _pick_kernel(counts_ptr, state_ptr, FIRST: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr):
    """Find the digit that the rank falls on; leave the counts zero for the next pass."""
    b = tl.program_id(0).to(tl.int64)
    state = state_ptr + b * _STATE
    bins = tl.arange(0, _DIGITS)
    counts = tl.load(counts_ptr + b * _DIGITS + bins)
    rank = tl.load(state + 1)
    digit = tl.sum((tl.cumsum(counts, axis=0) <= rank).to(tl.int64), axis=0)
    rank -= tl.sum(tl.where(bins < digit, counts, 0), axis=0)
    if FIRST:  # noqa: SIM108 (Triton compiles only the branch taken)
        known = digit - _DIGITS // 2
    else:
        known = (tl.load(state) << BITS) | digit
    tl.store(state, known)
    tl.store(state + 1, rank)
    if LAST:
        # Where more elements are equal to this one, the next is one of them.
        more = tl.sum(tl.where(bins == digit, counts, 0), axis=0) > rank + 1
        tl.store(state + 3, tl.where(more, known, _LARGEST))
    tl.store(counts_ptr + b * _DIGITS + bins, tl.zeros((_DIGITS,), tl.int64))


@triton.jit
def _next_kernel(
    bits_ptr,
    state_ptr,
    inner,
    programs_per_sample,
    ABSOLUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The smallest key above the one at the rank."""
    program = tl.program_id(0).to(tl.int64)
    b = program // programs_per_sample
    start = (program % programs_per_sample) * (TILE * TILES)
    state = state_ptr + b * _STATE
    known = tl.load(state)
    least = tl.full((TILE,), _LARGEST, tl.int64)
    for tile in range(TILES):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        mask = offsets < inner
        key = _key(tl.load(bits_ptr + b * inner + offsets, mask=mask, other=0).to(tl.int64), ABSOLUTE, WIDTH)
        least = tl.minimum(least, tl.where(mask & (key > known), key, _LARGEST))
    tl.atomic_min(state + 3, tl.min(least, axis=0))


@triton.jit
def _number(key, ABSOLUTE: tl.constexpr, WIDTH: tl.constexpr, BFLOAT: tl.constexpr):
    bits = _key(key, ABSOLUTE, WIDTH)
    if WIDTH == 64:
        value = bits.to(tl.float64, bitcast=True)
    elif WIDTH == 32:
        value = bits.to(tl.int32).to(tl.float32, bitcast=True)
    elif BFLOAT:
        value = (bits << 16).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["weight_bits"])
def _interpolate_kernel(
    state_ptr,
    out_ptr,  # [batch], compute dtype
    weight_bits,  # of a float64
    NEXT: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    BFLOAT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    state = state_ptr + b * _STATE
    low = _number(tl.load(state), ABSOLUTE, WIDTH, BFLOAT)
    if NEXT:  # noqa: SIM108 (Triton compiles only the branch taken)
        high = _number(tl.load(state + 3), ABSOLUTE, WIDTH, BFLOAT)
    else:
        high = low
    weight = tl.zeros_like(low) + weight_bits.to(tl.int64).to(tl.float64, bitcast=True).to(low.dtype)
    apart = high - low
    value = tl.where(weight < 0.5, tl.fma(weight, apart, low), tl.fma(weight - 1.0, apart, high))
    value = tl.where(tl.load(state + 2) != 0, float("nan"), value)
    tl.store(out_ptr + b, value)


def passes(width: int) -> list[tuple[int, int]]:
    """For each pass the shifts of the bits that are known before it and of those that it counts."""
    result, known = [], width
    while known > 0:
        result.append((known, max(known - DIGIT_BITS, 0)))
        known = result[-1][1]
    return result


_count = Launcher(_count_kernel)
_pick = Launcher(_pick_kernel)
_next = Launcher(_next_kernel)
_interpolate = Launcher(_interpolate_kernel)


def quantile(x: torch.Tensor, low: int, weight: float, absolute: bool) -> torch.Tensor:
    """The number of rank `low` of each sample and `weight` of the way to the next; samples are blocks of memory."""
    batch = x.shape[0]
    inner = x.numel() // batch
    integers, infinity = _INTEGERS[x.dtype]
    bits, width = x.view(integers), 8 * x.element_size()
    out = torch.empty(batch, dtype=torch.float64 if width == 64 else torch.float32, device=x.device)
    counts = torch.zeros(batch, _DIGITS.value, dtype=torch.int64, device=x.device)
    state = torch.zeros(batch, _STATE.value, dtype=torch.int64, device=x.device)
    state[:, 1] = low
    config = config_for("select", x)
    programs = blocks_of(inner, config.block * config.tiles)
    sizes, shape = (inner, programs), (absolute, width, config.block, config.tiles)
    for known, shift in passes(width):
        first = known == width
        levels = (first, known, shift, infinity)
        _count(batch * programs, (bits, counts, state), sizes, (*levels, *shape), config.num_warps)
        _pick(batch, (counts, state), (), (first, known - shift, shift == 0), FEW_WARPS)
    if weight > 0:
        _next(batch * programs, (bits, state), sizes, shape, config.num_warps)
    constants = (weight > 0, absolute, width, x.dtype == torch.bfloat16)
    _interpolate(batch, (state, out), (float_bits(weight),), constants, FEW_WARPS)
    return out
