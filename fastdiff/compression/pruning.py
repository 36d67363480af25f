# SPDX-License-Identifier: MIT
"""Pruning by torch.nn.utils.prune: the smallest weights, or channels, set to zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from ..analysis.workload import MethodSpec, Workload
from ..errors import checked_bool, checked_float, error_message
from ..solvers import SamplingMethod
from .report import CompressedModel, Measurement, compress, layers_to_change

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def prune(
    model: nn.Module,
    amount: float = 0.3,
    *,
    structured: bool = False,
    permanent: bool = True,
    exclude: Sequence[str] = (),
    workload: Workload | None = None,
    sampler: str | SamplingMethod | MethodSpec = "ddim",
    steps: int = 10,
    rounds: int = 1,
    inplace: bool = False,
) -> CompressedModel:
    """Set the smallest weights of linear layers and convolutions to zero.

    Tensors keep their shapes, so a zero takes as much memory and time as another number: pruning makes a model smaller
    in a compressed file, or for kernels that use zeros.

    Args:
        model: a `DiffusionModel`, an `AdvancedUNet`, or the model of `workload`.
        amount: the share of weights, above 0 and below 1.
        structured: set whole output channels to zero, in each layer those of the smallest L2 norm; else the weights of
            the smallest magnitude in all layers together.
        permanent: write the zeros into the weights.  False keeps weights and masks apart, as torch.nn.utils.prune does,
            so that training on leaves the zeros as they are.
        exclude: names of modules that stay as they are, with all within them.
        workload, sampler, steps, rounds, inplace: as in `fastdiff.compression.quantize`.

    Returns:
        the pruned model and the report: ``model, report = prune(original)``.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is no layer to prune.
    """
    operation = "prune"
    if checked_float(operation, "amount", amount, 0.0, strict=True) >= 1.0:
        expected, remedy = "a share above 0 and below 1", "pass 0.3 for 30 %"
        raise ValueError(error_message(operation, "amount", f"is {amount}", expected, remedy))
    checked_bool(operation, "structured", structured)
    checked_bool(operation, "permanent", permanent)
    measurement = Measurement.checked(operation, model, workload, sampler, steps, rounds)

    @torch.no_grad()
    def change(changed: nn.Module) -> list[nn.Module]:
        layers = list(layers_to_change(operation, changed, _KINDS, exclude).values())
        if structured:
            for layer in layers:
                channels = 1 if isinstance(layer, _TRANSPOSED) else 0
                torch_prune.ln_structured(layer, "weight", float(amount), n=2, dim=channels)  # type: ignore[no-untyped-call]
        else:
            torch_prune.global_unstructured(
                [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=float(amount)
            )
        if permanent:
            for layer in layers:
                _make_permanent(layer)
        return layers

    kind = "channels of each layer" if structured else "weights"
    method = f"the smallest {amount:.0%} of {kind} pruned"
    return compress(operation, method, model, change, measurement, counts_zeros=True, inplace=inplace)


def _make_permanent(layer: nn.Module) -> None:
    """Write a layer's mask into its weight, which stays the same parameter at the same place."""
    torch_prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    bias = layer.bias
    if isinstance(bias, nn.Parameter):  # behind the weight again, which has become the last parameter
        del layer.bias
        layer.register_parameter("bias", bias)
