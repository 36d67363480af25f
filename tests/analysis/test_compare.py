# SPDX-License-Identifier: MIT
"""Comparison of methods: same noise, the right figures, and refusals before anything is sampled."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fastdiff import SamplingMethod, create_sampler
from fastdiff.analysis import GaussianMixture, MethodSpec, compare_methods, measure_convergence, parse_method
from fastdiff.analysis.report import closest_to_baseline
from fastdiff.schedules.levels import variance_preserving
from support.analysis_cases import images_workload, points_workload


def test_comparison_samples_as_samplers_do_and_measures_from_the_reference() -> None:
    workload = points_workload()
    found = compare_methods(workload, ["ddim", "heun"], [4, 8], progress=False)
    assert [(row.method, row.steps, row.model_calls) for row in found.rows] == [
        ("ddim", 4, 4), ("ddim", 8, 8), ("heun", 4, 7), ("heun", 8, 15),
    ]  # fmt: skip
    truth = create_sampler(workload.scheduler, "ddim", num_inference_steps=40)
    solution = truth.sample(workload.model, workload.latents, progress=False).samples
    assert torch.equal(found.reference_samples, solution)
    row = found.row("heun", 8)
    own = create_sampler(workload.scheduler, "heun", num_inference_steps=8)
    samples = own.sample(workload.model, workload.latents, progress=False).samples
    assert torch.equal(row.samples, samples)
    apart = np.sqrt(((samples.double() - solution.double()).numpy() ** 2).mean(1))
    assert row.distance.mean == pytest.approx(apart.mean(), rel=1e-12)
    assert row.distance.error == pytest.approx(apart.std(ddof=1) / math.sqrt(len(apart)), rel=1e-12)
    assert row.variance == pytest.approx(samples.double().numpy().var(0, ddof=1).mean(), rel=1e-12)
    assert row.milliseconds_per_image == pytest.approx(1e3 * row.seconds / 16)
    assert (row.sharpness, row.frechet, row.inception) == (None, None, None)
    assert found.row("ddim", 4).distance.mean > found.row("ddim", 8).distance.mean > found.resolution > 0
    with pytest.raises(KeyError):
        found.row("heun", 5)


def test_reference_of_the_same_method_and_steps_has_distance_zero() -> None:
    found = compare_methods(points_workload(), ["ddim"], 10, reference_steps=10, progress=False)
    assert found.row("ddim", 10).distance == (0.0, 0.0)


def test_rounds_repeat_every_loop_and_change_no_sample() -> None:
    workload, calls = points_workload(), 0

    def counting(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return workload.model(x, t)  # type: ignore[no-any-return]

    counted = dataclasses.replace(workload, model=counting)
    once = compare_methods(counted, ["ddpm"], [3, 5], reference_steps=6, progress=False)
    assert calls == 6 + 3 + 3 + 5
    calls = 0
    thrice = compare_methods(counted, ["ddpm"], [3, 5], reference_steps=6, rounds=3, progress=False)
    assert calls == 6 + 3 + 3 * (3 + 5)
    assert torch.equal(once.row("ddpm", 5).samples, thrice.row("ddpm", 5).samples), "seeds make the noise"
    assert once.row("ddpm", 5).stochastic


def test_image_metrics_are_filled_and_figures_are_json() -> None:
    found = compare_methods(images_workload(), ["ddim"], [3], reference_steps=10, progress=False)
    (row,) = json.loads(json.dumps(found.figures(), allow_nan=False))["rows"]
    for name in ("sharpness", "frechet", "inception", "precision", "recall", "distance", "distance_error"):
        assert isinstance(row[name], float), name
    assert found.conditions["real images"].startswith("variance ")


def test_fewest_steps_that_reach_the_baseline_are_named() -> None:
    methods = ["ddim", "unipc:power=1.75"]
    found = compare_methods(points_workload(), methods, [5, 10, 20], reference="dpmsolver++", progress=False)
    most = found.row("ddim", 20)
    (sentence,) = closest_to_baseline(found, "ddim")
    enough = [row for row in found.rows if row.method != "ddim" and row.distance.mean <= most.distance.mean]
    assert sentence.startswith(f"{enough[0].steps} steps of unipc:power=1.75 ")
    assert f"as 20 of ddim: {enough[0].distance.mean:.4f} against {most.distance.mean:.4f}" in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["nope"]}, r"^compare_methods: methods is 'nope', expected one of .*dpmsolver\+\+"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["ddim:nope=1"]}, "option of ddim is 'nope=1'"),
        ({"methods": ["ddim:eta=-1"]}, "eta"),
        ({"methods": ["ddim:spacing=nope"]}, "spacing is 'nope'"),
        ({"methods": ["ddim:power=0"]}, "power is 0"),
        ({"steps": [41]}, "num_inference_steps.*41"),
        ({"steps": []}, "steps is empty"),
        ({"steps": [0]}, "steps is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"reference": "ddpm"}, "reference is 'ddpm', which draws noise"),
        ({"reference_steps": 1}, "reference_steps is 1"),
    ],
)
def test_bad_input_is_refused_before_sampling(arguments: dict[str, object], message: str) -> None:
    workload = dataclasses.replace(points_workload(), model=lambda x, t: pytest.fail("it samples"))
    with pytest.raises(ValueError, match=message):
        compare_methods(workload, **{"methods": ["ddim"], "steps": [4], **arguments})  # type: ignore[arg-type]


def test_method_names_carry_options() -> None:
    spec = parse_method("dpmsolver++:solver_order=3:lower_order_final=False:spacing=linspace")
    assert spec.fields == {
        "method": SamplingMethod.DPM_SOLVER, "algorithm_type": "dpmsolver++", "solver_order": 3,
        "lower_order_final": False,
    }  # fmt: skip
    assert spec.spacing == "linspace"
    workload = points_workload()
    assert spec.sampler(workload, 4).table.timesteps == (39.0, 26.0, 13.0, 0.0)
    assert parse_method(SamplingMethod.HEUN).label == "heun"
    assert isinstance(parse_method(spec), MethodSpec)


@pytest.mark.parametrize("method", list(SamplingMethod))
def test_every_registered_method_compares_or_is_refused(method: SamplingMethod) -> None:
    """A new solver needs no change here; one whose network takes other times is refused in one sentence."""
    for name in method.presets:
        try:
            found = compare_methods(points_workload(4), [name], [4], reference_steps=10, progress=False)
        except ValueError as error:
            assert "which calls the model with the time" in str(error)  # noqa: PT017
        else:
            assert bool(torch.isfinite(found.rows[0].samples).all())


def test_mixture_epsilon_is_the_gradient_of_its_log_density() -> None:
    mixture = GaussianMixture([[0.5, -1.0], [-0.3, 0.8]], [0.2, 0.6], [1.0, 3.0])
    level = variance_preserving(0.9, 0.0)
    x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    components = torch.distributions.Independent(
        torch.distributions.Normal(
            level.alpha * torch.tensor(mixture.means, dtype=torch.float64),
            ((level.alpha * torch.tensor(mixture.stds, dtype=torch.float64)) ** 2 + level.sigma**2).sqrt()[:, None],
        ),
        1,
    )
    weights = torch.distributions.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64))
    density = torch.distributions.MixtureSameFamily(weights, components).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(density, x)
    torch.testing.assert_close(mixture.epsilon(x.detach(), level), -level.sigma * gradient, rtol=1e-10, atol=1e-10)


def test_mixture_samples_and_sampled_points_lie_on_the_ring() -> None:
    workload = points_workload(200)
    points = workload.run(parse_method("dpmsolver++"), 20).samples
    drawn = GaussianMixture.ring(4).sample(200, torch.Generator().manual_seed(1))
    for cloud in (points, drawn):
        assert float((cloud.norm(dim=1) - 1.2).abs().mean()) < 0.2
    for lists in (([[0.0]], [0.0], [1.0]), ([[0.0], [1.0]], [1.0], [1.0]), ([[]], [1.0], [1.0])):
        with pytest.raises(ValueError, match=r"^GaussianMixture: "):
            GaussianMixture(*lists)


def test_measured_orders_are_those_of_the_methods() -> None:
    curves = measure_convergence(["ddim", "heun", "dpmsolver++"], (40, 80), points=8, progress=False)
    for curve, order in zip(curves, (1, 2, 2), strict=True):
        assert curve.slope == pytest.approx(order, abs=0.1), curve.method
        assert curve.errors[0] > curve.errors[1]
    assert curves[1].model_calls == (80, 160)  # the last level has noise, so Heun's last step makes two calls too
    with pytest.raises(ValueError, match=r"^measure_convergence: methods holds 'ddpm', which draws noise"):
        measure_convergence(["ddpm"], (4, 8))
    with pytest.raises(ValueError, match="two numbers or more"):
        measure_convergence(["ddim"], [4])
