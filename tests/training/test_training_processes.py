# SPDX-License-Identifier: MIT
"""Training that is killed and resumed, and training on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.child_environment import child_environment

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def report() -> Any:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    command = [sys.executable, "-m", "benchmarks.training_kills", "--kills", "3", "--two-processes"]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_end_in_the_bits_of_an_undisturbed_one(report: Any) -> None:
    kills = report["kills"]
    assert kills["kills"] == 3
    assert kills["equal"] == kills["trials"] >= 1


def test_two_processes_give_the_loss_curve_of_one_with_twice_the_batch(report: Any) -> None:
    found = report["two_processes"]
    assert len(found["one"]) == len(found["two"]) == 24
    # Sums over a batch are added in another order: units of 6e-8, which 24 steps at a rate of 1e-2 make larger.
    assert found["largest_relative_distance"] < 1e-4
    assert abs(found["one"][0] - found["one"][-1]) > 1e-2
