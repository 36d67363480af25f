# SPDX-License-Identifier: MIT
"""Normal numbers from a counter: Philox4x32-10 and Box–Muller, for the step kernel and on their own.

The operations and their order are those of csrc/philox.h, each product that feeds a sum fused with it, so that compiled
for any GPU that rounds conversions and square roots correctly the numbers have the same bits as on the CPU.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from .config import config_for
from .launch import Launcher, blocks_of

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_KEY_STEP_0 = tl.constexpr(0x9E3779B9)
_KEY_STEP_1 = tl.constexpr(0xBB67AE85)
_ROOT_HALF = tl.constexpr(0x3F3504F3)  # √½ as bits
_ONE = tl.constexpr(0x3F800000)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four words that Philox4x32-10 makes of a counter, all uint32."""
    for _ in tl.static_range(10):
        high_a = tl.umulhi(c0, tl.full(c0.shape, _MULTIPLIER_0, tl.uint32))
        low_a = c0 * tl.full(c0.shape, _MULTIPLIER_0, tl.uint32)
        high_b = tl.umulhi(c2, tl.full(c2.shape, _MULTIPLIER_1, tl.uint32))
        low_b = c2 * tl.full(c2.shape, _MULTIPLIER_1, tl.uint32)
        c0 = high_b ^ c1 ^ k0
        c1 = low_b
        c2 = high_a ^ c3 ^ k1
        c3 = low_a
        k0 = k0 + tl.full(k0.shape, _KEY_STEP_0, tl.uint32)
        k1 = k1 + tl.full(k1.shape, _KEY_STEP_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _fma(a, b, c):
    """a·b + c, rounded once; b and c may be numbers, which become float32 here and never double."""
    return tl.fma(a, tl.zeros_like(a) + b, tl.zeros_like(a) + c)


@triton.jit
def _log_of_uniform(word):
    """ln u for u = (word + 1/2)·2⁻³²; see csrc/philox.h."""
    u = _fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    shifted = u.to(tl.uint32, bitcast=True) + (_ONE - _ROOT_HALF)
    k = (shifted >> 23).to(tl.int32) - 127
    mantissa = ((shifted & 0x007FFFFF) + _ROOT_HALF).to(tl.float32, bitcast=True)
    near_one = -_fma((word ^ 0xFFFFFFFF).to(tl.float32), 2.0**-32, 2.0**-33)
    f = tl.where(k == 0, near_one, mantissa - 1.0)
    q = tl.zeros_like(f) + 0.08700359612703
    q = _fma(q, f, -0.14267475903034)
    q = _fma(q, f, 0.14914786815643)
    q = _fma(q, f, -0.16577586531639)
    q = _fma(q, f, 0.19963061809540)
    q = _fma(q, f, -0.25001338124275)
    q = _fma(q, f, 0.33333909511566)
    square = f * f
    n = k.to(tl.float32)
    tail = _fma(square * f, q, -0.5 * square)
    tail = _fma(n, 9.058001e-6, tail)
    return _fma(n, 0.6931381225585938, tail + f)


@triton.jit
def box_muller(radius, angle):
    """r·cos θ and r·sin θ with r = √(−2 ln u) of one word and θ of another; see csrc/philox.h."""
    r = tl.sqrt_rn(-2.0 * _log_of_uniform(radius))
    y = _fma((angle & 0xFFFFFFF8).to(tl.float32), 2.0**-34, 2.0**-32)
    y2 = y * y
    sine = tl.zeros_like(y) + -0.5890122056
    sine = _fma(sine, y2, 2.5497610569)
    sine = _fma(sine, y2, -5.1677079201)
    sine = _fma(sine, y2, 3.1415927410)
    sine = sine * y
    cosine = tl.zeros_like(y) + -1.3067060709
    cosine = _fma(cosine, y2, 4.0576515198)
    cosine = _fma(cosine, y2, -4.9347906113)
    cosine = _fma(cosine, y2, 1.0)
    swap = (angle & 1) != 0
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    # Signs by exclusive or: bit 1 turns the sine's, bit 2 the cosine's.
    signed_s = (s.to(tl.uint32, bitcast=True) ^ ((angle & 2) << 30)).to(tl.float32, bitcast=True)
    signed_c = (c.to(tl.uint32, bitcast=True) ^ ((angle & 4) << 29)).to(tl.float32, bitcast=True)
    return r * signed_c, r * signed_s


@triton.jit
def words_at(chunk, seed, step, purpose):
    """The words of int64 chunks; `seed` is int64, read as 64 bits, `step` and `purpose` are uint32."""
    zero = tl.zeros_like(chunk).to(tl.uint32)
    return philox(
        chunk.to(tl.uint32),
        (chunk >> 32).to(tl.uint32),
        zero + step,
        zero + purpose,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def normals(first, seed, step, purpose, SIZE: tl.constexpr):
    """The numbers of SIZE elements in row-major order from `first`, a multiple of 4, on: each chunk is made once."""
    chunk = first // 4 + tl.arange(0, SIZE // 4).to(tl.int64)
    w0, w1, w2, w3 = words_at(chunk, seed, step, purpose)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normals_at(place, seed, step, purpose):
    """The numbers at any places of a sample, int64: an element a chunk, of which one transform is made."""
    w0, w1, w2, w3 = words_at(place >> 2, seed, step, purpose)
    second = (place & 2) != 0
    even, odd = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((place & 1) != 0, odd, even)


# Only the type of scalars may matter to the compiler: another step or another number of elements is the same kernel.
@triton.jit(do_not_specialize=["step", "purpose"])
def _randn_kernel(
    out_ptr,  # [batch, inner], contiguous
    seeds_ptr,
    steps_ptr,
    step,
    purpose,
    inner,
    blocks_per_sample,
    STEPS: tl.constexpr,  # 0: `step`; 1: one in memory for all; 2: one a sample
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks_per_sample
    first = (program % blocks_per_sample) * BLOCK
    z = normals(first, tl.load(seeds_ptr + b), step_of(steps_ptr, b, step, STEPS), purpose.to(tl.uint32), BLOCK)
    offsets = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + b * inner + offsets, z.to(out_ptr.dtype.element_ty), mask=offsets < inner)


@triton.jit
def step_of(steps_ptr, b, step, STEPS: tl.constexpr):
    """A sample's step, uint32."""
    if STEPS == 2:
        result = tl.load(steps_ptr + b).to(tl.uint32)
    elif STEPS == 1:
        result = tl.load(steps_ptr).to(tl.uint32)
    else:
        result = step.to(tl.uint32)
    return result


_randn = Launcher(_randn_kernel)


def randn(out: Tensor, seeds: Tensor, steps: Tensor | None, step: int, purpose: int) -> None:
    """Fill a contiguous tensor ``[batch, ...]``, from a seed a sample, on the current stream of its device."""
    batch = seeds.numel()
    inner = out.numel() // batch
    config = config_for("randn", out)
    blocks_per_sample = blocks_of(inner, config.block)
    _randn(
        batch * blocks_per_sample,
        (out, seeds, seeds if steps is None else steps),
        (as_int32(step), as_int32(purpose), inner, blocks_per_sample),
        (how_many(steps), config.block),
        config.num_warps,
    )


def how_many(counters: Tensor | int | None) -> int:
    """Return where a kernel reads a sample's number: 0, an argument; 1, memory, for all; 2, memory, one a sample."""
    if not isinstance(counters, Tensor):
        return 0
    return 1 if counters.numel() == 1 else 2


def as_int32(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: from 2³¹ on an argument would be int64, and another kernel."""
    return word - 2**32 if word >= 2**31 else word
