# SPDX-License-Identifier: MIT
"""Comparison of sampling methods at several numbers of steps, from the same noise: distance, metrics and time."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_integer, error_message
from ..ops import backend_for
from ..samplers import BaseSampler
from ..solvers import SamplingMethod
from .metrics import Estimate, estimate, frechet_distance, inception_score, precision_recall, reference_distance
from .progress import with_progress
from .sample_statistics import compute_sample_variance, compute_sharpness
from .workload import MethodSpec, Workload, check_steps, parse_method


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one number of steps.

    Attributes:
        method: its label.
        steps, model_calls: of the loop; a call under guidance counts once.
        seconds: of the loop over the whole batch: the median of the rounds.
        milliseconds_per_image: the same, by sample.
        stochastic: the method draws noise, so its samples are others than the reference's by intention.
        distance: root mean square difference from the reference, mean over samples and its standard error.
        variance: `compute_sample_variance`; NaN for one sample.
        sharpness: `compute_sharpness` of images, else None.
        frechet, precision, recall: in the space of the workload's encoder, else None.
        inception: of the workload's classifier, else None.
        samples: ``[B, ...]`` on the CPU.
    """

    method: str
    steps: int
    model_calls: int
    seconds: float
    milliseconds_per_image: float
    stochastic: bool
    distance: Estimate
    variance: float
    sharpness: float | None
    frechet: float | None
    precision: float | None
    recall: float | None
    inception: float | None
    distances: Tensor = field(repr=False, compare=False)
    samples: Tensor = field(repr=False, compare=False)

    def figures(self) -> dict[str, Any]:
        """Return the numbers, ready for JSON."""
        shown = {name: value for name, value in vars(self).items() if name not in ("samples", "distances", "distance")}
        return {**shown, "distance": self.distance.mean, "distance_error": self.distance.error}


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_methods`.

    Attributes:
        rows: one for each method and number of steps, methods in the order asked for.
        reference: label of the reference method.
        reference_steps: its number of steps.
        reference_samples: ``[B, ...]`` on the CPU.
        resolution: mean distance between the reference and the same method at half the steps: differences below it say
            nothing.
        rounds: how often each loop was timed.
        conditions: machine, versions, date and workload, by name.
        workload: what was sampled.
    """

    rows: list[ComparisonRow]
    reference: str
    reference_steps: int
    reference_samples: Tensor = field(repr=False)
    resolution: float
    rounds: int
    conditions: dict[str, str]
    workload: Workload = field(repr=False)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))

    def row(self, method: str, steps: int) -> ComparisonRow:
        """Return the row of a label and a number of steps.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.method, row.steps) == (method, steps):
                return row
        raise KeyError((method, steps))

    def figures(self) -> dict[str, Any]:
        """Return everything but the samples, ready for JSON."""
        return {
            "conditions": self.conditions,
            "reference": {"method": self.reference, "steps": self.reference_steps, "resolution": self.resolution},
            "rounds": self.rounds,
            "rows": [row.figures() for row in self.rows],
        }


def compare_methods(
    workload: Workload,
    methods: Sequence[str | SamplingMethod | MethodSpec],
    steps: Sequence[int] | int = (5, 10, 20, 50),
    *,
    reference: str | SamplingMethod | MethodSpec = "ddim",
    reference_steps: int | None = None,
    rounds: int = 1,
    progress: bool | None = None,
) -> Comparison:
    """Sample with every method at every number of steps, from the same latents, conditions and seeds.

    The rounds are interleaved, so that a slow spell of the machine meets all methods alike.

    Args:
        workload: the model and what it is sampled with.
        methods: names with options, see `fastdiff.analysis.parse_method`.
        steps: numbers of steps.
        reference: the method whose many-step solution the samples are compared with.
        reference_steps: its steps; None for every timestep of the schedule.
        rounds: how often each loop runs for its time, 1 or more; samples are those of the first round.
        progress: show a progress bar; None shows it where tqdm is installed.

    Raises:
        TypeError, ValueError: an argument is out of range, or a method is unknown or does not fit the model; refused
            before anything is sampled.
    """
    operation = "compare_methods"
    chosen = checked_methods(operation, methods)
    counts = check_steps(operation, steps)
    rounds = checked_integer(operation, "rounds", rounds, 1)
    against = parse_method(reference, operation)
    total = len(workload.scheduler.alphas_cumprod)
    many = total if reference_steps is None else checked_integer(operation, "reference_steps", reference_steps, 2)
    samplers = [(spec, count, spec.sampler(workload, count)) for spec in chosen for count in counts]
    if any(against.sampler(workload, many).table.draws_noise):
        got, expected = f"is {against.label!r}, which draws noise", "a deterministic method"
        raise ValueError(error_message(operation, "reference", got, expected, "pass 'ddim' or 'dpmsolver++'"))

    def work() -> Iterator[tuple[MethodSpec, int, BaseSampler | None]]:
        yield from ((against, count, None) for count in (many, max(1, many // 2)))
        for _ in range(rounds):
            yield from samplers

    solutions: list[Tensor] = []
    first: dict[tuple[str, int], Tensor] = {}
    times: dict[tuple[str, int], list[float]] = {}
    for spec, count, sampler in with_progress(work(), 2 + rounds * len(samplers), "compare", progress):
        result = workload.run(spec, count, sampler=sampler)
        if sampler is None:
            solutions.append(result.samples.cpu())
            continue
        key = spec.label, count
        first.setdefault(key, result.samples.cpu())
        times.setdefault(key, []).append(result.processing_time)
    measured = _Metrics(workload, solutions[0])
    conditions = describe_conditions(workload)
    if workload.real is not None:
        real = (
            f"variance {compute_sample_variance(workload.real):.4g}, sharpness {compute_sharpness(workload.real):.4g}"
        )
        conditions["real images"] = real
    rows = [
        measured.row(spec, count, sampler, first[spec.label, count], times[spec.label, count])
        for spec, count, sampler in samplers
    ]
    resolution = float(reference_distance(solutions[1], solutions[0]).mean())
    return Comparison(rows, against.label, many, solutions[0], resolution, rounds, conditions, workload)


def checked_methods(operation: str, methods: Sequence[str | SamplingMethod | MethodSpec]) -> list[MethodSpec]:
    """Return the methods, each once.

    Raises:
        ValueError: there is none, or one is unknown.
    """
    named = [methods] if isinstance(methods, (str, MethodSpec)) else list(methods)
    if not named:
        raise ValueError(error_message(operation, "methods", "is empty", "one name or more", "pass methods=['ddim']"))
    return list({spec.label: spec for spec in (parse_method(method, operation) for method in named)}.values())


def describe_conditions(workload: Workload) -> dict[str, str]:
    """Return machine, versions, date and workload, by name, as reports print them."""
    device = workload.latents.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    return {
        "model": workload.name,
        "schedule": f"{workload.scheduler.config.schedule_type}, {workload.scheduler.config.timestep_spacing} spacing",
        "latents": f"{list(workload.latents.shape)} {workload.latents.dtype}".replace("torch.", ""),
        "options": ", ".join(f"{name} {value}" for name, value in workload.fields.items()) or "defaults",
        "machine": f"{machine}, {threads} thread{'' if threads == 1 else 's'}",
        "backend": backend_for(workload.latents),
        "versions": f"fastdiff {_package_version()}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _package_version() -> str:
    try:
        return importlib.metadata.version("fastdiff-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def cpu_name() -> str:
    """Return the name of the processor, or its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class _Metrics:
    """The metrics of a workload, with the features of its real images computed once."""

    def __init__(self, workload: Workload, reference: Tensor) -> None:
        self.workload, self.reference = workload, reference
        with_features = workload.encoder is not None and workload.real is not None
        self.real = workload.encoder(workload.real) if with_features else None  # type: ignore[misc,arg-type]

    @torch.no_grad()
    def row(
        self, spec: MethodSpec, steps: int, sampler: BaseSampler, samples: Tensor, times: list[float]
    ) -> ComparisonRow:
        seconds = statistics.median(times)
        distances = reference_distance(samples, self.reference)
        images = samples if self.workload.decode is None else self.workload.decode(samples)
        pictures = images.dim() == 4 and min(images.shape[-2:]) >= 3
        frechet = precision = recall = inception = None
        if self.real is not None and self.workload.encoder is not None and len(images) > 3:
            features = self.workload.encoder(images)
            frechet = frechet_distance(self.real, features)
            precision, recall = precision_recall(self.real, features)
        if self.workload.classifier is not None:
            inception = inception_score(self.workload.classifier(images))
        return ComparisonRow(
            spec.label,
            steps,
            len(sampler.table),
            seconds,
            1e3 * seconds / len(samples),
            any(sampler.table.draws_noise),
            estimate(distances),
            compute_sample_variance(samples) if len(samples) > 1 else float("nan"),
            compute_sharpness(images) if pictures else None,
            frechet,
            precision,
            recall,
            inception,
            distances,
            samples,
        )
