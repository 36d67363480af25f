# SPDX-License-Identifier: MIT
"""The guiders of diffusers' modular pipelines under their own names, each combination one fused pass.

Each is a weighted sum of u, c and for some a perturbed output or a running average, with weights a sample.  The weights
are those of `fastdiff.guidance`: one reduction where they need it; the sum is one call of the fused step.  Only
`forward` is replaced.  diffusers' own `forward` runs outside the guider's interval of steps, if gradients are needed,
for tensors of different shapes or dtypes, and for norms over some of a sample's dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..guidance import (
    Guidance,
    LateProjectedGuidance,
    MagnitudeAwareGuidance,
    PerturbedGuidance,
    Place,
    ProjectedGuidance,
    TangentialGuidance,
    ZeroStarGuidance,
)
from ..guidance.combining import combine
from ..guidance.method import STATE
from ..guidance.rescale import host_rescaling_of, rescaling_of
from ..guidance.vectors import Vector
from ..guidance.weights import formula_weights
from ..guidance.zero_star import fitted
from ..row_layout import compute_dtype
from ..sampling.single_steps import cfg_combine

try:
    from diffusers import guiders as _originals
    from diffusers.guiders.guider_utils import GuiderOutput
except ImportError:  # diffusers 0.35 has guiders that return something else
    _originals = None  # type: ignore[assignment]


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
        return _plain(cond, uncond, _extrapolation(self), rescale), uncond


class _FittedZeroStar(ZeroStarGuidance):
    """CFG-Zero* that also returns the scaled unconditional output."""

    def kept(self, branches: Mapping[str, Vector], place: Place) -> Vector | None:
        return fitted(branches["uncond"], branches["cond"])


class _ZeroStar(FusedGuider):
    """Guidance with α·u for u, α = ⟨c, u⟩ / (‖u‖² + 1e-8) (arXiv 2503.18886, eq. 7); zero in the first steps."""

    def _fuses(self: Any, cond: Any, uncond: Any) -> bool:
        return super()._fuses(cond, uncond) and self._step >= self.zero_init_steps

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        method = _method(_FittedZeroStar, scale=_extrapolation(self), rescale=rescale, zero_init_steps=0)
        pred, scaled = _guided(method, cond, uncond)
        return pred, scaled


class _Tangential(FusedGuider):
    """Guidance with u projected on the first right singular vector of the two rows c and u (arXiv 2503.18137)."""

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        method = _method(TangentialGuidance, scale=_extrapolation(self), rescale=rescale)
        return _guided(method, cond, uncond)[0], uncond


class _MagnitudeAware(FusedGuider):
    """Guidance whose scale falls with the size of the difference, e^(−α·‖c − u‖/‖u‖) (arXiv 2508.03442)."""

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        method = _method(MagnitudeAwareGuidance, scale=_extrapolation(self), rescale=rescale, alpha=float(self.alpha))
        return _guided(method, cond, uncond)[0], uncond


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
        return self._averaged(cond, uncond, ProjectedGuidance, self.guidance_scale, rescale), uncond

    def _averaged(self: Any, cond: Tensor, uncond: Tensor, kind: type, scale: float, rescale: float, **own: Any) -> Any:
        buffer = self.momentum_buffer
        original = bool(self.use_original_formulation)
        method = _method(
            kind,
            scale=scale + 1.0 if original else float(scale),
            rescale=rescale,
            momentum=0.0 if buffer is None else float(buffer.momentum),
            limit=float(self.adaptive_projected_guidance_rescale),
            eta=float(self.eta),
            around="cond" if original else "uncond",
            **own,
        )
        running = None if buffer is None else buffer.running_average
        pred, *average = _guided(method, cond, uncond, running if isinstance(running, Tensor) else None, self._step)
        if buffer is not None:
            # With a momentum of 0 the average is the difference of this step.
            buffer.running_average = average[0] if average else cond - uncond
        return pred


class _ProjectedMix(_Projected):
    """Plain guidance in the first steps, with the average updated; projected guidance after them."""

    def _combined(self: Any, cond: Tensor, uncond: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
        last = -1 if self._is_apg_enabled() else self._step
        plain = _extrapolation(self)
        scale = self.adaptive_projected_guidance_scale
        own = {"plain_scale": plain, "last_plain_step": last}
        return self._averaged(cond, uncond, LateProjectedGuidance, scale, rescale, **own), uncond


class _Perturbed(FusedGuider):
    """u + g·(c − u) + s·(c − p) with a perturbed output p; either difference may be off (arXiv 2403.17377)."""

    def forward(
        self: Any, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> Any:
        """Combine the model's outputs.

        Args:
            pred_cond, pred_uncond, pred_cond_skip: c, u and p, ``[B, ...]``; None for a difference that is off.

        Returns:
            diffusers' `GuiderOutput`.
        """
        return self._combined_with(pred_cond, pred_uncond, pred_cond_skip)

    def _perturbed_scale(self: Any) -> float | None:
        """Return s; None where c − p is off."""
        return float(self.skip_layer_guidance_scale) if self._is_slg_enabled() else None

    def _combined_with(self: Any, cond: Tensor, uncond: Tensor | None, perturbed: Tensor | None) -> Any:
        scale, own = float(self.guidance_scale) if self._is_cfg_enabled() else None, self._perturbed_scale()
        scales = {"uncond": scale, "perturbed": own}
        given = {"uncond": uncond, "perturbed": perturbed}
        others: dict[str, Any] = {n: given[n] for n in given if scales[n] is not None and self._fuses(cond, given[n])}
        if not others or len(others) < sum(one is not None for one in scales.values()):
            return self.original.forward(self, cond, uncond, perturbed)
        rescale, shift = float(self.guidance_rescale), 1.0 if self.use_original_formulation else 0.0
        if scale is not None and own is not None:
            method = _method(PerturbedGuidance, scale=scale + shift, perturbed_scale=own, rescale=rescale)
            pred = _combine(method, {"cond": cond, **others})[0]
        else:
            only = own if scale is None else scale
            assert only is not None
            (other,) = others.values()
            pred = _plain(cond, other, only + shift, rescale)
        return GuiderOutput(pred=pred, pred_cond=cond, pred_uncond=uncond)


class _SmoothedEnergy(_Perturbed):
    """u + g·(c − u) + s·(c − p), where p has smoothed attention; either difference may be off (arXiv 2408.00760)."""

    def forward(  # diffusers passes the outputs by name, and names this one otherwise
        self: Any, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_seg: Tensor | None = None
    ) -> Any:
        """Combine the model's outputs.

        Args:
            pred_cond, pred_uncond, pred_cond_seg: c, u and p, ``[B, ...]``; None for a difference that is off.

        Returns:
            diffusers' `GuiderOutput`.
        """
        return self._combined_with(pred_cond, pred_uncond, pred_cond_seg)

    def _perturbed_scale(self: Any) -> float | None:
        return float(self.seg_guidance_scale) if self._is_seg_enabled() else None


def _extrapolation(guider: Any) -> float:
    """Return g of u + g·(c − u); the original formulation c + (g − 1)·(c − u) is the same map."""
    return float(guider.guidance_scale) + (1.0 if guider.use_original_formulation else 0.0)


@functools.lru_cache(maxsize=256)
def _method(kind: type, **options: Any) -> Any:
    return kind(**options)


def _guided(
    method: Guidance, cond: Tensor, uncond: Tensor, state: Tensor | None = None, step: int = 0
) -> tuple[Tensor, ...]:
    """Return the guided output and what the method keeps: one reduction where it needs one, and one pass."""
    branches = {"cond": cond, "uncond": uncond}
    if state is not None:
        branches[STATE] = state
    return _combine(method, branches, step)


def _combine(method: Guidance, branches: Mapping[str, Tensor], step: int = 0) -> tuple[Tensor, ...]:
    """Return the guided output of branches by name, and what the method keeps."""
    place, tensors = Place(step, step + 1, has_state=STATE in branches), list(branches.values())
    cond = tensors[0]
    rows, (share, *_) = formula_weights([method], place, list(branches), tensors, cond, [place.has_state])
    if share == 0.0:
        return combine(cond, tensors, rows)
    guided, *kept = combine(cond, tensors, rows, dtype=compute_dtype(cond.dtype))
    return (_rescaled(guided, cond, share), *kept)


def _rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Return a guided output in the compute dtype, which is written, rescaled and like `cond`."""
    factor: float | Tensor
    if cond.device.type == "cpu" and len(cond) == 1:
        (factor,) = host_rescaling_of(guided, cond, share)
    else:
        factor = rescaling_of(guided, cond, share).reshape(-1, *[1] * (cond.dim() - 1))
    return guided.mul_(factor).to(cond.dtype)


def _plain(cond: Tensor, other: Tensor, scale: float, rescale: float) -> Tensor:
    """Return o + g·(c − o), rescaled."""
    if rescale <= 0.0:
        return cfg_combine(cond, other, scale)
    guided = torch.empty_like(cond, dtype=compute_dtype(cond.dtype))
    return _rescaled(cfg_combine(cond, other, scale, out=guided), cond, rescale)


_KINDS: dict[str, type] = {
    "AdaptiveProjectedGuidance": _Projected,
    "AdaptiveProjectedMixGuidance": _ProjectedMix,
    "AutoGuidance": _ClassifierFree,
    "ClassifierFreeGuidance": _ClassifierFree,
    "ClassifierFreeZeroStarGuidance": _ZeroStar,
    "MagnitudeAwareGuidance": _MagnitudeAware,
    "PerturbedAttentionGuidance": _Perturbed,
    "SkipLayerGuidance": _Perturbed,
    "SmoothedEnergyGuidance": _SmoothedEnergy,
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
