# SPDX-License-Identifier: MIT
"""Image-to-image, inpainting and RePaint against loops written out in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.editing import Process, blend, expand_mask, image_to_image, inpaint, repaint, repaint_schedule
from fastdiff.guidance import GuidedModel
from fastdiff.ops import backends
from fastdiff.sampling import BlendTarget, Stepper
from fastdiff.schedules.levels import Levels
from fastdiff.solvers import Prediction, ddim
from fastdiff.solvers.affine import PREDICTION, SAMPLE
from fastdiff.solvers.table import StepTable
from support.gaussian_model import GaussianModel, sampler_of
from support.oracle import assert_same_bits
from support.recorded_operators import RecordedOperators

SHAPE = (2, 3, 4, 5)
#: The steps are those of the loop below but for their rounding: 20 of them, with coefficients and values below 10.
CLOSE = {"rtol": 0.0, "atol": 20 * 10 * 16 * 2.0**-53}


def doubles(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]


def box() -> Tensor:
    mask = torch.zeros(1, 1, *SHAPE[2:], dtype=torch.bool)
    mask[..., 1:3, 2:] = True
    return mask


def ddim_step(
    model: GaussianModel, levels: Levels, i: int, x: Tensor, std: float = 0.0, z: Tensor | None = None
) -> Tensor:
    t, s = levels[i], levels[i + 1]
    epsilon = model(x, torch.tensor([t.timestep] * len(x)))
    x0 = (x - t.sigma * epsilon) / t.alpha
    prev = s.alpha * x0 + math.sqrt(s.sigma**2 - std**2) * epsilon
    return prev if z is None else prev + std * z


@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.55, 9), (0.05, 19), (0.0, 20)])
def test_image_to_image_starts_in_the_middle(strength: float, first: int) -> None:
    sampler = sampler_of("ddim", 20)
    model, levels, (image, noise) = GaussianModel(sampler), sampler.levels(20), doubles(2)
    x = levels[min(first, 19)].alpha * image + levels[min(first, 19)].sigma * noise if first < 20 else image
    for i in range(first, 20):
        x = ddim_step(model, levels, i, x)
    model.calls = 0
    got = image_to_image(sampler, model, image, strength=strength, noise=noise)
    torch.testing.assert_close(got, x, **CLOSE)
    assert model.calls == 20 - first


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_inpainting_blends_known_image_at_each_level(soft: bool) -> None:
    sampler = sampler_of("ddim", 20)
    model, levels, (image, noise) = GaussianModel(sampler), sampler.levels(20), doubles(2)
    mask = torch.rand(1, 1, *SHAPE[2:], dtype=torch.float64) if soft else box()
    x = levels[0].alpha * image + levels[0].sigma * noise
    for i in range(20):
        known = levels[i + 1].alpha * image + levels[i + 1].sigma * noise
        x = mask * ddim_step(model, levels, i, x) + (1 - mask.double()) * known
    got = inpaint(sampler, model, image, mask, noise=noise)
    torch.testing.assert_close(got, x, **CLOSE)
    if not soft:
        kept = ~mask.expand_as(image)
        assert_same_bits([got[kept]], [image[kept]])


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}), ("ddim", {"eta": 1.0}), ("dpm_solver", {}), ("dpm_solver", {"solver_order": 3}), ("heun", {}),
    ("dpm_solver", {"solver_mode": "singlestep"}), ("euler", {"s_churn": 5.0}), ("euler_ancestral", {}),
    ("unipc", {"solver_order": 3}), ("unipc", {"use_corrector": False}), ("unipc", {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "fields"), METHODS, ids=str)
def test_every_solver_inpaints_and_keeps_bits(method: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    sampler = sampler_of(method, 6, **fields)
    model, image = GaussianModel(sampler), torch.randn(SHAPE).to(dtype)
    with RecordedOperators() as recorded:  # a dispatch mode makes each step one operator that is seen
        got = inpaint(sampler, model, image, box(), seeds=[4, 5])
    steps = [name for name in map(str, recorded.names) if name.startswith("fastdiff.step")]
    if backends.extension is not None:  # the reference is torch's operators
        # One pass a row, but for a solver that keeps two outputs; and one for the first sample.
        crowded = fields.get("solver_mode") == "singlestep" or (method, fields) == ("unipc", {"solver_order": 3})
        passes = 2 if crowded else 1
        assert len(steps) == passes * len(sampler.table) + 1
    kept = ~box().expand_as(image)
    assert_same_bits([got[kept]], [image[kept]])
    assert bool(torch.isfinite(got).all())
    # A sample of a batch is what it is alone.
    assert_same_bits([inpaint(sampler, model, image[1:], box(), seeds=[5])], [got[1:]])


def two_kept(levels: Levels, prediction: Prediction) -> StepTable:
    """DDIM, with two outputs kept for nothing: no room is left for the target of a mask."""
    kept = (SAMPLE, PREDICTION)
    rows = tuple(replace(row, kept=kept, slots=(0, 1)) for row in ddim(levels, prediction))
    return StepTable(rows, drop_unread=False)


def test_solver_without_room_blends_in_a_second_pass() -> None:
    sampler = sampler_of("ddim", 6)
    model, (image, noise) = GaussianModel(sampler), doubles(2)
    levels = sampler.levels(6)
    mask = torch.rand(SHAPE, dtype=torch.float64).round(decimals=1)
    one = inpaint(Process(levels), model, image, mask, noise=noise)
    two = inpaint(Process(levels, two_kept), model, image, mask, noise=noise)
    # A sample that is rounded between the passes: in float64 it is not.
    assert_same_bits([two], [one])
    with pytest.raises(ValueError, match=r"^step: table keeps two outputs a step.*second pass"):
        Stepper(two_kept(levels, Prediction()), target=BlendTarget(image, noise, [(1.0, 0.0)] * 6))


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_inpainting_blends_after_each_step(order: int) -> None:
    sampler = sampler_of("unipc", 6, solver_order=order)
    model, levels, (image, noise) = GaussianModel(sampler), sampler.levels(6), doubles(2)
    mask = torch.rand(1, 1, *SHAPE[2:], dtype=torch.float64)
    stepper, x = sampler.stepper(), levels[0].alpha * image + levels[0].sigma * noise
    for i in range(6):
        x = stepper.step(x, model(x, torch.tensor([levels[i].timestep])))
        x = mask * x + (1 - mask) * (levels[i + 1].alpha * image + levels[i + 1].sigma * noise)
    got = inpaint(sampler, model, image, mask, noise=noise)
    torch.testing.assert_close(got, x, **CLOSE)


def test_inpainting_with_guidance_calls_model_once_a_step() -> None:
    sampler = sampler_of("dpm_solver", 5)
    own, image = GaussianModel(sampler), torch.randn(SHAPE)
    calls = []

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        calls.append(len(x))
        return own(x, t) + condition[:, None, None, None]

    condition = torch.tensor([0.1, -0.2])
    guided = GuidedModel(model, condition, torch.zeros(2), guidance_scale=3.0)
    got = inpaint(sampler, guided, image, box(), seeds=[1, 2])
    plain = inpaint(sampler, lambda x, t: own(x, t) + 3.0 * condition[:, None, None, None], image, box(), seeds=[1, 2])
    # u + 3·(c − u) and the sum of three terms differ by roundings of float32, over 5 steps.
    torch.testing.assert_close(got, plain, rtol=0, atol=5 * 32 * 2.0**-24)
    assert calls == [4] * 5


# --- RePaint ---------------------------------------------------------------------------------------------------------


def test_repaint_schedule_walks_each_stretch_so_often() -> None:
    assert repaint_schedule(4, 10, 5) == [4, 3, 2, 1, 0]
    assert repaint_schedule(5, 2, 2) == [5, 4, 3, 4, 5, 4, 3, 2, 1, 2, 3, 2, 1, 0]
    for n, length, walks in ((250, 10, 10), (7, 1, 3), (12, 5, 4)):
        visited = repaint_schedule(n, length, walks)
        assert (visited[0], visited[-1]) == (n, 0)
        moves = [b - a for a, b in itertools.pairwise(visited)]
        assert set(moves) == {-1, 1}
        jumps = len(range(1, n - length + 1, length)) * (walks - 1)
        assert moves.count(1) == jumps * length
        assert moves.count(-1) == n + jumps * length


def test_repaint_equals_its_algorithm() -> None:
    sampler = sampler_of("ddim", 6, eta=1.0)
    model, levels, (image, start) = GaussianModel(sampler), sampler.levels(6), doubles(2)
    seeds, mask = [8, 9], box()

    def drawn(visit: int, draw: int) -> Tensor:
        purpose = fastdiff.philox.purpose_of_draw(draw)
        return fastdiff.randn(SHAPE, seeds, step=visit, purpose=purpose, dtype=torch.float64)

    x = levels[0].alpha * image + levels[0].sigma * start
    visited = repaint_schedule(6, 2, 2)
    for visit, (before, after) in enumerate(itertools.pairwise(visited)):
        i = 6 - max(before, after)
        t, s = levels[i], levels[i + 1]
        ratio = t.alpha / s.alpha
        if after > before:
            x = ratio * x + math.sqrt(t.sigma**2 - (ratio * s.sigma) ** 2) * drawn(visit, 0)
            continue
        std = s.sigma / t.sigma * math.sqrt(1 - ratio**2)
        painted = ddim_step(model, levels, i, x, std, drawn(visit, 0))
        x = torch.where(mask, painted, s.alpha * image + s.sigma * drawn(visit, 1))
    got = repaint(sampler, model, image, mask, noise=start, seeds=seeds, jump_length=2, jump_n_sample=2)
    torch.testing.assert_close(got, x, **CLOSE)
    again = repaint(sampler, model, image[:1], mask, noise=start[:1], seeds=seeds[:1], jump_length=2, jump_n_sample=2)
    assert_same_bits([again], [got[:1]])


def test_repaint_refuses_solver_with_history() -> None:
    sampler = sampler_of("dpm_solver", 6)
    with pytest.raises(ValueError, match=r"^repaint: process keeps history"):
        repaint(sampler, GaussianModel(sampler), torch.zeros(SHAPE), box())


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_second_pass_blends_like_formula() -> None:
    x, known, noise = (torch.randn(SHAPE) for _ in range(3))
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:])
    got = blend(x, known, mask, noise=noise, alpha=0.6, sigma=0.8, out=x.clone())
    wide = mask.double()
    expected = (1 - wide) * x.double() + wide * (0.6 * known.double() + 0.8 * noise.double())
    # Six roundings of sums of at most a few units.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=6 * 8 * 2.0**-24)


def test_malformed_edits_are_refused_in_one_sentence() -> None:
    sampler, image = sampler_of("ddim", 4), torch.zeros(SHAPE)
    model = GaussianModel(sampler)
    for mask, kind, message in (
        (torch.ones(3, 4, 4), ValueError, r"mask has shape \[3, 4, 4\], expected a shape that broadcasts to"),
        (torch.ones(1, 1, 1, 4, 5), ValueError, "mask has shape"),
        (torch.ones(4, 5) * 1.5, ValueError, "mask holds 1.5 to 1.5, expected numbers from 0 to 1"),
        (torch.full((4, 5), math.nan), ValueError, "mask holds nan"),
        (torch.ones(4, 5, dtype=torch.int64), TypeError, "mask has dtype torch.int64"),
        (torch.ones(4, 5, device="meta"), ValueError, "mask is on meta"),
        ([[1]], TypeError, "mask is a list"),
    ):
        with pytest.raises(kind, match="^editing: " + message) as raised:
            inpaint(sampler, model, image, mask)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
    assert expand_mask(torch.ones(4, 5, dtype=torch.bool), image).shape == image.shape
    for given, message in (
        ({"strength": 1.5}, "strength is 1.5"),
        ({"noise": torch.zeros(1)}, "noise has shape"),
        ({"seeds": [1, 2], "generator": torch.Generator()}, "generator is given beside seeds"),
    ):
        with pytest.raises(ValueError, match="^editing: " + message):
            image_to_image(sampler, model, image, **given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^editing: process is a int, expected a sampler or a Process"):
        image_to_image(3, model, image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^blend: noise is missing"):
        blend(image, image, torch.ones(SHAPE), sigma=0.5)
    with pytest.raises(ValueError, match=r"^step: mask is given, expected none without a target"):
        sampler.stepper().step(image, image, mask=image)
    target = BlendTarget(image, image, Process.of(sampler).reached(sampler.table))
    with pytest.raises(ValueError, match=r"^step: mask has shape \[2, 1, 4, 5\].*fastdiff\.editing\.expand_mask"):
        Stepper(sampler.table, target=target).step(image, image, mask=torch.ones(2, 1, 4, 5))
    assert model.calls == 0
    assert not image.any()
