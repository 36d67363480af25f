# SPDX-License-Identifier: MIT
"""Host time of a step on a GPU, without a GPU: everything from the call to the launch, with a launch that does nothing.

    python -m benchmarks.host_path [--rounds 15] [--calls 2000]

CPU tensors stand for the device's, and a fake driver library (tests/support/fake_driver.cpp), which records launches,
for CUDA's.  A GPU adds its own launch, and its allocator for new outputs.  ``torch.add(x, y, out=z)`` is one torch
operation on the CPU, with its arithmetic.

Prints medians over rounds, in which all rows alternate.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["TRITON_INTERPRET"] = "0"  # compiled kernels, of which none is run

import torch  # noqa: E402
import triton  # noqa: E402
import triton.compiler  # noqa: E402
from torch import Tensor  # noqa: E402

import fastdiff.diffusers  # noqa: E402
from fastdiff import create_sampler, ops  # noqa: E402
from fastdiff.ops import backends  # noqa: E402
from fastdiff.ops.call import StepCall  # noqa: E402
from support import recording_driver  # noqa: E402
from support.fake_driver import FakeDriver  # noqa: E402

SHAPE = (1, 4, 128, 128)
#: Drop-in classes whose mid-loop steps are timed: scheduler, options.
DROPINS = ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "FlowMatchEulerDiscrete", "DEISMultistep")
#: Those whose loops scale the model's input before each step too.
SCALING_DROPINS = ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete")
#: All parameters of the kernel are passed: 19 addresses and 10 integers.
LAYOUT = "p" * 20 + "l" * 11


def _launch(call: StepCall) -> None:
    """Take the place of Triton's compiler: install a kernel for every key, then launch it."""
    extension = backends.extension
    assert extension is not None
    extension.set_triton_block(-1, call.sample.element_size(), call.seeds is not None, 1024)
    offered = backends.offer(call, triton=True)
    if isinstance(offered, bytes):
        extension.install_triton_kernel(offered, 1, 128, 0, LAYOUT)
        offered = backends.offer(call, triton=True)
    assert isinstance(offered, tuple), offered


@contextmanager
def launches_from_c() -> Iterator[FakeDriver]:
    """Have Triton's kernels launched from C++ through the fake driver, for CPU tensors."""
    from fastdiff.kernels import launch

    if backends.extension is None:
        raise RuntimeError(f"host_path: the C++ extension is missing: {backends.extension_error}")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(backends.RUN, triton=_launch), _triton_on_cpu():
        driver = FakeDriver(Path(folder))
        with driver.enabled(backends.extension, launch.guards()):
            yield driver


def _do_nothing(*_: object) -> None:
    """Take the place of Triton's runner."""


@contextmanager
def launches_from_python() -> Iterator[None]:
    """Have Triton's runner, which does nothing, called from Python, as where there is no extension."""
    with (
        mock.patch.object(triton.compiler, "compile", recording_driver.not_compile),
        mock.patch.object(recording_driver.Recorder, "__call__", _do_nothing),
        mock.patch.object(backends, "extension", None),
        _triton_on_cpu(),
    ):
        yield


@contextmanager
def _triton_on_cpu() -> Iterator[None]:
    """Force Triton, and let it take CPU tensors."""
    with (
        mock.patch.object(backends, "why_missing", return_value=""),
        mock.patch.object(backends, "_serves", return_value=True),
        ops.use_backend("triton"),
    ):
        yield


class Row:
    """A call to time; `calls` of it in a batch."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self.name, self.call = name, call

    def microseconds(self, calls: int) -> float:
        """Return the mean time of a call."""
        call = self.call
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls * 1e6


class StepperRow(Row):
    """Steps of a `Stepper` in the middle of its loop: DPM++2M, which keeps one tensor."""

    def __init__(self, x: Tensor, m: Tensor, u: Tensor) -> None:
        stepper = create_sampler("linear", method="dpm_solver", num_inference_steps=20).stepper()

        def call() -> None:
            if stepper.index > 17:
                stepper.index = 3  # the same table's rows again: no step is the first
            stepper.step(x, m, uncond=u, guidance_scale=7.5)

        super().__init__("Stepper.step, DPM++2M, guidance", call)
        for _ in range(4):
            call()


class DropinRow(Row):
    """Mid-loop steps of a drop-in scheduler."""

    def __init__(self, name: str, guided: bool, x: Tensor, m: Tensor, u: Tensor) -> None:
        self.name = f"{name}, {'guided_step' if guided else 'step'}"
        self.scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
        self.guided, self.tensors = guided, (x, m, u)

    def microseconds(self, calls: int) -> float:
        """Return the mean time of a step after the third of a loop; loops are repeated for about `calls` steps."""
        total, count = 0.0, 0
        while count < calls / 4:
            self.scheduler.set_timesteps(50)
            self.scheduler.is_scale_input_called = True  # no warning in a loop that does not scale
            timesteps = list(self.scheduler.timesteps)
            sample = self.take(timesteps[:3], self.tensors[0])
            started = time.perf_counter()
            self.take(timesteps[3:], sample)
            total += time.perf_counter() - started
            count += len(timesteps) - 3
        return total / count * 1e6

    def take(self, timesteps: list[Tensor], sample: Tensor) -> Tensor:
        """Take steps and return the last sample."""
        scheduler, (_, m, u) = self.scheduler, self.tensors
        for timestep in timesteps:
            if self.guided:
                sample = scheduler.guided_step(m, u, 7.5, timestep, sample, return_dict=False)[0]
            else:
                sample = scheduler.step(m, timestep, sample, return_dict=False)[0]
        return sample


class ScalingRow(DropinRow):
    """Mid-loop steps of a drop-in scheduler, each with the model's input scaled before it."""

    def __init__(self, name: str, x: Tensor, m: Tensor, u: Tensor) -> None:
        super().__init__(name, False, x, m, u)
        self.name = f"{name}, scale_model_input and step"

    def take(self, timesteps: list[Tensor], sample: Tensor) -> Tensor:
        """Scale and take steps, and return the last sample."""
        scheduler, m = self.scheduler, self.tensors[1]
        for timestep in timesteps:
            scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(m, timestep, sample, return_dict=False)[0]
        return sample


def rows() -> list[Row]:
    """Return the calls to time; the first is what a torch operation costs."""
    x, m, u, z = torch.randn(4, *SHAPE).unbind()
    table = torch.zeros(4, 32)
    table[:, 1], table[:, 2], table[:, 8], table[:, 10] = 1.0, math.inf, 0.9, 0.1
    guided = {"uncond": u, "guidance_scale": 7.5}
    return [
        Row("torch.add(x, y, out=z)", lambda: torch.add(x, m, out=z)),
        Row("ops.step", lambda: ops.step(x, m, table, 3)),
        Row("ops.step, guidance", lambda: ops.step(x, m, table, 3, **guided)),
        Row("ops.step, guidance, out=", lambda: ops.step(x, m, table, 3, **guided, out=(z,))),
        StepperRow(x, m, u),
        *(DropinRow(name, guided, x, m, u) for name in DROPINS for guided in (False, True)),
        *(ScalingRow(name, x, m, u) for name in SCALING_DROPINS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.host_path", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recording_driver.install()
    dimensions = "×".join(str(size) for size in SHAPE)
    print(f"µs a call, {dimensions} float32, launches that do nothing; torch {torch.__version__}")
    with torch.no_grad():
        with launches_from_c() as driver:
            made = rows()
            show(made, measured(made, options.rounds, options.calls))
            before = driver.launches
            for row in made[1:]:
                row.microseconds(1)
            assert driver.launches >= before + len(made) - 1, "a row launched nothing"
        print("without the extension:")
        with launches_from_python():
            made = rows()[1:4]
            show(made, measured(made, options.rounds, options.calls // 4))


def measured(made: list[Row], rounds: int, calls: int) -> list[float]:
    """Return the median time of a call of each row."""
    found: list[list[float]] = [[] for _ in made]
    for turn in range(rounds + 1):
        for row, times in zip(made, found, strict=True):
            figure = row.microseconds(calls)
            if turn:  # the first one fills caches
                times.append(figure)
    return [statistics.median(times) for times in found]


def show(made: list[Row], medians: list[float]) -> None:
    for row, median in zip(made, medians, strict=True):
        print(f"{row.name:44}{median:8.2f}")


if __name__ == "__main__":
    main()
