# SPDX-License-Identifier: MIT
"""Guidance methods beside their formulas, through whole loops of every kind of row; reductions and passes counted."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import create_noise_scheduler, create_sampler, ops
from fastdiff.guidance import FrequencyDecoupledGuidance, MixedGuidance, PlainGuidance, ProjectedGuidance, cfg_plus_plus
from fastdiff.sampling import GuidedStepper, Stepper
from fastdiff.solvers.affine import MODEL_OUTPUT
from fastdiff.solvers.table import Row, StepTable
from support.guidance_formulas import CASES, guided_by, outputs, plain

SHAPE = (4, 6, 10)
#: Tables whose rows leave different room: (options of the sampler).
TABLES: dict[str, dict[str, Any]] = {
    "ddim": {"method": "ddim"},
    "clipped ddim": {"method": "ddim", "clip": True},
    "thresholded ddim": {"method": "ddim", "thresholding": True},
    "second order": {"method": "dpm_solver", "solver_order": 2},
    "third order": {"method": "dpm_solver", "solver_order": 3, "prediction_type": "v_prediction"},
    "clipped second order": {"method": "dpm_solver", "solver_order": 2, "clip": True},
    "stochastic": {"method": "dpm_solver", "algorithm_type": "sde-dpmsolver++"},
}


@functools.lru_cache
def sampler_of(kind: str, steps: int = 4) -> Any:
    options = dict(TABLES[kind])
    scheduler = create_noise_scheduler("cosine", clip_sample=options.pop("clip", False))
    return create_sampler(scheduler, num_inference_steps=steps, guidance_scale=1.0, **options)


def steppers(kind: str, guidance: Any, **options: Any) -> tuple[GuidedStepper, Stepper]:
    sampler = sampler_of(kind)
    both = {"sample_max_value": 2.0, "seeds": [5, 6, 7] if kind == "stochastic" else None}
    return GuidedStepper(sampler.table, guidance, **both, **options), Stepper(sampler.table, **both)


def check_loop(
    guided: GuidedStepper, plain_stepper: Stepper, formulas: list[Any], dtype: torch.dtype, tol: float
) -> None:
    """Walk both; the plain stepper gets the formula's output, computed in float64."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    batch = len(formulas)
    x = y = torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    kept: list[Any] = [None] * batch
    for row in guided.table:
        given = outputs(batch, SHAPE, generator, dtype)
        wanted = guided_by(formulas, given, y, row.prediction, kept)
        x = guided.step(x, {name: given[name] for name in guided.branches})
        y = plain_stepper.step(y, wanted.to(dtype))
        error = float((x - y).abs().max() / y.abs().max())
        assert error < tol
    assert guided.done


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_step_equals_formula_in_float64(name: str, kind: str) -> None:
    method, formula = CASES[name]
    # Rounding of float64 through a loop whose first step multiplies errors by up to 100.
    check_loop(*steppers(kind, method), [formula] * 3, torch.float64, 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_scalars_of_a_large_batch_equal_formula(name: str) -> None:
    method, formula = CASES[name]
    sampler = sampler_of("second order")  # 20 samples: scalars are tensors [B]
    both = GuidedStepper(sampler.table, method), Stepper(sampler.table)
    check_loop(*both, [formula] * 20, torch.float64, 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_step_in_float32_is_near_the_formula(name: str) -> None:
    # A reduction's 1e-7 times weights of up to 20, and steps that multiply an error by up to 50 at the first level.
    method, formula = CASES[name]
    check_loop(*steppers("second order", method), [formula] * 3, torch.float32, 2e-4)


@pytest.mark.parametrize("batch", [5, 20])
def test_method_may_differ_from_sample_to_sample(batch: int) -> None:
    names = ["projected with momentum", "plain", "rescaled", "dual", "zero star"] * (batch // 5)
    methods, formulas = zip(*(CASES[name] for name in names), strict=True)
    for kind in ("second order", "clipped ddim"):
        sampler = sampler_of(kind)
        both = GuidedStepper(sampler.table, MixedGuidance(methods)), Stepper(sampler.table)
        check_loop(*both, list(formulas), torch.float64, 1e-11)


def test_scale_may_differ_from_sample_to_sample() -> None:
    scales = [1.0, 3.0, 7.5]
    formulas = [plain(g) for g in scales]
    for kind in TABLES:
        check_loop(*steppers(kind, PlainGuidance(torch.tensor(scales))), formulas, torch.float64, 1e-11)


# --- Reductions and passes --------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each reduction and each pass over the samples."""
    calls: list[str] = []
    for name in ("step", "gram", "host_gram", "dot", "norm", "std", "mean", "quantile"):
        function = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _f=function, _n=name, **k: (calls.append(_n.removeprefix("host_")), _f(*a, **k))[1]
        )
    return calls


@pytest.mark.parametrize("name", CASES)
def test_one_reduction_and_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = CASES[name]
    sampler = sampler_of("second order")
    guided = GuidedStepper(sampler.table, method, backend="reference")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *SHAPE)
    calls = counted(monkeypatch)
    for _ in sampler.table:
        given = outputs(2, SHAPE, generator, torch.float32)
        passes = guided.passes()
        x = guided.step(x, given)
        # Rescaling combines once more, and measures the standard deviations of the result and of a branch.
        place = guided._needs._place
        measured = 1 if method.rescale_at(place, method.scale_at(place)) > 0.0 else 0
        assert passes == 1
        assert calls.count("step") == 1 + measured
        assert calls.count("std") == 2 * measured
        assert calls.count("gram") == method.uses_products(place)
        assert len(calls) == 1 + 3 * measured + calls.count("gram")
        calls.clear()
    if method.reduces or method.rescale:
        assert method.uses_reduction(guided._needs._place)


@pytest.mark.parametrize(
    ("kind", "name", "passes"),
    [
        ("clipped ddim", "rescaled", 2),  # the first is measured
        ("clipped ddim", "perturbed", 2),  # three tensors in a clipped x0
        ("clipped ddim", "projected with momentum", 2),
        ("clipped ddim", "residual", 1),
        ("third order", "composed", 1),  # a pair and two in history slots
        ("thresholded ddim", "zero star", 2),  # the second measures x0
        ("thresholded ddim", "dual", 3),
    ],
)
def test_passes_where_room_is_short(kind: str, name: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(kind)
    guided = GuidedStepper(sampler.table, CASES[name][0], backend="reference")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, *SHAPE)
    calls = counted(monkeypatch)
    for index in range(len(sampler.table)):
        given = outputs(2, SHAPE, generator, torch.float32)
        announced = guided.passes() + sampler.table.thresholding + (name == "rescaled")
        calls.clear()
        x = guided.step(x, given)
        assert calls.count("step") <= passes
        if index > 1:
            assert calls.count("step") == passes == announced
        assert calls.count("gram") <= 1


# --- Calls that are left out ------------------------------------------------------------------------------------------


def test_branches_of_weight_zero_are_left_out() -> None:
    table = sampler_of("ddim", 10).table
    cases = [
        (PlainGuidance(1.0), [1] * 10),
        (PlainGuidance(5.0, start=0.2, stop=0.5), [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]),
        (PlainGuidance([1.0] * 4 + [3.0] * 6), [1] * 4 + [2] * 6),
        (PlainGuidance(lambda place: 1.0 if place.index % 2 else 4.0), [2, 1] * 5),
        (ProjectedGuidance(5.0, momentum=-0.5, stop=0.3), [2] * 3 + [1] * 7),
    ]
    for method, wanted in cases:
        guided = GuidedStepper(table, method)
        x, counts = torch.randn(2, *SHAPE), []
        for _ in table:
            counts.append(len(guided.branches))
            x = guided.step(x, {name: torch.randn_like(x) for name in guided.branches})
        assert counts == wanted


def test_interval_of_noise_is_that_of_the_levels() -> None:
    sampler = sampler_of("ddim", 10)
    levels = sampler.levels(10)
    guided = GuidedStepper(sampler.table, PlainGuidance(3.0, noise_ratios=(0.3, 5.0)), levels=levels)
    x = torch.randn(2, *SHAPE)
    for i in range(10):
        assert (len(guided.branches) == 2) == (0.3 < levels[i].sigma / levels[i].alpha <= 5.0)
        x = guided.step(x, {"cond": torch.randn_like(x), "uncond": torch.randn_like(x)})
    with pytest.raises(ValueError, match="noise_ratios"):
        GuidedStepper(sampler.table, PlainGuidance(3.0, noise_ratios=(0.3, 5.0))).branches  # noqa: B018


def test_uncond_is_taken_for_the_samples_that_need_it() -> None:
    table = sampler_of("second order").table
    method = PlainGuidance(torch.tensor([1.0, 4.0, 1.0, 2.0]))
    part, whole = GuidedStepper(table, method), GuidedStepper(table, method)
    x = y = torch.randn(4, *SHAPE)
    for _ in table:
        c, u = torch.randn_like(x), torch.randn_like(x)
        chosen = part.samples_for("uncond")
        assert part.samples_for("cond") is None
        assert chosen is not None
        assert chosen.tolist() == [1, 3]
        x = part.step(x, {"cond": c, "uncond": u[chosen]})
        y = whole.step(y, {"cond": c, "uncond": u})
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-5)  # c − u is 0 in the one, and has no weight in the other


def test_outputs_without_weight_are_not_read() -> None:
    table = sampler_of("ddim").table
    guided = GuidedStepper(table, CASES["zero star"][0])
    x = torch.randn(2, *SHAPE)
    assert guided.branches == ()
    first = guided.step(x, {})
    assert torch.equal(first, Stepper(table).step(x, torch.zeros_like(x)))


# --- CFG++ and frequencies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_cfg_plus_plus_is_the_papers_step(prediction_type: str) -> None:
    steps, scale = 5, 0.6
    sampler = create_sampler(
        create_noise_scheduler("linear", clip_sample=False), "ddim", num_inference_steps=steps, guidance_scale=1.0,
        prediction_type=prediction_type,
    )  # fmt: skip
    levels = sampler.levels(steps)
    guided = GuidedStepper(sampler.table, PlainGuidance(cfg_plus_plus(scale, levels)))
    x = y = torch.randn(2, *SHAPE, dtype=torch.float64)
    for i in range(steps):
        c, u = torch.randn_like(x), torch.randn_like(x)
        here, there = levels[i], levels[i + 1]

        def noise_of(m: Tensor, here: Any = here, y: Tensor = y) -> Tensor:
            if prediction_type == "epsilon":
                return m
            if prediction_type == "sample":
                return (y - here.alpha * m) / here.sigma
            return here.alpha * m + here.sigma * y

        eps_c, eps_u = noise_of(c), noise_of(u)
        x0 = (y - here.sigma * (eps_u + scale * (eps_c - eps_u))) / here.alpha
        y = there.alpha * x0 + there.sigma * eps_u
        x = guided.step(x, {"cond": c, "uncond": u})
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_frequency_bands_have_their_scales() -> None:
    shape = (2, 3, 16, 12)
    c, u = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    d = c - u
    # Two bands split at a quarter of a cycle: the low one from the complex transform of all frequencies.
    f = [torch.fft.fftfreq(n, dtype=torch.float64).abs() for n in shape[-2:]]
    low = (torch.maximum(f[0][:, None], f[1]) <= 0.25).double()

    def lowpass(v: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(v) * low).real

    wanted = u + 9.0 * (d - lowpass(d)) + 3.0 * lowpass(d)
    torch.testing.assert_close(FrequencyDecoupledGuidance(scales=(9.0, 3.0)).output(c, u), wanted)
    wanted = u.clone()
    for scale, eta, band in ((9.0, 0.2, lambda v: v - lowpass(v)), (3.0, 0.7, lowpass)):
        d_band, c_band = band(d), band(c)
        over = (1, 2, 3)
        along = (d_band * c_band).sum(over, keepdim=True) / c_band.square().sum(over, keepdim=True) * c_band
        wanted += scale * (d_band - along + eta * along)
    method = FrequencyDecoupledGuidance(scales=(9.0, 3.0), parallel_weights=(0.2, 0.7))
    torch.testing.assert_close(method.output(c, u), wanted)
    # One scale for all bands is plain guidance, in a loop too.
    even = FrequencyDecoupledGuidance(scales=(4.0, 4.0, 4.0))
    torch.testing.assert_close(even.output(c, u), u + 4.0 * d)
    check_loop(*steppers("second order", even), [plain(4.0)] * 3, torch.float64, 1e-11)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_malformed_arguments_are_named_and_change_nothing() -> None:
    table = sampler_of("second order").table
    guided = GuidedStepper(table, ProjectedGuidance(5.0, momentum=-0.5))
    x = torch.randn(2, *SHAPE)
    both = {"cond": torch.randn_like(x), "uncond": torch.randn_like(x)}
    for given, words in (
        ({"cond": x}, "lacks 'uncond'"),
        ({**both, "uncond": x[:1]}, r"outputs\['uncond'\]"),
        (x, "outputs"),
        ({**both, "uncond": 3.0}, "outputs"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            guided.step(x, given)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="gradients"):
        guided.step(x.clone().requires_grad_(), both)
    assert guided.index == 0
    assert guided._state is None
    for make, words in (
        (lambda: PlainGuidance(float("nan")), "scale"),
        (lambda: PlainGuidance(3.0, rescale=70.0), "rescale"),
        (lambda: ProjectedGuidance(3.0, around="x"), "around"),
        (lambda: GuidedStepper(table, 7.5), "guidance"),  # type: ignore[arg-type]
        (lambda: MixedGuidance([]), "methods"),
        (lambda: MixedGuidance([FrequencyDecoupledGuidance()]), "methods"),
        (lambda: GuidedStepper(table, PlainGuidance([1.0, 2.0])).branches, "2 scales"),
        (lambda: GuidedStepper(table, PlainGuidance(torch.ones(5))).step(x, both), "guidance"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            make()


def test_gradients_flow_through_weights_that_are_constant() -> None:
    table = StepTable((Row(1.0, MODEL_OUTPUT, (1.0, -0.5)),))
    c, u = (torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = GuidedStepper(table, PlainGuidance(3.0)).step(
        torch.randn(2, *SHAPE, dtype=torch.float64), {"cond": c, "uncond": u}
    )
    y.sum().backward()
    torch.testing.assert_close(c.grad, torch.full_like(c, 3.0))
    torch.testing.assert_close(u.grad, torch.full_like(u, -2.0))


@pytest.mark.parametrize("name", ["zero star", "projected with momentum", "perturbed"])
def test_copies_go_on_by_themselves(name: str) -> None:
    table = sampler_of("second order").table
    guided = GuidedStepper(table, CASES[name][0])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, *SHAPE)
    for _ in range(2):
        x = guided.step(x, outputs(2, SHAPE, generator, torch.float32))
    others = [copy.copy(guided), copy.deepcopy(guided), pickle.loads(pickle.dumps(guided))]
    given = [outputs(2, SHAPE, generator, torch.float32) for _ in range(2)]
    results = []
    for stepper in (guided, *others):
        y = x
        for one in given:
            y = stepper.step(y, one)
        results.append(y)
    for y in results[1:]:
        assert torch.equal(y, results[0])
