# SPDX-License-Identifier: MIT
"""The noise of torchsde's Brownian tree, one weighted sum of normal numbers instead of a walk from node to node.

diffusers' SDE solvers ask a `BrownianTreeNoiseSampler` for W(t1) − W(t0).  Its `BrownianInterval` halves [start, end]
until it meets both times, and in each interval that it halves draws Z from a seed of the interval's own: with W known
over [a, b] and m the middle,

    W(m) − W(a) = (m − a)/(b − a)·W + √((m − a)(b − m)/(b − a))·Z                 (Lévy's construction of the bridge)

So every increment is a sum of W(end) − W(start) and some twenty Z a time, with weights that depend on times alone:

    W(t) − W(start) = f·W + Σ w·Z        over the intervals that are halved on the way to t

torchsde makes a tensor of every interval on the way; here the numbers are added up as they are drawn
(csrc/torch_bits/seeded_sum.h).  Two times have the intervals around both in common, and beneath those each has a rest
of its own, Σ w·Z over the smaller ones.  The rests of the last few times are kept, since a loop asks next for the
interval beside: a step then draws the numbers of one time.  Weights are float64; the sum is float32, as torchsde's is.
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

_extension: Any = extension  # asked for nothing where it is None: torchsde then draws
#: Rests that are kept for a tree: of the two times of the last interval, and of the one before.
_MOST_RESTS = 3
#: Ways, and arguments of samplers, that are kept; a step needs two.
_MOST_WAYS = 4096
#: How far outside its range a tree is asked by rounding alone, as a share of the time: noise levels are float32, and
#: come from logarithms and back. torchsde takes the end of the range there, with a warning.
_ROUNDED = 2.0**-20

#: An interval that is halved: its place among those of its depth, and its depth, as torchsde numbers them.
Node = tuple[int, int]


@dataclass(frozen=True)
class Way:
    """W(t) − W(start) in terms of W = W(end) − W(start) and of what is drawn in the intervals on the way, root first.

    Attributes:
        fraction: of W.
        nodes, weights: of what is drawn.
    """

    fraction: float
    nodes: tuple[Node, ...]
    weights: tuple[float, ...]


@functools.lru_cache(_MOST_WAYS)
def way_to(time: float, start: float, end: float, digits: int) -> Way:
    """The way to a time within [start, end]; all three, and every middle, are rounded to so many decimal digits."""
    halves: list[tuple[Node, float, float, float]] = []
    place, depth, left, right = 0, 0, start, end
    while left < time < right:
        middle = round(0.5 * (right + left), digits)
        halves.append(((place, depth), left, middle, right))
        place, depth = 2 * place + (time > middle), depth + 1
        if time > middle:
            left = middle
        else:
            right = middle
    # From the smallest interval up: `fraction` is that of the interval below, whose increment is one of two parts.
    fraction, weights = 1.0 if time > left else 0.0, []
    for _, left, middle, right in reversed(halves):
        length = right - left
        deviation = math.sqrt((middle - left) * (right - middle) / length)
        weights.append(deviation * (1.0 - fraction if time > middle else fraction))
        share = (middle - left) / length
        fraction = share + fraction * (1.0 - share) if time > middle else fraction * share
    return Way(fraction, tuple(node for node, *_ in halves), tuple(reversed(weights)))


class Tree:
    """Increments of one `torchsde.BrownianInterval`, which is asked for nothing but its attributes.

    Attributes:
        total: W(end) − W(start), float32.
    """

    def __init__(self, interval: Any) -> None:
        self._start, self._end = interval._start, interval._end
        self._digits = -int(math.log10(interval._tol))  # as torchsde counts them
        self._entropy, self._pool_size = int(interval._entropy), int(interval._pool_size)
        self.total: Tensor = interval._w_h[0]
        #: By time, how many of its first intervals are left out, and Σ w·Z over the others. Never changed, but
        #: replaced: threads may share a tree.
        self._rests: dict[float, tuple[int, Tensor]] = {}

    def increment(self, before: float, after: float, scale: float, out: Tensor) -> bool:
        """Fill `out` with scale·(W(after) − W(before)); False where the interval itself has to be asked.

        Args:
            before, after: `before` < `after`, within the tree's range but for its rounding.
            out: contiguous, like the tree's tensors.
        """
        times = [round(self._within(time), self._digits) for time in (before, after)]
        if not self._start <= times[0] < times[1] <= self._end:
            return False
        ways = [way_to(time, self._start, self._end, self._digits) for time in times]
        common = 0
        for mine, other in zip(ways[0].nodes, ways[1].nodes, strict=False):
            if mine != other:
                break
            common += 1
        wanted: dict[Node, float] = {}
        bases, base_weights = [self.total], [ways[1].fraction - ways[0].fraction]
        for time, way, sign in zip(times, ways, (-1.0, 1.0), strict=True):
            left_out, rest = self._rest(time, way, common)
            for place, (node, weight) in enumerate(zip(way.nodes, way.weights, strict=True)):
                if rest is None or place < left_out:  # else it is part of the rest
                    wanted[node] = wanted.get(node, 0.0) + sign * weight
            if rest is not None:
                bases.append(rest)
                base_weights.append(sign)
        return self._sum(out, bases, base_weights, wanted, scale)

    def _within(self, time: float) -> float:
        """A time that is outside the tree's range by rounding alone, brought to its end."""
        nearest = min(max(time, self._start), self._end)
        return nearest if abs(time - nearest) <= _ROUNDED * nearest else time

    def _rest(self, time: float, way: Way, common: int) -> tuple[int, Tensor | None]:
        """The rest of a time, kept or made: how many intervals are left out, and the sum; None where it is empty."""
        kept = self._rests.get(time)
        if kept is not None:
            return kept
        beneath = dict(zip(way.nodes[common:], way.weights[common:], strict=True))
        if not beneath:
            return common, None
        rest = torch.empty_like(self.total)
        if not self._sum(rest, [], [], beneath, 1.0):
            return common, None  # so will be the sum that it is for
        self._rests = dict([*self._rests.items(), (time, (common, rest))][-_MOST_RESTS:])
        return common, rest

    def _sum(self, out: Tensor, bases: list[Tensor], base_weights: list[float], drawn: dict[Node, float],
             scale: float) -> bool:  # fmt: skip
        drawn = {node: weight for node, weight in drawn.items() if weight != 0.0}
        seeds = _extension.spawned_seeds(self._entropy, list(drawn), self._pool_size)
        weights = [scale * weight for weight in drawn.values()]
        return bool(_extension.seeded_sum(out, bases, [scale * weight for weight in base_weights], seeds, weights))


#: Of diffusers' trees, one or one a sample.
_TREES: weakref.WeakKeyDictionary[Any, list[Tree]] = weakref.WeakKeyDictionary()


def sampled(sampler: Any, sigma: float, sigma_next: float) -> Tensor:
    """``sampler(sigma, sigma_next)`` of a scheduler's noise sampler: the same noise, to rounding.

    Args:
        sampler: diffusers' `BrownianTreeNoiseSampler`, whose numbers are drawn here where they are float32 on the CPU;
            anything else, and that too outside its range, is called.
        sigma, sigma_next: its arguments.

    Returns:
        (W(t1) − W(t0)) / √|t1 − t0|, shaped like the samples.
    """
    drawn = _drawn(sampler, sigma, sigma_next)
    return sampler(sigma, sigma_next) if drawn is None else drawn


def _drawn(sampler: Any, sigma: float, sigma_next: float) -> Tensor | None:
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


@functools.lru_cache(_MOST_WAYS)
def _times(
    transform: Callable[[Tensor], Tensor], sigma: float, sigma_next: float, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """The earlier and the later time that a sampler asks its trees for, −1 where it goes back, and √|t1 − t0|, in
    torch's arithmetic for numbers of the default dtype, as the sampler has them."""
    t0, t1 = (transform(torch.as_tensor(value, dtype=dtype, device="cpu")) for value in (sigma, sigma_next))
    before, after = sorted((float(t0), float(t1)))
    return before, after, 1.0 if t0 < t1 else -1.0, float((t1 - t0).abs().sqrt())


def _trees_of(sampler: Any) -> list[Tree] | None:
    """The trees behind a sampler; None where it is none of diffusers' own, or draws what is not drawn here."""
    if type(sampler) is not _sampler_class():
        return None
    trees = _TREES.get(sampler.tree)
    if trees is None:
        intervals = sampler.tree.trees
        if not all(map(_is_plain, intervals)) or why_by_torchsde():
            return None
        trees = _TREES[sampler.tree] = [Tree(interval) for interval in intervals]
    return trees


def _is_plain(interval: Any) -> bool:
    """Whether an interval is such as diffusers makes, float32 on the CPU."""
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
    """What makes the noise sampler of a diffusers class in the first step of a loop, from the scheduler's attributes
    and the step's arguments; None for a class that is not known to have one."""
    return _MAKERS.get(original.__name__)


def _sampler_of_sde(attributes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Over the schedule's own range, from the seed in the configuration."""
    sigmas = attributes["sigmas"]
    lowest, highest = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    return _sampler_class()(arguments["sample"], lowest, highest, attributes["noise_sampler_seed"])


def _sampler_of_cosine(attributes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Over the configuration's range, from the seeds that the generators began with."""
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
    """Why torchsde itself draws a tree's float32 numbers on the CPU here, as a clause; empty where fastdiff does."""
    return why_by_torch() or _difference()


@functools.cache
def _difference() -> str:
    """What the installed torchsde does otherwise, found out by a small tree; empty for nothing."""
    import torchsde

    interval = torchsde.BrownianInterval(
        t0=0.03, t1=14.6, size=(16,), dtype=torch.float32, device="cpu", entropy=2**40 + 3, tol=1e-6, pool_size=24,
        halfway_tree=True,
    )  # fmt: skip
    tree, out = Tree(interval), torch.empty(16, device="cpu")
    for before, after in ((2.5, 14.6), (1.2, 2.5), (0.03, 1.2), (0.0301, 2.5), (7.315, 9.0)):
        # Steps of twice 25 roundings, of numbers below 4·√14.6.
        if not tree.increment(before, after, 1.0, out) or (out - interval(before, after)).abs().max() > 1e-4:
            return f"torchsde {torchsde.__version__} builds its tree otherwise"
    return ""
