# SPDX-License-Identifier: MIT
"""Patching: the same objects with other classes and unchanged state, and back."""

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
    """Take steps with outputs that depend on the sample and the step."""
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


def test_patching_twice_equals_once():
    pipe = pipeline()
    fastdiff.patch(pipe)
    again = fastdiff.patch(pipe)
    assert not again.replaced
    assert [part.reason for part in again.left] == ["fused already"]
    assert type(fastdiff.unpatch(pipe.scheduler) and pipe.scheduler) is diffusers.DDPMScheduler
    nothing = fastdiff.unpatch(pipe)
    assert not nothing.replaced
    assert [part.reason for part in nothing.left] == ["not fused"]


def test_unpatch_keeps_schedulers_made_fused():
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
def test_loop_continues_after_patch_and_unpatch(name):
    """Patch and unpatch during a loop: the samples equal those of an unpatched scheduler."""
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


def test_every_class_is_patched_and_unpatched():
    for name, kind in CLASSES.items():
        scheduler = kind.original()
        assert fastdiff.patch(scheduler).replaced[0].name == name
        assert type(scheduler) is kind
        fastdiff.unpatch(scheduler)
        assert type(scheduler) is kind.original


def test_user_subclass_is_not_patched():
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


def test_user_pipeline_is_searched():
    class Policy:
        def __init__(self):
            self.noise_scheduler = diffusers.DDIMScheduler()
            self.number = 3

    policy = Policy()
    assert [part.where for part in fastdiff.patch(policy).replaced] == ["noise_scheduler"]
    assert isinstance(policy.noise_scheduler, FusedScheduler)


class Diffusion(torch.nn.Module):
    """The model of a robot's policy, which holds its scheduler as LeRobot's does."""

    def __init__(self):
        super().__init__()
        self.unet = torch.nn.Linear(2, 2)
        self.noise_scheduler = diffusers.DDPMScheduler()


class NestedPolicy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Identity(), Diffusion()])
        self.diffusion = Diffusion()
        self.lr_scheduler = None


def test_nested_modules_are_searched():
    policy = NestedPolicy()
    report = fastdiff.patch(policy)
    assert [str(part) for part in report.replaced] == [
        "heads.1.noise_scheduler: DDPMScheduler", "diffusion.noise_scheduler: DDPMScheduler",
    ]  # fmt: skip
    assert isinstance(policy.diffusion.noise_scheduler, FusedScheduler)
    assert len(fastdiff.unpatch({"policy": policy}).replaced) == 2
    assert type(policy.diffusion.noise_scheduler) is diffusers.DDPMScheduler


class Agent:
    """Plain object with a scheduler, and one that is no diffusers scheduler."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)


class Slotted:
    __slots__ = ("noise_scheduler",)

    def __init__(self, scheduler):
        self.noise_scheduler = scheduler


class Computed:
    def __init__(self, scheduler):
        self._all = (scheduler,)

    @property
    def scheduler(self):
        return self._all[0]


@pytest.mark.parametrize(
    ("kind", "path"), [(Agent, "scheduler"), (Slotted, "noise_scheduler"), (Computed, "scheduler")]
)
def test_objects_with_a_scheduler_are_searched(kind, path):
    alone, within = kind(diffusers.DDIMScheduler()), kind(diffusers.EulerDiscreteScheduler())

    class Robot:
        def __init__(self):
            self.policy = {"arm": [within]}
            self.itself = self

    (part,) = fastdiff.patch(alone).replaced
    assert (part.where, part.name) == ("_all.0" if kind is Computed else path, "DDIMScheduler")
    (part,) = fastdiff.patch(Robot()).replaced
    assert (part.where, part.name) == (f"policy.arm.0.{path}", "EulerDiscreteScheduler")
    assert isinstance(getattr(within, path), FusedScheduler)
    assert [part.where for part in fastdiff.unpatch([alone, within]).replaced] == [f"0.{path}", f"1.{path}"]


def test_object_within_without_a_scheduler_is_not_searched():
    class Box:
        def __init__(self):
            self.other = diffusers.DDIMScheduler()

    class Holder:
        def __init__(self):
            self.box = Box()
            self.scheduler = diffusers.DDPMScheduler()

    holder = Holder()
    assert [part.where for part in fastdiff.patch(holder).replaced] == ["scheduler"]
    assert type(holder.box.other) is diffusers.DDIMScheduler


def test_lerobot_policy_is_searched():
    pytest.importorskip("lerobot", reason="lerobot 0.4 is not installed")
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (3,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        down_dims=(16, 32, 64), n_groups=4, device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    policy = DiffusionPolicy(config).eval()
    batch = {"observation.state": torch.zeros(1, 4), "observation.environment_state": torch.ones(1, 3)}

    def actions():
        torch.manual_seed(1)
        policy.reset()
        return torch.stack([policy.select_action(dict(batch)) for _ in range(3)])

    expected = actions()
    report = fastdiff.patch(policy)
    assert [str(part) for part in report.replaced] == ["diffusion.noise_scheduler: DDPMScheduler"]
    # The promise of the drop-ins, over a loop of 100 steps.
    assert float((actions() - expected).abs().max()) < 3e-4
    fastdiff.unpatch(policy)
    assert torch.equal(actions(), expected)


@pytest.mark.parametrize("operation", [fastdiff.patch, fastdiff.unpatch])
@pytest.mark.parametrize("thing", [3, "pipe", None, torch.nn.Linear(1, 1)])
def test_non_pipeline_is_refused(operation, thing):
    with pytest.raises(TypeError, match=r"patch: pipe is a \w+ without a scheduler or a guider, expected"):
        operation(thing)


def test_patched_pipeline_is_saved_with_diffusers_classes(tmp_path):
    plain, patched = pipeline(), pipeline()
    fastdiff.patch(patched)
    for pipe, folder in ((plain, "plain"), (patched, "patched")):
        pipe.save_pretrained(tmp_path / folder)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "plain" / file).read_text() == (tmp_path / "patched" / file).read_text()
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path / "patched").scheduler) is diffusers.DDPMScheduler


def test_copies_of_patched_scheduler_can_be_unpatched():
    scheduler = diffusers.DDIMScheduler()
    fastdiff.patch(scheduler)
    for again in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(again) is CLASSES["DDIMScheduler"]
        fastdiff.unpatch(again)
        assert type(again) is diffusers.DDIMScheduler
    assert type(scheduler) is CLASSES["DDIMScheduler"]


@pytest.mark.skipif(not GUIDERS, reason="this diffusers has no guiders that return a GuiderOutput")
def test_guiders_of_modular_pipelines_are_patched():
    from diffusers.modular_pipelines import ModularPipeline

    class OwnGuidance(diffusers.guiders.ClassifierFreeGuidance):
        pass

    pipe = ModularPipeline.__new__(ModularPipeline)
    guider, other = diffusers.guiders.ClassifierFreeGuidance(4.0), OwnGuidance(4.0)
    guider.set_state(2, 9, torch.tensor(7))
    vars(pipe).update(guider=guider, other=other, scheduler=diffusers.EulerDiscreteScheduler())
    report = fastdiff.patch(pipe)
    assert {part.where for part in report.replaced} == {"guider", "scheduler"}
    assert [(part.where, part.name) for part in report.left] == [("other", "OwnGuidance")]
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


def test_ddim_pipeline_makes_own_scheduler():
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
