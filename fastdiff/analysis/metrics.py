# SPDX-License-Identifier: MIT
"""Metrics of generated samples, computed in float64 on the CPU from samples, features or logits.

``frechet_distance``, ``precision_recall`` and ``inception_score`` work in the space of a given encoder; their values
compare only with values of the same encoder and the same number of samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import checked_integer, checked_type, error_message


class Estimate(NamedTuple):
    """A mean with its standard error, which is NaN for a single value."""

    mean: float
    error: float


class PrecisionRecall(NamedTuple):
    """Share of generated samples inside the real manifold, and of real samples inside the generated one."""

    precision: float
    recall: float


def estimate(values: Tensor) -> Estimate:
    """Return the mean of independent values ``[N]``, N of 1 or more, and its standard error."""
    exact = values.detach().double().cpu().flatten()
    error = float(exact.std()) / math.sqrt(len(exact)) if len(exact) > 1 else math.nan
    return Estimate(float(exact.mean()), error)


def reference_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """Return the root mean square difference of each sample from its reference, which began at the same noise.

    Args:
        samples, reference: ``[B, ...]``, floating, of one shape.

    Returns:
        float64 ``[B]`` on the CPU, in the unit of the samples.

    Raises:
        TypeError, ValueError: they are no such tensors.
    """
    for name, value in (("samples", samples), ("reference", reference)):
        _check_floating("reference_distance", name, value)
    if samples.shape != reference.shape or samples.dim() == 0 or samples.numel() == 0:
        got, expected = f"has shape {list(samples.shape)}", f"{list(reference.shape)} like reference, not empty"
        raise ValueError(
            error_message("reference_distance", "samples", got, expected, "pass two runs from the same latents")
        )
    apart = (samples.detach().double().cpu() - reference.detach().double().cpu()).reshape(len(samples), -1)
    return apart.square().mean(1).sqrt()


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    ``|μ₁ − μ₂|² + tr(C₁ + C₂ − 2·(C₁·C₂)^½)``, with unbiased covariances.  It falls with the number of samples even for
    samples of one distribution: compare equal numbers.

    Args:
        real, generated: features ``[N, D]`` and ``[M, D]``, floating, N and M of 2 or more.

    Raises:
        TypeError, ValueError: they are no such features.
    """
    first, second = _features("frechet_distance", real, generated, 2)
    mean = (first.mean(0) - second.mean(0)).square().sum()
    one, other = _covariance(first), _covariance(second)
    # tr (C₁C₂)^½ = tr (C₁^½·C₂·C₁^½)^½, whose matrix is symmetric; rounding may leave eigenvalues just below 0.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0.0).sqrt().sum()
    return max(0.0, float(mean + one.trace() + other.trace() - 2 * cross))


def inception_score(logits: Tensor) -> float:
    """Return ``exp(E KL(p(y|x) ‖ p(y)))`` of a classifier's logits (Salimans et al. 2016, arXiv 1606.03498, section 4).

    It is 1 for samples that all get the same probabilities and K at most, for K classes that are certain and equally
    frequent.

    Args:
        logits: ``[N, K]``, floating, N of 1 or more.

    Raises:
        TypeError, ValueError: they are no such logits.
    """
    _check_floating("inception_score", "logits", logits)
    if logits.dim() != 2 or logits.numel() == 0:
        got, remedy = f"has shape {list(logits.shape)}", "pass a row of logits a sample"
        raise ValueError(error_message("inception_score", "logits", got, "[N, K], not empty", remedy))
    logs = logits.detach().double().cpu().log_softmax(1)
    marginal = logs.logsumexp(0) - math.log(len(logs))
    return math.exp(float((logs.exp() * (logs - marginal)).sum(1).mean()))


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Return precision and recall of k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1).

    A manifold is the union of balls around the features of one set, each as wide as the distance to its k-th nearest
    neighbour in that set.

    Args:
        real, generated: features ``[N, D]`` and ``[M, D]``, floating, both of more than k rows.
        neighbours: k, 1 or more.

    Raises:
        TypeError, ValueError: they are no such features.
    """
    k = checked_integer("precision_recall", "neighbours", neighbours, 1)
    first, second = _features("precision_recall", real, generated, k + 1)
    return PrecisionRecall(_share_inside(second, first, k), _share_inside(first, second, k))


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Return the share of points that lie in a ball of a centre, the k-th neighbour's distance wide."""
    # The nearest of a centre is itself; exact distances, since cdist's matrix product makes this one more than 0.
    exact = "donot_use_mm_for_euclid_dist"
    radius = torch.cdist(centres, centres, compute_mode=exact).kthvalue(k + 1, dim=1).values
    inside = [
        (torch.cdist(part, centres, compute_mode=exact) <= radius).any(1) for part in torch.split(points, 1024)
    ]  # a block of rows at a time bounds the memory
    return float(torch.cat(inside).double().mean())


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _features(operation: str, real: Tensor, generated: Tensor, fewest: int) -> tuple[Tensor, Tensor]:
    """Check two sets of features and return them in float64 on the CPU."""
    for name, value in (("real", real), ("generated", generated)):
        _check_floating(operation, name, value)
        if value.dim() != 2 or value.shape[0] < fewest or value.shape[1] == 0:
            got, expected = f"has shape {list(value.shape)}", f"[N, D] with N of {fewest} or more"
            raise ValueError(error_message(operation, name, got, expected, "pass a row of features a sample"))
    if real.shape[1] != generated.shape[1]:
        got, expected = f"has {generated.shape[1]} features a row", f"{real.shape[1]} like real"
        raise ValueError(error_message(operation, "generated", got, expected, "encode both with one encoder"))
    return real.detach().double().cpu(), generated.detach().double().cpu()


def _check_floating(operation: str, argument: str, value: object) -> None:
    checked_type(operation, argument, value, Tensor, "a floating-point tensor", "pass a tensor")
    assert isinstance(value, Tensor)
    if not value.is_floating_point():
        got, remedy = f"has dtype {value.dtype}", f"convert it with {argument}.float()"
        raise TypeError(error_message(operation, argument, got, "a floating-point tensor", remedy))
