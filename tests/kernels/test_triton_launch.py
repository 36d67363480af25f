# SPDX-License-Identifier: MIT
"""Launches of Triton kernels: cached launches equal the JIT's for NVIDIA and AMD, and no kernel depends on a vendor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import ops
from fastdiff.ops import backends
from support import fake_driver
from support.child_environment import child_environment
from support.fork_server import run_program
from support.oracle import assert_same_bits, plain_row

config = pytest.importorskip("fastdiff.kernels.config", reason="needs the triton package")
launch = pytest.importorskip("fastdiff.kernels.launch")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels" / "triton").glob("*.py"))

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here: tests/gpu/test_gpu_launch.py does the same"
)


needs_driver = (
    pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built"),
    pytest.mark.skipif(fake_driver.COMPILER is None, reason="needs a C++ compiler for a fake driver library"),
)


@pytest.mark.parametrize(
    "tests", ["cached_launches", pytest.param("native_launches", marks=needs_driver), "eager_launches"]
)
def test_launches_pass_driver_what_jit_passes(tests: str, tmp_path: Path) -> None:
    """Run the tests of one way to a launch in a process in which Triton compiles: cached, from C++, remembered."""
    if launch._unknown:
        pytest.skip(launch._unknown)
    environ = {n: value for n, value in child_environment().items() if not n.startswith(("TRITON_", "FASTDIFF_"))}
    # Set, since conftest.py would turn the interpreter on.
    environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    path = ROOT / "tests" / "support" / f"{tests}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env=environ, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_launch_method_is_reported_with_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.triton_launcher() == "interpreted on the CPU: TRITON_INTERPRET is 1"
    # Kernels are made when they are first imported, for the interpreter or not.
    pytest.importorskip("fastdiff.kernels.step")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert ops.triton_launcher().startswith("missing: torch finds no GPU")
    monkeypatch.setattr(backends, "why_missing", lambda name: "")
    monkeypatch.setattr(launch, "_unknown", "")
    monkeypatch.setattr(launch, "_unknown_target", lambda: "")
    assert ops.triton_launcher() == "caches compiled kernels, and " + (
        "remembers launches of steps" if backends.extension is None else "launches steps from C++"
    )
    with launch.through_jit():
        assert ops.triton_launcher().startswith("through Triton's JIT: it was asked for")
    assert ops.triton_launcher().startswith("caches compiled kernels, and ")


@pytest.mark.parametrize(("value", "expected"), [("jit", "True"), ("held", "False"), ("", "False")])
def test_environment_selects_launcher(value: str, expected: str) -> None:
    done = import_launch(value)
    assert done.stdout.strip() == expected, done.stderr


def test_unknown_launcher_is_refused() -> None:
    done = import_launch("fast")
    assert done.returncode != 0
    assert "FASTDIFF_TRITON_LAUNCHER is 'fast', expected one of held, jit; " in done.stderr


def import_launch(value: str) -> subprocess.CompletedProcess[str]:
    code = "from fastdiff.kernels import launch; print(launch._through_jit)"
    return run_program(code, env=child_environment(FASTDIFF_TRITON_LAUNCHER=value))


def test_any_accelerator_except_apples_uses_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels are made when they are first imported, for the interpreter or not.
    pytest.importorskip("fastdiff.kernels.step")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind))
        assert (backends.why_missing("triton") == "") == (kind != "mps")
        assert backends._serves("triton", torch.device(kind)) == (kind != "mps")


def test_current_stream_belongs_to_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice3(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

        def get_device(self) -> int:
            return 3

    x = torch.zeros(1)
    assert backends.current_stream(x) == 0
    monkeypatch.setattr(backends, "_raw_stream", lambda device: 1000 + device)
    assert backends.current_stream(x) == 0
    assert backends.current_stream(x.as_subclass(OnDevice3)) == 1003


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernel_sources_name_no_vendor(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    for word in ("inline_asm", "libdevice", "torch.cuda", "torch.xpu", "torch.hip", 'device="cuda"', "is_cuda"):
        assert word not in source, word


# --- Configurations --------------------------------------------------------------------------------------------------

#: Smaller and larger than the default in everything.
CONFIGS = [
    {"step": (16, 1), "draw": (16, 1), "randn": (4, 1), "sum": (1, 1), "select": (1024, 1, 1)},
    {"step": (4096, 8), "draw": (2048, 8), "randn": (2048, 2), "sum": (16, 8), "select": (4096, 4, 2)},
]


@needs_interpreter
# A configuration changes which elements a program has, whatever their dtype: both with one, and each with two others.
@pytest.mark.parametrize(
    ("dtype", "configs"),
    [
        (torch.float32, CONFIGS),
        (torch.float64, CONFIGS[:1]),
        (torch.float16, CONFIGS[1:]),
        (torch.bfloat16, CONFIGS[1:]),
    ],
    ids=["float32", "float64", "float16", "bfloat16"],
)
def test_results_do_not_depend_on_the_configuration(dtype: torch.dtype, configs: list[dict[str, Any]]) -> None:
    x, m = torch.randn(2, 2, 2, 5, 7).to(dtype).unbind()
    table = plain_row(dtype, prev_x=0.5, prev_m=0.25, prev_z=0.75)
    seeds = torch.randint(-(2**62), 2**62, (2,))

    flat = torch.randn(2, 2100).to(dtype)  # more than two blocks of a sum, and tiles of a selection

    def results() -> list[torch.Tensor]:
        out = [ops.step(x, m, plain_row(dtype, prev_x=0.5, prev_m=0.25), 0, backend="triton")[0]]
        channels_last = [t.contiguous(memory_format=torch.channels_last) for t in (x, m)]
        for sample, output in ((x, m), channels_last):
            out += ops.step(sample, output, table, 0, seeds=seeds, noise_step=3, backend="triton")
        out.append(ops.randn((2, 37), seeds, 5, dtype=dtype, backend="triton"))
        out += [ops.std(flat, backend="triton"), ops.dot(flat, flat, backend="triton")]
        out.append(ops.quantile(flat, 0.7, backend="triton"))
        return out

    expected = results()
    for sizes in configs:
        with config.override(**{kind: config.Config(*size) for kind, size in sizes.items()}):
            assert config.config_for("step", x) == config.Config(*sizes["step"])
            assert_same_bits(results(), expected)
    assert config.config_for("step", x) == config.DEFAULT["step"]


def test_table_key_is_chip_kind_and_element_size(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = config.Config(2048, 8)
    monkeypatch.setitem(config.MEASURED, "sm_90", {("step", 4): measured})
    assert config.lookup("sm_90", "step", 4) == measured
    for chip, kind, size in (("sm_100", "step", 4), ("sm_90", "draw", 4), ("sm_90", "step", 2)):
        assert config.lookup(chip, kind, size) == config.DEFAULT[kind]


def test_every_table_entry_is_valid_for_kernels() -> None:
    assert set(config.DEFAULT) == set(config.KINDS)
    for entries in config.MEASURED.values():
        for (kind, size), entry in entries.items():
            assert kind in config.KINDS
            assert size in (2, 4, 8)
            with config.override(**{kind: entry}):
                pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: config.Config(1000, 4), "block is 1000, expected a power of two"),
        (lambda: config.Config(1024, 0), "num_warps is 0, expected a power of two from 1 to 32"),
        (lambda: config.Config(1024, 4, tiles=3), "tiles is 3"),
        (lambda: config.override(steps=config.Config(16, 1)).__enter__(), "the kind is 'steps', expected one of step"),
        (lambda: config.override(randn=config.Config(2, 1)).__enter__(), "block is 2 for 'randn', expected 4 or more"),
    ],
)
def test_invalid_configurations_are_refused(wrong: object, message: str) -> None:
    before = config.config_for("step", torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]
    assert config.config_for("step", torch.zeros(1)) == before
