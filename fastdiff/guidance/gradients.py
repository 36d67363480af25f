# SPDX-License-Identifier: MIT
"""Guidance by a gradient: a classifier's, or that of a loss on the predicted clean sample.

The gradient is one more tensor of the step: a term of the model's output or of the previous sample, in the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_bool, checked_callable, checked_float, error_message, unknown_name
from ..schedules.levels import Level
from ..solvers.table import Row
from .combining import weighted_sum
from .method import RowWeights
from .scalars import Scalar


@dataclass(frozen=True, eq=False)
class ClassifierGuidance:
    """Guidance by the gradient of a classifier (arXiv 2105.05233, algorithms 1 and 2).

    Args:
        guidance_fn: ``(x, t)`` to log p(y | x_t), or any score to raise: one number a sample, ``[B]``; t is ``[B]``.
        scale: s, a float or ``[B]``.
        form: ``epsilon`` shifts the model's noise, ε̂ = ε − s·σ·∇ (algorithm 2), for every solver and prediction type;
            ``mean`` shifts the mean of a step that adds noise, by s·Σ·∇ with the step's variance Σ (algorithm 1).

    Raises:
        TypeError, ValueError: a field does not fit.
    """

    guidance_fn: Callable[[Tensor, Tensor], Tensor]
    scale: float | Tensor = 1.0
    form: str = "epsilon"

    def __post_init__(self) -> None:
        expected = "a callable (x, t) that returns one number a sample"
        checked_callable("ClassifierGuidance", "guidance_fn", self.guidance_fn, expected, "pass a function")
        _check_scale("ClassifierGuidance", self.scale)
        if self.form not in ("epsilon", "mean"):
            raise unknown_name("ClassifierGuidance", "form", self.form, ("epsilon", "mean"))

    def gradient(self, x: Tensor, timestep: float) -> Tensor:
        """Return ∇_x of the sum of guidance_fn over the samples, like x."""

        def score(leaf: Tensor) -> Tensor:
            t = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
            return self.guidance_fn(leaf, t)

        return gradient_at(score, x, "ClassifierGuidance", "guidance_fn")

    def weights(self, row: Row, level: Level | None) -> tuple[Scalar, Scalar]:
        """Return the gradient's weight in the model's output, and in the previous sample."""
        if self.form == "mean":
            return 0.0, row.prev_sample.coefficients[-1] ** 2 * self._scale()
        assert level is not None
        q = row.prediction[1]
        # Δε = −s·σ·∇ moves x0 by −σ/α·Δε, which is q·Δm.
        return (level.sigma**2 / (level.alpha * q)) * self._scale(), 0.0

    def _scale(self) -> Scalar:
        return self.scale.double() if isinstance(self.scale, Tensor) else float(self.scale)


@dataclass(frozen=True, eq=False)
class LossGuidance:
    """Guidance by a loss on the predicted clean sample: diffusion posterior sampling (arXiv 2209.14687, algorithm 1).

    The step's result moves by −s·∇L(x0(x)).

    Args:
        loss: x0 ``[B, ...]`` to one number a sample, ``[B]``: for an inverse problem y = A(x0) it is ‖y − A(x0)‖, the
            root, with which the paper's step ζ/‖y − A(x0)‖ on the square is twice s.
        scale: s, a float or ``[B]``.
        through_model: differentiate through the model too, as the paper does: the outputs must then have been computed
            from the sample under autograd.  False takes the gradient with respect to x0 times ∂x0/∂x = p, with the
            model's output fixed: no backward pass of the model.

    Raises:
        TypeError, ValueError: a field does not fit.
    """

    loss: Callable[[Tensor], Tensor]
    scale: float | Tensor = 1.0
    through_model: bool = True

    def __post_init__(self) -> None:
        expected = "a callable that takes x0 and returns one number a sample"
        checked_callable("LossGuidance", "loss", self.loss, expected, "pass a function")
        _check_scale("LossGuidance", self.scale)
        checked_bool("LossGuidance", "through_model", self.through_model)

    def gradient(self, x: Tensor, model_output: Tensor, row: Row) -> Tensor:
        """Return ∇_x of the sum of the losses, like x.

        Args:
            x: the sample; with `through_model` the leaf that `model_output` was computed from.
            model_output: m.
            row: of the step, whose prediction reads x0.
        """
        p, q = row.prediction
        if self.through_model:
            with torch.enable_grad():
                if not x.requires_grad or not model_output.requires_grad:
                    got, expected = "was computed outside of autograd", "an output with a graph back to the sample"
                    remedy = (
                        "call the model under torch.enable_grad() on a sample with grad, or pass through_model=False"
                    )
                    raise ValueError(error_message("LossGuidance", "model_output", got, expected, remedy))
                return gradient_of(self.loss(p * x + q * model_output), x, "LossGuidance", "loss")
        return gradient_at(self.loss, p * x.detach() + q * model_output.detach(), "LossGuidance", "loss") * p

    def weights(self, row: Row, level: Level | None) -> tuple[Scalar, Scalar]:
        """Return the gradient's weight in the model's output, and in the previous sample."""
        return 0.0, -self.scale.double() if isinstance(self.scale, Tensor) else -float(self.scale)


def gradient_at(
    function: Callable[[Tensor], Tensor], x: Tensor, operation: str, argument: str, *, sums: bool = False
) -> Tensor:
    """Return the gradient of a function's numbers at x, like x; also inside `torch.inference_mode`.

    Args:
        function: x to one number a sample, ``[B]``.
        x: ``[B, ...]``.
        operation, argument: what errors name.
        sums: take one number for all samples too, and B numbers of any shape.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        return gradient_of(function(leaf), leaf, operation, argument, sums=sums)


def gradient_of(values: Any, leaf: Tensor, operation: str, argument: str, *, sums: bool = False) -> Tensor:
    """Return the gradient of the sum of one number a sample; arguments are those of `gradient_at`."""
    shape = getattr(values, "shape", None)
    if shape != leaf.shape[:1] and not (sums and isinstance(values, Tensor) and values.numel() in (1, len(leaf))):
        got = f"returned a {type(values).__name__} of shape {'none' if shape is None else list(shape)}"
        remedy = "return values.flatten(1).sum(1)"
        raise ValueError(error_message(operation, argument, got, f"[{leaf.shape[0]}], one number a sample", remedy))
    if not values.requires_grad:
        got, remedy = "returned numbers without a gradient", "compute them from x by torch operations"
        raise ValueError(error_message(operation, argument, got, "one number a sample that depends on x", remedy))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient.detach().to(leaf.dtype)


def _check_scale(operation: str, scale: object) -> None:
    if not isinstance(scale, Tensor):
        checked_float(operation, "scale", scale, -math.inf)


#: A gradient that moves the step.
Term = ClassifierGuidance | LossGuidance


def add_gradients(
    terms: Sequence[Term], sample: Tensor, tensors: list[Tensor], rows: list[RowWeights], row: Row, level: Level | None
) -> tuple[list[RowWeights], list[tuple[Tensor, Scalar]]]:
    """Compute the gradients of a step: those that shift the model's output become branches, the others moves.

    Args:
        terms: the gradients.
        sample: x, a leaf where a gradient goes through the model.
        tensors: the branches, to which the shifts are appended.
        rows: the weights of the branches and the sample.
        row: the solver's row.
        level: the level of the step, for terms that ask for σ.

    Returns:
        The weights with those of the shifts; and the tensors that are added to the previous sample, with their weights.
    """
    moves: list[tuple[Tensor, Scalar]] = []
    shifts: list[tuple[Tensor, Scalar]] = []
    for term in terms:
        if isinstance(term, ClassifierGuidance):
            gradient = term.gradient(sample, row.timestep)
        else:
            with torch.enable_grad():
                gradient = term.gradient(sample, weighted_sum(sample, tensors, rows), row)
        of_output, of_result = term.weights(row, level)
        if isinstance(of_output, Tensor) or of_output != 0.0:
            shifts.append((gradient, of_output))
        if isinstance(of_result, Tensor) or of_result != 0.0:
            moves.append((gradient, of_result))
    for gradient, weight in shifts:
        rows = [((*w[:-1], weight, w[-1]), k and (*k[:-1], 0.0, k[-1])) for w, k in rows]
        tensors.append(gradient)
    return rows, moves
