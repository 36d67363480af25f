# SPDX-License-Identifier: MIT
"""The classroom's sampler: what decides its form, what it refuses, and what stays unchanged then."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.classroom import DDPMSampler, FastSampler, SamplingComparison

T = 20


class SchedulerModule(torch.nn.Module):
    """A noise scheduler of one's own, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", torch.linspace(0.99, 0.01, T))

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal: Tensor = self.alphas_cumprod[t]
        return signal.sqrt() * x + (1 - signal).sqrt() * noise


def model(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


@pytest.mark.parametrize(
    ("first", "holds_model"),
    [
        (fastdiff.create_noise_scheduler("cosine", num_train_timesteps=T), False),
        (diffusers.DDPMScheduler(num_train_timesteps=T), False),
        (SchedulerModule(), False),
        (model, True),
        (torch.nn.Identity(), True),
    ],
)
def test_first_argument_decides_the_form(first: Any, holds_model: bool) -> None:
    sampler = DDPMSampler(first, 10)
    assert (sampler.model is first) == holds_model
    assert len(sampler.betas) == (10 if holds_model else T)
    assert len(sampler.timesteps) == 10
    named = {"model": first, "n_timesteps": 10} if holds_model else {"noise_scheduler": first, "num_inference_steps": 5}
    by_keyword = DDPMSampler(**named)
    assert by_keyword.betas.shape == ((10,) if holds_model else (T,))


def test_scheduler_configuration_is_followed() -> None:
    sampler = DDPMSampler(diffusers.DDPMScheduler(num_train_timesteps=T, prediction_type="v_prediction"), 10)
    assert sampler.prediction_type.value == "v_prediction"
    assert sampler.clip_range == 1.0  # clip_sample is True there
    assert DDPMSampler(SchedulerModule(), 3, prediction_type="sample").prediction_type.value == "sample"
    x, output = torch.randn(2, 4, dtype=torch.float64), 5 * torch.randn(2, 4, dtype=torch.float64)
    v = DDPMSampler(diffusers.DDPMScheduler(num_train_timesteps=T, prediction_type="v_prediction"), T)
    last = float(v.alphas_cumprod[0])
    expected = ((last**0.5) * x - (1 - last) ** 0.5 * output).clamp(-1, 1)  # the last step is the predicted x0
    torch.testing.assert_close(v.step(output, 0, x), expected, atol=1e-6, rtol=1e-5)  # ᾱ is rounded to float32


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"in_channels": 4, "sample_size": 8}, (4, 8, 8)),
        ({"in_channels": 1, "image_size": 6}, (1, 6, 6)),
        ({"in_channels": 2, "sample_size": (3, 5)}, (2, 3, 5)),
        ({}, (3, 32, 32)),
    ],
)
def test_sample_shape_is_what_the_model_says(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    sampler = DDPMSampler(SchedulerModule(), 2)
    for owner in (SimpleNamespace(**config), SimpleNamespace(config=SimpleNamespace(**config))):
        owned = type("Owned", (), {**vars(owner), "__call__": lambda self, x, t: x})()
        assert sampler(owned, 3).shape == (3, *shape)
    assert sampler(model, 3, sample_shape=(7,)).shape == (3, 7)


def test_samples_are_independent_of_the_batch_beside_them() -> None:
    sampler = DDPMSampler(model, n_timesteps=T)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = sampler.sample((3, 2), show_progress=False, generator=generators)
    alone = sampler.sample((1, 2), show_progress=False, generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_step_takes_every_dtype(dtype: torch.dtype) -> None:
    sampler = DDPMSampler(SchedulerModule(), 5)
    x, output = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    t = sampler.timesteps[-1]  # the last step draws no noise
    found = sampler.step(output.to(dtype), t, x.to(dtype))
    assert found.dtype == dtype
    signal = 0.99
    expected = (x - (1 - signal) ** 0.5 * output) / signal**0.5
    torch.testing.assert_close(found.double(), expected, atol=0.05 if dtype.itemsize == 2 else 1e-6, rtol=0.0)


def refused_calls() -> list[tuple[Any, str]]:
    scheduled, scratch = DDPMSampler(SchedulerModule(), 5), DDPMSampler(model, n_timesteps=T)
    x = torch.zeros(2, 3)
    return [
        (lambda: DDPMSampler(3), "a noise scheduler or a model"),
        (lambda: DDPMSampler(diffusers.DDPMScheduler(thresholding=True), 5), "thresholding"),
        (lambda: DDPMSampler(model, n_timesteps=0), "num_train_timesteps"),
        (lambda: scheduled.set_timesteps(T + 1), "at most"),
        (lambda: scheduled.set_timesteps(0), "at least 1"),
        (lambda: scheduled.set_timesteps(5, "sine"), "cosine, linear"),
        (lambda: scheduled.step(x, 1, x), "one of the 5 visited timesteps"),
        (lambda: scheduled.step(x, torch.tensor([0, 1]), x), "timestep is 1"),
        (lambda: scheduled.step(x[:1], 0, x), r"\[2, 3\] like the sample"),
        (lambda: scheduled.p_sample(x, 0), "made from a noise scheduler"),
        (lambda: scheduled.sample((2, 3)), "made from a noise scheduler"),
        (lambda: scheduled(model, 0), "batch_size"),
        (lambda: scheduled(5), "a callable"),  # type: ignore[arg-type]
        (lambda: scratch.p_sample(x, T), "visited"),
        (lambda: scratch.p_sample(x, -1), "visited"),
        (lambda: scratch.sample_with_guidance((2, 3), None), "guidance_fn"),  # type: ignore[arg-type]
        (lambda: scratch.sample_with_guidance((2, 3), lambda x, t: x), "one number a sample"),
        (lambda: scratch.sample_with_guidance((2, 3), lambda x, t: t.float()), "depends on x"),
        (lambda: SamplingComparison(SchedulerModule()).compare_schedules(model, T + 1), "at most"),
        (lambda: SamplingComparison(model), "noise_scheduler is a function"),
    ]


@pytest.mark.parametrize("index", range(len(refused_calls())))
def test_refusals_are_one_sentence(index: int) -> None:
    call, message = refused_calls()[index]
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_refused_timesteps_change_nothing() -> None:
    sampler = DDPMSampler(SchedulerModule(), 5)
    before = dict(vars(sampler))
    for arguments in ((T + 1,), (3, "sine"), (2.5,), (None,)):
        with pytest.raises((TypeError, ValueError)):
            sampler.set_timesteps(*arguments)  # type: ignore[arg-type]
    assert all(vars(sampler)[name] is value for name, value in before.items())


def test_failing_model_leaves_generator_and_mode_as_they_were() -> None:
    class Failing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.trained = torch.nn.Dropout().eval(), torch.nn.Dropout()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert not self.training
            assert not self.trained.training
            if int(t[0]) < 10:
                raise ArithmeticError("model")
            return x

    failing, generator = Failing(), torch.Generator().manual_seed(1)
    state, default = generator.get_state(), torch.get_rng_state()
    for call in (
        lambda: DDPMSampler(failing, T).sample((2, 2), show_progress=False, generator=generator),
        lambda: DDPMSampler(failing, T).sample((2, 2), show_progress=False),
        lambda: DDPMSampler(SchedulerModule(), T)(failing, 2, generator=generator),
    ):
        with pytest.raises(ArithmeticError):
            call()
        assert torch.equal(generator.get_state(), state)
        assert torch.equal(torch.get_rng_state(), default)
        assert (failing.training, failing.frozen.training, failing.trained.training) == (True, False, True)


def test_fast_sampler_takes_other_step_counts_and_always_returns_the_trajectory() -> None:
    sampler = FastSampler(SchedulerModule(), 4)
    samples, trajectory = sampler(model, 2, sample_shape=(2,), return_trajectory=False)
    assert isinstance(sampler, DDPMSampler)
    assert len(trajectory) == 5
    assert torch.equal(trajectory[-1], samples)


def test_guided_mean_of_normal_data_is_the_posterior_mean() -> None:
    """With the exact score of N(0, c²) and of a normal likelihood, samples come from their product.

    The likelihood N(y; x0, r²) has at x_t the density N(y; E[x0 | x_t], Var[x0 | x_t] + r²).
    """
    c2, r2, y = 1.0, 0.25, 1.5
    sampler = DDPMSampler(lambda x, t: noise_of(x, t), n_timesteps=250, beta_start=4e-4, beta_end=0.08)
    signal = sampler.alphas_cumprod.double()

    def noise_of(x: Tensor, t: Tensor) -> Tensor:
        a = signal[t][:, None]
        return ((1 - a).sqrt() / (a * c2 + 1 - a) * x).float()

    def log_likelihood(x: Tensor, t: Tensor) -> Tensor:
        a = signal[t].float()
        mean, spread = a.sqrt() * c2 / (a * c2 + 1 - a) * x[:, 0], c2 * (1 - a) / (a * c2 + 1 - a)
        return -((y - mean) ** 2) / (2 * (spread + r2))

    drawn = sampler.sample_with_guidance(
        (4000, 1), log_likelihood, 1.0, show_progress=False, clip_denoised=False, generator=torch.Generator()
    )
    # Exact: mean y·c²/(c² + r²), variance c²r²/(c² + r²). 250 steps leave 0.035; 4000 draws have a deviation of 0.007.
    assert float(drawn.mean()) == pytest.approx(y * c2 / (c2 + r2), abs=0.07)
    assert float(drawn.var()) == pytest.approx(c2 * r2 / (c2 + r2), abs=0.07)


def test_document_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "classroom.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)), {})
    assert "linear" in capsys.readouterr().out
    assert (tmp_path / "strip.png").stat().st_size > 1000
