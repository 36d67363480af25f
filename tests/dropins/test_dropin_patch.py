# SPDX-License-Identifier: MIT
"""Patching: the same objects with other classes, with the state that they had, and back."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import fastdiff  # noqa: E402
from fastdiff.diffusers import CLASSES, FusedScheduler  # noqa: E402
from fastdiff.diffusers.guiders import GUIDERS  # noqa: E402


def unet():
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def pipeline(scheduler=None):
    return diffusers.DDPMPipeline(unet(), scheduler or diffusers.DDPMScheduler())


def walk(scheduler, sample, steps=None, start=0):
    """Take steps with outputs that depend on the sample and the place."""
    for t in scheduler.timesteps[start:steps]:
        output = torch.tanh(sample) * (1.0 + 1e-3 * float(t))
        sample = scheduler.step(output, t, sample).prev_sample
    return sample


def test_patch_and_unpatch_are_inverse():
    pipe = pipeline()
    scheduler, before = pipe.scheduler, dict(vars(pipe.scheduler))
    report = fastdiff.patch(pipe)
    assert pipe.scheduler is scheduler
    assert type(scheduler) is CLASSES["DDPMScheduler"]
    assert [(part.where, part.name) for part in report.replaced] == [("scheduler", "DDPMScheduler")]
    assert "scheduler: DDPMScheduler" in str(report)
    pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")
    back = fastdiff.unpatch(pipe)
    assert pipe.scheduler is scheduler
    assert type(scheduler) is diffusers.DDPMScheduler
    assert [part.where for part in back.replaced] == ["scheduler"]
    assert vars(scheduler).keys() == before.keys()


def test_twice_is_once():
    pipe = pipeline()
    fastdiff.patch(pipe)
    again = fastdiff.patch(pipe)
    assert not again.replaced
    assert [part.reason for part in again.left] == ["fused already"]
    assert type(fastdiff.unpatch(pipe.scheduler) and pipe.scheduler) is diffusers.DDPMScheduler
    nothing = fastdiff.unpatch(pipe)
    assert not nothing.replaced
    assert [part.reason for part in nothing.left] == ["not fused"]


def test_what_was_made_fused_stays_fused():
    pipe = pipeline(CLASSES["DDIMScheduler"]())
    fastdiff.patch(pipe)
    report = fastdiff.unpatch(pipe)
    assert not report.replaced
    assert "not by patch" in report.left[0].reason
    assert isinstance(pipe.scheduler, FusedScheduler)


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_a_loop_goes_on_where_it_was(name):
    """Plain, patched and unpatched again in the middle of a loop: the same samples as plain throughout."""
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    plain, changing = getattr(diffusers, name)(), getattr(diffusers, name)()
    for scheduler in (plain, changing):
        scheduler.set_timesteps(12)
        scheduler.is_scale_input_called = True  # else they complain
    expected = walk(plain, start)
    third = len(plain.timesteps) // 3
    sample = walk(changing, start, third)
    fastdiff.patch(changing)
    assert isinstance(changing, FusedScheduler)
    sample = walk(changing, sample, 2 * third, third)
    fastdiff.unpatch(changing)
    assert not isinstance(changing, FusedScheduler)
    sample = walk(changing, sample, None, 2 * third)
    # The promise of the drop-ins; a float32 step each.
    assert float(((sample - expected).abs() / expected.abs().clamp(min=1.0)).max()) < 3e-4


def test_every_class_is_patched_and_undone():
    for name, kind in CLASSES.items():
        scheduler = kind.original()
        assert fastdiff.patch(scheduler).replaced[0].name == name
        assert type(scheduler) is kind
        fastdiff.unpatch(scheduler)
        assert type(scheduler) is kind.original


def test_a_subclass_of_ones_own_is_left():
    class Mine(diffusers.DDIMScheduler):
        pass

    class OverFused(CLASSES["DDIMScheduler"]):
        pass

    class Unknown(diffusers.SchedulerMixin, diffusers.ConfigMixin):
        pass

    parts = {"a": Mine(), "b": OverFused(), "c": Unknown(), "d": diffusers.VQDiffusionScheduler(num_vec_classes=8)}
    classes = {key: type(part) for key, part in parts.items()}
    report = fastdiff.patch(parts)
    assert not report.replaced
    reasons = {part.where: part.reason for part in report.left}
    assert "over DDIMScheduler" in reasons["a"]
    assert "left to its author" in reasons["b"]
    assert "no fused class" in reasons["c"]
    assert "no fused class" in reasons["d"]
    assert {key: type(part) for key, part in parts.items()} == classes
    assert "Mine" in str(report)


def test_nested_pipelines_and_shared_schedulers():
    inner, outer = pipeline(), pipeline()
    outer.prior_pipe = inner
    outer.image_noising_scheduler = diffusers.DDPMScheduler()
    outer.stages = [{"scheduler": inner.scheduler}, {"scheduler": diffusers.EulerDiscreteScheduler()}]
    report = fastdiff.patch(outer)
    assert {part.where for part in report.replaced} == {
        "scheduler", "prior_pipe.scheduler", "image_noising_scheduler", "stages.1.scheduler",
    }  # fmt: skip
    assert isinstance(inner.scheduler, FusedScheduler)
    assert len(fastdiff.unpatch(outer).replaced) == 4
    assert type(inner.scheduler) is diffusers.DDPMScheduler


def test_a_pipeline_of_ones_own_is_looked_through():
    class Policy:
        def __init__(self):
            self.noise_scheduler = diffusers.DDIMScheduler()
            self.number = 3

    policy = Policy()
    assert [part.where for part in fastdiff.patch(policy).replaced] == ["noise_scheduler"]
    assert isinstance(policy.noise_scheduler, FusedScheduler)


@pytest.mark.parametrize("operation", [fastdiff.patch, fastdiff.unpatch])
@pytest.mark.parametrize("thing", [3, "pipe", None, torch.nn.Linear(1, 1)])
def test_what_is_no_pipeline_is_refused(operation, thing):
    with pytest.raises(TypeError, match=r"patch: pipe is a \w+ without a scheduler or a guider, expected"):
        operation(thing)


def test_a_pipeline_is_saved_as_diffusers_own(tmp_path):
    plain, patched = pipeline(), pipeline()
    fastdiff.patch(patched)
    for pipe, folder in ((plain, "plain"), (patched, "patched")):
        pipe.save_pretrained(tmp_path / folder)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "plain" / file).read_text() == (tmp_path / "patched" / file).read_text()
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path / "patched").scheduler) is diffusers.DDPMScheduler


def test_copies_of_a_patched_scheduler_can_be_undone():
    scheduler = diffusers.DDIMScheduler()
    fastdiff.patch(scheduler)
    for again in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(again) is CLASSES["DDIMScheduler"]
        fastdiff.unpatch(again)
        assert type(again) is diffusers.DDIMScheduler
    assert type(scheduler) is CLASSES["DDIMScheduler"]


@pytest.mark.skipif(not GUIDERS, reason="this diffusers has no guiders that return a GuiderOutput")
def test_guiders_of_modular_pipelines():
    from diffusers.modular_pipelines import ModularPipeline

    pipe = ModularPipeline.__new__(ModularPipeline)
    guider, other = (
        diffusers.guiders.ClassifierFreeGuidance(4.0),
        diffusers.guiders.SkipLayerGuidance(skip_layer_guidance_layers=[1]),
    )
    guider.set_state(2, 9, torch.tensor(7))
    vars(pipe).update(guider=guider, other=other, scheduler=diffusers.EulerDiscreteScheduler())
    report = fastdiff.patch(pipe)
    assert {part.where for part in report.replaced} == {"guider", "scheduler"}
    assert [(part.where, part.name) for part in report.left] == [("other", "SkipLayerGuidance")]
    assert pipe.guider is guider
    assert type(guider) is GUIDERS["ClassifierFreeGuidance"]
    assert guider._step == 2
    fastdiff.unpatch(pipe)
    assert type(guider) is diffusers.guiders.ClassifierFreeGuidance


@pytest.mark.skipif(not GUIDERS, reason="this diffusers has no guiders that return a GuiderOutput")
def test_guiders_are_found_by_name():
    for name, kind in GUIDERS.items():
        assert getattr(fastdiff.diffusers, name) is kind
    with pytest.raises(AttributeError, match="no attribute 'UnknownGuidance'"):
        fastdiff.diffusers.UnknownGuidance  # noqa: B018


def test_ddim_pipeline_makes_a_scheduler_of_its_own():
    # Which is why patching comes after it; should this change, the docs have to.
    made = diffusers.DDIMPipeline(unet(), CLASSES["DDIMScheduler"]())
    assert type(made.scheduler) is diffusers.DDIMScheduler
    fastdiff.patch(made)
    assert type(made.scheduler) is CLASSES["DDIMScheduler"]


def test_importing_fastdiff_does_not_import_diffusers():
    code = (
        "import sys, fastdiff; assert 'diffusers' not in sys.modules; fastdiff.patch; assert 'diffusers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        fastdiff.unknown  # noqa: B018
