# SPDX-License-Identifier: MIT
from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import schedules
from fastdiff.schedules import (
    BaseNoiseScheduler,
    CosineNoiseScheduler,
    CustomNoiseScheduler,
    KarrasNoiseScheduler,
    LinearNoiseScheduler,
    NoiseSchedulerConfig,
    NoiseScheduleType,
    create_noise_scheduler,
    rescale_zero_terminal_snr,
)

NAMES = [kind.value for kind in NoiseScheduleType if not kind.value.startswith(("custom", "flow"))]
CLASSES = {
    "linear": "LinearNoiseScheduler",
    "scaled_linear": "ScaledLinearNoiseScheduler",
    "linear_rescaled": "LinearRescaledNoiseScheduler",
    "cosine": "CosineNoiseScheduler",
    "quadratic": "QuadraticNoiseScheduler",
    "sigmoid": "SigmoidNoiseScheduler",
    "exponential": "ExponentialNoiseScheduler",
    "laplace": "LaplaceNoiseScheduler",
    "karras": "KarrasNoiseScheduler",
    "custom_betas": "CustomNoiseScheduler",
    "custom_alphas_cumprod": "CustomNoiseScheduler",
}


def close(actual: torch.Tensor, expected: torch.Tensor | list[float], rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def line(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / max(count - 1, 1) for i in range(count)]


def betas_of(alpha_bar: Callable[[float], float], count: int) -> list[float]:
    return [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]


def laplace_alpha_bar(u: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def karras_betas(count: int) -> list[float]:
    squares = [0.0] + [root**14 for root in line(0.002 ** (1 / 7), 80 ** (1 / 7), count)]
    return [(after - before) / (1 + after) for before, after in pairwise(squares)]


FORMULAS: dict[str, Callable[[int, float, float], list[float]]] = {
    "linear": lambda n, a, b: line(a, b, n),
    "scaled_linear": lambda n, a, b: [x * x for x in line(math.sqrt(a), math.sqrt(b), n)],
    "quadratic": lambda n, a, b: [x * x for x in line(math.sqrt(a), math.sqrt(b), n)],
    "linear_rescaled": lambda n, a, b: line(a * 1000 / n, b * 1000 / n, n),
    "cosine": lambda n, a, b: betas_of(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, n),
    "sigmoid": lambda n, a, b: [a + (b - a) / (1 + math.exp(-x)) for x in line(-6, 6, n)],
    "exponential": lambda n, a, b: [a * (b / a) ** x for x in line(0, 1, n)],
    "laplace": lambda n, a, b: betas_of(laplace_alpha_bar, n),
    "karras": lambda n, a, b: karras_betas(n),
}

# From 31 timesteps on, the last beta of linear_rescaled stays below 1 for beta_end up to .03.
totals = st.integers(31, 400)
beta_ranges = st.tuples(st.floats(1e-5, 0.01), st.floats(0.01, 0.03))


@given(name=st.sampled_from(NAMES), total=totals, ends=beta_ranges, zero_snr=st.booleans())
def test_every_schedule_has_common_properties(name: str, total: int, ends: tuple[float, float], zero_snr: bool) -> None:
    scheduler = create_noise_scheduler(
        name, num_train_timesteps=total, beta_start=ends[0], beta_end=ends[1], rescale_betas_zero_snr=zero_snr
    )
    tables = (scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod, scheduler.sigmas)
    for values in tables:
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
        assert values.shape == (total,)
    betas, alphas, signal, sigmas = tables
    assert bool(((betas > 0) & (betas <= (1 if zero_snr else 0.999))).all())
    assert torch.equal(alphas, 1 - betas)
    assert bool((signal[1:] < signal[:-1]).all())
    assert bool((signal[0] > 0) & (signal[0] < 1))
    assert (float(signal[-1]) == 0.0) is zero_snr
    assert bool(sigmas[-1].isinf()) is zero_snr
    # The product of at most 400 factors, each off by a rounding of β, of α and of the product itself.
    close(alphas.cumprod(0), signal, rtol=400 * 3 * 2.0**-53)
    # (1 − ᾱ)/ᾱ takes three roundings; atol covers the cancellation in 1 − 1/(1 + σ²) of the test, not of the code.
    close(1 / (1 + sigmas**2), signal, rtol=8 * 2.0**-53, atol=2.0**-53)
    assert scheduler.num_train_timesteps == scheduler.config.num_train_timesteps == total
    assert scheduler.schedule_type is NoiseScheduleType(name)


@given(name=st.sampled_from(NAMES), total=totals, ends=beta_ranges)
def test_betas_follow_the_formula(name: str, total: int, ends: tuple[float, float]) -> None:
    scheduler = create_noise_scheduler(name, num_train_timesteps=total, beta_start=ends[0], beta_end=ends[1])
    # β = 1 − ᾱ ratio cancels: a few 2^-53 absolute, whichever way it is computed. The lines are good to some ulp.
    close(scheduler.betas, FORMULAS[name](total, *ends), rtol=1e-13, atol=8 * 2.0**-53)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"linear_rescaled"}))
def test_single_timestep_is_a_schedule(name: str) -> None:
    scheduler = create_noise_scheduler(name, num_train_timesteps=1)
    close(scheduler.betas, FORMULAS[name](1, 1e-4, 0.02), rtol=1e-9)
    assert 0 < float(scheduler.alphas_cumprod) < 1


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "quadratic", "exponential"])
def test_interpolated_schedules_have_given_ends(name: str) -> None:
    betas = create_noise_scheduler(name, beta_start=1e-4, beta_end=0.02).betas
    # √x² and exp(log x) may miss x by an ulp of a number up to log(1e-4) ≈ 9.
    close(betas[[0, -1]], [1e-4, 0.02], rtol=16 * 2.0**-53)


def test_linear_rescaled_equals_linear_at_1000_with_same_final_level() -> None:
    assert torch.equal(create_noise_scheduler("linear_rescaled").betas, create_noise_scheduler("linear").betas)
    ends = [float(create_noise_scheduler("linear_rescaled", num_train_timesteps=t).alphas_cumprod[-1].log()) for t in
            (500, 1000, 4000)]  # fmt: skip
    # −Σβ is about −10.05 for all of them; the rest is Σβ²/2.
    assert max(ends) - min(ends) < 0.2


def test_karras_has_noise_levels_of_paper() -> None:
    roots = KarrasNoiseScheduler().sigmas ** (1 / 7)
    # σ is recovered from 1 − ᾱ, which starts at 4e-6: a relative 2^-53/4e-6.
    close(roots, line(0.002 ** (1 / 7), 80 ** (1 / 7), 1000), rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "theirs", "rtol"),
    [
        # float32 lines there: an ulp of their upper end, which is up to 14 times the lower, squared for the second.
        ("linear", "linear", 1e-5),
        ("scaled_linear", "scaled_linear", 1e-5),
        ("quadratic", "scaled_linear", 1e-5),
        ("sigmoid", "sigmoid", 1e-5),
        # Computed there in float64 and rounded once.
        ("cosine", "squaredcos_cap_v2", 2.0**-23),
        ("laplace", "laplace", 2.0**-23),
    ],
)
@pytest.mark.parametrize("total", [10, 1000])
def test_betas_equal_diffusers(name: str, theirs: str, rtol: float, total: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(num_train_timesteps=total, beta_schedule=theirs)
    scheduler = create_noise_scheduler(name, num_train_timesteps=total)
    close(scheduler.betas, reference.betas.double(), rtol=rtol)
    # 1000 factors, each rounded to float32 there, and the product after each.
    close(scheduler.alphas_cumprod, reference.alphas_cumprod.double(), rtol=1000 * 2 * 2.0**-24)


falling = st.lists(st.floats(1e-3, 0.3), min_size=2, max_size=50).map(
    lambda betas: (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
)


@given(signal=falling)
def test_zero_snr_rescaling(signal: torch.Tensor) -> None:
    rescaled = rescale_zero_terminal_snr(signal)
    assert rescaled.dtype == torch.float64
    assert float(rescaled[-1]) == 0.0
    assert rescaled[0] == signal[0]
    assert bool((rescaled[1:] <= rescaled[:-1]).all())
    # Shifting and scaling keep the proportions of the steps of √ᾱ; differences of numbers below 1.
    before, after = signal.sqrt().diff(), rescaled.sqrt().diff()
    close(after * before.sum(), before * after.sum(), rtol=0, atol=16 * 2.0**-53)
    close(rescale_zero_terminal_snr(rescaled), rescaled, rtol=8 * 2.0**-53)


def test_zero_snr_rescaling_keeps_input_and_accepts_float32() -> None:
    signal = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float32)
    kept = signal.clone()
    rescaled = rescale_zero_terminal_snr(signal)
    assert torch.equal(signal, kept)
    assert rescaled.dtype == torch.float64
    assert float(rescaled[0]) == float(signal[0])


@pytest.mark.parametrize("name", NAMES)
def test_zero_snr_rescaling_equals_diffusers(name: str) -> None:
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    theirs = module.rescale_zero_terminal_snr(create_noise_scheduler(name).betas)  # float64 in, float64 through
    ours = create_noise_scheduler(name, rescale_betas_zero_snr=True)
    # √ᾱ_t − √ᾱ_T cancels near the end, where a relative 1e-9 remains; β is 1 − ratio of its squares.
    close(ours.betas, theirs, rtol=1e-9, atol=1e-12)
    assert float(ours.alphas_cumprod[-1]) == 0.0


def test_custom_schedules_keep_given_values() -> None:
    betas = [0.0, 0.1, 0.25, 0.5]
    from_betas = create_noise_scheduler("custom", custom_betas=betas)
    assert from_betas.betas.tolist() == betas
    assert from_betas.config.schedule_type == "custom_betas"
    signal = [1.0, 0.7, 0.7, 0.3, 0.0]
    from_signal = create_noise_scheduler("custom", custom_alphas_cumprod=signal)
    assert from_signal.alphas_cumprod.tolist() == signal
    assert from_signal.config.schedule_type == "custom_alphas_cumprod"
    close(from_signal.betas, [0.0, 0.3, 0.0, 1 - 0.3 / 0.7, 1.0], rtol=4 * 2.0**-53)
    assert from_signal.sigmas.tolist()[0] == 0.0
    assert from_signal.sigmas.tolist()[-1] == math.inf


@given(betas=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=40))
def test_custom_betas_and_their_alphas_cumprod_agree(betas: list[float]) -> None:
    one = CustomNoiseScheduler(custom_betas=betas)
    other = CustomNoiseScheduler(custom_alphas_cumprod=one.alphas_cumprod)
    assert torch.equal(other.alphas_cumprod, one.alphas_cumprod)
    close(other.betas, one.betas, rtol=0, atol=4 * 2.0**-53)  # the running product and the ratio, one rounding each


def test_schedule_with_vanishing_signal_has_no_nan() -> None:
    for zero_snr in (False, True):
        scheduler = CustomNoiseScheduler(custom_betas=[0.5] * 1200, rescale_betas_zero_snr=zero_snr)
        assert scheduler.alphas_cumprod[-50:].tolist() == [0.0] * 50  # 2^-1075 and below round to 0
        for values in (scheduler.betas, scheduler.alphas_cumprod, scheduler.sigmas):
            assert not bool(values.isnan().any())


# The forward process


def scales(scheduler: BaseNoiseScheduler, t: torch.Tensor | int, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return √ᾱ_t and √(1 − ᾱ_t) in float64 from the betas, by a product of Python floats."""
    steps = [t] if isinstance(t, int) else t.reshape(-1).tolist()
    signal = [math.prod(1 - b for b in scheduler.betas.tolist()[: step + 1]) for step in steps]
    shape = [-1] + [1] * (samples.dim() - 1) if samples.dim() else []
    both = torch.tensor([[math.sqrt(s) for s in signal], [math.sqrt(1 - s) for s in signal]], dtype=torch.float64)
    return both[0].reshape(shape), both[1].reshape(shape)


def tolerance(dtype: torch.dtype, terms: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return half an ulp of the result, plus in the compute dtype two roundings per term and one for the sum."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    # 8 units: those, and in float64 the rounding of the coefficients in this test and in the code.
    return 0.5001 * torch.finfo(dtype).eps * total.abs() + 8 * unit * terms + torch.finfo(dtype).tiny


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    shape=st.sampled_from([(), (3,), (0, 4), (2, 3, 5), (4, 1, 2, 2)]),
    step=st.integers(0, 49),
    single=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_forward_process_matches_float64(
    dtype: torch.dtype, shape: tuple[int, ...], step: int, single: bool, seed: int
) -> None:
    scheduler = LinearNoiseScheduler(num_train_timesteps=50)
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator).to(dtype)
    noise = torch.randn(shape, generator=generator).to(dtype)
    t: torch.Tensor | int = step
    if shape and not single:
        t = torch.randint(0, 50, shape[:1], generator=generator)
    a, s = scales(scheduler, t, x0)
    noisy, velocity = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
    for result, first, second in ((noisy, a * x0, s * noise), (velocity, a * noise, -s * x0)):
        assert result.dtype == dtype
        assert result.shape == x0.shape
        expected = first.double() + second.double()
        bound = tolerance(dtype, first.abs() + second.abs(), expected)
        assert bool(((result.double() - expected).abs() <= bound).all())


def test_coefficients_are_rounded_once() -> None:
    scheduler = CosineNoiseScheduler()
    x0, noise = torch.randn(4, 8), torch.randn(4, 8)
    t = torch.tensor([0, 10, 500, 999])
    a = scheduler.alphas_cumprod[t].sqrt().float()[:, None]
    s = (1 - scheduler.alphas_cumprod[t]).sqrt().float()[:, None]
    assert torch.equal(scheduler.add_noise(x0, noise, t), a * x0 + s * noise)
    half = scheduler.add_noise(x0.half(), noise.half(), t)
    assert torch.equal(half, (a * x0.half().float() + s * noise.half().float()).half())


def test_all_timestep_types_are_equivalent() -> None:
    scheduler = LinearNoiseScheduler()
    x0, noise = torch.randn(3, 4), torch.randn(3, 4)
    expected = scheduler.add_noise(x0, noise, 200)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        for t in (torch.tensor(200, dtype=dtype), torch.tensor([200], dtype=dtype), torch.full((3,), 200, dtype=dtype)):
            assert torch.equal(scheduler.add_noise(x0, noise, t), expected)


def test_velocity_is_rotation_of_sample() -> None:
    scheduler = LinearNoiseScheduler()
    x0, noise = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    t = torch.tensor([3, 700])
    noisy, velocity = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
    # (x_t, v) is (x0, ε) turned by an angle: the length stays. Sums of squares below 100, a few ulp.
    close(noisy**2 + velocity**2, x0**2 + noise**2, rtol=0, atol=1e-13)


def test_last_timestep_of_zero_snr_schedule_is_noise() -> None:
    scheduler = CosineNoiseScheduler(rescale_betas_zero_snr=True)
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(scheduler.add_noise(x0, noise, 999), noise)
    assert torch.equal(scheduler.get_velocity(x0, noise, 999), -x0)


def test_gradients_equal_coefficients() -> None:
    scheduler = LinearNoiseScheduler()
    x0 = torch.randn(2, 3, requires_grad=True)
    noise = torch.randn(2, 3, requires_grad=True)
    t = torch.tensor([1, 900])
    scheduler.add_noise(x0, noise, t).sum().backward()
    signal = scheduler.alphas_cumprod[t]
    assert x0.grad is not None
    assert noise.grad is not None
    assert torch.equal(x0.grad, signal.sqrt().float()[:, None].expand(2, 3))
    assert torch.equal(noise.grad, (1 - signal).sqrt().float()[:, None].expand(2, 3))


def test_scheduler_used_in_inference_mode_can_train_later() -> None:
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    with torch.inference_mode():
        scheduler = LinearNoiseScheduler()
        scheduler.add_noise(x0, noise, 5)
    scheduler.add_noise(x0.requires_grad_(), noise, 5).sum().backward()
    assert not scheduler.betas.is_inference()
    assert x0.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_default_device_has_no_effect(name: str) -> None:
    with torch.device("meta"):
        scheduler = create_noise_scheduler(name, rescale_betas_zero_snr=True)
    assert torch.equal(scheduler.betas, create_noise_scheduler(name, rescale_betas_zero_snr=True).betas)


def test_add_noise_compiles_as_one_graph() -> None:
    scheduler = LinearNoiseScheduler()
    x0, noise, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1, 900])
    # The "eager" backend runs the captured graph as it is, and needs no compiler.
    compiled = torch.compile(scheduler.add_noise, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x0, noise, t), scheduler.add_noise(x0, noise, t))


def test_pickled_scheduler_is_equal() -> None:
    scheduler = create_noise_scheduler("karras")
    scheduler.add_noise(torch.zeros(1), torch.zeros(1), 0)
    again = pickle.loads(pickle.dumps(scheduler))
    assert again.config == scheduler.config
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)


def test_q_sample_returns_the_noise_it_used() -> None:
    scheduler = LinearNoiseScheduler()
    x0, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([3, 40])
    noisy, noise = scheduler.q_sample(x0, t, generator=torch.Generator().manual_seed(7))
    drawn = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise, drawn)
    assert torch.equal(noisy, scheduler.add_noise(x0, noise, t))
    given_back = scheduler.q_sample(x0, t, noise)
    assert given_back[1] is noise
    assert torch.equal(given_back[0], noisy)
    torch.manual_seed(1)
    first = scheduler.q_sample(x0, 5)[1]
    torch.manual_seed(1)
    assert torch.equal(scheduler.q_sample(x0, 5)[1], first)


@pytest.mark.gpu
def test_forward_process_on_a_gpu() -> None:
    scheduler = LinearNoiseScheduler()
    x0, noise, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 5, 999])
    expected = scheduler.add_noise(x0, noise, t)
    for steps in (t, t.cuda()):
        result = scheduler.add_noise(x0.cuda(), noise.cuda(), steps)
        assert result.is_cuda
        # A GPU may contract a product into the sum: an ulp of numbers below 8.
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=2.0**-20)
    with pytest.raises(ValueError, match=r"noise is on cpu, expected cuda:0 like original_samples; move it"):
        scheduler.add_noise(x0.cuda(), noise, t)
    noise_from_cpu = scheduler.q_sample(x0.cuda(), 5, generator=torch.Generator().manual_seed(7))[1]
    assert torch.equal(noise_from_cpu.cpu(), torch.randn(3, 4, generator=torch.Generator().manual_seed(7)))


X = torch.zeros(2, 3)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity", "q_sample"])
@pytest.mark.parametrize(
    ("samples", "noise", "t", "error", "texts"),
    [
        (X.long(), X, 0, TypeError, ["{x} has dtype torch.int64", "convert {x}"]),
        ([1.0], X, 0, TypeError, ["{x} has type list", "convert {x}"]),
        (X, X.double(), 0, TypeError, ["noise has dtype torch.float64", "torch.float32 like {x}", "randn_like({x})"]),
        (X, [1.0], 0, TypeError, ["noise has type list", "convert noise"]),
        (X, X[:1], 0, ValueError, ["noise has shape [1, 3]", "[2, 3] like {x}", "randn_like({x})"]),
        (X, X.to("meta"), 0, ValueError, ["noise is on meta", "cpu like {x}", "noise.to({x}.device)"]),
        (X, X, 1000, ValueError, ["{t} spans [1000, 1000]", "integers in [0, 999]", "below 1000"]),
        (X, X, -1, ValueError, ["{t} spans [-1, -1]", "below 1000"]),
        (X, X, torch.tensor([0, 2000]), ValueError, ["{t} spans [0, 2000]", "below 1000"]),
        (X, X, 1.0, TypeError, ["{t} has type float", "pass an int"]),
        (X, X, True, TypeError, ["{t} has type bool", "pass an int"]),
        (X, X, torch.tensor([0.0, 1.0]), TypeError, ["{t} has dtype torch.float32", ".long()"]),
        (X, X, torch.tensor([True, False]), TypeError, ["{t} has dtype torch.bool", ".long()"]),
        (X, X, torch.tensor([0, 1, 2]), ValueError, ["{t} has shape [3]", "[2], one per sample of {x}", "single int"]),
        (X, X, torch.tensor([[0], [1]]), ValueError, ["{t} has shape [2, 1]", "[2], one per sample of {x}"]),
        (X[0, 0], X[0, 0], torch.tensor([0]), ValueError, ["{t} has shape [1]", "0-d", "single int"]),
    ],
)
def test_forward_process_errors(
    method: str, samples: Any, noise: Any, t: Any, error: type[Exception], texts: list[str]
) -> None:
    scheduler = LinearNoiseScheduler()
    x_name = {"add_noise": "original_samples", "get_velocity": "sample", "q_sample": "x0"}[method]
    t_name = "t" if method == "q_sample" else "timesteps"
    arguments = (samples, t, noise) if method == "q_sample" else (samples, noise, t)
    with pytest.raises(error, match=rf"^{method}: ") as caught:
        getattr(scheduler, method)(*arguments)
    for text in texts:
        assert text.format(x=x_name, t=t_name) in str(caught.value)


def test_q_sample_refuses_unused_generator() -> None:
    with pytest.raises(ValueError, match=r"^q_sample: generator is given beside noise, .* leave one of them out"):
        LinearNoiseScheduler().q_sample(X, 0, noise=X, generator=torch.Generator())


# Configuration, classes and the factory


def test_config_fields_have_order_and_defaults() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(NoiseSchedulerConfig)}
    assert list(fields.items()) == [
        ("num_train_timesteps", 1000),
        ("beta_start", 1e-4),
        ("beta_end", 0.02),
        ("schedule_type", "linear"),
        ("clip_sample", False),
        ("clip_sample_range", 1.0),
        ("sample_max_value", 1.0),
        ("timestep_spacing", None),  # leading, or what a flow takes
        ("rescale_betas_zero_snr", False),
        ("custom_betas", None),
        ("custom_alphas_cumprod", None),
        ("steps_offset", 0),
        ("shift", 1.0),
        ("shift_mu", None),
    ]
    assert NoiseSchedulerConfig().timestep_spacing == "leading"


def test_config_is_frozen_hashable_and_comparable() -> None:
    config = NoiseSchedulerConfig(schedule_type=NoiseScheduleType.COSINE)
    assert config == NoiseSchedulerConfig(schedule_type="squaredcos_cap_v2")
    assert hash(config) == hash(NoiseSchedulerConfig(schedule_type="squaredcos"))
    assert type(config.schedule_type) is str
    assert config != NoiseSchedulerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta_end = 0.5  # type: ignore[misc]


def test_custom_values_of_all_types_give_equal_config() -> None:
    numpy = pytest.importorskip("numpy")
    values = [0.1, 0.2, 0.3]
    tensor = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    configs = {
        NoiseSchedulerConfig(schedule_type="custom_betas", custom_betas=form)
        for form in (values, tuple(values), tensor, numpy.array(values))
    }
    (config,) = configs
    assert config.custom_betas == (0.1, 0.2, 0.3)
    assert config.num_train_timesteps == 3
    assert dataclasses.replace(config) == config


def test_numbers_are_normalised() -> None:
    numpy = pytest.importorskip("numpy")
    config = NoiseSchedulerConfig(num_train_timesteps=numpy.int64(10), beta_end=numpy.float32(0.5), sample_max_value=2)
    assert type(config.num_train_timesteps) is int
    assert type(config.beta_end) is float
    assert type(config.sample_max_value) is float


@pytest.mark.parametrize("name", [*NAMES, "squaredcos_cap_v2", "squaredcos"])
def test_factory_and_class_agree(name: str) -> None:
    made = create_noise_scheduler(name, num_train_timesteps=50)
    canonical = NoiseScheduleType.parse(name)
    cls = getattr(schedules, CLASSES[canonical.value])
    assert type(made) is cls
    for other in (
        cls(num_train_timesteps=50),
        cls(NoiseSchedulerConfig(num_train_timesteps=50)),
        cls(made.config),
        create_noise_scheduler(made.config),
        create_noise_scheduler(canonical, num_train_timesteps=50),
        create_noise_scheduler(NoiseSchedulerConfig(schedule_type=name), num_train_timesteps=50),
    ):
        assert type(other) is cls
        assert other.config == made.config
        assert torch.equal(other.betas, made.betas)


def test_custom_class_accepts_either_field() -> None:
    assert CustomNoiseScheduler(custom_betas=[0.1]).schedule_type is NoiseScheduleType.CUSTOM_BETAS
    by_product = CustomNoiseScheduler(NoiseSchedulerConfig(), custom_alphas_cumprod=[0.9])
    assert by_product.schedule_type is NoiseScheduleType.CUSTOM_ALPHAS_CUMPROD


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_schedule_info_is_plain_python(name: str, zero_snr: bool) -> None:
    scheduler = create_noise_scheduler(name, rescale_betas_zero_snr=zero_snr)
    info = scheduler.get_schedule_info()
    json.dumps(info)
    assert type(info["schedule_type"]) is str
    assert info["schedule_type"] == name
    assert info["num_train_timesteps"] == 1000
    assert info["zero_terminal_snr"] is zero_snr
    for key in ("betas_range", "alphas_cumprod_range", "sigmas_range", "snr_range", "log_snr_range"):
        low, high = info[key]
        assert type(low) is float
        assert low < high
    signal = scheduler.alphas_cumprod
    assert info["alphas_cumprod_range"] == (float(signal[-1]), float(signal[0]))
    assert info["terminal_snr"] == info["snr_range"][0]
    assert info["terminal_snr"] == pytest.approx(float(signal[-1] / (1 - signal[-1])), rel=1e-15, abs=0.0)
    assert info["log_snr_range"][1] == pytest.approx(math.log(info["snr_range"][1]), rel=1e-12)
    assert (info["log_snr_range"][0] == -math.inf) is zero_snr


def custom(**fields: Any) -> dict[str, Any]:
    return {"schedule_type": "custom", **fields}


@pytest.mark.parametrize(
    ("fields", "error", "texts"),
    [
        ({"num_train_timesteps": 0}, ValueError, ["num_train_timesteps is 0", "raise num_train_timesteps to 1"]),
        ({"num_train_timesteps": 10.0}, TypeError, ["num_train_timesteps has type float", "as an int"]),
        ({"num_train_timesteps": True}, TypeError, ["num_train_timesteps has type bool", "as an int"]),
        ({"steps_offset": -1}, ValueError, ["steps_offset is -1", "raise steps_offset to 0"]),
        ({"beta_start": 0.0}, ValueError, ["beta_start is 0.0", "above 0", "in that range"]),
        ({"beta_start": math.nan}, ValueError, ["beta_start is nan", "in that range"]),
        ({"beta_start": "1e-4"}, TypeError, ["beta_start has type str", "as a float"]),
        ({"beta_end": 1.0}, ValueError, ["beta_end is 1.0", "below 1", "0.02 is usual"]),
        ({"beta_end": math.inf}, ValueError, ["beta_end is inf", "in that range"]),
        ({"beta_start": 0.5}, ValueError, ["beta_start is 0.5", "at most beta_end, 0.02", "swap the two"]),
        ({"schedule_type": "sqrt"}, ValueError, ["schedule_type is 'sqrt'", "squaredcos_cap_v2", "pick a name"]),
        ({"schedule_type": None}, ValueError, ["schedule_type is None", "linear_rescaled", "pick a name"]),
        ({"clip_sample": 1}, TypeError, ["clip_sample has type int", "clip_sample=True"]),
        ({"rescale_betas_zero_snr": "no"}, TypeError, ["rescale_betas_zero_snr has type str", "=False"]),
        ({"clip_sample_range": 0}, ValueError, ["clip_sample_range is 0.0", "in that range"]),
        ({"sample_max_value": 0.5}, ValueError, ["sample_max_value is 0.5", "at least 1", "in that range"]),
        ({"timestep_spacing": "karras"}, ValueError, ["timestep_spacing is 'karras'", "trailing", "pick a name"]),
        (custom(), ValueError, ["schedule_type is 'custom'", "custom_betas or custom_alphas_cumprod", "1-D tensor"]),
        ({"schedule_type": "custom_betas"}, ValueError, ["'custom_betas' without its values", "pass custom_betas"]),
        (
            {"schedule_type": "custom_betas", "custom_alphas_cumprod": [0.9]},
            ValueError,
            ["'custom_betas' without its values", "pass custom_betas"],
        ),
        (
            custom(custom_betas=[0.1], custom_alphas_cumprod=[0.9]),
            ValueError,
            ["custom_alphas_cumprod is given beside custom_betas", "leave one of them out"],
        ),
        (
            {"custom_betas": [0.1]},
            ValueError,
            ["custom_betas is given with schedule_type 'linear'", "leave custom_betas"],
        ),
        (custom(custom_betas=[[0.1]]), ValueError, ["custom_betas has shape [1, 1]", "one value per timestep"]),
        (custom(custom_betas=[]), ValueError, ["custom_betas has shape [0]", "one value per timestep"]),
        (custom(custom_betas="0.1"), TypeError, ["custom_betas has type str", "as a list"]),
        (
            custom(custom_betas=torch.ones(2) * 1j),
            TypeError,
            ["custom_betas has type Tensor", "no real numbers", "as a list"],
        ),
        (custom(custom_betas=torch.tensor([True])), TypeError, ["custom_betas has type Tensor", "as a list"]),
        (custom(custom_betas=[0.1, 1.0]), ValueError, ["custom_betas[1] is 1.0", "[0, 1)", "rescale_betas_zero_snr"]),
        (custom(custom_betas=[math.nan]), ValueError, ["custom_betas[0] is nan", "variance of each step"]),
        (custom(custom_betas=[-0.1]), ValueError, ["custom_betas[0] is -0.1", "variance of each step"]),
        (custom(custom_alphas_cumprod=[1.5]), ValueError, ["custom_alphas_cumprod[0] is 1.5", "running product"]),
        (
            custom(custom_alphas_cumprod=[0.5, math.nan]),
            ValueError,
            ["custom_alphas_cumprod[1] is nan", "running product"],
        ),
        (custom(custom_alphas_cumprod=[0.5, 0.6]), ValueError, ["custom_alphas_cumprod[1] is 0.6", "clean to noisy"]),
        (
            custom(custom_alphas_cumprod=[0.5, 0, 0]),
            ValueError,
            ["custom_alphas_cumprod[1] is 0.0", "where the signal ends"],
        ),
        (
            custom(custom_betas=[0.1, 0.2], num_train_timesteps=3),
            ValueError,
            ["custom_betas has 2 values", "num_train_timesteps=3 of them", "leave num_train_timesteps out"],
        ),
    ],
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error, match=r"^NoiseSchedulerConfig: ") as caught:
        NoiseSchedulerConfig(**fields)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "texts"),
    [
        (lambda: create_noise_scheduler("sqrt"), ValueError, ["schedule_type is 'sqrt'", "karras", "pick a name"]),
        (
            lambda: create_noise_scheduler("linear", beta_max=1),
            ValueError,
            ["create_noise_scheduler: field is 'beta_max'", "beta_start", "steps_offset", "pick a name"],
        ),
        (lambda: LinearNoiseScheduler(T=1), ValueError, ["LinearNoiseScheduler: field is 'T'", "pick a name"]),
        (
            lambda: create_noise_scheduler("linear", schedule_type="cosine"),
            ValueError,
            ["schedule_type is given beside type 'linear'", "leave schedule_type out"],
        ),
        (
            lambda: LinearNoiseScheduler({"beta_end": 0.1}),  # type: ignore[arg-type]
            TypeError,
            ["LinearNoiseScheduler: config has type dict", "pass the fields as keywords"],
        ),
        (
            lambda: CosineNoiseScheduler(NoiseSchedulerConfig(schedule_type="karras")),
            ValueError,
            ["CosineNoiseScheduler: schedule_type is 'karras'", "expected 'cosine'", "create_noise_scheduler"],
        ),
        (
            lambda: CustomNoiseScheduler(),
            ValueError,
            ["schedule_type is 'custom'", "pass custom_betas or custom_alphas"],
        ),
        (
            lambda: create_noise_scheduler("linear_rescaled", num_train_timesteps=20),
            ValueError,
            ["num_train_timesteps is 20", "last beta 1", "use 21 timesteps or more"],
        ),
        (
            lambda: create_noise_scheduler("linear", num_train_timesteps=1, rescale_betas_zero_snr=True),
            ValueError,
            ["rescale_zero_terminal_snr: alphas_cumprod has shape [1]", "at least 2", "one value per timestep"],
        ),
        (
            lambda: create_noise_scheduler("custom", custom_alphas_cumprod=[0.5, 0.5], rescale_betas_zero_snr=True),
            ValueError,
            ["rescale_zero_terminal_snr: alphas_cumprod is the same at both ends", "leave out rescale_betas_zero_snr"],
        ),
        (
            lambda: rescale_zero_terminal_snr([0.9, 0.5]),  # type: ignore[arg-type]
            TypeError,
            ["alphas_cumprod has type list", "convert alphas_cumprod to a float tensor"],
        ),
        (lambda: rescale_zero_terminal_snr(torch.tensor([1, 0])), TypeError, ["alphas_cumprod has dtype torch.int64"]),
        (
            lambda: rescale_zero_terminal_snr(torch.tensor([1.5, 0])),
            ValueError,
            ["alphas_cumprod[0] is 1.5", "product"],
        ),
        (
            lambda: rescale_zero_terminal_snr(torch.tensor([0.1, 0.5])),
            ValueError,
            ["alphas_cumprod[1] is 0.5", "order"],
        ),
        (
            lambda: NoiseScheduleType.parse("lin"),
            ValueError,
            ["NoiseScheduleType.parse: schedule_type is 'lin'", "pick"],
        ),
    ],
)
def test_classes_and_functions_errors(call: Callable[[], object], error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)
