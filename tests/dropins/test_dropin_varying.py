# SPDX-License-Identifier: MIT
"""Numbers that are others at each call: they are computed anew from one trace, and nothing grows with them."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdiff.diffusers
from fastdiff.diffusers import mixin
from fastdiff.diffusers.compiler import compile as compiling
from fastdiff.diffusers.compiler import tape
from fastdiff.diffusers.compiler.plan import Fallback
from fastdiff.diffusers.compiler.tape import Tape, TraceTree
from fastdiff.diffusers.runtime import lookup, plan_cache
from fastdiff.ops import backends
from support.dropin_helpers import forget_plans, quiet
from support.oracle import assert_same_bits

needs_extension = pytest.mark.skipif(backends.extension is None, reason="steps go on in the C++ extension")
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
OUTPUT = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def pair(name: str, steps: int = 10, **config: Any) -> tuple[Any, Any]:
    """Ours, and diffusers' own."""
    both = []
    for module in (fastdiff.diffusers, diffusers):
        scheduler = getattr(module, f"{name}Scheduler")(**config)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        both.append(scheduler)
    return both[0], both[1]


def step(scheduler: Any, place: int, **more: Any) -> Tensor:
    if "_step_index" in vars(scheduler):
        scheduler._step_index = None
    if "generator" in scheduler.step.__code__.co_varnames or "generator" in more:
        more.setdefault("generator", torch.Generator().manual_seed(place))
    with quiet():
        return scheduler.step(OUTPUT, scheduler.timesteps[place], X, return_dict=False, **more)[0]


def traces() -> int:
    return sum(tree.count for tree in lookup._TRACES.values())


@pytest.mark.parametrize(
    ("name", "argument", "low", "high"),
    [
        ("DDIM", "eta", 0.0, 1.0), ("DDIMParallel", "eta", 0.0, 1.0), ("TCD", "eta", 0.0, 1.0),
        ("EulerDiscrete", "s_churn", 0.0, 3.0), ("EulerDiscrete", "s_noise", 0.5, 1.5),
        ("EDMEuler", "s_churn", 0.0, 3.0), ("FlowMatchHeunDiscrete", "s_churn", 0.0, 3.0),
    ],
)  # fmt: skip
def test_a_scalar_that_is_another_each_time_is_no_trace_of_its_own(
    name: str, argument: str, low: float, high: float
) -> None:
    ours, theirs = pair(name)
    forget_plans()
    draw = random.Random(name)
    counts = []
    for i in range(60):
        value = [low, high, draw.uniform(low, high)][min(i, 2)]
        place = i % 8
        found, wanted = (step(s, place, **{argument: value}) for s in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
        counts.append(traces())
    assert not isinstance(ours._fused.latest, Fallback)
    # A trace for each way through the code: with and without noise, the last step, the second half of Heun's.
    assert counts[-1] <= 6
    assert counts[-1] == counts[30]


@pytest.mark.parametrize("kind", ["views", "numbers"])
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "FlowMatchEulerDiscrete", "DPMSolverMultistep"])
def test_timesteps_in_any_order(name: str, kind: str) -> None:
    ours, theirs = pair(name, 200)
    forget_plans()
    draw = random.Random(0)
    for i in range(40):
        place = draw.randrange(199)
        if kind == "numbers" and name in ("DDIM", "DDPM"):
            timestep: Any = int(theirs.timesteps[place])
        else:
            timestep = None
        results = []
        for s in (ours, theirs):
            if "_step_index" in vars(s):
                s._step_index = None
            if "lower_order_nums" in vars(s):
                s.lower_order_nums = 0
            extra = {"generator": torch.Generator().manual_seed(i)} if name == "DDPM" else {}
            given = s.timesteps[place] if timestep is None else timestep
            results.append(s.step(OUTPUT, given, X, return_dict=False, **extra)[0])
        torch.testing.assert_close(*results, rtol=3e-4, atol=3e-4)
    assert traces() <= 3


def test_another_number_of_steps_or_other_betas_need_few_traces() -> None:
    forget_plans()
    counts = []
    for steps in (10, 20, 30, 40):
        for start in (1e-4, 2e-4):
            ours, theirs = pair("DDIM", steps, beta_start=start)
            for place in (0, steps // 2, steps - 1):
                torch.testing.assert_close(step(ours, place), step(theirs, place), rtol=1e-4, atol=1e-4)
            counts.append(traces())
    assert counts[-1] <= 4  # a configuration has traces of its own, a schedule has none


@needs_extension
@pytest.mark.parametrize("value", [lambda i: i, lambda i: [i], lambda i: {"at": i}, lambda i: torch.ones(i + 1)])
def test_an_attribute_that_no_step_reads_is_not_looked_at(
    value: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair("FlowMatchEulerDiscrete")
    calls: list[str] = []
    take_step = mixin.take_step
    monkeypatch.setattr(mixin, "take_step", lambda s, n, *rest: (calls.append(n), take_step(s, n, *rest))[1])
    for _ in range(4):
        ours.set_timesteps(6)
        calls.clear()
        for i, t in enumerate(ours.timesteps):
            ours.users_own = value(i)
            ours.step(OUTPUT, t, X)
    assert len(calls) <= 1


@needs_extension
def test_an_attribute_counts_from_the_first_step_that_reads_it() -> None:
    """One configuration's steps read what another's do not: those that went on unaware of it look again."""
    results = []
    for module in (fastdiff.diffusers, diffusers):
        forget_plans()
        plain = module.EulerDiscreteScheduler()
        plain.is_scale_input_called = True
        for _ in range(3):
            plain.set_timesteps(6)
            x = X
            for t in plain.timesteps:
                x = plain.step(OUTPUT, t, x, return_dict=False)[0]
        plain.set_timesteps(6)
        x = plain.step(OUTPUT, plain.timesteps[0], X, return_dict=False)[0]
        other = module.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
        other.set_timesteps(3)
        other.step(OUTPUT, other.timesteps[0], X)
        plain.sigmas = plain.sigmas * 1.5
        results.append(plain.step(OUTPUT, plain.timesteps[1], x, return_dict=False)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_every_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_plans()
    monkeypatch.setattr(plan_cache, "MOST_PLANS", 64)
    monkeypatch.setattr(plan_cache, "MOST_SCHEDULES", 4)
    monkeypatch.setattr(lookup, "MOST_TRACES", 8)
    results = []
    for again in range(2):
        for config in range(6):
            ours, theirs = pair("DDIM", 100 + config, beta_start=1e-4 * (1 + config))
            for i in range(80):
                found = step(ours, i, eta=0.1 + i / 100)
            wanted = step(theirs, 79, eta=0.1 + 79 / 100)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            results.append((again, found))
    assert traces() <= 8
    assert len(plan_cache.PLANS.schedules) <= 4
    assert sum(map(len, plan_cache.PLANS.schedules.values())) <= 2 * 64


# --- schedules written without torch's knowledge ---------------------------------------------------------------------

_WRITES: dict[str, Callable[[Any], None]] = {
    "data": lambda s: s.alphas_cumprod.data.mul_(0.9),
    "numpy": lambda s: s.alphas_cumprod.numpy().__imul__(np.float32(0.9)),
    "storage": lambda s: s.alphas_cumprod.untyped_storage().copy_((s.alphas_cumprod * 0.9).untyped_storage()),
    "detached": lambda s: s.alphas_cumprod.detach().mul_(0.9),
}


@pytest.mark.parametrize("way", _WRITES)
@pytest.mark.parametrize("seen", ["set_timesteps", "invalidate"])
def test_numbers_written_without_torch_s_knowledge_are_seen(way: str, seen: str) -> None:
    def loop(scheduler: Any, at: int) -> Tensor:
        x = X
        for i, t in enumerate(scheduler.timesteps):
            if i == at:
                _WRITES[way](scheduler)
                if seen == "invalidate" and hasattr(scheduler, "invalidate"):
                    scheduler.invalidate()
            x = scheduler.step(OUTPUT, t, x, return_dict=False)[0]
        return x

    ours, theirs = pair("DDIM", 5)
    for s in (ours, theirs):
        for _ in range(3):
            loop(s, 99)
            s.set_timesteps(5)
    if seen == "set_timesteps":
        for s in (ours, theirs):
            _WRITES[way](s)
            s.set_timesteps(5)
    torch.testing.assert_close(loop(ours, 2), loop(theirs, 2), rtol=1e-4, atol=1e-4) if seen == "invalidate" else (
        torch.testing.assert_close(loop(ours, 99), loop(theirs, 99), rtol=1e-4, atol=1e-4)
    )


# --- schedules of half types -----------------------------------------------------------------------------------------


def _outcome(make: Callable[[], Any]) -> tuple[str, Any]:
    try:
        with quiet():
            return "result", make()
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(fastdiff.diffusers.CLASSES))
def test_schedules_of_any_dtype_run_where_diffusers_runs_them(name: str, dtype: torch.dtype) -> None:
    """All arrays of numbers but the timesteps are cast by hand."""
    if name in ("RePaintScheduler", "CogVideoXDPMScheduler", "SCMScheduler", "ConsistencyDecoderScheduler"):
        pytest.skip("its step takes more than an output, a timestep and a sample")

    def steps(scheduler_class: Any) -> Tensor:
        scheduler = scheduler_class()
        scheduler.set_timesteps(4)
        for attribute, value in vars(scheduler).items():
            if isinstance(value, Tensor) and value.is_floating_point() and attribute != "timesteps":
                vars(scheduler)[attribute] = value.to(dtype)
        x = X
        torch.manual_seed(0)
        for t in scheduler.timesteps[:3]:
            timestep = t.expand(2) if "Wuerstchen" in name else t
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, timestep)
            x = scheduler.step(OUTPUT, timestep, x, return_dict=False)[0]
        return x

    ours = fastdiff.diffusers.CLASSES[name]
    (kind, found), (wanted_kind, wanted) = _outcome(lambda: steps(ours)), _outcome(lambda: steps(ours.original))
    assert kind == wanted_kind, (found, wanted)
    if kind == "result":
        # Half a unit in the last place of bfloat16's scalars, in each of three steps of a few operations.
        bound = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-3}[dtype]
        finite = torch.isfinite(wanted)
        assert torch.equal(torch.isfinite(found), finite)
        scale = float(wanted[finite].abs().max()) + 1.0 if bool(finite.any()) else 1.0
        torch.testing.assert_close(found[finite].float(), wanted[finite].float(), rtol=0.0, atol=bound * scale)


# --- interrupts ------------------------------------------------------------------------------------------------------

_TRACED_FILES = tuple(
    f"{module}.py"
    for module in ("trace", "scalars", "symbolic", "tape", "lookup", "plan", "lower", "inputs", "compile")
)


class _Interrupt:
    """Raises KeyboardInterrupt at the n-th line that is run in the files of the compiler."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "fastdiff" not in name or not name.endswith(_TRACED_FILES):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("part", range(8))
def test_an_interrupt_at_any_line_leaves_torch_as_it_was(part: int) -> None:
    step(pair("DPMSolverMultistep", 5)[0], 0)  # work done once a process is not counted below
    ours, theirs = pair("DPMSolverMultistep", 5)
    wanted = step(theirs, 0)
    forget_plans()
    counter = _Interrupt(10**9)
    sys.settrace(counter)
    try:
        step(ours, 0)
    finally:
        sys.settrace(None)
    lines = 10**9 - counter.left
    assert lines > 500
    for at in range(1 + part * 3, lines, 8 * max(1, lines // 400)):
        forget_plans()
        fresh, _ = pair("DPMSolverMultistep", 5)
        sys.settrace(_Interrupt(at))
        try:
            step(fresh, 0)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        assert torch._C._len_torch_function_stack() == 0, at
        assert type(torch.randn(2)) is Tensor
        assert interrupted
        fresh.set_timesteps(5)
        fresh.lower_order_nums = 0
        fresh.model_outputs = [None] * len(fresh.model_outputs)
        torch.testing.assert_close(step(fresh, 0), wanted, rtol=1e-4, atol=1e-4)
        assert not isinstance(fresh._fused.latest, Fallback), at


def test_a_trace_that_fails_for_lack_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("DDIM", 5)
    forget_plans()

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(compiling, "build_plan", fails)
        with pytest.raises(MemoryError):
            step(ours, 0)
    torch.testing.assert_close(step(ours, 0), step(theirs, 0), rtol=1e-4, atol=1e-4)
    assert not isinstance(ours._fused.latest, Fallback)


# --- the tape --------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, 1e308, 1e-308, 2.0]),
    st.floats(-50, 50),
)
_PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "divide": (tape.divide, torch.divide), "power": (tape.power, torch.pow), "log": (tape.log, torch.log),
    "log1p": (tape.log1p, torch.log1p), "exp": (tape.exp, torch.exp), "expm1": (tape.expm1, torch.expm1),
    "sqrt": (tape.sqrt, torch.sqrt), "minimum": (tape.minimum, torch.minimum), "maximum": (tape.maximum, torch.maximum),
    "rounded_down": (tape.rounded_down, torch.floor), "rounded_up": (tape.rounded_up, torch.ceil),
    "rounded": (tape.rounded, torch.round), "sigmoid": (tape.sigmoid, torch.sigmoid),
}  # fmt: skip


@pytest.mark.parametrize("name", _PAIRS)
@given(a=NUMBERS, b=NUMBERS)
def test_arithmetic_on_a_tape_is_torch_s_in_float64(name: str, a: float, b: float) -> None:
    ours, theirs = _PAIRS[name]
    operands = (a, b) if name in ("divide", "power", "minimum", "maximum") else (a,)
    found = float(ours(*operands))
    wanted = theirs(*(torch.tensor(x, dtype=torch.float64) for x in operands)).item()
    # The C library's functions and torch's vectorised ones each round within an ulp or two, and the latter may take a
    # subnormal number, below 2.3e-308, for 0.
    assert (math.isnan(found) and math.isnan(wanted)) or found == pytest.approx(wanted, rel=1e-14, abs=2.3e-308)


class _Inputs:
    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers


class _Reader:
    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, inputs: Any) -> float:
        return inputs.numbers[self.place]  # type: ignore[no-any-return]


_READERS = [_Reader(0), _Reader(1)]


def _record(inputs: _Inputs) -> tuple[Tape, int]:
    t = Tape(inputs)
    a, b = (t.read(reader) for reader in _READERS)
    total = t.apply(tape.add, a, t.apply(tape.multiply, b, t.constant(3.0)))
    if t.guard(t.apply(tape.less, a, b)):
        total = t.apply(tape.divide, total, b)
    return t, t.apply(tape.subtract, total, a)


@given(numbers=st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=200))
def test_a_kept_trace_computes_what_a_new_one_would(numbers: list[tuple[float, float]]) -> None:
    tree: TraceTree[int] = TraceTree()
    for pair_of in numbers:
        inputs = _Inputs(*pair_of)
        wanted, index = _record(inputs)
        found = tree.find(inputs)
        if found is None:
            tree.add(wanted, index)
        else:
            assert found[0] == index
            assert found[1] == wanted.values or any(map(math.isnan, wanted.values))
    assert tree.count <= 2


def test_compiled_operations_compute_the_same() -> None:
    tree: TraceTree[int] = TraceTree()
    draw = random.Random(0)
    tree.add(*_record(_Inputs(0.0, 1.0)))
    tree.add(*_record(_Inputs(1.0, 0.0)))
    for _ in range(200):  # beyond the visits after which operations become a function
        inputs = _Inputs(draw.uniform(-3, 3), draw.uniform(-3, 3))
        found = tree.find(inputs)
        assert found is not None
        assert found[1] == _record(inputs)[0].values


def test_first_and_later_steps_have_the_same_bits() -> None:
    """A row is evaluated alike whether its trace is new, kept or compiled."""
    results = []
    for again in range(2):
        forget_plans()
        ours, _ = pair("UniPCMultistep", 8)
        if again:
            for i in range(150):
                pair("UniPCMultistep", 8 + i)[0].step(OUTPUT, torch.tensor(999), X)
        ours.set_timesteps(8)
        x = X
        for t in ours.timesteps:
            x = ours.step(OUTPUT, t, x, return_dict=False)[0]
        results.append(x)
    assert_same_bits([results[0]], [results[1]])
