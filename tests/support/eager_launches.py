# SPDX-License-Identifier: MIT
"""Steps without the extension pass the driver what a checked call passes; run by test_triton_launch.py in a separate
process, in which `triton.jit` makes compiled kernels.

CPU tensors stand for a GPU's, and Triton's driver records each launch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.compiler
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.kernels import config, eager, launch
from fastdiff.ops import backends, dispatch
from fastdiff.ops.call import FIELDS, StepCall
from fastdiff.ops.canonicalize import canonicalize
from support import recording_driver
from support.cached_launches import accepted, call_of, forget, step_arguments
from support.recording_driver import LAUNCHES


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without the extension, whose Triton takes CPU tensors; nothing is compiled or kept."""
    recording_driver.install()
    monkeypatch.setattr(triton.compiler, "compile", recording_driver.not_compile)
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "_eager_steps", None)
    monkeypatch.setattr(backends, "why_missing", lambda name: "")
    monkeypatch.setattr(backends, "_serves", lambda name, device: True)
    forget()
    eager._prepared.clear()
    yield
    forget()
    eager._prepared.clear()


def offered(call: StepCall) -> Any:
    if call.parts != 1:
        return "parts"  # canonicalization sets it: callers have no such argument
    return eager.step(**{name: getattr(call, name) for name in FIELDS if name != "parts"})


def test_every_remembered_step_is_launched_as_when_checked() -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=4 * settings().max_examples, deadline=None)
    @given(call=step_arguments())
    def check(call: StepCall) -> None:
        call = accepted(call)
        LAUNCHES.clear()
        results = dispatch.run(call, "triton")
        checked = LAUNCHES[-1]
        again = offered(call)
        if isinstance(again, str):
            outcomes[again] += 1
            return
        if any(a is not b for (_, a), (_, b) in zip(call.inputs(), canonicalize(call).inputs(), strict=True)):
            # History that is another input too, element by element: a checked call writes a copy and copies it back.
            outcomes["copied"] += 1
            return
        outcomes["launched"] += 1
        function, grid, stream, metadata, values = LAUNCHES[-1]
        assert (function, grid, stream, metadata) == checked[:4]
        # New outputs have addresses of their own.
        replaced = {result.data_ptr(): new.data_ptr() for result, new in zip(results, again, strict=True)}
        assert values == tuple(replaced.get(value, value) for value in checked[4])
        assert [(r.shape, r.stride(), r.dtype) for r in again] == [(r.shape, r.stride(), r.dtype) for r in results]

    check()
    assert outcomes["launched"] > 2 * settings().max_examples, outcomes


def plain() -> tuple[StepCall, Callable[..., Any]]:
    x = torch.zeros(2, 64)
    call = StepCall(sample=x, model_output=x.clone(), table=torch.zeros(3, 32), row_index=1, uncond=x.clone(),
                    guidance_scale=2.0)  # fmt: skip
    dispatch.run(call, "triton")
    assert isinstance(offered(call), tuple)
    return call, lambda **changes: offered(dataclasses.replace(call, **changes))


def test_numbers_of_a_step_are_arguments_of_one_launch() -> None:
    _, step = plain()
    before = len(eager._prepared)
    for row, scale in ((0, 1.0), (2, 7), (1, -3.5)):
        assert isinstance(step(row_index=row, guidance_scale=scale), tuple)
        values = LAUNCHES[-1][4]
        assert values[20] == row
        assert torch.tensor(values[26], dtype=torch.int32).view(torch.float32).item() == scale
    assert len(eager._prepared) == before
    assert step(row_index=3) == step(row_index=-1) == "value"


def test_unlike_calls_are_declined() -> None:
    call, step = plain()
    x = call.sample
    assert step(model_output=torch.zeros(2, 65)[:, :64]) == "kernel"  # other strides
    assert step(model_output=torch.zeros(129)[1:].view(2, 64)) == "kernel"  # off 16 bytes
    assert step(model_output=x.half()) == "kernel"
    assert step(uncond=None, guidance_scale=None) == "kernel"
    assert step(out=(torch.float16,)) == "kernel"
    assert step(history=(x,)) == "kernel"
    assert step(history=x) == step(out=x) == step(keeps="1") == step(out=()) == "argument"
    assert step(sample="x") == step(guidance_scale="2") == step(row_index=None if False else "0") == "wrapper"
    assert step(model_output=x.to_sparse()) == "wrapper"
    assert step(model_output=torch.zeros(2, 64, dtype=torch.complex64).conj().imag) == "wrapper"  # a negated view


def test_gradients_are_recorded() -> None:
    call, step = plain()
    wanted = torch.zeros(2, 64, requires_grad=True)
    assert step(model_output=wanted) == "autograd"
    with torch.no_grad():
        assert isinstance(step(model_output=wanted), tuple)
    with torch.autograd.forward_ad.dual_level():
        assert offered(call) == "modes"


def test_modes_see_operators() -> None:
    call, _ = plain()
    with TorchDispatchMode():
        assert offered(call) == "modes"
    assert torch.func.vmap(lambda _: torch.tensor(offered(call) == "modes"))(torch.zeros(1)).item()


def test_freed_memory_is_found() -> None:
    call, step = plain()
    short = torch.zeros(2, 64)
    address = short.data_ptr()
    short.untyped_storage().resize_(256)
    if short.data_ptr() % 16 == address % 16 == 0:
        assert step(model_output=short) == "storage"
    with pytest.raises(ValueError, match=r"^step: model_output has a storage of 256 bytes"):
        ops.step(call.sample, short, call.table, 0, backend="triton")


def test_written_tensors_may_be_inputs_and_not_overlap_them() -> None:
    call, _ = plain()
    x = call.sample
    memory = torch.zeros(256)
    step = dataclasses.replace
    for target, outcome in ((x, tuple), (torch.zeros(2, 64), tuple)):
        dispatch.run(step(call, out=(target,)), "triton")
        assert isinstance(offered(step(call, out=(target,))), outcome)
    before = x._version
    assert offered(step(call, out=(x,)))[0] is x
    assert x._version == before + 1
    ahead = step(call, sample=memory[:128].view(2, 64), out=(memory[16:144].view(2, 64),))
    assert offered(ahead) == "overlap"


def test_history_slots_that_are_written_lie_apart() -> None:
    x, a, b = torch.zeros(3, 2, 64).unbind()
    call = StepCall(
        sample=x, model_output=x, table=torch.zeros(3, 32), row_index=torch.tensor([0, 1]), history=(a, b),
        write_history=True, out=(torch.zeros(2, 64),),
    )  # fmt: skip
    dispatch.run(call, "triton")
    assert isinstance(offered(call), tuple)
    assert offered(dataclasses.replace(call, history=(a, a))) == "overlap"


@pytest.mark.parametrize("how", ["hook", "jit", "config"])
def test_launches_of_jit_are_respected(how: str) -> None:
    call, _ = plain()
    if how == "hook":
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(print)
        try:
            assert offered(call) == "modes"
        finally:
            hooks.remove(print)
    else:
        with launch.through_jit() if how == "jit" else config.override(step=config.Config(512, 4)):
            assert offered(call) == "modes"
    assert isinstance(offered(call), tuple)


def test_public_step_takes_short_way_after_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[Any] = []
    complete = backends.remember
    monkeypatch.setattr(backends, "remember", lambda *args: (checks.append(args), complete(*args)))
    x, table = torch.zeros(2, 64), torch.zeros(3, 32)
    for row in range(3):
        ops.step(x, x, table, row, backend="triton")
        with ops.use_backend("triton"):
            ops.step(x, x, table, row)
    assert len(checks) == 1
    assert len(LAUNCHES) == 6


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_MOST", 3)
    for size in range(1, 9):
        dispatch.run(call_of(torch.zeros(1, size), rows=1, row_index=0), "triton")
        assert len(eager._prepared) <= 3
