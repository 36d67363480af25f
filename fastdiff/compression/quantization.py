# SPDX-License-Identifier: MIT
"""Quantization by torchao: the weights of linear layers in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..analysis.workload import MethodSpec, Workload
from ..errors import checked_type, error_message, require, unknown_name
from ..solvers import SamplingMethod
from .report import CompressedModel, Measurement, compress, layers_to_change

#: Classes of torchao's configurations by name.
SCHEMES = {
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8": "Float8WeightOnlyConfig",
}


def quantize(
    model: nn.Module,
    scheme: Any = "int8",
    *,
    exclude: Sequence[str] = (),
    workload: Workload | None = None,
    sampler: str | SamplingMethod | MethodSpec = "ddim",
    steps: int = 10,
    rounds: int = 1,
    inplace: bool = False,
) -> CompressedModel:
    """Quantize the linear layers of a model for sampling; convolutions keep their weights.

    Args:
        model: a `DiffusionModel`, an `AdvancedUNet`, or the model of `workload`.
        scheme: ``"int8"``, weights alone; ``"int8_dynamic"``, activations too, with scales found at each call;
            ``"float8"``, weights alone; or a configuration of torchao, such as ``Int4WeightOnlyConfig()``.
        exclude: names of modules that stay as they are, with all within them.
        workload: the noise, schedule and conditions that both models are sampled with; four samples from fixed seeds
            where None.
        sampler, steps: of the loops that are compared, see `fastdiff.analysis.parse_method`.
        rounds: how often each loop is timed.
        inplace: change the model itself; else a copy.

    Returns:
        the quantized model and the report: ``model, report = quantize(original)``.

    Raises:
        ImportError: torchao is missing.
        TypeError, ValueError: an argument does not fit, there is no linear layer, or torchao refuses one.
    """
    operation = "quantize"
    measurement = Measurement.checked(operation, model, workload, sampler, steps, rounds)
    for name, layer in layers_to_change(operation, model, (nn.Linear,), exclude).items():
        if "weight" not in layer._parameters:
            got, remedy = f"keeps a mask beside the weight of {name!r}", "prune with permanent=True, or exclude it"
            raise ValueError(error_message(operation, "model", got, "weights that are parameters", remedy))
    torchao = require("torchao.quantization", "compression", operation)
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise unknown_name(operation, "scheme", scheme, SCHEMES)
        scheme = getattr(torchao, SCHEMES[scheme])()
    base = require("torchao.core.config", "compression", operation).AOBaseConfig
    checked_type(operation, "scheme", scheme, base, "a name or a configuration of torchao", "take one of its *Config")

    def change(changed: nn.Module) -> list[nn.Module]:
        layers = layers_to_change(operation, changed, (nn.Linear,), exclude)
        torchao.quantize_(changed, scheme, filter_fn=lambda module, name: name in layers)
        return list(layers.values())

    method = f"quantized by {type(scheme).__name__}"
    return compress(operation, method, model, change, measurement, counts_zeros=False, inplace=inplace)
