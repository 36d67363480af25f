# SPDX-License-Identifier: MIT
"""The guiders of diffusers' modular pipelines under their own names, each combination one fused pass.

Each is a weighted sum of u, c and for some a running average, with a weight for each sample.  The weights come from
reductions of `fastdiff.ops`; the sum is one call of the fused step with a row for each sample.  Only `forward` is
replaced.  diffusers' own `forward` runs outside the guider's interval of steps, if gradients are needed, for tensors of
different shapes or dtypes, and for norms over some of a sample's dimensions.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..guidance.rescale import rescaling_of
from ..row_layout import (
    COLUMNS,
    KEEP_0,
    PREV_SAMPLE,
    STORE_0,
    blank_row,
    compute_dtype,
)
from ..sampling.single_steps import cfg_combine

try:
    from diffusers import guiders as _originals
    from diffusers.guiders.guider_utils import GuiderOutput
except ImportError:  # diffusers 0.35 has guiders that return something else
    _originals = None  # type: ignore[assignment]

#: A weight of a sum: one number, or one for each sample.
Weight = float | Tensor
_SAMPLE, _OUTPUT, _HISTORY = (COLUMNS.index(name) for name in ("sample", "model_output", "history_0"))


class FusedGuider:
    """Mixin before a diffusers guider; subclasses implement `_combined`."""

    original: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.original = next((base for base in cls.__mro__[1:] if not issubclass(base, FusedGuider)), object)
        if cls.original is not object:
            # Configurations and pipelines save a class by its module's library and its name, which are diffusers'.
            cls.__module__ = cls.original.__module__

    def forward(self: Any, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the model's outputs.

        Args:
            pred_cond, pred_uncond: the model's outputs, ``[B, ...]``.

        Returns:
            diffusers' `GuiderOutput`.
        """
        if self.num_conditions == 1 or not self._fuses(pred_cond, pred_uncond):
            return self.original.forward(self, pred_cond, pred_uncond)
        pred, uncond = self._combined(pred_cond, pred_uncond, float(self.guidance_rescale))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=uncond)

    def _fuses(self: Any, cond: Any, uncond: Any) -> bool:
        """Return whether both are tensors of samples with one shape, dtype and device, and need no gradient."""
        return (
            isinstance(cond, Tensor)
            and isinstance(uncond, Tensor)
            and cond.dim() > 1
            and cond.numel() > 0
            and cond.is_floating_point()
            and (cond.shape, cond.dtype, cond.device) == (uncond.shape, uncond.dtype, uncond.device)
            and not (torch.is_grad_enabled() and (cond.requires_grad or uncond.requires_grad))
            and isinstance(self.guidance_scale, (int, float))
        )

    def _combined(self, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        """Return the guided output, and the unconditional one that the result contains."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__name__,), vars(self)


def _rebuild(name: str) -> Any:
    return GUIDERS[name].__new__(GUIDERS[name])


class _ClassifierFree(FusedGuider):
    """u + g·(c − u), or c + g·(c − u)."""

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        scale = _extrapolation(self, self.guidance_scale)
        return _extrapolated(cond, uncond, scale, rescale), uncond


class _ZeroStar(FusedGuider):
    """Guidance with α·u for u, α = ⟨c, u⟩ / (‖u‖² + 1e-8) (arXiv 2503.18886, eq. 7); zero in the first steps."""

    def _fuses(self: Any, cond: Any, uncond: Any) -> bool:
        return super()._fuses(cond, uncond) and self._step >= self.zero_init_steps

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        alpha = ops.dot(cond, uncond) / (ops.dot(uncond, uncond) + 1e-8)
        scale = _extrapolation(self, self.guidance_scale)
        pred, scaled = _sum(cond, uncond, (scale, alpha * (1.0 - scale)), kept=(0.0, alpha))
        return _rescaled(pred, cond, rescale), scaled


class _Tangential(FusedGuider):
    """Guidance with u projected on the first right singular vector of the two rows c and u (arXiv 2503.18137).

    The left singular vectors are those of the Gram matrix [[⟨c,c⟩, ⟨c,u⟩], [⟨c,u⟩, ⟨u,u⟩]]; the first is (cos θ, sin θ)
    with tan 2θ = 2⟨c,u⟩ / (⟨c,c⟩ − ⟨u,u⟩), and the projection of u is sin θ·(cos θ·c + sin θ·u).
    """

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        difference = ops.dot(cond, cond) - ops.dot(uncond, uncond)
        twice = 2.0 * ops.dot(cond, uncond)
        length = torch.hypot(difference, twice)
        # For orthogonal rows of equal length every direction is a first one: take c, which is orthogonal to u.
        none = length == 0.0
        sine = torch.where(none, 0.0, twice / length)
        cosine = torch.where(none, 1.0, difference / length)
        of_cond, of_uncond = 0.5 * sine, 0.5 * (1.0 - cosine)
        scale = _extrapolation(self, self.guidance_scale)
        rest = 1.0 - scale
        (pred,) = _sum(cond, uncond, (scale + rest * of_cond, rest * of_uncond))
        return _rescaled(pred, cond, rescale), uncond


class _MagnitudeAware(FusedGuider):
    """Guidance whose scale falls with the size of the difference, e^(−α·‖c − u‖/‖u‖) (arXiv 2508.03442)."""

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        (difference,) = _sum(cond, uncond, (1.0, -1.0))
        falling = torch.exp(-self.alpha * ops.norm(difference) / ops.norm(uncond))
        scale = self.guidance_scale
        scale = 1.0 + (scale * falling if self.use_original_formulation else (scale - 1.0) * falling)
        return _extrapolated(cond, uncond, scale, rescale), uncond


class _Projected(FusedGuider):
    """Guidance by a running average of c − u, limited in length, split along and across c (arXiv 2410.02416)."""

    def _fuses(self: Any, cond: Any, uncond: Any) -> bool:
        if not super()._fuses(cond, uncond):
            return False
        dims = getattr(self, "adaptive_projected_guidance_norm_dim", None)
        if dims is not None:
            dims = {dim % cond.dim() for dim in ((dims,) if isinstance(dims, int) else dims)}
            if dims != set(range(1, cond.dim())):
                return False
        running = None if self.momentum_buffer is None else self.momentum_buffer.running_average
        return not isinstance(running, Tensor) or super()._fuses(cond, running)

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        return self._projected(cond, uncond, self.guidance_scale, rescale), uncond

    def _projected(self: Any, cond: Tensor, uncond: Tensor, scale: float, rescale: float) -> Tensor:
        buffer = self.momentum_buffer
        running, momentum = _running(buffer)
        (average,) = _sum(cond, uncond, (1.0, -1.0, momentum), running)
        if buffer is not None:
            buffer.running_average = average
        limit = self.adaptive_projected_guidance_rescale
        shrunk: Weight = torch.clamp(limit / ops.norm(average), max=1.0) if limit > 0 else 1.0
        # d⊥ + η·d∥ = d + (η − 1)·d∥, and d∥ = ⟨d, c⟩/‖c‖²·c with the norm that torch's normalize divides by.
        along = ops.dot(average, cond) / ops.norm(cond).clamp(min=1e-12).square()
        across = scale * shrunk
        of_cond = across * (self.eta - 1.0) * along
        if self.use_original_formulation:
            weights: tuple[Weight, ...] = (1.0 + of_cond, 0.0, across)
        else:
            weights = (of_cond, 1.0, across)
        (pred,) = _sum(cond, uncond, weights, average)
        return _rescaled(pred, cond, rescale)


class _ProjectedMix(_Projected):
    """Plain guidance in the first steps, with the average updated; projected guidance after them."""

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        if self._is_apg_enabled():
            return self._projected(cond, uncond, self.adaptive_projected_guidance_scale, rescale), uncond
        scale = _extrapolation(self, self.guidance_scale)
        buffer = self.momentum_buffer
        if buffer is None:
            return _extrapolated(cond, uncond, scale, rescale), uncond
        running, momentum = _running(buffer)
        pred, buffer.running_average = _sum(cond, uncond, (scale, 1.0 - scale), running, kept=(1.0, -1.0, momentum))
        return _rescaled(pred, cond, rescale), uncond


def _running(buffer: Any) -> tuple[Tensor | None, float]:
    """Return the running average and its weight; None and 0 in the first step."""
    if buffer is None or not isinstance(buffer.running_average, Tensor):
        return None, 0.0
    return buffer.running_average, float(buffer.momentum)


def _extrapolation(guider: Any, scale: float) -> float:
    """Return g of u + g·(c − u); the original formulation c + (g − 1)·(c − u) is the same map."""
    return scale + 1.0 if guider.use_original_formulation else float(scale)


def _extrapolated(cond: Tensor, uncond: Tensor, scale: Weight, rescale: float) -> Tensor:
    pred = cfg_combine(cond, uncond, scale)
    if rescale <= 0.0:
        return pred
    # Computed from the model's outputs, not from `pred`, so that half types are rounded once.
    factor = rescaling_of(pred, cond, rescale)
    return _step(cond, cond, [(_OUTPUT, factor)], [], uncond=uncond, guidance_scale=scale, out=pred)[0]


def _rescaled(pred: Tensor, cond: Tensor, rescale: float) -> Tensor:
    if rescale <= 0.0:
        return pred
    return _step(pred, pred, [(_SAMPLE, rescaling_of(pred, cond, rescale))], [], out=pred)[0]


def _sum(
    cond: Tensor, uncond: Tensor, weights: tuple[Weight, ...], running: Tensor | None = None,
    kept: tuple[Weight, ...] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return one or two weighted sums of c, u and a running average, in one pass.

    Args:
        cond, uncond, running: ``[B, ...]``.
        weights: of these three, each a number or ``[B]``.
        kept: the weights of a second sum.
    """
    columns = (_SAMPLE, _OUTPUT, _HISTORY)
    first, second = (list(zip(columns, given, strict=False)) for given in (weights, kept))
    return _step(cond, uncond, first, second, history=() if running is None else (running,))


def _step(
    sample: Tensor, output: Tensor, first: list[tuple[int, Weight]], second: list[tuple[int, Weight]],
    out: Tensor | None = None, **tensors: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Call the fused step with a row for each sample, or one for all if the weights are numbers."""
    entries = [(PREV_SAMPLE + c, w) for c, w in first] + [(KEEP_0 + c, w) for c, w in second]
    numbers = tuple((c, float(w)) for c, w in entries if not isinstance(w, Tensor))
    dtype, keeps = compute_dtype(sample.dtype), 1 if second else 0
    table = _fixed_row(numbers, keeps, dtype, sample.device)
    rows: int | Tensor = 0
    outs: tuple[Tensor | None, ...] | None = None if out is None else (out,)
    if len(numbers) < len(entries):
        table = table.repeat(len(sample), 1)
        for column, weight in entries:
            if isinstance(weight, Tensor):
                table[:, column] = weight
        if len(sample) > 1:
            rows = _count(len(sample), sample.device)
            if keeps:  # the direct call needs them: rows in a tensor could leave samples unwritten
                outs = torch.empty_like(sample), torch.empty_like(sample)
    return ops.step(sample, output, table, rows, keeps=keeps, out=outs, **tensors)


@functools.lru_cache(maxsize=1024)
def _fixed_row(numbers: tuple[tuple[int, float], ...], keeps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    row = torch.tensor([blank_row()], dtype=torch.float64, device="cpu")
    row[0, STORE_0] = 0.0 if keeps else -1.0
    for column, number in numbers:
        row[0, column] = number
    with torch.inference_mode(False):
        return row.to(device=device, dtype=dtype).clone()


@functools.lru_cache(maxsize=64)
def _count(number: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(number, device=device)


_KINDS: dict[str, type] = {
    "AdaptiveProjectedGuidance": _Projected,
    "AdaptiveProjectedMixGuidance": _ProjectedMix,
    "AutoGuidance": _ClassifierFree,
    "ClassifierFreeGuidance": _ClassifierFree,
    "ClassifierFreeZeroStarGuidance": _ZeroStar,
    "MagnitudeAwareGuidance": _MagnitudeAware,
    "TangentialClassifierFreeGuidance": _Tangential,
}


def _fused_guider(name: str, kind: type) -> Any:
    """Return the subclass of diffusers' class of that name; None if the installed diffusers has none."""
    original = getattr(_originals, name, None)
    if original is None:
        return None
    doc = f"diffusers' {name}, its combination one fused pass.\n\n{kind.__doc__}\n\n{original.__doc__ or ''}"
    return type(name, (kind, original), {"__doc__": doc})


#: The classes by name that the installed diffusers has.
GUIDERS: dict[str, Any] = {
    name: made for name, kind in sorted(_KINDS.items()) if (made := _fused_guider(name, kind)) is not None
}
