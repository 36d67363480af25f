# SPDX-License-Identifier: MIT
"""Analysis of a model: its parameters, memory and operations, and the speed of samplers with it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...analysis.plots.figures import legend_beside, new_figure, plain_numbers, series_style
from ...analysis.workload import MethodSpec, Workload, check_steps, parse_method
from ...errors import checked_integer, checked_type, error_message
from ...solvers import SamplingMethod
from ..model.diffusion_model import AdvancedUNet, DiffusionModel
from .flops import bytes_kept_for_backward, count_flops
from .model_size import total_bytes
from .workload import model_workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DiffusionAnalyzer", "LayerRow", "ModelAnalysis", "SamplingBenchmark", "SamplingRow"]

_MIB = 2**20


@dataclass(frozen=True)
class LayerRow:
    """One module, without those within it.

    Attributes:
        name: its path in the model; empty for the model itself.
        kind: the name of its class.
        parameters: its own.
        flops: its own operations in one forward call of the batch.
        output_shape: of its last call, where it returned one tensor.
    """

    name: str
    kind: str
    parameters: int
    flops: int
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class ModelAnalysis:
    """The result of `DiffusionAnalyzer.analyze_model`.

    Attributes:
        parameters, trainable_parameters: elements, shared ones once.
        parameter_bytes, buffer_bytes: in memory; of quantized weights, as they are stored.
        backward_bytes: what autograd keeps of one forward call in training mode, at this batch;
            0 for a model without trainable parameters.
        training_bytes: an estimate for AdamW: parameters, their gradients, two moments, buffers and `backward_bytes`.
        flops: floating-point operations of one forward call of the batch, as torch's FlopCounterMode counts them:
            products of matrices, convolutions and attention, a multiplication and an addition as two.
        batch_size: B.
        layers: the modules with parameters or operations of their own; their operations add up to `flops`.
    """

    parameters: int
    trainable_parameters: int
    parameter_bytes: int
    buffer_bytes: int
    backward_bytes: int
    training_bytes: int
    flops: int
    batch_size: int
    layers: list[LayerRow]

    def figures(self) -> dict[str, Any]:
        """Return everything as values of JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"parameters          {self.parameters:,} ({self.trainable_parameters:,} trainable)",
            f"weights             {(self.parameter_bytes + self.buffer_bytes) / _MIB:.2f} MiB",
            f"kept for backward   {self.backward_bytes / _MIB:.2f} MiB at batch {self.batch_size}",
            f"training with AdamW {self.training_bytes / _MIB:.2f} MiB or more",
            f"forward call        {self.flops / 1e9:.4g} GFLOP at batch {self.batch_size}",
        ]
        table = [("layer", "kind", "parameters", "MFLOP", "output")]
        for row in self.layers:
            shape = "" if row.output_shape is None else str(list(row.output_shape))
            table.append((row.name or "(model)", row.kind, f"{row.parameters:,}", f"{row.flops / 1e6:.4g}", shape))
        return "\n".join([*lines, "", _aligned(table, left=(0, 1))])


@dataclass(frozen=True)
class SamplingRow:
    """One sampler at one number of steps.

    Attributes:
        sampler: its name.
        steps: of the loop.
        seconds: of the loop over the whole batch, the median of the rounds.
        milliseconds_per_step: the same, by step.
        images_per_second: the batch by `seconds`.
    """

    sampler: str
    steps: int
    seconds: float
    milliseconds_per_step: float
    images_per_second: float


@dataclass(frozen=True)
class SamplingBenchmark:
    """The result of `DiffusionAnalyzer.benchmark_sampling`; printed, it is a table.

    Attributes:
        rows: one for each sampler and number of steps.
        batch_size: B.
        device: of the noise.
        rounds: how often each loop was timed.
    """

    rows: list[SamplingRow]
    batch_size: int
    device: str
    rounds: int

    def figures(self) -> dict[str, Any]:
        """Return everything as values of JSON."""
        return asdict(self)

    def plot(self) -> Figure:
        """Draw seconds a batch, and images a second, against the number of steps; a line a sampler.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = new_figure(10.0, 4.0, "benchmark_sampling")
        axes: Any = figure.subplots(1, 2)
        for i, name in enumerate(dict.fromkeys(row.sampler for row in self.rows)):
            rows = [row for row in self.rows if row.sampler == name]
            steps = [row.steps for row in rows]
            axes[0].plot(steps, [row.seconds for row in rows], label=name, **series_style(i))
            axes[1].plot(steps, [row.images_per_second for row in rows], **series_style(i))
        for axis, label in zip(axes, (f"seconds a batch of {self.batch_size}", "images a second"), strict=True):
            axis.set(xlabel="steps", ylabel=label, xscale="log", yscale="log")
            axis.grid(alpha=0.3, which="both")
            plain_numbers(axis.xaxis)
            plain_numbers(axis.yaxis)
        legend_beside(figure, axes[0])
        return figure

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("sampler", "steps", "seconds", "ms a step", "images a second")]
        for row in self.rows:
            figures = (row.seconds, row.milliseconds_per_step, row.images_per_second)
            table.append((row.sampler, str(row.steps), *(f"{figure:.4g}" for figure in figures)))
        return f"batch {self.batch_size} on {self.device}, median of {self.rounds}\n{_aligned(table, left=(0,))}"


class DiffusionAnalyzer:
    """Counts what a model needs, and times samplers with it."""

    def analyze_model(self, model: nn.Module, inputs: Any = None, *, batch_size: int = 1) -> ModelAnalysis:
        """Count parameters, memory and operations of a model, by two forward calls.

        The model is as it was afterwards.

        Args:
            model: a `DiffusionModel`, an `AdvancedUNet`, or another module with `inputs`.
            inputs: the arguments of a forward call, positional or by name; of the model's configuration where None.
            batch_size: of these inputs where they are made.

        Raises:
            TypeError: it is no module, or a module of another kind without `inputs`.
            ValueError: `batch_size` is below 1.
        """
        operation = "analyze_model"
        checked_type(operation, "model", model, nn.Module, "a torch.nn.Module", "pass the network")
        if isinstance(inputs, Tensor):
            message = error_message(operation, "inputs", "is a Tensor", "the arguments of a call", "pass (tensor,)")
            raise TypeError(message)
        if inputs is None:
            inputs = _inputs_of(model, checked_integer(operation, "batch_size", batch_size, 1), operation)
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        flops, own, shapes = count_flops(model, args, kwargs)
        backward = bytes_kept_for_backward(model, args, kwargs)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        buffers = total_bytes(model.buffers())
        return ModelAnalysis(
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable_parameters=sum(parameter.numel() for parameter in trained),
            parameter_bytes=total_bytes(parameters),
            buffer_bytes=buffers,
            backward_bytes=backward,
            training_bytes=total_bytes(parameters) + 3 * total_bytes(trained) + buffers + backward,
            flops=flops,
            batch_size=1 if first is None else len(first),
            layers=_layers(model, own, shapes),
        )

    def benchmark_sampling(
        self,
        model: DiffusionModel | AdvancedUNet | Workload,
        samplers: Sequence[str | SamplingMethod | MethodSpec] = ("ddim", "dpmsolver++", "unipc"),
        steps: Sequence[int] | int = (10, 20, 50),
        *,
        batch_size: int = 1,
        rounds: int = 1,
    ) -> SamplingBenchmark:
        """Time samplers at several numbers of steps, from the same noise, in interleaved rounds after a warm-up.

        Args:
            model: a `DiffusionModel`, an `AdvancedUNet`, or a workload of another model.
            samplers: names with options, see `fastdiff.analysis.parse_method`.
            steps: numbers of steps.
            batch_size: B, where the noise is made.
            rounds: how often each loop is timed.

        Raises:
            TypeError, ValueError: an argument does not fit, or a method is unknown; refused before anything is sampled.
        """
        operation = "benchmark_sampling"
        methods = [parse_method(sampler, operation) for sampler in samplers]
        if not methods:
            message = error_message(operation, "samplers", "is empty", "one name or more", "pass samplers=('ddim',)")
            raise ValueError(message)
        counts = check_steps(operation, steps)
        rounds = checked_integer(operation, "rounds", rounds, 1)
        workload = model if isinstance(model, Workload) else model_workload(model, batch_size, operation=operation)
        loops = [(spec, count, spec.sampler(workload, count)) for spec in methods for count in counts]
        for spec in methods:
            workload.run(spec, counts[0])
        seconds: list[list[float]] = [[] for _ in loops]
        for _ in range(rounds):
            for times, (spec, count, sampler) in zip(seconds, loops, strict=True):
                times.append(workload.run(spec, count, sampler=sampler).processing_time)
        batch = len(workload.latents)
        rows = []
        for times, (spec, count, _) in zip(seconds, loops, strict=True):
            median = statistics.median(times)
            rows.append(SamplingRow(spec.label, count, median, 1e3 * median / count, batch / median))
        return SamplingBenchmark(rows, batch, str(workload.latents.device), rounds)


def _inputs_of(model: nn.Module, batch_size: int, operation: str) -> tuple[Tensor, ...]:
    """Return the arguments of a forward call of a model with a configuration; zeros and a timestep in the middle.

    Raises:
        TypeError: the model is another one.
    """
    if not isinstance(model, (DiffusionModel, AdvancedUNet)):
        got, remedy = f"is a {type(model).__name__} without inputs", "pass inputs=(sample, timestep)"
        raise TypeError(error_message(operation, "model", got, "a DiffusionModel or an AdvancedUNet", remedy))
    config, place = model.config, next(model.parameters())
    shape = batch_size, config.in_channels, config.image_size, config.image_size
    timestep = torch.full((batch_size,), config.num_train_timesteps // 2, device=place.device)
    return torch.zeros(shape, dtype=place.dtype, device=place.device), timestep


def _layers(model: nn.Module, flops: Mapping[str, int], shapes: Mapping[str, Any]) -> list[LayerRow]:
    """Return the modules with parameters or operations of their own, in the order of the model."""
    rows = []
    for name, module in model.named_modules():
        own = flops.get(name, 0)
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own or parameters:
            shape = tuple(shapes[name]) if name in shapes else None
            rows.append(LayerRow(name, type(module).__name__, parameters, own, shape))
    return rows


def _aligned(table: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Return rows of cells as lines of text, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
