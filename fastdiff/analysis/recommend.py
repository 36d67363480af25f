# SPDX-License-Identifier: MIT
"""Choice of a solver, a spacing and a number of steps for a model on this machine, by measurement.

Candidates are screened on the first half of the batch; the best few are measured on the other half, which the choice
among them has not seen when their list was made.  All have the same budget, of time or of model calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import checked_float, checked_integer, error_message
from ..solvers import SamplingMethod
from .compare import checked_methods, describe_conditions
from .metrics import Estimate, estimate, reference_distance
from .progress import with_progress
from .workload import MethodSpec, Workload, parse_method

#: Options that are tried with every method: the spacing of timesteps or noise levels.
SPACINGS = (
    "spacing=trailing",
    "spacing=leading",
    "spacing=linspace",
    "spacing=cosine",
    "sigma_spacing=karras",
    "sigma_spacing=exponential",
    "power=1.25",
    "power=1.5",
    "power=1.75",
    "power=2",
)
#: Candidates that are measured again after the screening.
FINALISTS = 6
#: How far over a budget of time a finalist may be, as a share of it: clocks vary.
SLACK = 0.05


@dataclass(frozen=True)
class Candidate:
    """A finalist.

    Attributes:
        method: with its options, as `parse_method` reads it.
        steps, model_calls: of the loop.
        milliseconds: of the loop over the workload's second half: the median of the rounds.
        distance: to the reference, mean over samples and standard error.
        behind: paired difference to the recommended one, mean and standard error; 0 for itself.
    """

    method: str
    steps: int
    model_calls: int
    milliseconds: float
    distance: Estimate
    behind: Estimate

    @property
    def tied(self) -> bool:
        """Return True if the difference to the recommended one is within two standard errors."""
        return not self.behind.mean > 2 * self.behind.error


@dataclass(frozen=True)
class Recommendation:
    """The result of `recommend`.

    Attributes:
        budget: in words.
        candidates: finalists by distance; the first is recommended.
        reference: the reference in words.
        resolution: mean distance of the reference from itself at half the steps; smaller differences say nothing.
        samples: on which distances were measured.
        screened: how many candidates were compared.
        stochastic: methods left out because they draw noise: their samples are others than the reference's.
        unfit: methods left out because they do not fit the model or the budget, with the reason.
        over_budget: True if every finalist took longer than the budget; the fastest is then the only candidate.
        conditions: machine, versions, date and workload, by name.
    """

    budget: str
    candidates: list[Candidate]
    reference: str
    resolution: float
    samples: int
    screened: int
    stochastic: list[str]
    unfit: dict[str, str]
    over_budget: bool
    conditions: dict[str, str]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def sentence(self) -> str:
        """Return the recommendation in words, with its figures and how sure it is."""
        best = self.best
        said = (
            f"Take {best.method} with {best.steps} steps ({best.model_calls} model calls, {best.milliseconds:.1f} ms "
            f"for {self.samples} samples): {best.distance.mean:.4f} ± {best.distance.error:.4f} from {self.reference}."
        )
        ties = [candidate.method for candidate in self.candidates[1:] if candidate.tied]
        if ties:
            said += f" {self.samples} samples do not tell it from {', '.join(ties)}."
        if self.over_budget:
            said += f" That is over the budget of {self.budget}: the machine slowed down. Call again when it is idle."
        if best.distance.mean < self.resolution:
            said += f" The reference is known to {self.resolution:.2g} only: more reference steps would tell more."
        return said


def recommend(
    workload: Workload,
    *,
    budget_ms: float | None = None,
    steps: int | None = None,
    methods: Sequence[str | SamplingMethod | MethodSpec] | None = None,
    spacings: Sequence[str] = SPACINGS,
    reference: str | SamplingMethod | MethodSpec = "dpmsolver++:spacing=trailing",
    reference_steps: int | None = None,
    rounds: int = 3,
    progress: bool | None = None,
) -> Recommendation:
    """Measure methods and spacings on a model at one budget, and return the closest to a many-step reference.

    Args:
        workload: the model and what it is sampled with; 8 samples or more, of which the second half is timed.
        budget_ms: milliseconds of a whole loop over that half of the batch.
        steps: or model calls of a loop; a method with two calls a step takes half as many steps.
        methods: names with options; None for every registered deterministic method.
        spacings: options of `parse_method`, tried with every method that names none.
        reference: the method of the reference.
        reference_steps: its steps; None for 200, or all of the schedule if it has fewer.
        rounds: how often each finalist is timed.
        progress: show progress bars; None shows them where tqdm is installed.

    Raises:
        TypeError, ValueError: an argument is out of range, or nothing fits the budget.
    """
    operation = "recommend"
    if (budget_ms is None) == (steps is None):
        got, remedy = "is given beside budget_ms" if steps is not None else "is missing", "pass one of the two"
        raise ValueError(error_message(operation, "steps", got, "steps or budget_ms", remedy))
    if budget_ms is not None:
        checked_float(operation, "budget_ms", budget_ms, 0.0, strict=True)
    if steps is not None:
        checked_integer(operation, "steps", steps, 1)
    checked_integer(operation, "rounds", rounds, 1)
    batch = len(workload.latents)
    if batch < 8:
        raise ValueError(
            error_message(operation, "workload", f"has {batch} samples", "8 or more", "pass latents of a larger batch")
        )
    total = len(workload.scheduler.alphas_cumprod)
    many = (
        min(200, total)
        if reference_steps is None
        else checked_integer(operation, "reference_steps", reference_steps, 2)
    )
    against = parse_method(reference, operation)
    if methods is None:
        methods = [name for method in SamplingMethod for name in method.presets]
    chosen = checked_methods(operation, methods)
    search = _Search(workload, budget_ms, steps, slice(0, batch // 2), slice(batch // 2, batch), progress)
    entries = search.fit(chosen, spacings)
    solutions = [
        workload.run(against, count).samples.cpu()
        for count in with_progress((many, many // 2), 2, "reference", progress)
    ]
    finalists = search.screen(entries, solutions[0])
    candidates = search.measure(finalists, solutions[0], rounds)
    return Recommendation(
        f"{budget_ms:g} ms a loop" if budget_ms is not None else f"{steps} model calls",
        candidates,
        f"{many} steps of {against.label}",
        float(reference_distance(solutions[1], solutions[0]).mean()),
        batch - batch // 2,
        len(entries),
        search.stochastic,
        search.unfit,
        not search.within_budget(candidates[0].milliseconds),
        describe_conditions(workload),
    )


class _Search:
    """One run of `recommend`: its budget, the two halves of the batch, and what was left out."""

    def __init__(
        self,
        workload: Workload,
        budget_ms: float | None,
        calls: int | None,
        screening: slice,
        final: slice,
        progress: bool | None,
    ) -> None:
        self.workload, self.budget_ms, self.calls = workload, budget_ms, calls
        self.screening, self.final, self.progress = screening, final, progress
        self.stochastic: list[str] = []
        self.unfit: dict[str, str] = {}

    def fit(self, methods: Sequence[MethodSpec], spacings: Sequence[str]) -> list[tuple[MethodSpec, int]]:
        """Return methods with spacings, each with the most steps that the budget has."""
        fitting: list[MethodSpec] = []
        for spec in methods:
            try:
                noisy = any(spec.sampler(self.workload, 4).table.draws_noise)
            except ValueError as error:  # it does not fit this model: `unfit` says why
                self.unfit[spec.label] = str(error)
                continue
            if noisy:
                self.stochastic.append(spec.label)
            else:
                fitting.append(spec)
        if not fitting:
            got, remedy = "holds no deterministic method that fits", "pass methods=['ddim', 'dpmsolver++']"
            raise ValueError(error_message("recommend", "methods", got, "one or more", remedy))
        per_call = self._milliseconds_per_call(fitting[0]) if self.budget_ms is not None else None
        entries = []
        for spec in fitting:
            for variant in _variants(spec, spacings):
                try:
                    count = self._most_steps(variant, per_call)
                except ValueError as error:
                    self.unfit[variant.label] = str(error)
                    continue
                if count:
                    entries.append((variant, count))
                else:
                    self.unfit[variant.label] = "one step is over the budget"
        if not entries:
            raise ValueError(
                error_message("recommend", "budget_ms", f"is {self.budget_ms}", "time for one step", "raise it")
            )
        return entries

    def screen(self, entries: list[tuple[MethodSpec, int]], reference: Tensor) -> list[tuple[MethodSpec, int]]:
        """Return the entries whose samples of the first half are closest to the reference."""
        scores = []
        for spec, count in with_progress(entries, len(entries), "screening", self.progress):
            samples = self.workload.run(spec, count, samples=self.screening).samples.cpu()
            scores.append(float(reference_distance(samples, reference[self.screening]).mean()))
        order = sorted(range(len(entries)), key=lambda i: scores[i])
        return [entries[i] for i in order[:FINALISTS]]

    def measure(self, finalists: list[tuple[MethodSpec, int]], reference: Tensor, rounds: int) -> list[Candidate]:
        """Measure finalists on the second half, in interleaved rounds; the closest within the budget comes first."""
        times: list[list[float]] = [[] for _ in finalists]
        distances: list[Tensor] = [torch.empty(0)] * len(finalists)
        runs = [(i, spec, count) for _ in range(rounds) for i, (spec, count) in enumerate(finalists)]
        for i, spec, count in with_progress(runs, len(runs), "finalists", self.progress):
            result = self.workload.run(spec, count, samples=self.final)
            times[i].append(1e3 * result.processing_time)
            distances[i] = reference_distance(result.samples.cpu(), reference[self.final])
        milliseconds = [statistics.median(own) for own in times]
        allowed = [i for i in range(len(finalists)) if self.within_budget(milliseconds[i])]
        allowed = allowed or [min(range(len(finalists)), key=lambda i: milliseconds[i])]
        for i in set(range(len(finalists))) - set(allowed):
            self.unfit[finalists[i][0].label] = f"a loop took {milliseconds[i]:.1f} ms"
        allowed.sort(key=lambda i: float(distances[i].mean()))
        best = distances[allowed[0]]
        found = []
        for i in allowed:
            spec, count = finalists[i]
            calls = len(spec.sampler(self.workload, count).table)
            behind = Estimate(0.0, 0.0) if i == allowed[0] else estimate(distances[i] - best)
            found.append(Candidate(spec.label, count, calls, milliseconds[i], estimate(distances[i]), behind))
        return found

    def within_budget(self, milliseconds: float) -> bool:
        """Return True if a loop of so long is within the budget of time, where there is one."""
        return self.budget_ms is None or milliseconds <= (1 + SLACK) * self.budget_ms

    def _milliseconds_per_call(self, spec: MethodSpec) -> float:
        """Return the time of a model call with its step on the second half, from the faster of two warm loops."""
        runs = [self.workload.run(spec, 4, samples=self.final) for _ in range(3)][1:]
        return min(1e3 * run.processing_time / run.steps for run in runs)

    def _most_steps(self, spec: MethodSpec, per_call: float | None) -> int:
        """Return the most steps whose model calls are within the budget, 0 for none."""
        calls = self.calls if per_call is None else int((self.budget_ms or 0.0) / per_call)
        total = len(self.workload.scheduler.alphas_cumprod)
        assert calls is not None
        count = min(calls, total)
        while count > 0 and len(spec.sampler(self.workload, count).table) > calls:
            count = min(count - 1, -(-count * calls // len(spec.sampler(self.workload, count).table)))
        return count


def _variants(spec: MethodSpec, spacings: Sequence[str]) -> list[MethodSpec]:
    """Return a method with each spacing, or alone where it names one."""
    own = spec.spacing is not None or "sigma_spacing" in spec.fields or "use_karras_sigmas" in spec.fields
    return [spec] if own else [parse_method(f"{spec.label}:{spacing}", "recommend") for spacing in spacings]
