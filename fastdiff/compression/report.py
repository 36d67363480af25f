# SPDX-License-Identifier: MIT
"""What compression costs: size, speed, and the distance of samples from the original's at the same seeds."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..analysis.metrics import Estimate, estimate, reference_distance
from ..analysis.workload import MethodSpec, Workload, parse_method
from ..errors import checked_bool, checked_integer, checked_type, error_message
from ..solvers import SamplingMethod
from ..training.analyzer.model_size import model_bytes
from ..training.analyzer.workload import model_workload


@dataclass(frozen=True)
class CompressionReport:
    """The result of a compression, measured beside the original.

    Attributes:
        method: what was done, in words.
        layers: how many modules were changed.
        share: the part of the model's parameters that these modules' weights are.
        bytes_before, bytes_after: of parameters and buffers, as they are stored.
        zeros: the part of the changed weights that is zero; NaN where they are quantized.
        seconds_before, seconds_after: of one sampling loop over the batch, medians of interleaved rounds.
        distance: root mean square difference of samples from the original's that began at the same noise: its mean over
            samples and the standard error.
        spread: root mean square difference of the original's samples from their mean: a distance near it means that
            the samples have little in common.  NaN for one sample.
        sampler, steps, batch_size: of these loops.
    """

    method: str
    layers: int
    share: float
    bytes_before: int
    bytes_after: int
    zeros: float
    seconds_before: float
    seconds_after: float
    distance: Estimate
    spread: float
    sampler: str
    steps: int
    batch_size: int

    @property
    def size_ratio(self) -> float:
        """Bytes after, as a part of those before."""
        return self.bytes_after / self.bytes_before

    @property
    def speedup(self) -> float:
        """Seconds before, in units of those after: above 1 is faster."""
        return self.seconds_before / self.seconds_after

    def figures(self) -> dict[str, Any]:
        """Return everything as values of standard JSON; NaN is None."""
        shown = {**asdict(self), "distance": self.distance.mean, "distance_error": self.distance.error}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in shown.items()
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.method}: {self.layers} layers with {self.share:.1%} of the parameters",
                f"size      {self.bytes_before:,} -> {self.bytes_after:,} bytes ({self.size_ratio:.3f})",
                f"speed     {self.seconds_before:.4g} -> {self.seconds_after:.4g} s ({self.speedup:.3f} times as fast)",
                f"distance  {self.distance.mean:.4g} ± {self.distance.error:.2g}, spread of samples {self.spread:.4g}",
                f"sampled by {self.sampler}, {self.steps} steps, batch {self.batch_size}",
            ]
        )


class CompressedModel(NamedTuple):
    """A compressed model and its report: ``model, report = quantize(original)``."""

    model: nn.Module
    report: CompressionReport


@dataclass(frozen=True)
class Measurement:
    """How a compressed model is compared with its original.

    Args:
        workload_of: returns the workload of either model.
        spec: the sampler.
        steps: of each loop.
        rounds: how often each loop is timed.
    """

    workload_of: Callable[[nn.Module], Workload]
    spec: MethodSpec
    steps: int
    rounds: int

    @classmethod
    def checked(
        cls,
        operation: str,
        model: nn.Module,
        workload: Workload | None,
        sampler: str | SamplingMethod | MethodSpec,
        steps: int,
        rounds: int,
    ) -> Measurement:
        """Check the arguments of a compression.

        Raises:
            TypeError, ValueError: one of them does not fit.
        """
        checked_type(operation, "model", model, nn.Module, "a torch.nn.Module", "pass the network")
        if workload is not None and workload.model is not model:
            got, remedy = "has another model", "make the workload with the model that is compressed"
            raise ValueError(error_message(operation, "workload", got, "the model itself", remedy))

        def workload_of(either: nn.Module) -> Workload:
            return model_workload(either, operation=operation) if workload is None else replace(workload, model=either)

        spec = parse_method(sampler, operation)
        steps = checked_integer(operation, "steps", steps, 1)
        spec.sampler(workload_of(model), steps)  # refuses a number of steps that the method does not take
        return cls(workload_of, spec, steps, checked_integer(operation, "rounds", rounds, 1))


def compress(
    operation: str,
    method: str,
    model: nn.Module,
    change: Callable[[nn.Module], Sequence[nn.Module]],
    measurement: Measurement,
    *,
    counts_zeros: bool,
    inplace: bool,
) -> CompressedModel:
    """Compress a copy of a model, measure it beside the original, and then change the original if that is asked for.

    Args:
        operation: for messages.
        method: what is done, in words.
        model: the original.
        change: changes a model in place and returns the modules whose weights it changed.
        measurement: how they are compared.
        counts_zeros: the changed weights are numbers, whose zeros are counted.
        inplace: change the model itself; it is as it was where the change or the measurement fails on the copy.

    Raises:
        TypeError, ValueError: an argument does not fit, or the samples are not finite.
    """
    checked_bool(operation, "inplace", inplace)
    smaller = _copied(model)
    originals, names = dict(model.named_modules()), {module: name for name, module in smaller.named_modules()}
    elements = sum(parameter.numel() for parameter in model.parameters())
    layers = change(smaller)
    weights = _different(_weight(module) for module in layers)
    compressed = _different(_weight(originals[names[module]]) for module in layers)
    share = sum(weight.numel() for weight in compressed) / elements
    pair = measurement.workload_of(model), measurement.workload_of(smaller)
    spec, steps = measurement.spec, measurement.steps
    before, after = (workload.run(spec, steps).samples for workload in pair)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(measurement.rounds):
        for times, workload in zip(seconds, pair, strict=True):
            times.append(workload.run(spec, steps).processing_time)
    changed = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights) / changed if counts_zeros else math.nan
    exact = before.double()
    report = CompressionReport(
        method=method,
        layers=len(layers),
        share=share,
        bytes_before=model_bytes(model),
        bytes_after=model_bytes(smaller),
        zeros=zeros,
        seconds_before=statistics.median(seconds[0]),
        seconds_after=statistics.median(seconds[1]),
        distance=estimate(reference_distance(after, before)),
        spread=float((exact - exact.mean(0)).square().mean().sqrt()) if len(exact) > 1 else math.nan,
        sampler=spec.label,
        steps=steps,
        batch_size=len(before),
    )
    if not inplace:
        return CompressedModel(smaller, report)
    change(model)
    return CompressedModel(model, report)


def layers_to_change(
    operation: str, model: nn.Module, kinds: tuple[type[nn.Module], ...], exclude: Sequence[str]
) -> dict[str, nn.Module]:
    """Return the modules of some kinds by name, without those that are excluded by name or lie within an excluded one.

    Raises:
        TypeError: `exclude` is one text.
        ValueError: an excluded name is no module, nothing is left, or a weight is quantized already.
    """
    if isinstance(exclude, str):
        raise TypeError(error_message(operation, "exclude", "is a text", "a sequence of names", "pass (name,)"))
    modules = dict(model.named_modules())
    for name in exclude:
        if name not in modules:
            remedy = "take names of model.named_modules()"
            raise ValueError(error_message(operation, "exclude", f"has {name!r}", "a module's name", remedy))
    kept = tuple(f"{name}." for name in exclude)
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, kinds) and not f"{name}.".startswith(kept)
    }
    if not found:
        kind = ", ".join(kind.__name__ for kind in kinds)
        got, remedy = f"is a {type(model).__name__} with none to change", "exclude less, or pass another model"
        raise ValueError(error_message(operation, "model", got, f"a module of {kind}", remedy))
    for name, module in found.items():
        if hasattr(module.weight, "__tensor_flatten__"):
            got, remedy = f"has a quantized weight in {name!r}", "exclude it, or pass the model before its quantization"
            raise ValueError(error_message(operation, "model", got, "weights of numbers", remedy))
    return found


def _copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model; of weights that masks are multiplied into at each call, the present values."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:  # made again by the next call
                setattr(module, name, value.detach())
    return copy.deepcopy(model)


def _different(weights: Iterable[Tensor]) -> list[Tensor]:
    """Return weights, those that several layers share once."""
    return list({id(weight): weight for weight in weights}.values())


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
