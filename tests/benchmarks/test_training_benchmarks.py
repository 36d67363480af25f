# SPDX-License-Identifier: MIT
"""The benchmarks of training at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for name in ("accelerate", "diffusers", "sklearn"):
    pytest.importorskip(name)

from benchmarks import few_steps, training_curve  # noqa: E402
from fastdiff.digits import NULL_CLASS, load_digit_unet  # noqa: E402
from fastdiff.training import DiffusionConfig, RunOptions, Trainer  # noqa: E402


def test_training_curve_measures_both_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curve.json"
    assert training_curve.main(["--seeds", "1", "--steps", "2", "--per-class", "0", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["steps"] == 2
    # The untrained velocity of normalized data has a mean square near 1.
    assert all(0.2 < run["loss"] < 2.0 for name in ("fastdiff", "plain torch") for run in found[name])
    assert "difference of the mean losses" in capsys.readouterr().out


def test_a_student_with_its_teachers_weights_has_its_teachers_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DiffusionConfig(image_size=8, in_channels=1, beta_schedule="cosine", prediction_type="v_prediction")
    options = RunOptions(output_dir=str(tmp_path), cpu=True)
    model = load_digit_unet().requires_grad_(True)
    Trainer(model, config, options, null_label=NULL_CLASS).save_checkpoint()
    monkeypatch.setattr(few_steps, "TEACHER_STEPS", (2, 3))
    few_steps.main(["--seeds", "1", "--per-class", "2", f"{tmp_path}:ddim:2"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 3
    assert rows[2][2:] == rows[0][2:] != rows[1][2:]
