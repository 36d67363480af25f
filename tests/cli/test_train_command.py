# SPDX-License-Identifier: MIT
"""``fastdiff train``: digits, folders, resumption, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

from fastdiff.cli import app
from fastdiff.command import run_command
from fastdiff.digits import load_digit_unet
from fastdiff.training import load_checkpoint
from fastdiff.training.checkpoints import list_checkpoints

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


def _run(*words: object) -> int:
    return run_command("fastdiff", lambda: app([str(word) for word in words], standalone_mode=False))


def test_digits_are_trained_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("train", "--data", "digits", "--batch", 8, "--log-every", 1, "--seed", 3, "--jitter", 0.5, "--quiet")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _run(*fixed, "--steps", 3, "--out", whole, "--checkpoint-every", 2, "--validate-every", 3) == 0
    assert "3 steps in" in capsys.readouterr().out
    for path in list_checkpoints(whole / "checkpoints")[1:]:
        parts.joinpath("checkpoints").mkdir(parents=True)
        path.rename(tmp_path / "last")
    (whole / "checkpoints" / "step-00000002").rename(parts / "checkpoints" / "step-00000002")
    assert _run(*fixed, "--steps", 3, "--out", parts, "--resume") == 0
    assert "1 steps in" in capsys.readouterr().out
    for name in ("model", "ema", "optimizer"):
        found = parts / "checkpoints" / "step-00000003" / f"{name}.safetensors"
        assert found.read_bytes() == (tmp_path / "last" / f"{name}.safetensors").read_bytes()
    history = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [1, 2, 3]
    assert history[-1]["val_loss"] > 0
    load_checkpoint(tmp_path / "last", load_digit_unet(), ema=True)
    assert _run(*fixed, "--steps", 3, "--out", parts) == 2
    assert "pass --resume" in capsys.readouterr().err


def test_folder_of_classes_is_trained_by_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for name, value in (("cats", 0), ("dogs", 255)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            pillow.new("RGB", (9, 9), (value, i, 0)).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "cats" / "bad.png").write_text("no image")
    fields = {
        "image_size": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [],
        "num_heads": 4, "use_spatial_transformer": True, "context_dim": 256, "use_ema": False,
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fields))
    call = ("train", "--data", tmp_path / "data", "--config", config, "--batch", 2, "--quiet", "--steps", 2)
    with pytest.warns(UserWarning, match="1 files of 5 cannot be read"):
        assert _run(*call, "--out", tmp_path / "out") == 0
    (folder,) = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "text_encoder.safetensors",
    }
    config.write_text(json.dumps({**fields, "colour": 1}))
    assert _run(*call, "--out", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "colour" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--data", "nothing"), "is no folder"),
        (("--data", "."), "holds no readable image"),
        (("--data", "digits", "--steps", "0"), "--steps is 0"),
        (("--data", "digits", "--on-nan", "hope"), "on_nan"),
        (("--data", "digits", "--jitter", "3"), "share is 3"),
        (("--data", "digits", "--batch", "0"), "--batch is 0"),
        (("--data", "digits", "--config", "missing.json"), "cannot be read"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    words: tuple[str, ...],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run("train", *words, "--out", "out") in (1, 2)
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_options_of_folders_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    (tmp_path / "data").mkdir()
    for i in range(3):
        pillow.new("RGB", (8, 8)).save(tmp_path / "data" / f"{i}.png")
    config = {"image_size": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "num_heads": 4}
    (tmp_path / "c.json").write_text(json.dumps({**config, "attention_resolutions": [], "max_train_steps": "3"}))
    call = ("train", "--data", tmp_path / "data", "--config", tmp_path / "c.json", "--out", tmp_path / "out", "--quiet")
    assert _run(*call) == 2
    assert "max_train_steps has type str, expected an integer" in capsys.readouterr().err
    assert _run(*call, "--steps", 1, "--validate-every", 1) == 2
    assert "--validate-every is 1 for data of which none are held out" in capsys.readouterr().err
    # Two processes with batches of 2 share out the 3 images, in an incomplete batch; one has a whole batch.
    loaders: list[Any] = []

    def loader(*words: Any, **options: Any) -> Any:
        loaders.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.utils.data.DataLoader", loader)
    for world in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert _run(*call, "--steps", 1, "--batch", 2) == 130
    assert [options["drop_last"] for options in loaders] == [True, False]


def test_help_lists_options() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--data", "--config", "--resume", "--checkpoint-every", "--on-nan"):
        assert option in shown


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a module that keeps its runs in place of wandb."""
    runs: list[Any] = []

    def init(project: str, **options: Any) -> Any:
        runs.append(MagicMock(options=options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=init))
    from accelerate.utils import LoggerType

    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    return runs


def test_digits_are_distilled_round_by_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb_runs: list[Any]
) -> None:
    fixed = ("train", "--data", "digits", "--batch", 8, "--steps", 1, "--quiet", "--distill")
    halves = (*fixed, "progressive", "--teacher-steps", 8, "--student-steps", 2, "--out", tmp_path)
    assert _run(*halves, "--tracker", "wandb") == 0
    # wandb ignores steps that go backwards: each round is a run of its own, ended before the next begins.
    assert [run.options for run in wandb_runs] == [{"dir": str(tmp_path / f"steps-000{n}")} for n in (4, 2)]
    for run in wandb_runs:
        assert [call[0] for call in run.method_calls] == ["log", "finish"]
        assert run.log.call_args.kwargs == {"step": 1}
    rounds = [list_checkpoints(tmp_path / name / "checkpoints") for name in ("steps-0004", "steps-0002")]
    assert [[path.name for path in found] for found in rounds] == [["step-00000001"]] * 2
    written = (rounds[1][0] / "ema.safetensors").read_bytes()
    capsys.readouterr()
    assert _run(*halves) == 2
    assert "pass --resume" in capsys.readouterr().err
    # The second round is made again from the first, in the same bits.
    shutil.rmtree(tmp_path / "steps-0002")
    assert _run(*halves, "--resume") == 0
    assert capsys.readouterr().out.count("0 steps in") == 1
    assert (rounds[1][0] / "ema.safetensors").read_bytes() == written
    for folder, steps in ((tmp_path, 2), (tmp_path / "steps-0004", 4)):
        assert _run("sample", "--weights", folder, "--n", 1, "--quiet", "--out", tmp_path / "digits.png") == 0
        assert f", ddim, {steps} steps; " in capsys.readouterr().out
    own = (*fixed, "consistency", "--teacher", tmp_path, "--teacher-steps", 16, "--out", tmp_path / "c")
    assert _run(*own, "--teacher-guidance-scale", 1.5) == 0
    assert _run(*fixed, "consistency_training", "--out", tmp_path / "d") == 0
    for folder in (tmp_path / "c", tmp_path / "d"):  # consistency models
        assert _run("sample", "--weights", folder, "--n", 1, "--quiet", "--out", tmp_path / "digits.png") == 0
        assert ", lcm, 4 steps; " in capsys.readouterr().out
    other = tmp_path / "other.json"
    (state,) = (path / "state.json" for path in list_checkpoints(tmp_path / "d" / "checkpoints"))
    other.write_text(state.read_text().replace('"prediction_type": "v_prediction"', '"prediction_type": "epsilon"'))
    other.replace(state)
    assert _run(*fixed, "consistency", "--teacher", tmp_path / "d", "--out", tmp_path / "e") == 2
    assert "prediction_type 'epsilon', expected 'v_prediction' like the student" in capsys.readouterr().err
    student = load_digit_unet()
    load_checkpoint(list_checkpoints(tmp_path / "c" / "checkpoints")[-1], student, ema=True)


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (("--distill", "half"), "--distill", 2),
        (("--teacher", "x"), "--distill beside it", 2),
        (("--student-steps", 4), "--student-steps is given, expected --distill beside it", 2),
        (("--teacher-steps", 8), "--teacher-steps is given, expected --distill beside it", 2),
        (("--teacher-guidance-scale", 1), "--teacher-guidance-scale is given, expected --distill beside it", 2),
        (("--distill", "progressive", "--teacher-steps", 24), "teacher_steps", 2),
        (("--distill", "consistency_training", "--teacher", "x"), "without a teacher", 2),
        (("--distill", "plain_consistency_training", "--teacher", "x"), "without a teacher", 2),
        (("--distill", "consistency", "--teacher", "nowhere"), "nowhere", 1),
    ],
)
def test_distillations_that_do_not_fit_are_refused(
    words: tuple[object, ...], message: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("train", "--data", "digits", "--steps", 1, "--out", tmp_path / "out", *words) == status
    assert message in capsys.readouterr().err
