# SPDX-License-Identifier: MIT
"""Noise of own loops: seeds, Brownian paths, torchsde's tree, and what a loop may write to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import loops
from fastdiff.noise import BrownianPath
from support.loop_cases import SIGMAS, k_diffusion, mixture, start
from support.seeds import TEST_SEED

SHAPE = (4, 2, 3, 5)
SEEDS = [TEST_SEED + 7, 3, 2**63 + TEST_SEED, 11]
#: A loop of each way to noise: in the step, with a churned start, at each stage, on a path.
STOCHASTIC: dict[str, dict[str, Any]] = {
    "euler_ancestral": {},
    "heun": {"s_churn": 3.0},
    "dpmpp_2s_ancestral": {},
    "seeds_3": {},
    "er_sde": {},
    "dpmpp_sde": {},
    "dpmpp_2m_sde": {},
    "restart": {"restart_list": {0.2: [4, 2, 1.5]}},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_sample_has_same_bits_alone_and_at_any_place_of_a_batch(name: str) -> None:
    x, function = start(TEST_SEED, SHAPE), getattr(loops, f"sample_{name}")
    options = STOCHASTIC[name]
    batch = function(mixture, x, SIGMAS, disable=True, seeds=SEEDS, **options)
    order = [2, 0, 3, 1]
    shuffled = function(mixture, x[order], SIGMAS, disable=True, seeds=[SEEDS[i] for i in order], **options)
    alone = function(mixture, x[2:3], SIGMAS, disable=True, seeds=[SEEDS[2]], **options)
    assert torch.equal(shuffled, batch[order])
    assert torch.equal(alone, batch[2:3])
    assert not torch.equal(batch, function(mixture, x, SIGMAS, disable=True, seeds=[5, 6, 7, 8], **options))


def test_churned_start_and_first_step_draw_different_noise() -> None:
    x, seen = torch.zeros(1, 1, 64, 64), []
    keep = lambda x, sigma: seen.append(x.clone()) or torch.zeros_like(x)  # noqa: E731
    loops.sample_euler(keep, x, SIGMAS, disable=True, s_churn=3.0, seeds=[1])
    first = seen[0].flatten()
    second = (seen[1] - seen[0] * (seen[1].std() / seen[0].std())).flatten()
    lifts = torch.stack([fastdiff.randn(x.shape, [1], i, fastdiff.Purpose.STEP).flatten() for i in range(2)])
    assert abs(torch.corrcoef(torch.stack([first, lifts[0]]))[0, 1]) > 0.999
    assert abs(torch.corrcoef(torch.stack([first, lifts[1]]))[0, 1]) < 0.1
    assert second.std() > 0


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_sde_noise_is_the_path_of_the_seed(name: str) -> None:
    """The loop with seeds equals the loop with the increments of `BrownianPath`, whatever was asked of it before."""
    x, function = start(TEST_SEED, SHAPE), getattr(loops, f"sample_{name}")
    path = BrownianPath(SHAPE, SEEDS)
    path.increment(0.3, 7.7)
    by_path = function(mixture, x, SIGMAS, disable=True, noise_sampler=path)
    assert torch.equal(function(mixture, x, SIGMAS, disable=True, seeds=SEEDS), by_path)


def test_loop_on_a_path_converges_to_one_result() -> None:
    """With one Brownian path, more steps change the result less; independent noise would keep it changing."""
    x = start(TEST_SEED, (1, 1, 8, 8), torch.float64) * (5.0 / 14.6)

    def run(steps: int) -> Tensor:
        sigmas = torch.logspace(0.7, -1.0, steps + 1, dtype=torch.float64)
        return loops.sample_dpmpp_2m_sde(mixture, x, sigmas, disable=True, seeds=[TEST_SEED])

    ends = [run(steps) for steps in (8, 16, 32, 64)]
    changes = [float((a - b).square().mean().sqrt()) for a, b in itertools.pairwise(ends)]
    assert changes[2] < 0.5 * changes[0]
    assert changes[2] < 0.1


def test_default_noise_follows_torchs_generator() -> None:
    x = start(TEST_SEED, SHAPE)
    for name in ("euler_ancestral", "dpmpp_2m_sde", "seeds_2"):
        function, ends = getattr(loops, f"sample_{name}"), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            ends.append(function(mixture, x, SIGMAS, disable=True))
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])
    # k-diffusion draws torch.randn_like once a step here: one seed gives both the same noise.
    torch.manual_seed(1)
    want = k_diffusion().sample_euler_ancestral(mixture, x, SIGMAS, disable=True)
    torch.manual_seed(1)
    mine = loops.sample_euler_ancestral(mixture, x, SIGMAS, disable=True)
    torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [TEST_SEED, [TEST_SEED, 2, 3, 4]], ids=["one", "list"])
def test_brownian_tree_has_torchsdes_numbers(seed: int | list[int]) -> None:
    pytest.importorskip("torchsde")
    x = start(TEST_SEED, SHAPE)
    low, high = torch.tensor(0.03), torch.tensor(14.6)
    for transform in (lambda level: level, lambda level: level.log().neg()):
        mine = loops.BrownianTreeNoiseSampler(x, low, high, seed, transform)
        want = k_diffusion().BrownianTreeNoiseSampler(x, low, high, seed, transform)
        for start_level, end in ((14.6, 8.0), (8.0, 2.0), (2.0, 2.5), (0.5, 0.03), (14.6, 8.0)):
            ends = torch.tensor(start_level), torch.tensor(end)
            # At most 25 roundings of numbers below 4 on each side.
            torch.testing.assert_close(mine(*ends), want(*ends), rtol=0.0, atol=2e-5)
    loop = loops.sample_dpmpp_2m_sde(mixture, x, SIGMAS, disable=True,
                                     noise_sampler=loops.BrownianTreeNoiseSampler(x, 0.05, 14.6, seed))  # fmt: skip
    theirs = k_diffusion().sample_dpmpp_2m_sde(mixture, x, SIGMAS, disable=True, noise_sampler=(
        k_diffusion().BrownianTreeNoiseSampler(x, torch.tensor(0.05), torch.tensor(14.6), seed)))  # fmt: skip
    torch.testing.assert_close(loop, theirs, rtol=1e-4, atol=1e-4)


def test_brownian_tree_refuses_a_wrong_number_of_seeds() -> None:
    pytest.importorskip("torchsde")
    with pytest.raises(ValueError, match="one a sample"):
        loops.BrownianTreeNoiseSampler(start(TEST_SEED, SHAPE), 0.03, 14.6, [1, 2])


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "res_3s"])
def test_nothing_that_others_hold_is_written(name: str) -> None:
    """The caller's samples, those that the model has kept or returned as they are, and those of a callback."""
    x, function = start(TEST_SEED, SHAPE), getattr(loops, f"sample_{name}")
    given, kept = x.clone(), []

    def hoarder(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append((x, x.clone()))
        sigma.mul_(1.0)  # its own tensor, too
        return mixture(x, sigma)

    want = function(mixture, x, SIGMAS, disable=True)
    assert torch.equal(function(hoarder, x, SIGMAS, disable=True), want)
    assert torch.equal(x, given)
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)
    seen: list[tuple[Tensor, Tensor]] = []
    again = function(
        mixture, x, SIGMAS, disable=True, callback=lambda info: seen.append((info["x"], info["x"].clone()))
    )
    assert torch.equal(again, want)
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)
    same = function(lambda x, sigma: x, x, SIGMAS, disable=True)
    torch.testing.assert_close(same, x, rtol=1e-5, atol=1e-5)  # x0 = x has slope 0
    assert function(mixture, x, SIGMAS[:1]) is x


def test_loop_writes_over_its_own_samples() -> None:
    """From its second step on, no new samples are made: the model sees the same memory."""
    addresses = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        addresses.append(x.data_ptr())
        return mixture(x, sigma)

    loops.sample_euler(model, start(TEST_SEED, SHAPE), SIGMAS, disable=True)
    assert len(set(addresses[2:])) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = start(TEST_SEED, SHAPE, dtype)
    seen = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.dtype, sigma.dtype, tuple(sigma.shape)))
        return mixture(x, sigma)

    end = loops.sample_dpmpp_2m(model, x, SIGMAS, disable=True)
    assert set(seen) == {(dtype, dtype, (4,))}
    want = loops.sample_dpmpp_2m(mixture, x.double(), SIGMAS, disable=True)
    # A step rounds x to the dtype: an error of one unit of a number up to 14.6, which later steps bring down.
    torch.testing.assert_close(end.double(), want, rtol=0.0, atol=40 * torch.finfo(dtype).eps)


def test_errors_name_the_argument() -> None:
    x = start(TEST_SEED, SHAPE)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "seeds", lambda: loops.sample_euler_ancestral(
            mixture, x, SIGMAS, noise_sampler=lambda a, b: x, seeds=[1, 2, 3, 4])),
        (ValueError, "points", lambda: loops.sample_euler(mixture, x, SIGMAS.flip(0))),
        (TypeError, "x is a list", lambda: loops.sample_euler(mixture, [1.0], SIGMAS)),
        (TypeError, "model returned a Tensor", lambda: loops.sample_euler_cfg_pp(mixture, x, SIGMAS, disable=True)),
        (ValueError, "eta", lambda: loops.sample_dpmpp_sde(mixture, x, SIGMAS, eta=-1.0)),
        (ValueError, "sigma_min", lambda: loops.sample_dpm_fast(mixture, x, 0.0, 1.0, 5)),
        (ValueError, "order", lambda: loops.sample_dpm_adaptive(mixture, x, 0.1, 1.0, order=4)),
        (ValueError, "solver_type", lambda: loops.sample_seeds_2(mixture, x, SIGMAS, solver_type="phi_9")),
        (ValueError, "node", lambda: loops.sample_res_2s(mixture, x, SIGMAS, c2=1.5)),
        (ValueError, "seeds", lambda: loops.sample_euler_ancestral(mixture, x, SIGMAS, seeds=[1])),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
