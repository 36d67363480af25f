# SPDX-License-Identifier: MIT
"""Cached kernels are launched like by Triton's JIT; run by test_triton_launch.py in a separate process, in which
`triton.jit` makes compiled kernels.

Each launch is made twice with the same arguments, by a `Launcher` and through the JIT, with a driver that records its
arguments.  The function argument represents all inputs of the compiler, so that an incomplete cache key passes a
different function.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastdiff.kernels import config, launch, philox, reduce, select, step
from fastdiff.kernels.launch import Launcher
from fastdiff.ops.call import StepCall
from support import recording_driver
from support.recording_driver import LAUNCHES, RecordingDriver

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = (
    step._step_kernel, philox._randn_kernel, reduce._sum_kernel, reduce._finish_kernel, select._count_kernel,
    select._pick_kernel, select._next_kernel, select._interpolate_kernel,
)  # fmt: skip
LAUNCHERS = [
    value for module in (step, philox, reduce, select) for value in vars(module).values() if isinstance(value, Launcher)
]


@pytest.fixture(scope="module", autouse=True)
def driver() -> RecordingDriver:
    """One for all: Triton keeps what it knows of a device."""
    return recording_driver.install()


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch, driver: RecordingDriver) -> Iterator[None]:
    """Forget what was cached and compiled, and compile nothing."""
    monkeypatch.setattr(triton.compiler, "compile", recording_driver.not_compile)
    forget()
    driver.device = driver.stream = 0
    yield
    forget()


def forget() -> None:
    LAUNCHES.clear()
    for kernel in KERNELS:
        kernel.device_caches.clear()
    for launcher in LAUNCHERS:
        launcher._cached.clear()
        launcher._rules.clear()


@pytest.fixture
def jit_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of kernel names launched via the JIT, in order."""
    names: list[str] = []
    run = JITFunction.run

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", spy)
    return names


def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Have each launch made by the launcher and through the JIT, and compare what the driver is handed."""
    once = Launcher.__call__
    seen: list[tuple[Any, ...]] = []

    def twice(self: Launcher, *args: Any) -> Any:
        LAUNCHES.clear()
        kernel = once(self, *args)
        with launch.through_jit():
            once(self, *args)
        cached, jit = LAUNCHES
        assert cached == jit
        seen.append(cached)
        return kernel

    monkeypatch.setattr(Launcher, "__call__", twice)
    return seen


# --- Calls of all kinds ----------------------------------------------------------------------------------------------

#: More than two gigabytes, never accessed: AMD's compiler uses the size of a tensor's memory.
LARGE = torch.empty(2**31 + 4096, dtype=torch.uint8)
INNERS = st.sampled_from([1, 2, 15, 16, 17, 48, 1000, 1024, 1025])
BATCHES = st.sampled_from([1, 2, 16, 17])


@st.composite
def tensors(draw: Any, count: int, dtype: torch.dtype) -> Tensor:
    """A tensor on a multiple of 16 bytes, or off it, seldom in large memory."""
    size = torch.empty((), dtype=dtype).element_size()
    shift = draw(st.sampled_from([0, 0, 0, 1, 16 // size, 3]))
    if draw(st.integers(0, 9)) == 0:
        return LARGE.view(dtype)[shift : shift + count]
    return torch.empty(count + shift, dtype=dtype)[shift:]


@st.composite
def step_arguments(draw: Any) -> StepCall:
    dtype, batch, inner = draw(st.sampled_from(DTYPES)), draw(BATCHES), draw(INNERS)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (batch, inner)
    mixed = dtype != torch.float64 and draw(st.integers(0, 4)) == 0

    def like(there: bool = True) -> Any:
        kind = draw(st.sampled_from(DTYPES[:3])) if mixed else dtype
        return draw(tensors(batch * inner, kind)).view(shape) if there else None

    def counters(wanted: int) -> Any:
        number = draw(st.sampled_from([0, 1, 16, 2**31, 2**32 - 1]))
        return number if wanted == 0 else draw(tensors(1 if wanted == 1 else batch, torch.int64))

    def guidance_scale() -> Any:
        if draw(st.booleans()):
            return draw(st.sampled_from([0.0, 1e-45, 1.5, -7.5, 1e300, math.inf, math.nan]))
        return draw(tensors(draw(st.sampled_from([1, batch])), compute))

    parts = draw(st.sampled_from([1, 1, batch]))
    seeds = draw(tensors(batch // parts, torch.int64)) if draw(st.booleans()) else None
    scatter, masked = draw(st.booleans()), draw(st.integers(0, 3)) == 0
    keeps = draw(st.integers(0, 1 if masked else 2))
    uncond = like(draw(st.booleans()))
    rows = draw(st.integers(1 if scatter else 0, 2))
    copies = draw(st.integers(0, 2))
    other = draw(st.sampled_from(DTYPES))
    return StepCall(
        sample=like(),
        model_output=like(),
        table=draw(tensors(32 * draw(st.sampled_from([1, 16, 50])), compute)).view(-1, 32),
        row_index=counters(rows),
        uncond=uncond,
        guidance_scale=None if uncond is None else guidance_scale(),
        history=tuple(like(draw(st.booleans())) for _ in range(draw(st.integers(0, 4)))),
        noise=like(seeds is None and draw(st.booleans())),
        variance=like(draw(st.booleans())),
        mask=like(masked),
        threshold=draw(tensors(batch, compute)) if draw(st.booleans()) else None,
        variance_kind=draw(st.integers(0, 2)),
        keeps=0 if scatter else keeps,
        seeds=seeds,
        noise_step=counters(draw(st.integers(0, 2))),
        purpose=draw(st.sampled_from([0, 1, 2**32 - 1])),
        parts=1 if seeds is None else parts,
        model_input=draw(tensors(copies * batch * inner, other)).view(-1, inner) if copies else None,
        write_history=scatter,
        out=tuple(like() for _ in range(1 if scatter else 1 + keeps)),
    )


def accepted(call: StepCall) -> StepCall:
    """Return a call that the checks accept: Triton's launch takes an unused variance, and rows beyond the table."""
    return dataclasses.replace(
        call,
        variance=call.variance if call.variance_kind else None,
        variance_kind=call.variance_kind if call.variance is not None else 0,
        row_index=call.row_index if isinstance(call.row_index, Tensor) else call.row_index % len(call.table),
    )


def step_calls() -> st.SearchStrategy[Callable[[], Any]]:
    return step_arguments().map(lambda call: lambda: step.launch(call))


@st.composite
def other_calls(draw: Any) -> Callable[[], None]:
    dtype, batch, inner = draw(st.sampled_from(DTYPES)), draw(BATCHES), draw(INNERS)
    x = draw(tensors(batch * inner, dtype)).view(batch, inner)
    kind = draw(st.sampled_from(["randn", "reduce", "quantile"]))
    if kind == "randn":
        seeds = draw(tensors(batch, torch.int64))
        steps = draw(st.sampled_from([None, seeds, seeds[:1]]))
        number, purpose = (draw(st.sampled_from([0, 1, 16, 2**31, 2**32 - 1])) for _ in range(2))
        return lambda: philox.randn(x, seeds, steps, number, purpose)
    if kind == "reduce":
        which, correction = draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 1.0, 0.5, -1.0]))
        y = draw(tensors(batch * inner, dtype)).view(batch, inner) if which == 3 else None
        return lambda: reduce.reduce(which, x, y, correction)  # type: ignore[return-value]
    weight, absolute = draw(st.sampled_from([0.0, 0.25])), draw(st.booleans())
    return lambda: select.quantile(x, 0, weight, absolute)  # type: ignore[return-value]


def call_of(x: Tensor, rows: int, row_index: int) -> StepCall:
    """A step of a tensor on itself, in place, by a table of so many rows."""
    return StepCall(sample=x, model_output=x, table=torch.empty(rows, 32), row_index=row_index, out=(x,))


def all_kernels(x: Tensor) -> None:
    step.launch(call_of(x, rows=3, row_index=1))
    philox.randn(x, torch.zeros(len(x), dtype=torch.int64), None, 3, 4)
    reduce.reduce(1, x, None, 1.0)
    select.quantile(x, 3, 0.5, True)


#: Other than the default in everything, and in the warps alone.
CONFIGS: list[dict[str, config.Config]] = [
    {},
    {
        "step": config.Config(256, 2), "draw": config.Config(2048, 8), "randn": config.Config(512, 1),
        "sum": config.Config(2, 2), "select": config.Config(1024, 4, 2),
    },
    {kind: dataclasses.replace(default, num_warps=2) for kind, default in config.DEFAULT.items()},
]  # fmt: skip


def test_cached_kernels_are_launched_like_jit(
    monkeypatch: pytest.MonkeyPatch, driver: RecordingDriver, jit_launches: list[str]
) -> None:
    seen = compared(monkeypatch)
    all_kernels(torch.empty(2, 64))

    # What earlier examples left is cached: calls of all kinds come in any order.
    @settings(max_examples=4 * settings().max_examples)
    @given(
        calls=st.lists(st.one_of(step_calls(), step_calls(), other_calls()), min_size=1, max_size=4),
        devices=st.lists(st.integers(0, 2), min_size=4, max_size=4),
        stream=st.integers(0, 3),
        configs=st.sampled_from(CONFIGS),
    )
    def check(calls: list[Callable[[], None]], devices: list[int], stream: int, configs: dict[str, Any]) -> None:
        driver.stream = stream
        for call, device in zip(calls, devices, strict=False):
            driver.device = device
            with config.override(**configs):
                call()
                call()

    check()
    assert {function[0] for function, *_ in seen} >= {repr(kernel.__name__) for kernel in KERNELS}
    # The JIT was called once per launch, for the comparison, and for compilations.
    assert len(jit_launches) < 2 * len(seen)


@pytest.mark.parametrize("device", range(3))
def test_second_launch_does_not_call_jit(driver: RecordingDriver, jit_launches: list[str], device: int) -> None:
    driver.device = device
    x = torch.empty(2, 64)
    all_kernels(x)
    assert set(jit_launches) == {kernel.__name__ for kernel in KERNELS}
    jit_launches.clear()
    first = list(LAUNCHES)
    all_kernels(x)
    assert jit_launches == []
    assert [(f, grid, s, m) for f, grid, s, m, _ in LAUNCHES[len(first) :]] == [(f, g, s, m) for f, g, s, m, _ in first]


def test_varying_step_arguments_share_one_cached_kernel(jit_launches: list[str]) -> None:
    x, seeds = torch.empty(2, 64), torch.tensor([1, 2])
    tables = [torch.empty(count, 32) for count in (1, 16, 33)]
    for table, row, number in itertools.product(tables, (0, 1, 16), (0, 1, 16, 2**31, 2**32 - 1)):
        step.launch(
            StepCall(
                sample=x,
                model_output=x,
                table=table,
                row_index=row,
                seeds=seeds,
                noise_step=number,
                purpose=number,
                out=(x,),
            )
        )
        philox.randn(x, seeds, None, number, number)
    assert jit_launches == ["_step_kernel", "_randn_kernel"]


def test_launch_runs_on_device_of_tensors(monkeypatch: pytest.MonkeyPatch, driver: RecordingDriver) -> None:
    guarded: list[torch.device] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            guarded.append(device)

        def __enter__(self) -> None:
            driver.device = 1

        def __exit__(self, *_: object) -> None:
            driver.device = 0

    class OnDevice1(Tensor):
        def get_device(self) -> int:
            return 1

    monkeypatch.setattr(launch, "on_device", Guard)
    x = torch.empty(2, 64).as_subclass(OnDevice1)
    step.launch(call_of(x, rows=1, row_index=0))
    assert (len(guarded), driver.device) == (1, 0)
    assert LAUNCHES[0][2] == 1000
    driver.device = 1
    step.launch(call_of(x, rows=1, row_index=0))
    assert len(guarded) == 1


# --- Cases that need the JIT ------------------------------------------------------------------------------------------


def plain_step() -> None:
    x = torch.empty(2, 64)
    step.launch(call_of(x, rows=3, row_index=1))


def test_launch_hooks_are_called_via_jit(jit_launches: list[str]) -> None:
    plain_step()
    plain_step()
    assert len(jit_launches) == 1
    told: list[str] = []

    def enter(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    runtime = triton.knobs.runtime
    for hooks in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hooks.add(enter)
        try:
            assert "launch hook" in launch.why_through_jit()
            plain_step()
        finally:
            hooks.remove(enter)
    assert told == ["_step_kernel"] * 2
    assert len(jit_launches) == 3
    assert launch.why_through_jit() == ""
    plain_step()
    assert len(jit_launches) == 3


def test_function_in_place_of_hooks_is_called(monkeypatch: pytest.MonkeyPatch, jit_launches: list[str]) -> None:
    plain_step()
    told: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", told.append)
    plain_step()
    assert (len(told), len(jit_launches)) == (1, 2)


@pytest.mark.parametrize(
    ("knobs", "name", "value"),
    [("runtime", "debug", True), ("compilation", "instrumentation_mode", "consan")],
)
def test_compiler_options_use_jit(
    monkeypatch: pytest.MonkeyPatch, jit_launches: list[str], knobs: str, name: str, value: Any
) -> None:
    plain_step()
    monkeypatch.setattr(getattr(triton.knobs, knobs), name, value)
    plain_step()
    plain_step()
    assert len(jit_launches) == 3
    # The other option is another kernel, and the cached one is not it.
    assert LAUNCHES[0][0] != LAUNCHES[1][0] == LAUNCHES[2][0]


def test_unknown_triton_uses_jit_with_reason(monkeypatch: pytest.MonkeyPatch, jit_launches: list[str]) -> None:
    monkeypatch.setattr(triton, "__version__", "9.1.0")
    assert "triton is 9.1.0" in launch._unknown_runtime()
    monkeypatch.setattr(launch, "_unknown", launch._unknown_runtime())
    monkeypatch.setattr(step, "_step", Launcher(step._step_kernel))
    for _ in range(3):
        plain_step()
    assert len(jit_launches) == len(LAUNCHES) == 3


def test_unsupported_gpu_uses_jit_with_reason(
    monkeypatch: pytest.MonkeyPatch, driver: RecordingDriver, jit_launches: list[str]
) -> None:
    monkeypatch.setattr(launch, "TARGETS", ("cuda",))
    driver.device = 2
    assert launch.why_through_jit() == "compiled kernels are cached for cuda, and this device is hip"
    plain_step()
    plain_step()
    assert len(jit_launches) == 2
    driver.device = 0
    assert launch.why_through_jit() == ""


@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_vendor_launchers_accept_arguments(vendor: str) -> None:
    driver = importlib.import_module(f"triton.backends.{vendor}.driver")
    launcher = driver.CudaLauncher if vendor == "nvidia" else driver.HIPLauncher
    given = inspect.signature(launcher.__call__).bind("self", 5, 1, 1, 1234, "function", "packed", None, None, None, 7)
    names = ("stream", "function", "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
    rest = list(given.arguments["args"])
    expected = dict(zip(names, (1234, "function", "packed", None, None, None), strict=True))
    for name, value in expected.items():
        # An older launcher takes those after the function as it is given them, in the same order.
        assert (given.arguments[name] if name in given.arguments else rest.pop(0)) == value
    assert rest == [7]


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_CACHE_SIZE", 3)
    for size in range(1, 9):
        x = torch.empty(1, size)
        step.launch(call_of(x, rows=1, row_index=0))
        assert len(step._step._cached) <= 3


def test_too_many_programs_are_refused() -> None:
    x = torch.empty(16)
    with pytest.raises(ValueError, match=r"^_step_kernel: .* 2147483648 programs, expected 2147483647 or fewer"):
        step._step(2**31, (x,), (), (), 4)
    assert LAUNCHES == []


# --- With the compiler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 2], ids=["sm_90", "gfx942"])
def test_compiled_kernels_are_cached_for_every_vendor(
    monkeypatch: pytest.MonkeyPatch, driver: RecordingDriver, jit_launches: list[str], device: int
) -> None:
    monkeypatch.undo()
    spy_free = len(LAUNCHES)
    driver.device = device
    x, seeds = torch.empty(2, 64), torch.tensor([1, 2])
    for offset in (0, 1, 0, 1):
        y = torch.empty(129)[offset : offset + 128].view(2, 64)
        philox.randn(y, seeds, None, 3, 4)
        reduce.reduce(0, y, None, 0.0)
    step.launch(call_of(x, rows=3, row_index=1))
    step.launch(call_of(x, rows=3, row_index=2))
    functions = [launched[0] for launched in LAUNCHES[spy_free:]]
    randns = [f for f in functions if f[0] == "_randn_kernel"]
    # Off 16 bytes it is another kernel, and the third call is the first one's.
    assert randns[0] == randns[2] != randns[1] == randns[3]
    assert functions[-1] == functions[-2]
    assert all(function[1] == device for function in functions)
    target = recording_driver.CHIPS[device]
    cached = list(step._step_kernel.device_caches[device][0].values())
    assert [kernel.metadata.target for kernel in cached] == [target]


def test_host_time_of_cached_launch_is_below_jit(capsys: pytest.CaptureFixture[str]) -> None:
    # With a driver that does nothing: Python's part alone, of which a cached launch does a fraction.
    x, seeds = torch.empty(2, 64), torch.tensor([1, 2])
    call = replace(call_of(x, rows=3, row_index=1), uncond=x, guidance_scale=torch.empty(1), seeds=seeds)

    def microseconds() -> float:
        best = float("inf")
        for _ in range(7):
            LAUNCHES.clear()
            begin = time.perf_counter()
            for _ in range(300):
                step.launch(call)
            best = min(best, (time.perf_counter() - begin) / 300 * 1e6)
        return best

    step.launch(call)
    cached = microseconds()
    with launch.through_jit():
        jit = microseconds()
    with capsys.disabled():
        print(f"\nhost time with a driver that does nothing: cached {cached:.1f} us, through the JIT {jit:.1f} us")
    assert cached < jit
