# SPDX-License-Identifier: MIT
"""``fastdiff sample --weights``: checkpoints of ``fastdiff train`` beside loops written out, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastdiff import create_noise_scheduler, create_sampler, randn, spawn_seeds
from fastdiff.cli import app
from fastdiff.cli.sample import check_channels
from fastdiff.cli.sample_sources import SampleSource
from fastdiff.command import run_command
from fastdiff.digits import DigitUNet
from fastdiff.digits.batches import DigitBatches
from fastdiff.training import (
    AdvancedDiffusionPipeline,
    AdvancedUNet,
    DiffusionConfig,
    DiffusionModel,
    RunOptions,
    Trainer,
    load_checkpoint,
)
from fastdiff.training.checkpoints import list_checkpoints
from fastdiff.training.few_steps.job import DistillOptions, prepare_student
from fastdiff.training.model.from_checkpoint import find_checkpoint
from fastdiff.training.pictures.batches import CheckpointModel
from fastdiff.training.trainer.job import DIGITS, Job
from support.shard_jobs import tree

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
load_file = pytest.importorskip("safetensors.torch").load_file
image_of = pytest.importorskip("PIL.Image").open

#: The smallest U-Net of diffusers that a configuration makes.
TINY: dict[str, Any] = {
    "image_size": 8, "model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (),
    "num_heads": 4, "beta_schedule": "cosine", "max_train_steps": 2, "lr_warmup_steps": 0, "num_inference_steps": 3,
    "ema_decay": 0.99,
}  # fmt: skip
PROMPTS = {"use_spatial_transformer": True, "context_dim": 256, "in_channels": 1, "guidance_scale": 2.0}


class Runs(NamedTuple):
    """Folders of runs: digits by labels, three channels without a condition, one channel with prompts."""

    digits: Path
    plain: Path
    prompts: Path


def _run(*words: object) -> int:
    return run_command("fastdiff", lambda: app([str(word) for word in words], standalone_mode=False))


def _train(out: Path, model: Any, config: DiffusionConfig, batch: Any, **options: Any) -> Path:
    trainer = Trainer(model, config, RunOptions(output_dir=str(out), cpu=True), **options)
    for _ in range(2):
        trainer.training_step(batch)
    trainer.save_checkpoint()
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DiffusionConfig: ")
        few = {"max_train_steps": 2, "num_inference_steps": 3}
        digits = DiffusionConfig(**DIGITS, **few, lr_warmup_steps=0)
        labelled = (images[:, :1], torch.tensor([3, 8]))
        plain, prompts = DiffusionConfig(**TINY), DiffusionConfig(**TINY, **PROMPTS)
        told = {"images": images[:, :1], "prompts": ["a cat", "a dog"]}
        yield Runs(
            _train(folder / "digits", DigitUNet(), digits, labelled, null_label=10),
            _train(folder / "plain", AdvancedUNet(plain), plain, images),
            _train(folder / "prompts", AdvancedUNet(prompts), prompts, told),
        )


def _shards(folder: Path) -> torch.Tensor:
    return torch.cat([load_file(path)["samples"] for path in sorted((folder / "shards").iterdir())])


def test_digits_are_those_of_the_averaged_weights(runs: Runs, tmp_path: Path) -> None:
    out, job = tmp_path / "job", ("sample", "--quiet", "--weights", runs.digits, "--classes", "1,4", "--n", 3)
    assert _run(*job, "--folder", out, "--format", "safetensors", "--seed", 5) == 0
    model, (checkpoint,) = DigitUNet(), list_checkpoints(runs.digits / "checkpoints")
    load_checkpoint(checkpoint, model, ema=True)
    # The recipe of the digits: a cosine schedule, v, trailing timesteps, guidance scale 2.
    schedule = create_noise_scheduler("cosine", timestep_spacing="trailing")
    fields = {"prediction_type": "v_prediction", "guidance_scale": 2.0, "num_inference_steps": 3}
    labels, seeds = torch.tensor([1, 1, 4]), spawn_seeds(5, 3)
    latents = randn((3, 1, 8, 8), seeds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sampler = create_sampler(schedule, "ddim", **fields)
        expected = sampler.sample(model.eval(), latents, labels, torch.full((3,), 10), progress=False).samples
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(_shards(out), expected)
    options = json.loads((out / "job.json").read_text())["options"]
    assert (options["method"], options["guidance_scale"], options["classes"]) == ("ddim", 2.0, "1,4")


@pytest.mark.parametrize("kind", ["plain", "prompts"])
def test_images_are_those_of_the_model(kind: str, runs: Runs, tmp_path: Path) -> None:
    run = getattr(runs, kind)
    words = ("--prompt", "a cat", "--negative-prompt", "a dog") if kind == "prompts" else ()
    job = ("sample", "--quiet", "--weights", run, *words, "--n", 3, "--batch-size", 2, "--format", "safetensors")
    assert _run(*job, "--folder", tmp_path / "ddim") == 0
    pipeline = AdvancedDiffusionPipeline(run)
    embeds = {}
    if kind == "prompts":
        encode = pipeline._pictures.text_encoder
        with torch.no_grad():
            embeds = {
                f"{name}prompt_embeds": encode([text] * 3) for name, text in (("", "a cat"), ("negative_", "a dog"))
            }
    expected = pipeline.model.sample(3, seeds=spawn_seeds(0, 3), **embeds)
    # Batches of 2 and 1 instead of 3: convolutions may add in another order, in float32.
    torch.testing.assert_close(_shards(tmp_path / "ddim"), expected, rtol=1e-4, atol=1e-4)
    other = (*job, "--folder", tmp_path / "other", "--steps", 2, "--sampler", "dpmsolver++", "--threads", 2)
    assert _run(*other, *(("--guidance-scale", 1.5, "--eta", 0) if words else ())) == 0
    assert not torch.equal(_shards(tmp_path / "other"), _shards(tmp_path / "ddim"))


def test_pictures_of_any_size_and_channels(runs: Runs, tmp_path: Path) -> None:
    assert _run("sample", "--quiet", "--weights", runs.plain, "--n", 3, "--out", tmp_path / "grid.png") == 0
    grid = image_of(tmp_path / "grid.png")
    # Two columns and rows of 8 pixels, four times as large, with gaps of 2.
    assert (grid.mode, grid.size) == ("RGB", (2 * 34 + 2, 2 * 34 + 2))
    job = ("sample", "--quiet", "--weights", runs.plain, "--n", 3, "--batch-size", 2, "--folder")
    assert _run(*job, tmp_path / "one") == 0
    with pytest.MonkeyPatch.context() as patch:
        for rank in "10":
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            assert _run(*job, tmp_path / "two") == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_other_weights_are_refused_for_a_folder_that_was_begun(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(runs.digits, changed)
    (checkpoint,) = list_checkpoints(changed / "checkpoints")
    job = ("sample", "--quiet", "--n", 2, "--steps", 1, "--folder", tmp_path / "job", "--weights")
    assert _run(*job, runs.digits) == 0
    assert _run(*job, checkpoint) == 0  # a copy of the same weights
    model = CheckpointModel(checkpoint)
    again = pickle.loads(pickle.dumps(model))
    assert (again.folder, again.digest) == (model.folder, model.digest)
    for mine, theirs in zip(again.network("cpu").parameters(), model.network("cpu").parameters(), strict=True):
        assert torch.equal(mine, theirs)
    packed = pickle.dumps(model)
    assert len(packed) < 1000
    capsys.readouterr()
    config = DiffusionConfig(**DIGITS, max_train_steps=2)
    shutil.rmtree(checkpoint)
    _train(changed, DigitUNet(), config, torch.rand(2, 1, 8, 8), null_label=10)
    assert _run(*job, changed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights" in line
    with pytest.raises(ValueError, match="which was written again"):
        pickle.loads(packed)


def test_models_that_make_no_pictures_are_refused(runs: Runs) -> None:
    with pytest.raises(ValueError, match=r"source is .*, a model of digits by labels, expected"):
        AdvancedDiffusionPipeline(runs.digits)
    latents = SampleSource(DigitBatches, (4, 8, 8), {}, int)
    check_channels(latents, "safetensors")
    for file_format in (None, "png"):
        with pytest.raises(ValueError, match="--weights draws samples of 4 channels"):
            check_channels(latents, file_format)


def test_schedule_of_the_training_is_that_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule given to the trainer has to be the configuration's, if only in float32; older checkpoints load."""
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm").DDPMScheduler
    config, network = DiffusionConfig(**DIGITS, use_ema=False), DigitUNet()

    def saved(name: str, schedule: Any) -> Path:
        trainer = Trainer(network, config, RunOptions(output_dir=str(tmp_path / name), cpu=True), schedule=schedule)
        trainer.save_checkpoint()
        return tmp_path / name

    given = {
        "linear": create_noise_scheduler("linear", num_train_timesteps=1000),
        "flow": create_noise_scheduler("flow", num_train_timesteps=1000),
        "fewer": create_noise_scheduler("cosine", num_train_timesteps=999),
        "diffusers": ddpm(),
    }
    for name, schedule in given.items():
        out = saved(name, schedule)
        with pytest.raises(ValueError, match="pass create_sampler the schedule of the training"):
            AdvancedDiffusionPipeline(out)
    assert _run("sample", "--weights", tmp_path / "linear", "--images", 1, "--out", tmp_path / "a.png") == 2
    assert "trainer was given another noise schedule than its configuration has" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="differs from the checkpoint's in the noise schedule"):
        Trainer(network, config, RunOptions(cpu=True)).load_checkpoint(find_checkpoint(tmp_path / "linear"))
    own = DiffusionModel(config, network).scheduler.schedule
    for name, schedule in {"own": own, "equal": ddpm(beta_schedule="squaredcos_cap_v2")}.items():
        CheckpointModel(saved(name, schedule))
    state = find_checkpoint(tmp_path / "linear") / "state.json"
    document = json.loads(state.read_text())
    assert len(document["state"].pop("schedule")["alpha"]) == 5
    state.write_text(json.dumps(document))
    CheckpointModel(tmp_path / "linear")


def test_folder_means_one_checkpoint(tmp_path: Path) -> None:
    def state(folder: Path, step: int) -> Path:
        (folder / f"step-{step:08d}").mkdir(parents=True)
        document = {"format": "fastdiff checkpoint", "version": 1, "files": {}}
        document["state"] = {"step": step, "config": {"max_train_steps": 20}}
        (folder / f"step-{step:08d}" / "state.json").write_text(json.dumps(document))
        return folder / f"step-{step:08d}"

    first, last = state(tmp_path / "run" / "checkpoints", 5), state(tmp_path / "run" / "checkpoints", 10)
    for folder, expected in ((tmp_path / "run", last), (tmp_path / "run" / "checkpoints", last), (first, first)):
        assert find_checkpoint(folder) == expected
    few = tmp_path / "few"
    state(few / "steps-0004" / "checkpoints", 10)
    with pytest.raises(ValueError, match="no round is complete"):
        find_checkpoint(few)
    complete = state(few / "steps-0008" / "checkpoints", 20)
    state(few / "steps-0016" / "checkpoints", 20)
    assert find_checkpoint(few) == complete
    finished = state(few / "steps-0004" / "checkpoints", 20)
    assert find_checkpoint(few) == finished
    assert find_checkpoint(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_student_is_sampled_by_its_own_method_and_timesteps(tmp_path: Path) -> None:
    """A student's loops are LCM's and start at the last timestep wherever its checkpoint is loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DiffusionConfig: ")
        config = DiffusionConfig(**TINY)
        job = prepare_student(
            Job(config, AdvancedUNet(config), None, None, None), "x", DistillOptions("consistency_training").validate()
        )
        run = _train(tmp_path / "run", job.model, job.config, torch.rand(2, 3, 8, 8))
        pipeline = AdvancedDiffusionPipeline(run)
        models = [pipeline.model, DiffusionModel(DiffusionConfig.from_json(job.config.to_json()))]
    assert config.timestep_spacing is None
    for model in models:
        assert model.scheduler.sampler("ddim", 4).timesteps.tolist() == [999, 749, 499, 249]
        seen: list[float] = []
        model.unet.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(float(inputs[1].flatten()[0])))
        own = model.sample(1, num_inference_steps=4, seeds=[3], progress=False)
        assert seen == [999, 749, 499, 249]
        lcm, ddim = (model.sample(1, 4, method=method, seeds=[3], progress=False) for method in ("lcm", "ddim"))
        assert torch.equal(own, lcm)
        assert not torch.equal(own, ddim)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("plain", ("--classes", "1"), "--classes is given for a model without labels"),
        ("prompts", ("--classes", "1"), "--classes is given for a model without labels"),
        ("digits", ("--prompt", "x"), "--prompt is given for a model without a text encoder"),
        ("plain", ("--prompt", "x"), "--prompt is given for a model without a text encoder"),
        ("plain", ("--guidance-scale", "3"), "--guidance-scale is given for a model without a condition"),
        (
            "prompts",
            ("--negative-prompt", "x", "--guidance-scale", "1"),
            "--negative-prompt is given at guidance scale 1",
        ),
        ("plain", ("--sampler", "nope"), "--sampler is 'nope'"),
        ("plain", ("--steps", "0"), "num_inference_steps is 0"),
        (None, ("--prompt", "x"), "--prompt is given without --weights"),
        (None, ("--weights", "nowhere"), "--weights is 'nowhere', which does not exist"),
        (None, ("--weights", "."), "has no state.json"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    kind: str | None, words: tuple[str, ...], message: str, runs: Runs, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    weights = () if kind is None else ("--weights", getattr(runs, kind))
    assert _run("sample", *weights, *words) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
