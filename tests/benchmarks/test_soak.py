# SPDX-License-Identifier: MIT
"""The soak: it runs every use, and it fails where memory grows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("diffusers")
import diffusers

import fastdiff.diffusers
from benchmarks import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")


@pytest.mark.parametrize("name", soak.USES)
def test_soak_use_takes_steps(name: str) -> None:
    use, beside_diffusers = soak.USES[name]
    for module in (fastdiff.diffusers, diffusers) if beside_diffusers else (fastdiff.diffusers,):
        assert len(list(islice(use(module), 45))) == 45  # three loops


def test_soak_fails_where_memory_grows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[Any] = []

    def leaks(module: Any) -> Iterator[None]:
        while True:
            kept.append(bytearray(2**20))
            yield

    def flat(module: Any) -> Iterator[None]:
        while True:
            yield

    monkeypatch.setitem(soak.USES, "leaks", (leaks, False))
    monkeypatch.setitem(soak.USES, "flat", (flat, True))
    assert soak.main(["--here", "--steps", "20", "--only", "leaks"]) == 1
    assert soak.main(["--here", "--steps", "20", "--only", "flat"]) == 0
    leaking, steady = capsys.readouterr().out.splitlines()
    assert leaking.split()[0] == "leaks"
    assert 17 < float(leaking.split()[3]) < 23  # MiB in 18 steps
    assert abs(float(steady.split()[3])) < 1
    kept.clear()


def test_soak_reports_a_process_that_fails(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.USES, "absent", soak.USES["eta"])  # which a process of its own does not know
    assert soak.main(["--steps", "10", "--only", "absent"]) == 1
    assert "failed: absent" in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [["--steps", "9"], ["--only", "none such"]])
def test_soak_refuses_other_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(arguments)
    assert "--steps takes 10 or more, --only takes some of sampler," in capsys.readouterr().err
