# SPDX-License-Identifier: MIT
"""Increments of torchsde's Brownian tree as one weighted sum of normal numbers instead of a traversal node by node.

diffusers' SDE solvers ask a `BrownianTreeNoiseSampler` for W(t1) − W(t0).  Its `BrownianInterval` halves [start, end]
until both times are end points, and in each interval that it halves draws Z from the interval's own seed: with W known
over [a, b] and m the midpoint,

    W(m) − W(a) = (m − a)/(b − a)·W + √((m − a)(b − m)/(b − a))·Z                 (Lévy's construction of the bridge)

So every increment is a sum of W = W(end) − W(start) and about twenty Z per time, with weights that depend only on the
times:

    W(t) − W(start) = f·W + Σ w·Z        over the intervals that are halved to reach t

torchsde makes a tensor for each of these intervals; here the numbers are added up as they are drawn
(csrc/torch_bits/seeded_sum.h).  Two times share the intervals that contain both; the sum Σ w·Z over the smaller
intervals of one time is its partial sum.  The partial sums of the last few times are cached: a loop usually asks next
for the adjacent interval, so a step draws the numbers of one time.  Weights are float64; the sum is float32, like
torchsde's.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..extension import extension
from .torch_normals import why_by_torch

_extension: Any = extension  # not used if it is None: torchsde then draws
#: Partial sums cached per tree: those of both times of the last interval, and one more.
_MAX_PARTIAL_SUMS = 3
#: Cache size for expansions and for the arguments of samplers; a step needs two.
_CACHE_SIZE = 4096
#: Relative distance outside a tree's range that is attributed to rounding: noise levels are float32 and pass through
#: a logarithm and back. torchsde uses the end of the range there, with a warning.
_RANGE_TOLERANCE = 2.0**-20

#: A halved interval: its index within its depth, and its depth, as torchsde numbers them.
Node = tuple[int, int]


@dataclass(frozen=True)
class BridgeExpansion:
    """Weights of W(t) − W(start) over W = W(end) − W(start) and the draws of the halved intervals, root first.

    Attributes:
        fraction: weight of W.
        nodes: the halved intervals.
        weights: weight of each interval's draw.
    """

    fraction: float
    nodes: tuple[Node, ...]
    weights: tuple[float, ...]


@functools.lru_cache(_CACHE_SIZE)
def bridge_expansion(time: float, start: float, end: float, digits: int) -> BridgeExpansion:
    """Expand W(time) − W(start), start ≤ time ≤ end; all times and midpoints are rounded to `digits` decimal digits."""
    halves: list[tuple[Node, float, float, float]] = []
    index, depth, left, right = 0, 0, start, end
    while left < time < right:
        middle = round(0.5 * (right + left), digits)
        halves.append(((index, depth), left, middle, right))
        index, depth = 2 * index + (time > middle), depth + 1
        if time > middle:
            left = middle
        else:
            right = middle
    # From the smallest interval up: `fraction` is the weight of the increment over the interval that is a half of this.
    fraction, weights = 1.0 if time > left else 0.0, []
    for _, left, middle, right in reversed(halves):
        length = right - left
        deviation = math.sqrt((middle - left) * (right - middle) / length)
        weights.append(deviation * (1.0 - fraction if time > middle else fraction))
        share = (middle - left) / length
        fraction = share + fraction * (1.0 - share) if time > middle else fraction * share
    return BridgeExpansion(fraction, tuple(node for node, *_ in halves), tuple(reversed(weights)))


class Tree:
    """Increments of one `torchsde.BrownianInterval`, computed from its attributes without calling it.

    Attributes:
        total: W(end) − W(start), float32.
    """

    def __init__(self, interval: Any) -> None:
        self._start, self._end = interval._start, interval._end
        self._digits = -int(math.log10(interval._tol))  # torchsde's formula
        self._entropy, self._pool_size = int(interval._entropy), int(interval._pool_size)
        self.total: Tensor = interval._w_h[0]
        #: For each time, the number of leading intervals left out and Σ w·Z over the others. The dict is replaced,
        #: never mutated: threads may share a tree.
        self._partial_sums: dict[float, tuple[int, Tensor]] = {}

    def increment(self, before: float, after: float, scale: float, out: Tensor) -> bool:
        """Fill `out` with scale·(W(after) − W(before)); return False if torchsde's interval has to draw.

        Args:
            before, after: times, `before` < `after`, within the tree's range up to rounding.
            out: a contiguous tensor like the tree's.
        """
        times = [round(self._clamped(time), self._digits) for time in (before, after)]
        if not self._start <= times[0] < times[1] <= self._end:
            return False
        expansions = [bridge_expansion(time, self._start, self._end, self._digits) for time in times]
        common = 0
        for node, other_node in zip(expansions[0].nodes, expansions[1].nodes, strict=False):
            if node != other_node:
                break
            common += 1
        node_weights: dict[Node, float] = {}
        bases, base_weights = [self.total], [expansions[1].fraction - expansions[0].fraction]
        for time, expansion, sign in zip(times, expansions, (-1.0, 1.0), strict=True):
            left_out, partial_sum = self._partial_sum(time, expansion, common)
            for depth, (node, weight) in enumerate(zip(expansion.nodes, expansion.weights, strict=True)):
                if partial_sum is None or depth < left_out:  # otherwise the partial sum includes it
                    node_weights[node] = node_weights.get(node, 0.0) + sign * weight
            if partial_sum is not None:
                bases.append(partial_sum)
                base_weights.append(sign)
        return self._sum(out, bases, base_weights, node_weights, scale)

    def _clamped(self, time: float) -> float:
        """Return the end of the range for a time that lies outside it by rounding, else the time itself."""
        nearest = min(max(time, self._start), self._end)
        return nearest if abs(time - nearest) <= _RANGE_TOLERANCE * nearest else time

    def _partial_sum(self, time: float, expansion: BridgeExpansion, common: int) -> tuple[int, Tensor | None]:
        """Return the number of leading intervals left out and the cached or new sum over the rest; None if empty."""
        cached = self._partial_sums.get(time)
        if cached is not None:
            return cached
        node_weights = dict(zip(expansion.nodes[common:], expansion.weights[common:], strict=True))
        if not node_weights:
            return common, None
        partial_sum = torch.empty_like(self.total)
        if not self._sum(partial_sum, [], [], node_weights, 1.0):
            return common, None  # the sum over all intervals is refused as well
        self._partial_sums = dict([*self._partial_sums.items(), (time, (common, partial_sum))][-_MAX_PARTIAL_SUMS:])
        return common, partial_sum

    def _sum(self, out: Tensor, bases: list[Tensor], base_weights: list[float], node_weights: dict[Node, float],
             scale: float) -> bool:  # fmt: skip
        """Fill `out` with scale·(Σ weight·base + Σ weight·Z); return False if the extension cannot draw here."""
        node_weights = {node: weight for node, weight in node_weights.items() if weight != 0.0}
        seeds = _extension.spawned_seeds(self._entropy, list(node_weights), self._pool_size)
        weights = [scale * weight for weight in node_weights.values()]
        return bool(_extension.seeded_sum(out, bases, [scale * weight for weight in base_weights], seeds, weights))


#: The trees of each of diffusers' `BatchedBrownianTree`: one, or one per sample.
_TREES: weakref.WeakKeyDictionary[Any, list[Tree]] = weakref.WeakKeyDictionary()


def sampled(sampler: Any, sigma: float, sigma_next: float) -> Tensor:
    """Return the noise of ``sampler(sigma, sigma_next)`` for a scheduler's noise sampler, equal up to rounding.

    Args:
        sampler: diffusers' `BrownianTreeNoiseSampler`, whose float32 numbers on the CPU are drawn by the extension; any
            other sampler, and this one outside its range, is called.
        sigma, sigma_next: the sampler's arguments.

    Returns:
        (W(t1) − W(t0)) / √|t1 − t0|, shaped like the samples.
    """
    drawn = _draw_in_extension(sampler, sigma, sigma_next)
    return sampler(sigma, sigma_next) if drawn is None else drawn


def _draw_in_extension(sampler: Any, sigma: float, sigma_next: float) -> Tensor | None:
    """Draw a sampler's noise in the extension; None if the sampler has to be called."""
    trees = _trees_of(sampler)
    if trees is None:
        return None
    before, after, direction, deviation = _times(sampler.transform, sigma, sigma_next, torch.get_default_dtype())
    if before == after:
        return None
    scale = sampler.tree.sign * direction / deviation
    like, batched = trees[0].total, sampler.tree.batched
    out = torch.empty((len(trees), *like.shape) if batched else like.shape, dtype=like.dtype, device=like.device)
    for tree, part in zip(trees, out if batched else [out], strict=True):
        if not tree.increment(before, after, scale, part):
            return None
    return out


@functools.lru_cache(_CACHE_SIZE)
def _times(
    transform: Callable[[Tensor], Tensor], sigma: float, sigma_next: float, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """Return the earlier time, the later time, −1 if t1 < t0 (else 1), and √|t1 − t0|.

    They are computed in torch's arithmetic for the default dtype, like the sampler computes them.
    """
    t0, t1 = (transform(torch.as_tensor(value, dtype=dtype, device="cpu")) for value in (sigma, sigma_next))
    before, after = sorted((float(t0), float(t1)))
    return before, after, 1.0 if t0 < t1 else -1.0, float((t1 - t0).abs().sqrt())


def _trees_of(sampler: Any) -> list[Tree] | None:
    """Return a sampler's trees; None if it is not diffusers' own or the extension cannot draw its numbers."""
    if type(sampler) is not _sampler_class():
        return None
    trees = _TREES.get(sampler.tree)
    if trees is None:
        intervals = sampler.tree.trees
        if not all(map(is_supported, intervals)) or why_by_torchsde():
            return None
        trees = _TREES[sampler.tree] = [Tree(interval) for interval in intervals]
    return trees


def is_supported(interval: Any) -> bool:
    """Return True for an interval with the options that diffusers uses, float32 on the CPU."""
    total = interval._w_h[0]
    return bool(
        interval._halfway_tree
        and not interval._have_H
        and total.dtype == torch.float32
        and total.device.type == "cpu"
        and total.numel() >= 16
        and total.is_contiguous()
        and 0 <= int(interval._entropy) < 2**64
    )


@functools.cache
def _sampler_class() -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    return BrownianTreeNoiseSampler


def sampler_maker(original: type) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None:
    """Return the function that makes a diffusers class's noise sampler in the first step of a loop.

    It takes the scheduler's attributes and the step's arguments.  None for a class that is not known to have a sampler.
    """
    return _MAKERS.get(original.__name__)


def _sampler_of_sde(attributes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Make DPMSolverSDE's sampler: over the schedule's range, with the seed of the configuration."""
    sigmas = attributes["sigmas"]
    lowest, highest = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    return _sampler_class()(arguments["sample"], lowest, highest, attributes["noise_sampler_seed"])


def _sampler_of_cosine(attributes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Make CosineDPMSolverMultistep's sampler: over the configuration's range, with the generators' initial seeds."""
    generator, sample, output = arguments.get("generator"), arguments["sample"], arguments["model_output"]
    seed = None
    if generator is not None:
        seed = [g.initial_seed() for g in generator] if isinstance(generator, list) else generator.initial_seed()
    like = output.new_empty(sample.shape, dtype=torch.promote_types(sample.dtype, output.dtype))
    config = attributes["_internal_dict"]
    return _sampler_class()(like, sigma_min=config["sigma_min"], sigma_max=config["sigma_max"], seed=seed)


_MAKERS = {
    "DPMSolverSDEScheduler": _sampler_of_sde,
    "CosineDPMSolverMultistepScheduler": _sampler_of_cosine,
}


def why_by_torchsde() -> str:
    """Return why torchsde draws a tree's float32 numbers on the CPU here, as a clause; empty if the extension does."""
    return why_by_torch() or _difference()


@functools.cache
def _difference() -> str:
    """Compare a small tree with the installed torchsde's; return the difference as a clause, or ""."""
    import torchsde

    interval = torchsde.BrownianInterval(
        t0=0.03, t1=14.6, size=(16,), dtype=torch.float32, device="cpu", entropy=2**40 + 3, tol=1e-6, pool_size=24,
        halfway_tree=True,
    )  # fmt: skip
    tree, out = Tree(interval), torch.empty(16, device="cpu")
    for before, after in ((2.5, 14.6), (1.2, 2.5), (0.03, 1.2), (0.0301, 2.5), (7.315, 9.0)):
        # At most 25 roundings on each side, of numbers below 4·√14.6.
        if not tree.increment(before, after, 1.0, out) or (out - interval(before, after)).abs().max() > 1e-4:
            return f"torchsde {torchsde.__version__} builds its tree otherwise"
    return ""
