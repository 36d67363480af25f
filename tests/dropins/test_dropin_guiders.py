# SPDX-License-Identifier: MIT
"""The guiders: the outputs of diffusers', and of half types at least as near to a float64 oracle."""

import copy
import inspect
import pickle

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastdiff import ops  # noqa: E402
from fastdiff.diffusers.guiders import GUIDERS  # noqa: E402
from support.guider_cases import CASES, STEPS, given, options_of, outputs, pair, shape_of, walk  # noqa: E402

pytestmark = pytest.mark.skipif(not GUIDERS, reason="this diffusers has no guiders that return a GuiderOutput")


def settings(guider):
    """The configuration without what diffusers notes about the file that it came from."""
    return {key: value for key, value in guider.config.items() if not key.startswith("_")}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_loop_equals_diffusers(name, options):
    fused, original = pair(name, options)
    shape = shape_of(name)
    for ours, theirs in zip(walk(fused, shape, torch.float32), walk(original, shape, torch.float32), strict=True):
        assert type(ours) is type(theirs)
        for key in ("pred", "pred_cond", "pred_uncond"):
            a, b = ours[key], theirs[key]
            if b is None:
                assert a is None
                continue
            assert a.dtype == b.dtype
            assert torch.equal(a.isnan(), b.isnan())  # zeros rescaled are NaN there, and are here
            # Promised are 3e-4.  A weight of up to 20 times an error of 1e-7 in a reduction is 2e-6; the first numbers
            # of a singular vector, which diffusers decomposes for, come out of LAPACK with 1e-4.
            error = ((a - b).abs() / b.abs().clamp(min=1.0)).nan_to_num()
            assert float(error.max()) < (3e-4 if name.startswith("Tangential") else 2e-5)


def oracle(name, options, shape, dtype):
    """diffusers' own code in float64; where it converts to float32, its formula."""
    options = options_of(name, options)
    guider = GUIDERS[name].original(**options)
    if not name.startswith(("Tangential", "ClassifierFreeZeroStar")):
        return walk(guider, shape, dtype, double=True)
    results = []
    for step in range(STEPS):
        cond, uncond = outputs(shape, dtype, 100 + step, double=True)
        c, u = cond.flatten(1), uncond.flatten(1)
        if name.startswith("Tangential"):
            first = torch.linalg.svd(torch.stack([c, u], 1), full_matrices=False)[2][:, 0]
            u = (u * first).sum(1, keepdim=True) * first
            u, kept = u.reshape(shape), uncond
        else:
            u = u * (c * u).sum(1, keepdim=True) / (u.square().sum(1, keepdim=True) + 1e-8)
            u = kept = u.reshape(shape)
        pred = (cond if guider.use_original_formulation else u) + guider.guidance_scale * (cond - u)
        zero = name.startswith("Classifier") and step < guider.zero_init_steps
        results.append({"pred": 0.0 * pred, "pred_uncond": uncond} if zero else {"pred": pred, "pred_uncond": kept})
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_original_formulation": True}])
@pytest.mark.parametrize("name", GUIDERS)
def test_all_dtypes_are_as_accurate_as_diffusers(name, options, dtype):
    fused, original = pair(name, options)
    shape = shape_of(name)
    exact = oracle(name, options, shape, dtype)
    for key in ("pred", "pred_uncond"):
        error = {
            who: max(float((r[key].double() - e[key]).abs().max()) for r, e in zip(results, exact, strict=True))
            for who, results in (("ours", walk(fused, shape, dtype)), ("theirs", walk(original, shape, dtype)))
        }
        largest = max(float(e[key].abs().max()) for e in exact)
        # 1 ulp; 2 of projected guidance, whose weights of up to 7 come from scalar products rounded to float32, where
        # diffusers projects in float64.
        ulps = 2 if name == "AdaptiveProjectedGuidance" and dtype is torch.float32 else 1
        assert error["ours"] <= error["theirs"] + ulps * torch.finfo(dtype).eps * largest


@pytest.mark.skipif("MagnitudeAwareGuidance" not in GUIDERS, reason="this diffusers has no MagnitudeAwareGuidance")
def test_magnitudes_of_more_dimensions_follow_the_formula():
    # diffusers' own raises for them: torch.norm takes two dimensions.
    guider = GUIDERS["MagnitudeAwareGuidance"](guidance_scale=6.0, alpha=2.0)
    guider.set_state(0, 1, torch.tensor(0))
    cond, uncond = outputs((2, 4, 6, 10), torch.float32, 0)
    c, u = cond.double(), uncond.double()
    ratio = (c - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    scale = (1.0 + 5.0 * torch.exp(-2.0 * ratio)).reshape(-1, 1, 1, 1)
    # Rounding of a few float32 operations on numbers of up to 10.
    torch.testing.assert_close(guider.forward(cond, uncond).pred.double(), u + scale * (c - u), rtol=2e-6, atol=2e-6)


def test_orthogonal_outputs_of_one_length_have_no_tangent():
    # Every direction is a first singular vector then; NaN is none of them.
    guider = GUIDERS["TangentialClassifierFreeGuidance"](guidance_scale=3.0)
    guider.set_state(0, 1, torch.tensor(0))
    cond, uncond = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(guider.forward(cond, uncond).pred, 3.0 * cond)


@pytest.mark.parametrize("name", GUIDERS)
def test_outputs_are_combined_in_one_pass(name, monkeypatch):
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function.__name__.removeprefix("host_"))
            return function(*args, **kwargs)

        return call

    guider, _ = pair(name, {"guidance_scale": 4.0})
    shape = shape_of(name)
    guider.set_state(STEPS - 1, STEPS, torch.tensor(1))
    guider.prepare_inputs({})
    from fastdiff.sampling import single_steps as functional

    for operation in ("step", "gram", "host_gram", "dot", "norm", "std"):
        monkeypatch.setattr(ops, operation, counted(getattr(ops, operation)))
    monkeypatch.setattr(functional, "step", counted(functional.step))
    guider.forward(**given(guider, *outputs(shape, torch.float32, 0)))
    assert calls.count("step") == 1
    assert len(calls) - 1 == calls.count("gram") <= 1


@pytest.mark.parametrize("name", GUIDERS)
def test_configurations_convert_both_ways(name, tmp_path):
    fused, original = pair(name, {"guidance_scale": 3.25})
    assert inspect.signature(type(fused).__init__) == inspect.signature(type(original).__init__)
    fused.save_pretrained(tmp_path)
    back = GUIDERS[name].original.from_pretrained(tmp_path)
    assert type(back) is GUIDERS[name].original
    assert type(GUIDERS[name].from_pretrained(tmp_path)) is GUIDERS[name]
    for guider in (fused, back):
        assert settings(guider) == settings(original)
    assert fused.new(guidance_scale=2.0).guidance_scale == 2.0
    assert type(fused.new()) is GUIDERS[name]


@pytest.mark.parametrize("name", GUIDERS)
def test_copies_and_pickles_keep_class_and_state(name):
    fused, _ = pair(name, {})
    walk(fused, shape_of(name), torch.float32)
    for again in (copy.deepcopy(fused), copy.copy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(again) is GUIDERS[name]
        assert again._step == STEPS - 1
        assert again.config == fused.config


@pytest.mark.parametrize("name", GUIDERS)
def test_gradients_equal_diffusers(name):
    fused, original = pair(name, {"guidance_rescale": 0.5})
    gradients = []
    for guider in (fused, original):
        guider.set_state(STEPS - 1, STEPS, torch.tensor(1))
        guider.prepare_inputs({})
        cond, uncond = outputs(shape_of(name), torch.float32, 3)
        cond.requires_grad_()
        guider.forward(**given(guider, cond, uncond)).pred.square().sum().backward()
        gradients.append(cond.grad)
    torch.testing.assert_close(*gradients, rtol=0.0, atol=0.0)


def test_outputs_of_different_shapes_use_diffusers():
    fused, original = pair("ClassifierFreeGuidance", {})
    cond, uncond = torch.randn(2, 4, 5, 5), torch.randn(1, 4, 5, 5)
    assert torch.equal(fused.forward(cond, uncond).pred, original.forward(cond, uncond).pred)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GUIDERS)
def test_results_on_gpu_equal_diffusers(name):
    fused, original = pair(name, {"guidance_rescale": 0.5})
    for step in range(STEPS):
        cond, uncond = (tensor.cuda() for tensor in outputs(shape_of(name), torch.float32, 100 + step))
        results = []
        for guider in (fused, original):
            guider.set_state(step, STEPS, torch.tensor(STEPS - step))
            guider.prepare_inputs({})
            results.append(guider.forward(**given(guider, cond, uncond)).pred)
        assert results[0].device == cond.device
        torch.testing.assert_close(*results, rtol=3e-4, atol=3e-4, equal_nan=True)  # what is promised
