# SPDX-License-Identifier: MIT
"""What `explain` says of a scheduler, and that it leaves no trace."""

import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastdiff.diffusers import CLASSES, explain, registry  # noqa: E402

#: Classes that take no five steps by default, and how they are asked.
STEPS = {"ConsistencyDecoderScheduler": 2, "SCMScheduler": 2}
#: Classes whose first step makes a tree of noise, and is diffusers' own.


@pytest.mark.filterwarnings("ignore:Should have t")  # torchsde, of its own rounding
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_walked(name):
    explained = explain(CLASSES[name](), STEPS.get(name, 5))
    assert explained.name == name
    assert explained.steps
    for step in explained.steps:
        assert step.fused
        assert not step.reason
        assert [operation for operation in step.operations if operation == "step"] == ["step"]
        assert step.draws == sum(operation in ("randn", "noise_sampler") for operation in step.operations)
    text = str(explained)
    assert text.startswith(f"{name}.step: ")
    assert f"of {len(explained.steps)} steps fused" in text


#: Besides a step and a draw: two draws; the blend by a mask; the look at a noise sampler's times.
MORE = {
    "CogVideoXDPMScheduler": {"randn"},
    "RePaintScheduler": {"_to_copy", "addcmul"},
    "DPMSolverSDEScheduler": {"_local_scalar_dense", "make_noise_sampler", "noise_sampler"},
    "CosineDPMSolverMultistepScheduler": {"make_noise_sampler", "noise_sampler"},
}


@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_samples_of_half_types_cost_no_conversions(name, dtype):
    # Several return or keep float32 tensors beside half ones.
    for step in explain(CLASSES[name](), STEPS.get(name, 4), dtype=dtype).steps:
        if step.fused:
            assert set(step.operations) <= {"step", "randn"} | MORE.get(name, set())
            assert len(step.operations) <= 2 or name in MORE


@pytest.mark.parametrize("name", ["DDPMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
                                  "SASolverScheduler", "DPMSolverSinglestepScheduler", "IPNDMScheduler",
                                  "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler"])  # fmt: skip
def test_it_starts_anew_and_leaves_the_scheduler_where_it_was(name):
    scheduler = CLASSES[name]()
    scheduler.set_timesteps(6)
    fresh = explain(scheduler)
    sample = torch.randn(1, 4, 8, 8)
    for t in scheduler.timesteps[: len(scheduler.timesteps) // 2]:
        scheduler.scale_model_input(sample, t)
        sample = scheduler.step(torch.randn_like(sample), t, sample).prev_sample
    before = {key: copy.copy(value) for key, value in vars(scheduler).items() if key != "_fused"}
    random = torch.get_rng_state()
    assert explain(scheduler).steps == fresh.steps
    assert torch.equal(torch.get_rng_state(), random)
    after = {key: value for key, value in vars(scheduler).items() if key != "_fused"}
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[key], value, rtol=0.0, atol=0.0, equal_nan=True)
        elif isinstance(value, list):
            assert len(after[key]) == len(value)
            assert all(a is b or a == b for a, b in zip(after[key], value, strict=True))
        elif not hasattr(value, "shape"):
            assert after[key] == value


def test_own_timesteps_are_those_walked():
    scheduler = CLASSES["FlowMatchEulerDiscreteScheduler"]()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3])
    explained = explain(scheduler)
    assert [step.timestep for step in explained.steps] == scheduler.timesteps.tolist()


def test_arguments_of_the_step_and_guidance_count():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    assert {step.draws for step in explain(scheduler).steps} == {0}
    assert explain(scheduler, eta=1.0).steps[0].operations == ("randn", "step")
    guided = explain(scheduler, guided=True, dtype=torch.bfloat16, shape=(2, 3, 4, 4))
    assert guided.guided
    assert guided.fused
    assert "DDIMScheduler.guided_step" in str(guided)
    assert type(scheduler) is diffusers.DDIMScheduler


def test_noise_drawn_inside_is_told():
    scheduler = CLASSES["DDPMScheduler"]()
    scheduler.set_timesteps(4)
    scheduler.use_philox([7])
    explained = explain(scheduler)
    assert [step.drawn_inside for step in explained.steps] == [True, True, True, False]
    assert explained.steps[0].operations == ("step",)
    assert "draws its noise inside" in str(explained)


def test_what_is_not_fused_says_why():
    scheduler = CLASSES["DDIMScheduler"](rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    explained = explain(scheduler, 3)
    assert not explained.fused
    assert [step.fused for step in explained.steps] == [False, True, True]
    reason = "has a coefficient that is infinite or not a number"
    assert explained.steps[0].reason == reason
    assert f"step 0: not fused ({reason})" in str(explained)


def test_what_makes_the_noise_sampler_is_one_operation():
    explained = explain(CLASSES["CosineDPMSolverMultistepScheduler"](), 3)
    assert explained.steps[0].operations[:2] == ("make_noise_sampler", "noise_sampler")
    assert [step.draws for step in explained.steps] == [1, 1, 1]


def test_a_scheduler_that_has_walked_is_walked_from_the_start():
    scheduler = CLASSES["CosineDPMSolverMultistepScheduler"]()
    scheduler.set_timesteps(3)
    sample = torch.randn(1, 4, 8, 8)
    for timestep in scheduler.timesteps:
        scheduler.step(sample, timestep, sample)
    sampler = scheduler.noise_sampler
    assert explain(scheduler).fused
    assert scheduler.noise_sampler is sampler


def test_a_reason_from_the_trace_is_handed_on(monkeypatch):
    class NotASum(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            return (sample * model_output,)

    kind = type("NotASum", (registry.FusedScheduler, NotASum), {})
    explained = explain(kind(), 2)
    assert [step.fused for step in explained.steps] == [False, False]
    assert explained.steps[0].reason == "multiplies two tensors by each other"
    assert explained.steps[0].operations == ("mul",)


def test_refusals():
    with pytest.raises(ValueError, match="explain: num_inference_steps is None for a scheduler without timesteps"):
        explain(CLASSES["DDIMScheduler"]())
    with pytest.raises(TypeError, match="explain: scheduler is a VQDiffusionScheduler, expected"):
        explain(diffusers.VQDiffusionScheduler(num_vec_classes=8))
    with pytest.raises(TypeError, match="explain: scheduler is a int, expected"):
        explain(3)
