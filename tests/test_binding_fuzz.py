# SPDX-License-Identifier: MIT
"""Anything at all, handed to the binding and to the public step: a right result, a refusal, never a crash.

A call is drawn as a `Plan` of plain values and built and made in a process of its own, which lives on from call to
call: where it dies, the plan that killed it is in the failure.  Run as a program this file is that process.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from oracle import NOTHING_MORE, Case, Shape, assert_same_bits, assert_within_rounding, make
from strange_tensors import OTHER_CHANGES, SYMBOLIC, TENSOR_CHANGES, UNREADABLE, in_a_room

#: The binding's arguments in their order, without `stream`, which it takes last and alone.
ARGUMENTS = (
    "sample", "model_output", "table", "row", "uncond", "guidance", "history", "noise", "variance", "threshold",
    "variance_kind", "keeps", "out",
)  # fmt: skip
TENSORS = ("sample", "model_output", "table", "uncond", "guidance", "noise", "variance", "threshold")
INTEGERS = ("row", "variance_kind", "keeps")
LISTS = ("history", "out")
WAYS = ("binding", "direct", "step", "step by cpu")


@dataclass(frozen=True)
class Plan:
    """One call: a good one, what is changed in it, and the way it is made."""

    seed: int
    dtype: str
    shape: tuple[int, ...]
    guidance: str
    registers: int
    noise: bool
    variance_kind: int
    threshold: bool
    keeps: int
    outs: bool
    way: str
    #: (argument, change); "history 2" and "out 0" are entries of lists.
    changes: tuple[tuple[str, str], ...] = ()
    #: (argument that moves, argument whose memory it is put into, elements past its start)
    shared: tuple[tuple[str, str, int], ...] = ()
    #: How many arguments the binding gets, where not all.
    count: int | None = None


SLOTS = (*TENSORS, *(f"history {j}" for j in range(4)), *(f"out {o}" for o in range(3)))
CHANGES = st.one_of(
    st.tuples(st.sampled_from(SLOTS), st.sampled_from(sorted(TENSOR_CHANGES))),
    st.tuples(st.sampled_from((*INTEGERS, *LISTS, *TENSORS)), st.sampled_from(sorted(OTHER_CHANGES))),
)
PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(("float16", "bfloat16", "float32", "float64")),
    shape=st.sampled_from(((2, 3), (1, 5), (3, 1, 4), (32,), (2, 16), (), (1, 1), (2, 520), (0, 3), (1, 32))),
    guidance=st.sampled_from(("none", "scalar", "a sample")),
    registers=st.integers(0, 15),
    noise=st.booleans(),
    variance_kind=st.integers(0, 2),
    threshold=st.booleans(),
    keeps=st.integers(0, 2),
    outs=st.booleans(),
    way=st.sampled_from(WAYS),
    changes=st.lists(CHANGES, max_size=2).map(tuple),
    shared=st.lists(
        st.tuples(st.sampled_from(SLOTS), st.sampled_from(SLOTS), st.integers(-3, 3)), max_size=2
    ).map(tuple),
    count=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20)),
)  # fmt: skip


# --- The process that makes the calls --------------------------------------------------------------------------------


def build(plan: Plan) -> tuple[dict[str, Any], set[str]]:
    """The arguments, and which changes made tensors among them that cannot be read."""
    whole = Shape(
        plan.seed, getattr(torch, plan.dtype), tuple(plan.shape), plan.guidance, plan.registers, plan.noise,
        plan.variance_kind, plan.threshold, plan.keeps,
    )  # fmt: skip
    case = make(whole)
    entries: dict[str, Any] = {name: getattr(case, name) for name in TENSORS}
    entries |= {f"history {j}": h for j, h in enumerate(case.history)}
    if plan.outs:
        entries |= {f"out {o}": torch.full_like(case.sample, 5.0) for o in range(plan.keeps + 1)}
    # Give each tensor a buffer with room at both ends, so that others can be put over it.
    rooms = {name: in_a_room(t, 4).reshape(t.shape) for name, t in entries.items() if isinstance(t, Tensor)}
    entries |= rooms
    for mover, owner, shift in plan.shared:
        a, b = entries.get(mover), entries.get(owner)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or a is b:
            continue
        offset, room = b.storage_offset() + shift, b.untyped_storage().nbytes() // b.element_size()
        if offset >= 0 and offset + a.numel() <= room:
            moved = torch.empty(0, dtype=a.dtype).set_(b.untyped_storage(), offset, a.shape)
            entries[mover] = moved.copy_(a.clone()) if shift else moved
    unreadable: dict[int, str] = {}
    arguments: dict[str, Any] = {"row": 0, "variance_kind": plan.variance_kind, "keeps": plan.keeps}
    for slot, change in plan.changes:
        if id(entries.get(slot)) in unreadable:
            continue  # torch itself would read what is not there
        if slot in SLOTS and change in TENSOR_CHANGES and isinstance(entries.get(slot), Tensor):
            try:
                entries[slot] = TENSOR_CHANGES[change](entries[slot])
                if change in UNREADABLE:
                    unreadable[id(entries[slot])] = change
            except Exception:  # torch has no such tensor of this dtype or shape: the good one stays
                continue
    arguments |= {name: entries[name] for name in TENSORS}
    arguments["history"] = [entries[f"history {j}"] for j in range(len(case.history))]
    arguments["out"] = [entries[f"out {o}"] for o in range(plan.keeps + 1)] if plan.outs else None
    for slot, change in plan.changes:
        if slot in arguments and change in OTHER_CHANGES and (slot not in TENSORS or change not in TENSOR_CHANGES):
            arguments[slot] = OTHER_CHANGES[change]
    return arguments, {unreadable[id(t)] for t in _tensors(arguments) if id(t) in unreadable}


def call(plan: Plan, arguments: dict[str, Any]) -> Any:
    values = [arguments[name] for name in ARGUMENTS]
    if plan.way == "binding":
        assert backends.extension is not None
        values += NOTHING_MORE
        return backends.extension.step(*(values * 2)[: len(values) if plan.count is None else plan.count])
    if plan.way == "direct":
        return ops.direct_step(*values)
    rest = {name: arguments[name] for name in ARGUMENTS[4:]}
    return ops.step(*values[:4], **rest, backend="cpu" if plan.way == "step by cpu" else None)


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    lists = [arguments[name] for name in LISTS]
    flat = [*arguments.values(), *(item for value in lists if isinstance(value, (list, tuple)) for item in value)]
    return [value for value in flat if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> Tensor | None:
    """All bytes of a tensor's storage, where it has memory of its own kind."""
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.data_ptr() == 0:
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def outcome(plan: Plan) -> str:
    """Make the call and hold it to the contract; AssertionError where it is broken."""
    arguments, unreadable = build(plan)
    outs = [t for t in arguments["out"] if isinstance(t, Tensor)] if isinstance(arguments["out"], list) else []
    storages = [(t, t_bytes, t_bytes.clone()) for t in _tensors(arguments) if (t_bytes := _bytes(t)) is not None]
    clean = {name: _clone(value) for name, value in arguments.items()} if not unreadable else {}
    try:
        results = call(plan, arguments)
    except (AssertionError, SystemError):  # an internal promise was broken, or an error was set beside a result
        raise
    except Exception as error:
        results, word = None, type(error).__name__
    else:
        word = "declined" if results is None else "result"
    for _, now, before in storages:
        changed = now != before
        # Where an output is no memory, torch's own copy_ to it may raise after another has been written.
        if word == "result" or "wrapper" in unreadable:
            for out in outs:
                if _bytes(out) is not None and out.untyped_storage().data_ptr() == now.data_ptr():
                    _mark(changed, out)
        assert not bool(changed.any()), f"{word}: {int(changed.sum())} bytes outside of the outputs were written"
    if results is None:
        return word
    if unreadable:
        assert plan.way in ("step", "step by cpu"), f"a result although a tensor is {unreadable}"
        assert unreadable <= SYMBOLIC, f"a result although a tensor is {unreadable}"
        return word
    assert isinstance(results, tuple)
    assert all(out is None or out is result for out, result in zip(arguments["out"] or results, results, strict=True))
    with torch.no_grad():
        case = _case(clean)
        assert_same_bits([_clone(result) for result in results], case.run("cpu"))
        finite = all(bool(torch.isfinite(t).all()) for t in _tensors(clean) if t is not clean["table"])
        # Thresholds and clip are above 0 by contract; clamping between bounds in the wrong order is anybody's guess.
        positive = all(bool((t > 0).all()) for t in (case.table[0, 2], case.threshold) if t is not None)
        if finite and positive:
            assert_within_rounding(case, [_clone(result) for result in results], "cpu")
    return word


def _case(clean: dict[str, Any]) -> Case:
    """The call with each tensor in memory of its own, and scalars as tensors."""
    sample, guidance = clean["sample"], clean["guidance"]
    row = int(clean["row"])
    wide = clean["table"].dtype
    return Case(
        sample, clean["model_output"], clean["table"][row : row + 1].clone(), clean["uncond"],
        guidance if guidance is None or isinstance(guidance, Tensor) else torch.tensor([float(guidance)], dtype=wide),
        clean["history"] or (), clean["noise"], clean["variance"], clean["threshold"], int(clean["variance_kind"]),
        int(clean["keeps"]),
    )  # fmt: skip


def _clone(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_clone(item) for item in value]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return value
    value = value.detach().resolve_neg().as_subclass(Tensor)
    # Not clone(), which keeps shared elements shared in some layouts.
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)


def _mark(changed: Tensor, out: Tensor) -> None:
    """Take an output's bytes out of those that changed."""
    size = out.element_size()
    shape, strides = (*out.shape, size), (*(s * size for s in out.stride()), 1)
    if out.numel():
        changed.as_strided(shape, strides, out.storage_offset() * size).fill_(False)


def serve() -> None:
    for line in sys.stdin:
        plan = Plan(**json.loads(line))
        try:
            answer = outcome(plan)
        except BaseException as error:
            traceback.print_exc()
            answer = f"failed: {type(error).__name__}: {error}"[:1500]
        print(json.dumps(answer), flush=True)


# --- The tests -------------------------------------------------------------------------------------------------------


class Server:
    """The process, started at the first call and again after its death."""

    process: subprocess.Popen[str] | None = None

    def ask(self, plan: Plan) -> str:
        if self.process is None:
            self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115, the process writes to it until it ends
            environment = {**os.environ, "FASTDIFF_BACKEND": "", "PYTHONFAULTHANDLER": "1"}
            environment["PYTHONPATH"] = str(Path(fastdiff.__file__).parents[1])
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(plan)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return str(json.loads(answer))
        code = self.process.wait()
        self.process = None
        self.words.seek(0)
        raise AssertionError(f"the process ended with {code} in {plan}:\n{self.words.read()[-6000:]}")

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


SERVER = Server()
atexit.register(SERVER.close)
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")


@needs_extension
@settings(max_examples=3 * settings().max_examples)
@given(plan=PLANS)
def test_any_call_is_answered_right_or_refused_and_no_input_is_written(plan: Plan) -> None:
    answer = SERVER.ask(plan)
    assert not answer.startswith("failed"), answer


GOOD = Plan(1, "float32", (2, 16), "scalar", 3, True, 1, True, 1, True, "binding")


@needs_extension
@pytest.mark.parametrize("way", WAYS)
def test_the_good_call_gives_a_result(way: str) -> None:
    # Without this a fuzzer whose every call is refused would pass.
    assert SERVER.ask(Plan(**{**asdict(GOOD), "way": way})) == "result"


@needs_extension
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", sorted(TENSOR_CHANGES))
def test_every_change_of_every_tensor_by_every_way(way: str, change: str) -> None:
    for slot in ("sample", "model_output", "table", "guidance", "threshold", "variance", "history 1", "out 0"):
        answer = SERVER.ask(Plan(**{**asdict(GOOD), "way": way, "changes": ((slot, change),)}))
        assert not answer.startswith("failed"), f"{slot}: {answer}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
