# SPDX-License-Identifier: MIT
"""Schedulers and sampling as people type them, line by line; each value against its own formula in float64."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.guidance.guided_model as guided_model
from fastdiff import *  # noqa: F403
from fastdiff import (
    AdvancedSamplingManager,
    CustomNoiseScheduler,
    DDIMSampler,
    DDPMSampler,
    EulerAncestralSampler,
    NoiseSchedulerConfig,
    NoiseScheduleType,
    SamplingConfig,
    SamplingMethod,
    create_advanced_sampling_manager,
    create_noise_scheduler,
    create_sampler,
)

SHAPE = (2, 3, 4, 4)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_seeded(seed), dtype=torch.float64)


LATENTS, TEXT, NEGATIVE = _draw(*SHAPE, seed=1), _draw(2, 5, seed=2), _draw(2, 5, seed=3)


def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Stay bounded, and depend on all three."""
    return torch.tanh(x + condition.mean(1).reshape(-1, 1, 1, 1)) * 0.9 + 1e-4 * t.reshape(-1, 1, 1, 1).to(x.dtype)


def cosine_alphas_cumprod(total: int = 1000) -> Tensor:
    u = torch.arange(total + 1, dtype=torch.float64) / total
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)


def guided(x: Tensor, t: int, negative: Tensor, scale: float) -> Tensor:
    times = torch.full((2,), t)
    u, c = model(x, times, negative), model(x, times, TEXT)
    return u + scale * (c - u)


def ddim(steps: int, negative: Tensor, scale: float) -> Tensor:
    """arXiv 2010.02502, eq. 12 with η = 0, at timesteps i·(T // n)."""
    bars = cosine_alphas_cumprod()
    visited = [i * (1000 // steps) for i in reversed(range(steps))]
    x = LATENTS
    for t, s in zip(visited, [*visited[1:], None], strict=True):
        here, there = bars[t], torch.tensor(1.0, dtype=torch.float64) if s is None else bars[s]
        eps = guided(x, t, negative, scale)
        x0 = (x - (1 - here).sqrt() * eps) / here.sqrt()
        x = there.sqrt() * x0 + (1 - there).sqrt() * eps
    return x


def ddpm(steps: int, negative: Tensor, scale: float, bars: Tensor, generator: torch.Generator) -> Tensor:
    """arXiv 2006.11239, eq. 6 and 7, for the next visited level; no noise in the last step."""
    total = len(bars)
    visited = [i * (total // steps) for i in reversed(range(steps))]
    x = LATENTS
    for t, s in zip(visited, [*visited[1:], None], strict=True):
        here, there = bars[t], torch.tensor(1.0, dtype=torch.float64) if s is None else bars[s]
        alpha = here / there
        x0 = (x - (1 - here).sqrt() * guided(x, t, negative, scale)) / here.sqrt()
        mean = there.sqrt() * (1 - alpha) / (1 - here) * x0 + alpha.sqrt() * (1 - there) / (1 - here) * x
        noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64) if s is not None else 0.0
        x = mean + ((1 - alpha) * (1 - there) / (1 - here)).sqrt() * noise
    return x


def close(found: Tensor, expected: Tensor) -> None:
    # Some tens of float64 operations a step on numbers up to some hundreds, at a guidance of 7.5.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_scheduler_is_made_by_type_and_describes_itself() -> None:
    scheduler = create_noise_scheduler(
        NoiseScheduleType.COSINE, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02
    )
    info = scheduler.get_schedule_info()
    assert info["schedule_type"] == "cosine"
    bars = cosine_alphas_cumprod()
    betas = 1 - bars / torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    assert info["betas_range"] == pytest.approx((float(betas.min()), float(betas.max())), rel=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "karras", "flow"])
def test_schedulers_carry_arrays_of_the_forward_process(kind: str) -> None:
    scheduler = create_noise_scheduler(kind, num_train_timesteps=50)
    betas = scheduler.betas
    bars = scheduler.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    close(scheduler.alphas, 1 - betas)
    close(bars, (1 - betas).cumprod(0))
    close(scheduler.alphas_cumprod_prev, before)
    close(scheduler.sqrt_alphas_cumprod, bars**0.5)
    close(scheduler.sqrt_one_minus_alphas_cumprod, (1 - bars) ** 0.5)
    close(scheduler.posterior_variance, betas * (1 - before) / (1 - bars))
    assert float(scheduler.posterior_variance[0]) == 0.0


def test_scheduler_sets_timesteps_on_a_device() -> None:
    scheduler = create_noise_scheduler("linear")
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.set_timesteps(50, device=torch.device("cpu"))
    assert scheduler.timesteps.tolist() == list(range(980, -1, -20))
    assert (scheduler.timesteps.dtype, scheduler.num_inference_steps) == (torch.int64, 50)
    scheduler.set_timesteps(10, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    with pytest.raises(ValueError, match=r"num_inference_steps is 1001, expected at most num_train_timesteps, 1000"):
        scheduler.set_timesteps(1001)
    assert scheduler.num_inference_steps == 10


def test_noise_is_added_in_both_forms() -> None:
    scheduler, images, times = create_noise_scheduler("linear"), _draw(4, 3, seed=5), torch.tensor([0, 10, 500, 999])
    noisy, noise = scheduler.add_noise(images, times, generator=_seeded(7))
    close(noise, torch.randn(4, 3, generator=_seeded(7), dtype=torch.float64))
    bars = scheduler.alphas_cumprod[times][:, None]
    close(noisy, bars**0.5 * images + (1 - bars) ** 0.5 * noise)
    assert torch.equal(scheduler.add_noise(images, noise, times), noisy)
    again, other = scheduler.add_noise(images, timesteps=times)
    assert not torch.equal(other, noise)
    assert torch.equal(scheduler.add_noise(images, other, times), again)
    with pytest.raises(TypeError, match=r"^add_noise: timesteps has dtype torch.float64, expected integers"):
        scheduler.add_noise(images, noise)
    with pytest.raises(ValueError, match=r"^add_noise: generator is given beside noise"):
        scheduler.add_noise(images, noise, times, generator=_seeded())


def test_sampler_is_made_by_type_and_samples() -> None:
    sampler = create_sampler(
        NoiseScheduleType.COSINE, SamplingMethod.DDIM, num_inference_steps=50, guidance_scale=7.5, eta=0.0
    )
    result = sampler.sample(model=model, latents=LATENTS, prompt_embeds=TEXT, negative_prompt_embeds=NEGATIVE)
    assert result.samples.shape == SHAPE
    assert float(f"{result.processing_time:.3f}") >= 0
    close(result.samples, ddim(50, NEGATIVE, 7.5))


def test_missing_negative_condition_is_zeros_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided_model, "_warned", set())
    manager = create_advanced_sampling_manager(
        schedule_type=NoiseScheduleType.COSINE,
        method=SamplingMethod.DPM_SOLVER,
        num_inference_steps=20,
        guidance_scale=7.5,
    )
    with pytest.warns(UserWarning, match=r"^sample: negative_prompt_embeds is missing at guidance_scale 7.5, and"):
        result = manager.sample(model=model, latents=LATENTS, prompt_embeds=TEXT)
    given = manager.sample(model, LATENTS, TEXT, torch.zeros_like(TEXT))
    assert torch.equal(result.samples, given.samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = manager.sample(model=model, latents=LATENTS, prompt_embeds=TEXT)
    assert torch.equal(again.samples, given.samples)


def test_labels_have_no_default_negative_condition() -> None:
    sampler = create_sampler("cosine", "ddim", num_inference_steps=2)
    with pytest.raises(ValueError, match=r"negative_prompt_embeds is missing, expected a .* guidance_scale 7.5"):
        sampler.sample(lambda x, t, y: x, LATENTS, torch.tensor([1, 2]))


def test_without_prompt_there_is_no_guidance() -> None:
    calls: list[int] = []

    def plain(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.1 * x

    create_sampler("cosine", "ddim", num_inference_steps=3).sample(plain, LATENTS, progress=False)
    assert calls == [2, 2, 2]


def test_methods_are_compared_and_found_by_member_and_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    manager = create_advanced_sampling_manager("cosine", num_inference_steps=4)
    generator = _seeded(9)
    comparison = manager.compare_sampling_methods(
        model=model,
        latents=LATENTS,
        prompt_embeds=TEXT,
        negative_prompt_embeds=NEGATIVE,
        methods=[SamplingMethod.DDPM, SamplingMethod.DDIM, SamplingMethod.DPM_SOLVER, "euler_ancestral"],
        generator=generator,
    )
    for method, result in comparison.items():
        print(f"{method}: {result.processing_time:.3f}s")
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["ddpm", "ddim", "dpm_solver", "euler_ancestral"]
    assert comparison["ddim"] is comparison[SamplingMethod.DDIM]
    assert "heun" not in comparison
    assert SamplingMethod.HEUN not in comparison
    for method in comparison:
        alone = create_sampler("cosine", method, num_inference_steps=4)
        expected = alone.sample(model, LATENTS, TEXT, NEGATIVE, generator=_seeded(9)).samples
        assert torch.equal(comparison[method].samples, expected), method
    with pytest.raises(ValueError, match="method is 'eular'"):
        manager.compare_sampling_methods(model, LATENTS, TEXT, methods=["eular"])
    with pytest.raises(TypeError, match="methods is 'ddim', expected a list"):
        manager.compare_sampling_methods(model, LATENTS, TEXT, methods="ddim")


def test_manager_is_made_from_both_configurations() -> None:
    manager = AdvancedSamplingManager(
        NoiseSchedulerConfig(
            num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, schedule_type=NoiseScheduleType.COSINE
        ),
        SamplingConfig(method=SamplingMethod.DDIM, num_inference_steps=50, guidance_scale=7.5, eta=0.0),
    )
    close(manager.sample(model, LATENTS, TEXT, NEGATIVE).samples, ddim(50, NEGATIVE, 7.5))


def test_custom_schedule_and_class_that_decides_the_method() -> None:
    scheduler = CustomNoiseScheduler(
        NoiseSchedulerConfig(schedule_type=NoiseScheduleType.CUSTOM, custom_betas=torch.linspace(0.001, 0.01, 1000))
    )
    betas = torch.linspace(0.001, 0.01, 1000).double()
    close(scheduler.betas, betas)
    sampler = DDPMSampler(scheduler, SamplingConfig(num_inference_steps=50))
    found = sampler.sample(model, LATENTS, TEXT, NEGATIVE, generator=_seeded(4)).samples
    close(found, ddpm(50, NEGATIVE, 7.5, (1 - betas).cumprod(0), _seeded(4)))
    assert sampler.sample(model, LATENTS, TEXT).samples.shape == SHAPE
    other = DDIMSampler(scheduler, SamplingConfig(num_inference_steps=50))
    assert (other.config.method, other.config.num_inference_steps) == (SamplingMethod.DDIM, 50)
    assert create_noise_scheduler(NoiseScheduleType.CUSTOM, custom_betas=[0.1, 0.2]).num_train_timesteps == 2


def test_sampling_config_has_promised_defaults() -> None:
    config = SamplingConfig()
    assert config.method is SamplingMethod.DDPM
    assert (config.num_inference_steps, config.eta, config.guidance_scale) == (50, 0.0, 7.5)
    assert config.prediction_type == "epsilon"
    assert (config.thresholding, config.dynamic_thresholding_ratio) == (False, 0.995)
    assert (config.algorithm_type, config.solver_type) == ("dpmsolver++", "midpoint")
    assert (config.lower_order_final, config.use_karras_sigmas) == (True, False)


def test_eta_left_at_its_default_keeps_ancestral_noise() -> None:
    scheduler = create_noise_scheduler("linear")
    tables = [
        EulerAncestralSampler(scheduler, SamplingConfig(num_inference_steps=4, **given)).table
        for given in ({}, {"eta": None}, {"eta": 1.0}, {"eta": 0.0})
    ]
    assert tables[0] == tables[1] == tables[2]
    assert any(tables[0].draws_noise)
    assert not any(tables[3].draws_noise)
    manager = AdvancedSamplingManager(None, SamplingConfig(method="ddim", num_inference_steps=4))
    manager.configure(method="euler_ancestral")
    for config in (manager.sampling_config, SamplingConfig.from_json(manager.sampling_config.to_json())):
        for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert same.eta == 0.0
            assert EulerAncestralSampler(scheduler, same).table == tables[0]
    explicit = SamplingConfig(eta=0.0, num_inference_steps=4, method="euler_ancestral")
    assert EulerAncestralSampler(scheduler, SamplingConfig.from_dict(explicit.to_dict())).table == tables[3]


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(method="euler", s_churn=1.0, s_tmax=math.inf, eta=0.25, sigma_spacing="lu"),
        NoiseSchedulerConfig(schedule_type="cosine", timestep_spacing="trailing"),
        NoiseSchedulerConfig(schedule_type="custom", custom_alphas_cumprod=torch.linspace(0.9, 0.1, 5)),
        NoiseSchedulerConfig(schedule_type="flow", shift_mu=0.7),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configuration_is_standard_json_both_ways(config: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not standard JSON")

    text = config.to_json()
    assert json.loads(text, parse_constant=refuse) == config.to_dict()
    assert type(config).from_json(text) == config
    assert type(config).from_dict(config.to_dict()) == config
    assert type(config)(**asdict(config)) == config
    for bad, message in (("{", "is no JSON"), ("[1]", "holds a list"), ('{"steps": 3}', "field is 'steps'")):
        with pytest.raises(ValueError, match=message):
            type(config).from_json(bad)


def test_star_import_leaves_diffusers_alone_and_needs_none() -> None:
    script = (
        "import sys, types\n"
        "diffusers = types.ModuleType('diffusers')\n"
        "sys.modules['diffusers'] = None\n"
        "from fastdiff import *\n"
        "assert isinstance(diffusers, types.ModuleType) and diffusers.__name__ == 'diffusers'\n"
        "assert 'patch' not in globals() and 'create_sampler' in globals()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


class Net(torch.nn.Module):
    """A model with a part that is in evaluation mode already, and a record of the modes that it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.dropout = torch.nn.Dropout(0.5)
        self.modes: list[tuple[bool, bool, bool]] = []
        self.fail = False

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.modes.append(self.now())
        if self.fail:
            raise RuntimeError("enough")
        return model(self.dropout(self.frozen(x)), t, condition)

    def now(self) -> tuple[bool, bool, bool]:
        return self.training, self.dropout.training, self.frozen.training


class Lightning(torch.nn.Module):
    """A module that holds a model and a manager, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()
        self.sampling_manager = create_advanced_sampling_manager(
            NoiseScheduleType.COSINE, SamplingMethod.DDIM, num_inference_steps=5
        )

    def sample(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self.sampling_manager.sample(self.model, latents, prompt_embeds).samples


def test_model_is_in_evaluation_mode_and_put_back() -> None:
    held, before = Lightning(), (True, True, False)
    close(held.sample(LATENTS, TEXT), ddim(5, torch.zeros_like(TEXT), 7.5))
    net, manager = held.model, held.sampling_manager
    assert net.modes == [(False, False, False)] * 5
    assert net.now() == before
    net.fail = True
    with pytest.raises(RuntimeError, match="enough"):
        held.sample(LATENTS, TEXT)
    assert net.now() == before
    net.fail = False
    stream = manager.stream(net, LATENTS, TEXT, NEGATIVE)
    assert net.now() == before, "a stream that has not begun changes nothing"
    next(stream)
    assert net.now() == (False, False, False)
    stream.close()
    assert net.now() == before
    net.modes.clear()
    manager.sample(net, LATENTS, TEXT, NEGATIVE, keep_mode=True)
    assert set(net.modes) == {before}
    assert net.now() == before
    copy.deepcopy(held).sample(LATENTS, TEXT)
    assert pickle.loads(pickle.dumps(held)).sample(LATENTS, TEXT).shape == SHAPE


def test_loops_in_threads_share_a_model() -> None:
    net, gate = Net(), threading.Barrier(2)
    sampler = create_sampler("cosine", "ddim", num_inference_steps=3)

    def callback(info: Any) -> None:
        if info.index == 1:
            gate.wait(60)

    def work(found: list[Tensor]) -> None:
        found.append(sampler.sample(net, LATENTS, TEXT, NEGATIVE, callback=callback, progress=False).samples)

    ends: list[Tensor] = []
    threads = [threading.Thread(target=work, args=(ends,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(net.modes) == {(False, False, False)}
    assert net.now() == (True, True, False)
    close(ends[0], ddim(3, NEGATIVE, 7.5))
    assert torch.equal(*ends)


def test_handler_makes_a_manager_a_request() -> None:
    """A handler of a web server runs outside of the main thread, where Python has no signals."""

    def handler(request: dict[str, Any]) -> dict[str, Any]:
        manager = create_advanced_sampling_manager(
            schedule_type=NoiseScheduleType(request["schedule"]),
            method=SamplingMethod(request["method"]),
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance_scale"],
        )
        result = manager.sample(model=model, latents=LATENTS, prompt_embeds=TEXT)
        return {"shape": list(result.samples.shape), "time": result.processing_time, "end": result.samples}

    request = {"schedule": "cosine", "method": "ddim", "steps": 3, "guidance_scale": 2.0}

    async def serve() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(asyncio.to_thread(handler, request) for _ in range(2))))

    for answer in asyncio.run(serve()):
        assert answer["shape"] == list(SHAPE)
        close(answer["end"], ddim(3, torch.zeros_like(TEXT), 2.0))


def test_debug_log_names_shapes_backends_and_times_only(caplog: pytest.LogCaptureFixture) -> None:
    latents = LATENTS.clone().fill_(987654.0)
    make: Callable[[], Any] = lambda: create_sampler("cosine", "ddim", num_inference_steps=2)  # noqa: E731
    make().sample(model, latents, TEXT, NEGATIVE, progress=False)
    assert not caplog.records, "nothing is said unless it is asked for"
    with caplog.at_level("DEBUG", logger="fastdiff"):
        make().sample(model, latents, TEXT, NEGATIVE, progress=False)
    text = "\n".join(record.getMessage() for record in caplog.records if record.name == "fastdiff")
    for part in ("compiled 2 rows", "[2, 3, 4, 4] torch.float64 on cpu", "backend", "batched", "2 of 2 steps", " s"):
        assert part in text
    assert "98765" not in text
