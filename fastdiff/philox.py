# SPDX-License-Identifier: MIT
"""Counter-based normal random numbers in plain torch: the specification for csrc/philox.h and Triton.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the Box–Muller transform.
The key is the sample's seed; the counter is ``(chunk_lo, chunk_hi, step, purpose)``, where a chunk is four consecutive
elements of the sample in row-major order.  A sample's noise depends only on its seed, the step and the purpose, not on
the batch, the device, the number of threads or the memory format.

All operations are integer operations, correctly rounded conversions and square roots, and fused multiply-adds, so that
every backend gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from .device_copy import to_device
from .errors import checked_integer, checked_type, error_message, shown

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

_LOG = (0.08700359612703, -0.14267475903034, 0.14914786815643, -0.16577586531639, 0.19963061809540,
        -0.25001338124275, 0.33333909511566)  # fmt: skip
_LN2 = (0.6931381225585938, 9.058001e-6)
_SINE = (-0.5890122056, 2.5497610569, -5.1677079201, 3.1415927410)
_COSINE = (-1.3067060709, 4.0576515198, -4.9347906113, 1.0)
_ROOT_HALF = 0x3F3504F3
_ONE = 0x3F800000


class Purpose(IntEnum):
    """The last word of the counter, which keeps different uses of noise at one step from sharing numbers.

    Values up to 2¹⁶ − 1 that are not named here are free for the caller's own noise.  The high half of the word counts
    the draws of one purpose at one step: see `purpose_of_draw`.

    Attributes:
        LATENTS: the initial sample.
        STEP: the noise that a step adds.
        PATH: the numbers that a `fastdiff.noise.BrownianPath` adds up; their `step` word encodes an interval of time.
        FORWARD: the noise of the forward process in training.
        TIMESTEP: the draw of a training timestep.
        CONDITION_DROPOUT: the draw that replaces a condition by the null condition in training.
        JITTER: the draws of an augmented training image.
    """

    LATENTS = 0
    STEP = 1
    PATH = 2
    FORWARD = 3
    TIMESTEP = 4
    CONDITION_DROPOUT = 5
    JITTER = 6


def purpose_of_draw(draw: int, purpose: int = Purpose.STEP) -> int:
    """Return the last word of the counter for a draw of a step that draws several times.

    Args:
        draw: 0 to 2¹⁶ − 1, the number of the step's earlier draws; for the first draw the word is `purpose` itself.
        purpose: 0 to 2¹⁶ − 1, see `Purpose`.

    Raises:
        ValueError: out of range.
    """
    for name, value in (("draw", draw), ("purpose", purpose)):
        if not 0 <= value < 2**16:
            raise ValueError(error_message("purpose_of_draw", name, f"is {value}", "0 to 65535", "stay in that range"))
    return draw << 16 | purpose


def philox_words(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox4x32-10 for a counter.

    Args:
        counter: four words that broadcast together: int64 tensors of numbers below 2³², or ints.
        key: two words of the same kinds.
    """
    given = [word for word in (*counter, *key) if isinstance(word, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    k0, k1 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in key)
    for round_ in range(_ROUNDS):
        # int64 products wrap around 2⁶⁴; shifted down and masked, both halves are those of the unsigned product.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        step0, step1 = (round_ * step & _MASK for step in _KEY_STEPS)
        c0, c1, c2, c3 = (
            ((b >> 32) & _MASK) ^ c1 ^ ((k0 + step0) & _MASK),
            b & _MASK,
            ((a >> 32) & _MASK) ^ c3 ^ ((k1 + step1) & _MASK),
            a & _MASK,
        )
    return c0, c1, c2, c3


def normals(seeds: Tensor, step: int | Tensor, purpose: int, size: int, first: Tensor | None = None) -> Tensor:
    """Return standard normal numbers, ``[B, size]`` float32.

    Args:
        seeds: ``[B]`` int64, read as 64 bits.
        step: one number for all samples, or ``[B]`` int64.
        purpose: see `Purpose`.
        size: numbers per sample.
        first: ``[B]`` int64, the place of each sample's first number; None for 0.
    """
    if first is not None:
        # Whole chunks from the one before, and each sample's own numbers of them.
        places = (first % 4)[:, None] + torch.arange(size, dtype=torch.int64, device=seeds.device)
        return _normals(seeds, step, purpose, size + 3, (first // 4)[:, None]).gather(1, places)
    return _normals(seeds, step, purpose, size, 0)


def _normals(seeds: Tensor, step: int | Tensor, purpose: int, size: int, chunk: Tensor | int) -> Tensor:
    """Return numbers from a chunk on."""
    chunk = torch.arange((size + 3) // 4, dtype=torch.int64, device=seeds.device) + chunk
    key = (seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK)
    steps = step.reshape(-1, 1) & _MASK if isinstance(step, Tensor) else torch.full_like(seeds[:1, None], step)
    words = philox_words((chunk & _MASK, chunk >> 32, steps, torch.full_like(steps, purpose)), key)
    pairs = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(pairs, dim=-1).flatten(1)[:, :size]


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return r·cos θ and r·sin θ: r = √(−2 ln u) from one word, θ from another, whose low three bits are the octant."""
    # Computed in float64 and rounded: torch's float32 square root is not always correctly rounded.
    r = torch.sqrt((-2.0 * _log_of_uniform(radius)).double()).to(torch.float32)
    y = _fma((angle & ~7).to(torch.float32), 2.0**-34, 2.0**-32)
    y2 = y * y
    sine, cosine = _polynomial(_SINE, y2) * y, _polynomial(_COSINE, y2)
    swap = (angle & 1) != 0
    c, s = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return r * torch.where((angle & 4) != 0, -c, c), r * torch.where((angle & 2) != 0, -s, s)


def _log_of_uniform(word: Tensor) -> Tensor:
    """Return ln u for u = (word + 1/2)·2⁻³²."""
    u = _fma(word.to(torch.float32), 2.0**-32, 2.0**-33)
    shifted = u.view(torch.int32).to(torch.int64) + (_ONE - _ROOT_HALF)
    n = (shifted >> 23) - 127
    mantissa = ((shifted & 0x7FFFFF) + _ROOT_HALF).to(torch.int32).view(torch.float32)
    # Near 1 compute u − 1 from the bits of ~word, which has the digits that rounding removes from u.
    near_one = -_fma((word ^ _MASK).to(torch.float32), 2.0**-32, 2.0**-33)
    f = torch.where(n == 0, near_one, mantissa - 1.0)
    exponent = n.to(torch.float32)
    square = f * f
    tail = _fma(square * f, _polynomial(_LOG, f), -0.5 * square)
    tail = _fma(exponent, _LN2[1], tail)
    return _fma(exponent, _LN2[0], tail + f)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Evaluate a polynomial by Horner's rule, highest power first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return a·b + c in float32, rounded once.

    The product is exact in float64.  The sum is rounded to odd there (towards the neighbour whose last bit is set,
    unless exact): with 53 ≥ 2·24 + 2 bits, rounding that to float32 equals a single rounding.
    """
    product = a.double() * _single(b, a).double()
    addend = _single(c, a).double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    away = ((error > 0) == (total > 0)).to(torch.int64) * 2 - 1
    bits = torch.where((error != 0) & ((bits & 1) == 0), bits + away, bits)
    return bits.view(torch.float64).to(torch.float32)


def _single(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like, value)


def as_seeds(seeds: int | Sequence[int] | Tensor, batch: int, device: torch.device | str) -> Tensor:
    """Return seeds as the tensor that a backend takes, ``[batch]`` int64 on `device`.

    Args:
        seeds: one number from 0 to 2⁶⁴ − 1 per sample, a single number for a batch of one, or an int64 tensor
            ``[batch]``, whose bits are read as such numbers.

    Raises:
        TypeError: the seeds have another type.
        ValueError: the number of seeds is not the number of samples, or a seed is out of range.
    """
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64:
            raise TypeError(
                error_message("randn", "seeds", f"has dtype {seeds.dtype}", "int64", "make it with torch.tensor([...])")
            )
        if list(seeds.shape) != [batch]:
            raise ValueError(
                error_message(
                    "randn", "seeds", f"has shape {list(seeds.shape)}", f"[{batch}]", "give one seed a sample"
                )
            )
        return to_device(seeds, device).contiguous().resolve_neg()
    if not isinstance(seeds, int):
        checked_type("randn", "seeds", seeds, Iterable, "ints or an int64 tensor", "pass one whole number a sample")
    listed = [seeds] if isinstance(seeds, int) else list(seeds)
    for seed in listed:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(
                error_message("randn", "seeds", f"holds a {type(seed).__name__}", "ints", "pass whole numbers")
            )
        if not 0 <= seed < 2**64:
            raise ValueError(
                error_message("randn", "seeds", f"holds {shown(seed)}", "0 to 2**64 - 1", "take it modulo 2**64")
            )
    if len(listed) != batch:
        raise ValueError(
            error_message(
                "randn",
                "seeds",
                f"holds {len(listed)}",
                f"one for each of {batch} samples",
                "give one seed a sample, such as fastdiff.spawn_seeds(seed, batch)",
            )
        )
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in listed]
    return to_device(torch.tensor(signed, dtype=torch.int64, device="cpu"), device)


def spawn_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """Return seeds for `count` samples of one request: ``seed`` in the low 32 bits, the sample's index above it.

    Args:
        seed: 0 to 2³² − 1.  Requests with different seeds share no sample's noise.
        count: 0 to 2³².
        first: index of the first sample, 0 to 2³² − count.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """
    checked_integer("spawn_seeds", "count", count, 0)
    for name, value, end in (("seed", seed, 2**32), ("count", count, 2**32 + 1), ("first", first, 2**32 - count + 1)):
        if not checked_integer("spawn_seeds", name, value, 0) < end:
            got = f"is {shown(value)}"
            raise ValueError(error_message("spawn_seeds", name, got, f"0 to {end - 1}", "stay in that range"))
    return [i << 32 | seed for i in range(first, first + count)]
