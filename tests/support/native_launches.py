# SPDX-License-Identifier: MIT
"""Steps launched from C++ pass the driver what Triton's JIT passes; run by test_triton_launch.py in a separate process,
in which `triton.jit` makes compiled kernels.

Triton's own launches go to a driver that records them, those of the extension to a fake driver library.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.compiler
from hypothesis import given, settings

import fastdiff.diffusers
from fastdiff.benchmarks import host_path
from fastdiff.kernels import config, launch, native, step
from fastdiff.ops import backends
from fastdiff.ops.call import FIELDS, StepCall
from fastdiff.ops.canonicalize import canonicalize
from support import recording_driver
from support.cached_launches import accepted, call_of, forget, step_arguments
from support.fake_driver import FakeDriver, parameters_by_layout
from support.recording_driver import LAUNCHES

BLOCK = config.DEFAULT["step"].block


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    found = backends.extension
    assert found is not None, backends.extension_error
    return found


@pytest.fixture
def fake(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, extension: ModuleType
) -> Iterator[FakeDriver]:
    """The fake driver, with launches enabled under Triton's own guards, and nothing compiled or cached."""
    recording_driver.install()
    monkeypatch.setattr(triton.compiler, "compile", recording_driver.not_compile)
    forget()
    driver = FakeDriver(tmp_path_factory.getbasetemp())
    driver.set(device=0, status=0)
    with driver.enabled(extension, launch.guards()):
        for size in (2, 4, 8):
            for draws in (False, True):
                extension.set_triton_block(-1, size, draws, BLOCK)
        yield driver
    forget()


def offered(extension: ModuleType, call: StepCall) -> Any:
    return extension.step(**{name: getattr(call, name) for name in FIELDS}, triton=True, in_operator=True)


def addresses_and_integers(values: tuple[Any, ...], layout: str) -> list[Any]:
    """Return what the recorded arguments of a launch say is passed: constants are not."""
    return [value for value, form in zip(values, layout, strict=False) if form != "-"]


def test_every_step_is_launched_as_by_jit(extension: ModuleType, fake: FakeDriver) -> None:
    functions: dict[bytes, tuple[int, Any, str]] = {}
    outcomes: Counter[str] = Counter()

    @settings(max_examples=600, deadline=None)
    @given(call=step_arguments())
    def check(call: StepCall) -> None:
        canonical = canonicalize(accepted(call))
        key = offered(extension, canonical)
        if isinstance(key, str):
            outcomes[key] += 1
            return
        LAUNCHES.clear()
        kernel = step.launch(canonical)
        ((function, grid, _, metadata, values),) = LAUNCHES
        layout = native.layout_of(kernel)
        if isinstance(key, bytes):
            assert key not in functions
            functions[key] = (len(functions) + 1, function, layout)
            extension.install_triton_kernel(key, len(functions), 32 * metadata[0], 0, layout)
        outcomes["launched"] += 1
        assert isinstance(offered(extension, canonical), tuple)
        last = fake.last
        # One kernel a key, compiled from the same inputs.
        _, compiled, its_layout = next(entry for entry in functions.values() if entry[0] == last.function)
        assert (compiled, its_layout) == (function, layout)
        assert (list(last.grid), list(last.block)) == ([grid[0], 1, 1], [32 * metadata[0], 1, 1])
        assert (last.stream, last.attribute_count) == (0, 0)
        expected = addresses_and_integers(values, layout)
        assert parameters_by_layout(last, layout) == expected
        # Triton's two addresses of scratch memory.
        assert list(last.parameters[len(expected) : len(expected) + 2]) == [0, 0]

    check()
    # Others overlap: large tensors of the strategy share their memory.
    others = sum(count for reason, count in outcomes.items() if reason != "launched")
    assert outcomes["launched"] > 3 * others, outcomes
    assert len(functions) > 50


def test_guidance_scale_is_passed_by_value(extension: ModuleType, fake: FakeDriver) -> None:
    for dtype, form, code in ((torch.float32, "<f", "<i"), (torch.float64, "<d", "<q")):
        x = torch.zeros(2, 64, dtype=dtype)
        call = dataclasses.replace(
            call_of(x, rows=3, row_index=1), table=torch.zeros(3, 32, dtype=dtype), uncond=x, guidance_scale=7.3
        )
        key = offered(extension, call)
        kernel = step.launch(call)
        layout = native.layout_of(kernel)
        extension.install_triton_kernel(key, 1, 128, 0, layout)
        offered(extension, call)
        bits = struct.unpack(code, struct.pack(form, 7.3))[0]
        assert bits in parameters_by_layout(fake.last, layout)
        # Another number is the same kernel.
        assert isinstance(offered(extension, dataclasses.replace(call, guidance_scale=-1.0)), tuple)


def ready(extension: ModuleType) -> StepCall:
    """A call whose kernel is installed."""
    call = call_of(torch.zeros(2, 64), rows=3, row_index=1)
    key = offered(extension, call)
    extension.install_triton_kernel(key, 1, 128, 0, native.layout_of(step.launch(call)))
    assert isinstance(offered(extension, call), tuple)
    return call


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_not_passed_over(extension: ModuleType, fake: FakeDriver, hook: str) -> None:
    call, hooks = ready(extension), getattr(triton.knobs.runtime, hook)
    hooks.add(print)
    try:
        assert offered(extension, call) == "device"
    finally:
        hooks.remove(print)
    assert isinstance(offered(extension, call), tuple)


@pytest.mark.parametrize(
    ("knobs", "name", "value"),
    [("runtime", "launch_enter_hook", print), ("runtime", "debug", True), ("compilation", "instrumentation_mode", "x")],
)
def test_changed_knobs_are_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, extension: ModuleType, fake: FakeDriver, knobs: str, name: str, value: Any
) -> None:
    call = ready(extension)
    monkeypatch.setattr(getattr(triton.knobs, knobs), name, value)
    assert offered(extension, call) == "device"


def test_block_that_wants_jit_is_respected(extension: ModuleType, fake: FakeDriver) -> None:
    call = ready(extension)
    with launch.through_jit():
        assert offered(extension, call) == "device"
    assert isinstance(offered(extension, call), tuple)


def test_failed_launch_raises_drivers_message(extension: ModuleType, fake: FakeDriver) -> None:
    call = ready(extension)
    fake.set(status=700)
    with pytest.raises(RuntimeError, match=r"^step: the Triton launch failed: an illegal memory access"):
        offered(extension, call)
    fake.set(status=1)
    with pytest.raises(RuntimeError, match=r"an unknown error of the CUDA driver"):
        offered(extension, call)


def test_written_tensors_change_their_version(extension: ModuleType, fake: FakeDriver) -> None:
    call = ready(extension)
    before = call.sample._version
    offered(extension, call)
    assert call.sample._version == before + 1


def test_missing_driver_is_reported(extension: ModuleType, tmp_path: Path) -> None:
    problem = extension.enable_triton([], str(tmp_path / "none.so"), False)
    assert problem.startswith("the CUDA driver cannot be loaded: ")
    (tmp_path / "empty.cpp").write_text("")
    call = call_of(torch.zeros(2, 64), rows=3, row_index=1)
    assert offered(extension, call) == "device"


def test_kernel_of_another_shape_is_refused(extension: ModuleType, fake: FakeDriver) -> None:
    with pytest.raises(ValueError, match=r"^install_triton_kernel: got a key of 3 bytes"):
        extension.install_triton_kernel(b"123", 1, 128, 0, "p" * 31)


def test_ptx_has_parameters_of_layout(monkeypatch: pytest.MonkeyPatch, extension: ModuleType, fake: FakeDriver) -> None:
    """The layout is the compiled kernel's own: what is passed is what PTX declares, in its order and sizes."""
    monkeypatch.undo()
    call = call_of(torch.zeros(2, 64), rows=3, row_index=1)
    kernel = step.launch(dataclasses.replace(call, noise=torch.zeros(2, 64), keeps=0))
    declared = [line for line in kernel.asm["ptx"].partition(")")[0].splitlines() if ".param" in line]
    widths = [64 if ".u64" in line or ".b64" in line else 32 for line in declared]
    layout = native.layout_of(kernel)
    assert widths == [32 if form == "i" else 64 for form in layout if form != "-"] + [64, 64]


@pytest.mark.parametrize("guided", [False, True], ids=["step", "guided_step"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
                                  "KDPM2AncestralDiscrete", "LMSDiscrete", "EDMEuler"])  # fmt: skip
def test_dropin_step_and_its_model_input_are_one_launch(extension: ModuleType, name: str, guided: bool) -> None:
    scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
    x, m, u = torch.randn(3, 2, 4, 8, 8)
    with host_path.launches_from_c() as driver:
        for _ in range(4):  # plans, what scales after them, kernels, and a loop that has all
            scheduler.set_timesteps(8)
            sample, counts = x, []
            for timestep in scheduler.timesteps:
                before = driver.launches
                scheduler.scale_model_input(sample, timestep)
                if guided:
                    sample = scheduler.guided_step(u, m, 3.0, timestep, sample, return_dict=False)[0]
                else:
                    sample = scheduler.step(m, timestep, sample, return_dict=False)[0]
                counts.append(driver.launches - before)
        # No step comes before the first one, which is looked up where a backend is forced and writes no model input.
        assert counts[2:] == [1] * (len(counts) - 2)
        assert counts[:2] == [2, 2]
