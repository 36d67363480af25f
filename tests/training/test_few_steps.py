# SPDX-License-Identifier: MIT
"""Progressive and consistency distillation beside formulas written in float64, on a 2-D mixture with a known score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdiff import create_noise_scheduler, create_sampler, randn
from fastdiff.noise import sample_seeds
from fastdiff.philox import Purpose
from fastdiff.training import (
    ConsistencyObjective,
    ConsistencyOptions,
    DiffusionConfig,
    ProgressiveObjective,
    Teacher,
    Trainer,
    TrainingBatch,
)
from fastdiff.training.few_steps.job import DistillOptions
from fastdiff.training.few_steps.progressive import progressive_rounds, trailing_schedule
from fastdiff.training.losses.timestep_draws import draw_timesteps

T = 64
SCHEDULE = create_noise_scheduler("cosine", num_train_timesteps=T, clip_sample=False)
MEANS = torch.tensor([[1.0, 0.5], [-0.7, 0.2], [0.1, -1.2]], dtype=torch.float64)
STD = 0.3


def _scales(t: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ ``[B, 1]`` at timesteps; −1 is the clean end."""
    signal = torch.cat([SCHEDULE.alphas_cumprod, torch.ones(1, dtype=torch.float64)])[t.long()]
    return signal.sqrt()[:, None], (1 - signal).sqrt()[:, None]


def _velocity(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """v of the mixture, from the posterior mean of x0."""
    a, s = _scales(t)
    variance = (a * STD) ** 2 + s**2
    centers = a[:, None] * MEANS
    weights = torch.softmax(-(x[:, None] - centers).square().sum(-1) / (2 * variance), dim=1)
    means = MEANS + (a * STD**2 / variance)[:, None] * (x[:, None] - centers)
    x0 = (weights[..., None] * means).sum(1)
    return (a * x - x0) / s


class _Student(nn.Module):
    """The mixture's velocity beside a linear map that is wrong by a little."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.off = nn.Linear(2, 2).double()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return _velocity(x, t) + self.dropout(self.off(x))


def _batch(count: int = 24, *, step: int = 0, seed: int | None = None) -> TrainingBatch:
    drawn = torch.randint(2**31, ()).item() if seed is None else seed
    ids = torch.arange(count)
    seeds = sample_seeds(int(drawn), ids, 0)
    images = MEANS[ids % 3] + STD * torch.randn(count, 2, dtype=torch.float64)
    return TrainingBatch(images, None, seeds, ids, 0, step)


def _noise(batch: TrainingBatch) -> Tensor:
    return randn(batch.images.shape, batch.seeds, purpose=Purpose.FORWARD, dtype=torch.float64)


def _ddim(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    (a, b), (a_next, b_next) = _scales(t), _scales(s)
    return a_next * (a * x - b * v) + b_next * (b * x + a * v)


def _trailing(steps: int) -> Tensor:
    """Timesteps of a loop, then −1: the clean end."""
    return torch.tensor([round(T - i * T / steps) - 1 for i in range(steps + 1)])


# The noise and the rows are float64; α and σ are computed in two orders, which differ by some units of 1e-16.  They are
# divided by b of the inverse rows, above 0.02 here.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one", "uniform"])
def test_progressive_loss_is_that_of_algorithm_2(weighting: str) -> None:
    steps, batch, student = 8, _batch(), _Student()
    found = ProgressiveObjective(_velocity, SCHEDULE, steps, "v_prediction", weighting=weighting)(student, batch)
    index = draw_timesteps(len(batch.images), steps, seeds=batch.seeds)
    grid = _trailing(2 * steps)
    t, middle, s = grid[2 * index], grid[2 * index + 1], grid[2 * index + 2]
    a, b = _scales(t)
    a_s, b_s = _scales(s)
    z = a * batch.images + b * _noise(batch)
    half = _ddim(z, _velocity(z, t), t, middle)
    reached = _ddim(half, _velocity(half, middle), middle, s)
    x0 = (reached - b_s / b * z) / (a_s - b_s / b * a)
    error = (x0 - (a * z - b * student(z, t))).square().mean(1)
    snr = ((a / b) ** 2)[:, 0]
    weights = {"truncated_snr": snr.clamp(min=1), "snr_plus_one": snr + 1, "uniform": torch.ones_like(snr)}
    torch.testing.assert_close(found.losses, weights[weighting] * error, **CLOSE)
    assert torch.equal(found.timesteps, t)
    expected = torch.autograd.grad((weights[weighting] * error).sum(), student.off.weight)
    torch.testing.assert_close(torch.autograd.grad(found.losses.sum(), student.off.weight), expected, **CLOSE)


def test_a_students_loop_reaches_its_target_in_one_step() -> None:
    """The student's levels are those of a trailing DDIM sampler of half as many steps, and of TCD without noise."""
    seen: list[Tensor] = []

    def teacher(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        seen.append(t)
        return _velocity(x, t)

    found = ProgressiveObjective(teacher, SCHEDULE, 4, "v_prediction")(_Student(), _batch(64))
    for method, fields in (("ddim", {}), ("tcd", {"eta": 0.0}), ("lcm", {})):
        sampler = create_sampler(trailing_schedule(SCHEDULE), method, num_inference_steps=4, **fields)
        assert set(sampler.timesteps.tolist()) == set(found.timesteps.tolist())
    both = create_sampler(trailing_schedule(SCHEDULE), "ddim", num_inference_steps=8)
    assert set(torch.cat(seen).tolist()) == set(both.timesteps.tolist())


@pytest.mark.parametrize("teacher", [None, _velocity], ids=["training", "distillation"])
@pytest.mark.parametrize(
    "fields",
    [
        {"intervals": 16, "timestep_scaling": 0.1, "sigma_data": 0.4},
        {"intervals": 16, "loss": "huber"},
        {"intervals": 16, "weighting": "uniform", "loss": "huber"},
        {
            "intervals": 32,
            "first_intervals": 4,
            "index_sampling": "lognormal",
            "weighting": "inverse_gap",
            "loss": "huber",
        },
        vars(DistillOptions("consistency_training", teacher_steps=40).validate().grid(T)),
        vars(DistillOptions("plain_consistency_training", teacher_steps=16).validate().grid(T)),
    ],
    ids=[
        "default",
        "huber",
        "lcm",
        "improved",
        "consistency_training",
        "plain_consistency_training",
    ],
)
def test_consistency_loss_is_that_of_the_papers(teacher: Any, fields: dict[str, Any]) -> None:
    options, student, batch = ConsistencyOptions(**fields), _Student(), _batch(step=50)
    objective = ConsistencyObjective(SCHEDULE, "v_prediction", options, teacher=teacher, total_steps=100)
    found = objective(student, batch)
    # 4, 8, 16 and 32 intervals for a quarter of 100 steps each, or 10, 20 and 40 for a third: step 50 has 16, or 20.
    intervals = 20 if options.first_intervals == 10 else 16
    grid = _trailing(intervals)
    alpha, sigma = _scales(grid)
    ratio = (sigma / alpha)[:, 0]
    index = draw_timesteps(len(batch.images), intervals, seeds=batch.seeds)
    if options.index_sampling == "lognormal":
        uniform = draw_timesteps(len(batch.images), seeds=batch.seeds).double()
        edges = torch.distributions.Normal(-1.1, 2.0).cdf(ratio.log())
        above = (edges[:-1] - edges[1:]).cumsum(0) / (edges[0] - edges[-1])
        index = (uniform[:, None] >= above).sum(1)
    t, s = grid[index], grid[index + 1]
    a, b = _scales(t)
    a_s, b_s = _scales(s)
    noise = _noise(batch)
    z = a * batch.images + b * noise
    partner = a_s * batch.images + b_s * noise if teacher is None else _ddim(z, _velocity(z, t), t, s)

    def consistency(x: Tensor, at: Tensor) -> Tensor:
        scaled = options.timestep_scaling * at.double()[:, None]
        norm = scaled**2 + options.sigma_data**2
        level, noise_level = _scales(at)
        x0 = level * x - noise_level * student(x, at)
        return torch.where(at[:, None] < 0, x, scaled / norm.sqrt() * x0 + options.sigma_data**2 / norm * x)

    squares = (consistency(z, t) - consistency(partner, s).detach()).square()
    c = 0.00054 * math.sqrt(2)
    expected = squares.mean(1) if options.loss == "l2" else (squares.sum(1) + c * c).sqrt() - c
    if options.weighting == "inverse_gap":
        expected = expected / (ratio[index] - ratio[index + 1])
    elif options.weighting == "truncated_snr":
        root = (1 / ratio[index]).clamp(min=1.0)
        expected = expected * (root.square() if options.loss == "l2" else root)
    # The student is exact in float64 at the clean end too, where the formula divides by σ = 0 and drops the result.
    torch.testing.assert_close(found.losses, expected, **CLOSE)
    assert torch.equal(found.timesteps, t)
    wanted = torch.autograd.grad(expected.sum(), student.off.bias)
    torch.testing.assert_close(torch.autograd.grad(found.losses.sum(), student.off.bias), wanted, **CLOSE)


def test_consistency_training_has_the_grids_of_the_paper() -> None:
    """min(s0·2^⌊k/K'⌋, s1) with K' = ⌊K/(log2⌊s1/s0⌋ + 1)⌋, s0 = 10 and s1 = 1280 (arXiv 2310.14189, section 3.4)."""
    options = DistillOptions("consistency_training").validate()
    for steps, (total, last) in ((4000, (400_000, 1280)), (1000, (9999, 1000)), (64, (7, 64)), (4, (50, 4))):
        grid, first = options.grid(steps), min(10, last)
        length = max(int(total / (math.log2(last // first) + 1)), 1)
        for k in {0, length - 1, length, 2 * length, total - 1}:
            assert grid.intervals_at(k, total) == min(first * 2 ** (k // length), last)
        assert grid.intervals_at(total - 1, total) == last
    assert (grid.log_mean, grid.log_std, grid.huber_c, grid.loss) == (-1.1, 2.0, None, "huber")
    assert options.grid(1000).weighting == "inverse_gap"


def test_both_calls_of_a_consistency_loss_draw_the_same_dropout() -> None:
    masks: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        masks.append(torch.rand(4))
        return x

    ConsistencyObjective(SCHEDULE, "v_prediction", ConsistencyOptions(8))(predict, _batch())
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("kind", ["progressive", "consistency"])
def test_losses_belong_to_samples(kind: str) -> None:
    """A sample's loss is the same in another batch."""
    student, batch = _Student(), _batch(12)
    if kind == "progressive":
        objective: Any = ProgressiveObjective(_velocity, SCHEDULE, 8, "v_prediction")
    else:
        objective = ConsistencyObjective(SCHEDULE, "v_prediction", ConsistencyOptions(8), teacher=_velocity)
    order = torch.randperm(12)[:5]
    part = TrainingBatch(batch.images[order], None, batch.seeds[order], batch.sample_ids[order], 0, 0)
    # Another batch size may add in another order.
    torch.testing.assert_close(objective(student, part).losses, objective(student, batch).losses[order], **CLOSE)


def test_a_guided_teacher_is_two_calls() -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return x * labels[:, None] + t[:, None]

    x, t, labels = torch.randn(5, 2), torch.arange(5), torch.arange(5)
    found = Teacher(Labelled(), 2.5, null_label=7)(x, t, labels)
    free, conditional = x * 7 + t[:, None], x * labels[:, None] + t[:, None]
    torch.testing.assert_close(found, free + 2.5 * (conditional - free))


def test_what_does_not_fit_is_refused() -> None:
    assert progressive_rounds(32, 4) == [16, 8, 4]
    with pytest.raises(ValueError, match="teacher_steps"):
        progressive_rounds(24, 4)
    with pytest.raises(ValueError, match="teacher_steps"):
        progressive_rounds(4, 4)
    with pytest.raises(ValueError, match="weighting"):
        ProgressiveObjective(_velocity, SCHEDULE, 4, "v_prediction", weighting="snr")
    with pytest.raises(ValueError, match="num_inference_steps"):
        ProgressiveObjective(_velocity, SCHEDULE, T, "v_prediction")
    with pytest.raises(TypeError, match="noise schedule of fastdiff"):
        ConsistencyObjective(SCHEDULE.alphas_cumprod, "v_prediction")  # type: ignore[arg-type]
    for field, value in (("intervals", 0), ("loss", "l1"), ("huber_c", 0.0), ("first_intervals", 65)):
        with pytest.raises(ValueError, match=field):
            ConsistencyOptions(**{field: value}).validate()


@pytest.mark.parametrize("kind", ["progressive", "consistency"])
def test_the_trainer_brings_a_student_nearer_to_its_teacher(kind: str, tmp_path: Any) -> None:
    """A few steps of the trainer lower the validation loss, and a resumed run has the same bits."""
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    config = DiffusionConfig(
        num_timesteps=T, in_channels=2, learning_rate=2e-2, lr_warmup_steps=0, max_train_steps=40, use_ema=False
    )
    torch.manual_seed(0)
    batch = _batch(64).images
    loader = DataLoader(TensorDataset(batch.reshape(64, 2)), 32, shuffle=True)

    def trainer(student: nn.Module) -> Trainer:
        if kind == "progressive":
            objective: Any = ProgressiveObjective(_velocity, SCHEDULE, 4, "v_prediction")
        else:
            objective = ConsistencyObjective(SCHEDULE, "v_prediction", ConsistencyOptions(8), teacher=_velocity)
        return Trainer(student, config, schedule=SCHEDULE, objective=objective)

    student = _Student(0.1)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    whole = trainer(student)
    before = whole.validate(loader)
    whole.train(loader, max_steps=10)
    whole.save_checkpoint(tmp_path / "at-10")
    whole.train(loader, max_steps=40)
    assert whole.validate(loader) < 0.7 * before
    other = _Student(0.1)
    other.load_state_dict(weights)
    resumed = trainer(other)
    resumed.load_checkpoint(tmp_path / "at-10")
    resumed.train(loader, max_steps=40)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))
