# SPDX-License-Identifier: MIT
"""Rollouts and their replay: the bits of every step, gradients, files, and the tables of stochastic flow samplers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.rl import Trajectory, clipped_objective, replay_log_prob, rollout
from fastdiff.row_layout import COLUMNS, PREV_SAMPLE
from fastdiff.schedules.levels import Levels, levels_from_flow_times, levels_from_timesteps
from fastdiff.solvers import Prediction, ddim, ddpm, dpm_multistep, euler_ancestral
from fastdiff.solvers.cps import cps
from fastdiff.solvers.flow_sde import flow_sde
from fastdiff.solvers.table import StepTable
from support.oracle import DTYPES, assert_same_bits

NOISE = PREV_SAMPLE + COLUMNS.index("noise")
FLOW = Prediction("flow_prediction")


def diffusion() -> Levels:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return levels_from_timesteps(torch.cumprod(1 - betas, 0), [900.0, 600.0, 300.0, 100.0])


def flow() -> Levels:
    return levels_from_flow_times([1.0, 0.8, 0.55, 0.2, 0.0])


TABLES: dict[str, Callable[[], StepTable]] = {
    "ddim": lambda: ddim(diffusion(), Prediction(), eta=1.0),
    "ddim clipped": lambda: ddim(diffusion(), Prediction(clip_range=1.0), eta=0.5),
    "ddpm": lambda: ddpm(diffusion(), Prediction("v_prediction")),
    "euler_ancestral": lambda: euler_ancestral(diffusion(), Prediction()),
    "sde-dpmsolver++ 1": lambda: dpm_multistep(
        diffusion(), Prediction(), algorithm_type="sde-dpmsolver++", solver_order=1
    ),
    "sde-dpmsolver++ 2": lambda: dpm_multistep(diffusion(), Prediction(), algorithm_type="sde-dpmsolver++"),
    "flow_sde": lambda: flow_sde(flow(), FLOW),
    "flow_sde window": lambda: flow_sde(flow(), FLOW, noise_level=[0.0, 0.7, 0.7, 0.0]),
    "cps": lambda: cps(flow(), FLOW, noise_level=0.6),
}


class Policy(torch.nn.Module):
    """A small model with a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        shift = 0.0 if condition is None else condition[:, :, None, None]
        return torch.tanh(self.mix(x) + shift) + (t / 1000.0)[:, None, None, None].to(x.dtype)


def policy(seed: int, dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(seed)
    return Policy().to(dtype)


# --- Tables ----------------------------------------------------------------------------------------------------------


def test_flow_sde_is_the_step_of_its_paper() -> None:
    a, times = 0.7, [1.0, 0.8, 0.55, 0.2, 0.0]
    generator = torch.Generator().manual_seed(0)
    x, v, z = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    table = flow_sde(flow(), FLOW, noise_level=a)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        capped = s if t == 1.0 else t
        std, dt = a * math.sqrt(capped / (1 - capped)), s - t  # negative, as the paper's
        mean = x + (v + std**2 / (2 * t) * (x + (1 - t) * v)) * dt
        (prev,) = ops.step(x, v, table.coefficients, i, noise=z)
        torch.testing.assert_close(prev, mean + std * math.sqrt(-dt) * z, rtol=1e-12, atol=1e-12)


def test_flow_sde_without_noise_is_euler_and_its_last_noise_is_optional() -> None:
    times = [1.0, 0.8, 0.55, 0.2, 0.0]
    rows = flow_sde(flow(), FLOW, noise_level=0.0).coefficients
    x, v = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        torch.testing.assert_close(ops.step(x, v, rows, i)[0], x + (s - t) * v, rtol=1e-12, atol=1e-12)
    assert flow_sde(flow(), FLOW).draws_noise == (True,) * 4
    assert flow_sde(flow(), FLOW, noise_last=False).draws_noise == (True, True, True, False)


def test_cps_keeps_the_noise_of_each_level() -> None:
    times = [1.0, 0.8, 0.55, 0.2, 0.0]
    x, v, z = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    for eta in (0.0, 0.6, 1.0):
        table = cps(flow(), FLOW, noise_level=eta)
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            x0, noise = x - t * v, x + (1 - t) * v
            std = s * math.sin(eta * math.pi / 2)
            expected = (1 - s) * x0 + math.sqrt(max(s**2 - std**2, 0.0)) * noise + std * z
            torch.testing.assert_close(
                ops.step(x, v, table.coefficients, i, noise=z)[0], expected, rtol=1e-12, atol=1e-12
            )
    # η = 1 of DDIM has the posterior's noise; CPS is DDIM with another standard deviation, on any path.
    assert cps(diffusion(), Prediction(), noise_level=0.0).coefficients.allclose(
        ddim(diffusion(), Prediction()).coefficients
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flow_sde(diffusion(), FLOW), r"flow_sde: levels hold alpha .* expected alpha \+ sigma = 1"),
        (lambda: flow_sde(flow(), FLOW, noise_level=-1.0), "flow_sde: noise_level is -1.0"),
        (lambda: flow_sde(flow(), FLOW, noise_level=[0.7]), "flow_sde: noise_level holds 1 numbers, expected 4"),
        (lambda: flow_sde(levels_from_flow_times([1.0, 0.0]), FLOW), "flow_sde: levels go from time 1 to 0"),
        (lambda: cps(flow(), FLOW, noise_level=1.5), "cps: noise_level is 1.5, expected 0 to 1"),
    ],
)
def test_unfit_tables_are_refused(make: Callable[[], StepTable], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Rollout and replay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_rollout_is_the_loop_and_replay_has_its_bits(name: str) -> None:
    table, model = TABLES[name](), policy(0)
    latents = torch.randn(3, 3, 9, 9)
    trajectory = rollout(table, model, latents, seeds=[1, 2, 3])
    # The same loop, taken step by step with the reference formula's own operation.
    sample, slots = latents * table.initial_scale, [None] * 4
    with torch.no_grad():
        for row, timestep in enumerate(table.timesteps):
            prev, *kept = ops.step(
                sample, model(sample, torch.full((3,), timestep)), table.coefficients_as(torch.float32), row,
                history=tuple(slots), seeds=torch.tensor([1, 2, 3]), noise_step=row, keeps=len(table.kept_slots[row]),
            )  # fmt: skip
            for slot, tensor in zip(table.kept_slots[row], kept, strict=True):
                slots[slot] = tensor  # type: ignore[call-overload]
            sample = prev
    assert_same_bits([trajectory.samples[-1]], [sample])
    assert trajectory.steps == tuple(i for i, row in enumerate(table.coefficients) if row[NOISE])
    assert len(trajectory.steps) >= 2
    replayed = replay_log_prob(trajectory, model)
    assert replayed.requires_grad
    assert_same_bits([replayed.detach()], [trajectory.log_probs])
    # One step, and some of the samples: no other bits.
    step = trajectory.steps[-1]
    assert_same_bits([replay_log_prob(trajectory, model, steps=[step])[0].detach()], [trajectory.log_probs[-1]])
    output = model(trajectory.samples[step], torch.full((3,), float(trajectory.timesteps[step]))).detach()
    some = trajectory.select(torch.tensor([2, 0]))
    assert_same_bits([some.log_prob(step, output[[2, 0]])], [trajectory.log_probs[-1][[2, 0]]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [4.0, "per sample"])
def test_replay_of_guided_rollout_has_its_bits(dtype: torch.dtype, scale: float | str) -> None:
    model, table = policy(1, dtype), TABLES["ddim"]()
    conditions = torch.randn(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    guidance = torch.tensor([2.0, 5.0]) if scale == "per sample" else scale
    latents = torch.randn(2, 3, 8, 8, dtype=dtype)
    trajectory = rollout(table, model, latents, *conditions, guidance_scale=guidance, reduction="mean")  # type: ignore[arg-type]
    assert trajectory.samples.dtype == dtype
    assert_same_bits([replay_log_prob(trajectory, model, *conditions).detach()], [trajectory.log_probs])


def test_gradient_of_objective_matches_plain_formula_in_float64() -> None:
    table, model = TABLES["flow_sde"](), policy(2, torch.float64)
    latents = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    trajectory = rollout(table, model, latents, seeds=[5, 6, 7])
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    other = policy(3, torch.float64)
    other.load_state_dict({k: v + 1e-4 * torch.randn_like(v) for k, v in model.state_dict().items()})
    loss = clipped_objective(replay_log_prob(trajectory, other), trajectory.log_probs, advantages, 0.2)
    got = torch.autograd.grad(loss, list(other.parameters()))

    found = []
    for i, timestep in enumerate(table.timesteps):
        a = table.coefficients[i, PREV_SAMPLE:]
        x = trajectory.samples[i]
        mean = a[0] * x + a[1] * other(x, torch.full((3,), timestep))
        found.append(torch.distributions.Normal(mean, a[7]).log_prob(trajectory.samples[i + 1]).flatten(1).sum(1))
    ratio = torch.exp(torch.stack(found) - trajectory.log_probs)
    expected_loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    expected = torch.autograd.grad(expected_loss, list(other.parameters()))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0.0)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sde-dpmsolver++ 2", "cps"])
def test_saved_trajectory_replays_with_the_same_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = policy(4)
    conditions = torch.randn(2, 3), torch.zeros(2, 3)
    trajectory = rollout(TABLES[name](), model, torch.randn(2, 3, 8, 8), *conditions, guidance_scale=3.0, seeds=[8, 9])
    trajectory.save(tmp_path / "rollout.safetensors")
    loaded = Trajectory.load(tmp_path / "rollout.safetensors")
    assert loaded.guidance_scale == 3.0
    assert loaded.reduction == trajectory.reduction
    assert_same_bits(
        [loaded.samples, loaded.seeds, loaded.coefficients],
        [trajectory.samples, trajectory.seeds, trajectory.coefficients],
    )  # type: ignore[list-item]
    assert_same_bits([replay_log_prob(loaded, model, *conditions).detach()], [trajectory.log_probs])


def test_malformed_file_is_refused_with_one_sentence(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"Trajectory.load: .* cannot be read"):
        Trajectory.load(path)
    safetensors.save_file({"samples": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="expected a fastdiff trajectory of version 1"):
        Trajectory.load(path)
    with pytest.raises(OSError, match="nothing"):
        Trajectory.load(tmp_path / "nothing")
    whole = rollout(TABLES["cps"](), policy(0), torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"Trajectory: samples has shape \[4, 2, 3, 4, 4\], expected \[5, B, ...\]"):
        Trajectory(**{**vars(whole), "samples": whole.samples[1:]})


def test_rollout_takes_a_sampler_and_a_generator() -> None:
    scheduler = fastdiff.create_noise_scheduler("linear", num_train_timesteps=100)
    sampler = fastdiff.DDIMSampler(scheduler, num_inference_steps=4, eta=1.0)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    trajectory = rollout(sampler, policy(0), torch.randn(1, 3, 8, 8), generator=generator)
    assert_same_bits([replay_log_prob(trajectory, policy(0)).detach()], [trajectory.log_probs])

    def fails(x: Tensor, t: Tensor) -> Tensor:
        if int(t[0]) < 50:
            raise KeyError("a model that breaks")
        return x

    generator.set_state(state)
    with pytest.raises(KeyError):
        rollout(sampler, fails, torch.randn(1, 3, 8, 8), generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_unfit_rollouts_and_replays_are_refused() -> None:
    latents = torch.randn(1, 3, 4, 4)
    for table, message in (
        (ddim(diffusion(), Prediction()), "rollout: source adds no noise in any row"),
        (ddpm(diffusion(), Prediction(), variance_type="learned"), "rollout: source has a learned variance"),
        (ddim(diffusion(), Prediction(thresholding=True), eta=1.0), "rollout: source asks for dynamic thresholding"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout(table, policy(0), latents)
    with pytest.raises(TypeError, match="rollout: source is a int"):
        rollout(3, policy(0), latents)  # type: ignore[arg-type]
    trajectory = rollout(TABLES["ddpm"](), policy(0), latents)
    last = len(trajectory) - 1
    assert last not in trajectory.steps
    with pytest.raises(ValueError, match=f"replay_log_prob: steps holds {last}"):
        replay_log_prob(trajectory, policy(0), steps=[last])
    with pytest.raises(ValueError, match="a row that adds no noise"):
        trajectory.log_prob(last, latents)


def test_code_of_the_documentation_runs() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "rl.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)), {})
