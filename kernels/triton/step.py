# SPDX-License-Identifier: MIT
"""The fused step as one Triton kernel, for every GPU that Triton compiles for.

The arithmetic is that of csrc/step_math.h, in the same order, each product fused with its sum.  Coefficients are
loaded from the table on the device: as kernel arguments they would cost a launch time each, and be baked into graphs.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

import triton
import triton.language as tl

if TYPE_CHECKING:
    from fastdiff.call import StepCall

#: Elements a program, and warps a program: 8 elements a thread, one 16-byte access for half types and two for float32.
BLOCK = 1024
NUM_WARPS = 4

# The layout of a row; fastdiff/table.py holds the same numbers.
_PREDICTION_SAMPLE = tl.constexpr(0)
_PREDICTION_OUTPUT = tl.constexpr(1)
_CLIP = tl.constexpr(2)
_VARIANCE_OFFSET = tl.constexpr(3)
_VARIANCE_SLOPE = tl.constexpr(4)
_PREV_SAMPLE = tl.constexpr(8)
_KEEP_0 = tl.constexpr(16)
_KEEP_1 = tl.constexpr(24)
_ROW_WIDTH = tl.constexpr(32)

_LEARNED_RANGE = tl.constexpr(1)


@triton.jit
def _divide(a, b):
    """a/b, rounded once; Triton's plain float32 division is approximate."""
    if a.dtype == tl.float32:  # noqa: SIM108 (Triton compiles only the branch taken)
        result = tl.div_rn(a, tl.zeros_like(a) + b)
    else:
        result = a / b
    return result


@triton.jit
def _clamp_to(value, bound):
    """Clamp to ±bound by comparisons, which keep NaN."""
    value = tl.where(value > bound, bound, value)
    return tl.where(value < -bound, -bound, value)


@triton.jit
def _exp(x):
    """e^x to a few units in the last place; Triton's float32 exp multiplies by log2(e) first and loses |x| of them."""
    if x.dtype == tl.float32:
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, the first with few enough bits that n times it is exact.
        r = tl.fma(n, tl.full(n.shape, -0.693145751953125, n.dtype), x)
        r = tl.fma(n, tl.full(n.shape, -1.42860682030941723e-6, n.dtype), r)
        result = tl.exp2(n) * tl.exp(r)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def _learned_std(v, row_ptr, VARIANCE: tl.constexpr):
    if VARIANCE == _LEARNED_RANGE:
        slope = tl.load(row_ptr + _VARIANCE_SLOPE)
        std = _exp(tl.fma(tl.zeros_like(v) + slope, v, tl.load(row_ptr + _VARIANCE_OFFSET)))
    elif v.dtype == tl.float32:
        std = tl.sqrt_rn(v)
    else:
        std = tl.sqrt(v)
    return std


@triton.jit
def _add_term(total, weight_ptr, term):
    """total + weight·term, without the term where its weight is 0."""
    weight = tl.load(weight_ptr)
    return tl.where(weight != 0, tl.fma(tl.zeros_like(term) + weight, term, total), total)


@triton.jit
def _weighted_sum(map_ptr, x, m, d, h0, h1, h2, h3, z, HISTORY: tl.constexpr, HAS_NOISE: tl.constexpr):
    """One affine map; `map_ptr` points at its eight weights."""
    total = tl.zeros_like(x)
    total = _add_term(total, map_ptr, x)
    total = _add_term(total, map_ptr + 1, m)
    total = _add_term(total, map_ptr + 2, d)
    if HISTORY & 1:
        total = _add_term(total, map_ptr + 3, h0)
    if HISTORY & 2:
        total = _add_term(total, map_ptr + 4, h1)
    if HISTORY & 4:
        total = _add_term(total, map_ptr + 5, h2)
    if HISTORY & 8:
        total = _add_term(total, map_ptr + 6, h3)
    if HAS_NOISE:
        total = _add_term(total, map_ptr + 7, z)
    return total


@triton.jit(do_not_specialize=["row"])
def _step_kernel(
    sample_ptr,  # [batch, inner], as all tensors of the samples' dtype
    model_output_ptr,
    uncond_ptr,
    variance_ptr,
    noise_ptr,
    history_0_ptr,
    history_1_ptr,
    history_2_ptr,
    history_3_ptr,
    table_ptr,  # [rows, 32], compute dtype
    guidance_ptr,  # [1] or [batch], compute dtype
    threshold_ptr,  # [batch], compute dtype
    prev_sample_ptr,
    keep_0_ptr,
    keep_1_ptr,
    row,
    inner,
    model_stride,  # elements from sample to sample in model_output, uncond and variance
    blocks_a_sample,
    HAS_UNCOND: tl.constexpr,
    GUIDANCE_A_SAMPLE: tl.constexpr,
    HISTORY: tl.constexpr,  # bit j: register j is read
    HAS_NOISE: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    VARIANCE: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks_a_sample
    offsets = (program % blocks_a_sample) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < inner
    here = b * inner + offsets
    there = b * model_stride + offsets
    row_ptr = table_ptr + row.to(tl.int64) * _ROW_WIDTH
    compute = table_ptr.dtype.element_ty

    x = tl.load(sample_ptr + here, mask=mask, other=0.0).to(compute)
    m = tl.load(model_output_ptr + there, mask=mask, other=0.0).to(compute)
    if HAS_UNCOND:
        u = tl.load(uncond_ptr + there, mask=mask, other=0.0).to(compute)
        g = tl.load(guidance_ptr + b) if GUIDANCE_A_SAMPLE else tl.load(guidance_ptr)
        m = tl.fma(tl.zeros_like(m) + g, m - u, u)

    q = tl.load(row_ptr + _PREDICTION_OUTPUT)
    d = tl.fma(tl.zeros_like(m) + q, m, tl.load(row_ptr + _PREDICTION_SAMPLE) * x)
    d = _clamp_to(d, tl.load(row_ptr + _CLIP))
    if HAS_THRESHOLD:
        threshold = tl.load(threshold_ptr + b)
        d = _divide(_clamp_to(d, threshold), threshold)

    h0 = x
    h1 = x
    h2 = x
    h3 = x
    if HISTORY & 1:
        h0 = tl.load(history_0_ptr + here, mask=mask, other=0.0).to(compute)
    if HISTORY & 2:
        h1 = tl.load(history_1_ptr + here, mask=mask, other=0.0).to(compute)
    if HISTORY & 4:
        h2 = tl.load(history_2_ptr + here, mask=mask, other=0.0).to(compute)
    if HISTORY & 8:
        h3 = tl.load(history_3_ptr + here, mask=mask, other=0.0).to(compute)
    z = x
    if HAS_NOISE:
        z = tl.load(noise_ptr + here, mask=mask, other=0.0).to(compute)
        if VARIANCE:
            v = tl.load(variance_ptr + there, mask=mask, other=1.0).to(compute)
            z = z * _learned_std(v, row_ptr, VARIANCE)

    # Outputs may be inputs: everything is loaded above before the first store.
    prev = _weighted_sum(row_ptr + _PREV_SAMPLE, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_NOISE)
    if KEEPS >= 1:
        keep_0 = _weighted_sum(row_ptr + _KEEP_0, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_NOISE)
        tl.store(keep_0_ptr + here, keep_0.to(keep_0_ptr.dtype.element_ty), mask=mask)
    if KEEPS >= 2:
        keep_1 = _weighted_sum(row_ptr + _KEEP_1, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_NOISE)
        tl.store(keep_1_ptr + here, keep_1.to(keep_1_ptr.dtype.element_ty), mask=mask)
    tl.store(prev_sample_ptr + here, prev.to(prev_sample_ptr.dtype.element_ty), mask=mask)


def launch(call: StepCall) -> None:
    """Run a plain call (see `fastdiff.ops.checks.make_plain`) on the current stream of its device."""
    x = call.sample
    batch, inner, model_stride = call.blocks()
    blocks_a_sample = triton.cdiv(inner, BLOCK)
    history = [*call.history, None, None, None, None][:4]
    keeps = [*call.outputs[1:], x, x][:2]

    def pointer(tensor: torch.Tensor | None) -> torch.Tensor:
        return x if tensor is None else tensor

    with _on_device(x.device):
        _step_kernel[(batch * blocks_a_sample,)](
            x,
            call.model_output,
            pointer(call.uncond),
            pointer(call.variance),
            pointer(call.noise),
            *(pointer(h) for h in history),
            call.table,
            pointer(call.guidance),
            pointer(call.threshold),
            call.outputs[0],
            *keeps,
            call.row,
            inner,
            model_stride,
            blocks_a_sample,
            HAS_UNCOND=call.uncond is not None,
            GUIDANCE_A_SAMPLE=call.guidance is not None and call.guidance.numel() > 1,
            HISTORY=sum(1 << j for j, h in enumerate(history) if h is not None),
            HAS_NOISE=call.noise is not None,
            HAS_THRESHOLD=call.threshold is not None,
            VARIANCE=int(call.variance_kind),
            KEEPS=call.keeps,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # only the fused products that are written: the same bits as the CPU
        )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":  # Triton's interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]
