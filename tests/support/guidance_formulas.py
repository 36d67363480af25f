# SPDX-License-Identifier: MIT
"""Guidance methods and their formulas, written on tensors in float64 and sample by sample, with no Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.guidance import (
    AutoGuidance,
    ComposedGuidance,
    DualGuidance,
    Guidance,
    MagnitudeAwareGuidance,
    PerpendicularGuidance,
    PerTokenNormGuidance,
    PerturbedGuidance,
    PlainGuidance,
    ProjectedGuidance,
    ResidualGuidance,
    TangentialGuidance,
    ZeroStarGuidance,
)

BRANCHES = ("cond", "uncond", "weak", "perturbed", "partial", "negative", "reference", "style")

#: A formula: branches of one sample, x, (p, q), what was kept (None at first) -> m and what is kept.
Formula = Callable[[dict[str, Tensor], Tensor, tuple[float, float], Any], tuple[Tensor, Any]]


def plain(g: float, other: str = "uncond") -> Formula:
    return lambda b, x, pq, kept: (b[other] + g * (b["cond"] - b[other]), None)


def rescaled(formula: Formula, phi: float) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        m, kept = formula(b, x, pq, kept)
        return phi * m * b["cond"].std() / m.std() + (1 - phi) * m, kept

    return guided


def zero_star(g: float) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        if kept is None:
            return torch.zeros_like(x), 1
        c, u = b["cond"], b["uncond"]
        u = u * (c * u).sum() / (u.square().sum() + 1e-8)
        return u + g * (c - u), 1

    return guided


def tangential(g: float) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        c, u = b["cond"].flatten(), b["uncond"].flatten()
        first = torch.linalg.svd(torch.stack([c, u]), full_matrices=False)[2][0]
        u = (u @ first) * first
        return (u + g * (c - u)).reshape(x.shape), None

    return guided


def magnitude_aware(g: float, alpha: float) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        c, u = b["cond"], b["uncond"]
        ratio = (c - u).square().sum().sqrt() / u.square().sum().sqrt()
        return u + (1 + (g - 1) * torch.exp(-alpha * ratio)) * (c - u), None

    return guided


def projected(g: float, beta: float, limit: float, eta: float, around: str) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        c, u = b["cond"], b["uncond"]
        average = c - u if kept is None else c - u + beta * kept
        length = average.square().sum().sqrt()
        d = average * min(1.0, limit / float(length)) if limit > 0 else average
        direction = c / c.square().sum().sqrt()
        along = (d * direction).sum() * direction
        update = d - along + eta * along
        return (c + (g - 1) * update if around == "cond" else u + g * update), average

    return guided


def per_token_norm(g: float, dims: int) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        over = tuple(range(-dims, 0))
        m = b["uncond"] + g * (b["cond"] - b["uncond"])
        return m * b["cond"].norm(dim=over, keepdim=True) / m.norm(dim=over, keepdim=True), None

    return guided


def perturbed(g: float, s: float) -> Formula:
    return lambda b, x, pq, kept: (
        b["uncond"] + g * (b["cond"] - b["uncond"]) + s * (b["cond"] - b["perturbed"]),
        None,
    )


def dual(g: float, s: float) -> Formula:
    return lambda b, x, pq, kept: (
        b["uncond"] + s * (b["partial"] - b["uncond"]) + g * (b["cond"] - b["partial"]),
        None,
    )


def composed(g: float, weights: dict[str, float]) -> Formula:
    return lambda b, x, pq, kept: (
        b["uncond"] + g * sum(w * (b[name] - b["uncond"]) for name, w in weights.items()),
        None,
    )


def perpendicular(g: float, w: float) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        positive, negative = b["cond"] - b["uncond"], b["negative"] - b["uncond"]
        unit = positive / positive.square().sum().sqrt()
        return b["uncond"] + g * (positive - w * (negative - (negative * unit).sum() * unit)), None

    return guided


def residual(g: float, delta: float, onetime: bool) -> Formula:
    def guided(b: dict[str, Tensor], x: Tensor, pq: tuple[float, float], kept: Any) -> tuple[Tensor, Any]:
        p, q = pq
        if onetime and kept is None:
            return b["uncond"] + g * (b["cond"] - b["uncond"]), p * x + q * b["uncond"]
        clean = kept if onetime else b["reference"]
        v = delta * (clean - p * x) / q
        return v + g * (b["cond"] - v), kept

    return guided


WEIGHTS = {"cond": 1.0, "style": 0.6, "negative": -0.4}

CASES: dict[str, tuple[Guidance, Formula]] = {
    "plain": (PlainGuidance(7.5), plain(7.5)),
    "rescaled": (PlainGuidance(7.5, rescale=0.7), rescaled(plain(7.5), 0.7)),
    "auto": (AutoGuidance(2.5), plain(2.5, "weak")),
    "zero star": (ZeroStarGuidance(4.0), zero_star(4.0)),
    "tangential": (TangentialGuidance(5.0), tangential(5.0)),
    "magnitude aware": (MagnitudeAwareGuidance(9.0, alpha=2.0), magnitude_aware(9.0, 2.0)),
    "projected": (ProjectedGuidance(8.0, limit=6.0, eta=0.2), projected(8.0, 0.0, 6.0, 0.2, "cond")),
    "projected with momentum": (
        ProjectedGuidance(8.0, momentum=-0.5, limit=8.0, eta=0.0),
        projected(8.0, -0.5, 8.0, 0.0, "cond"),
    ),
    "projected around uncond": (
        ProjectedGuidance(3.0, momentum=0.6, limit=0.0, eta=0.5, around="uncond"),
        projected(3.0, 0.6, 0.0, 0.5, "uncond"),
    ),
    "per-token norm": (PerTokenNormGuidance(4.0), per_token_norm(4.0, 1)),
    "per-token norm of two dimensions": (PerTokenNormGuidance(4.0, token_dims=2), per_token_norm(4.0, 2)),
    "perturbed": (PerturbedGuidance(6.0, perturbed_scale=2.0), perturbed(6.0, 2.0)),
    "perturbed and rescaled": (
        PerturbedGuidance(6.0, perturbed_scale=2.0, rescale=0.5),
        rescaled(perturbed(6.0, 2.0), 0.5),
    ),
    "dual": (DualGuidance(7.0, partial_scale=1.5), dual(7.0, 1.5)),
    "composed": (ComposedGuidance(5.0, condition_weights=WEIGHTS), composed(5.0, WEIGHTS)),
    "perpendicular": (PerpendicularGuidance(6.0, negative_weight=1.3), perpendicular(6.0, 1.3)),
    "residual": (ResidualGuidance(1.4, delta=0.8), residual(1.4, 0.8, False)),
    "residual, rescaled": (ResidualGuidance(1.4, rescale=0.3), rescaled(residual(1.4, 1.0, False), 0.3)),
    "residual, onetime": (ResidualGuidance(1.6, negative="onetime"), residual(1.6, 1.0, True)),
}


def outputs(batch: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a branch's outputs each, which resemble each other as those of a model do."""
    common = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return {
        name: (common + 0.4 * torch.randn(batch, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name in BRANCHES
    }


def guided_by(
    formulas: list[Formula], given: dict[str, Tensor], x: Tensor, prediction: tuple[float, float], kept: list[Any]
) -> Tensor:
    """Return m in float64, sample by sample; `kept` is updated."""
    found = []
    for i, formula in enumerate(formulas):
        of_sample = {name: tensor[i].double() for name, tensor in given.items()}
        m, kept[i] = formula(of_sample, x[i].double(), prediction, kept[i])
        found.append(m)
    return torch.stack(found)
