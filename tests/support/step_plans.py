# SPDX-License-Identifier: MIT
"""Plans of fuzzed calls of the step; run as a program, the child process of test_binding_fuzz.py that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends, reference
from fastdiff.ops import call as call_module
from fastdiff.row_layout import MODEL_INPUT_SCALE, STORE_0, STORE_1
from support.fuzz_process import Memory, copy_of, serve
from support.oracle import Case, Shape, assert_same_bits, assert_within_rounding, evaluate, make
from support.tensor_mutations import OTHER_CHANGES, SYMBOLIC, TENSOR_CHANGES, UNREADABLE, in_a_room

#: The binding's keywords, without those that say how a call is launched.
ARGUMENTS = call_module.FIELDS
REQUIRED = ("sample", "model_output", "table")
TENSORS = ("sample", "model_output", "table", "uncond", "guidance_scale", "noise", "variance", "mask", "threshold",
           "seeds", "model_input")  # fmt: skip
#: An integer or a tensor of them.
COUNTERS = ("row_index", "noise_step")
#: Tensors like the sample, which have dtypes of their own; beside a table of either compute dtype.
LIKE_SAMPLE = ("model_output", "uncond", "noise", "variance", "mask", *(f"history {j}" for j in range(4)),
               *(f"out {o}" for o in range(3)))  # fmt: skip
INTEGERS = ("variance_kind", "keeps", "purpose")
#: Arguments of the binding that the public steps lack.
PRIVATE = ("write_history", "parts")
MASKS = ("none", "alone", "beside two kept")
LISTS = ("history", "out")
SLOTS = (*TENSORS, *COUNTERS, *(f"history {j}" for j in range(4)), *(f"out {o}" for o in range(3)))
WAYS = ("binding", "offer", "step", "step by cpu", "rows", "rows by cpu")
ROWS_IN_TABLE = 3


@dataclass(frozen=True)
class Plan:
    """One call: a valid call, its mutations, and the entry point."""

    seed: int
    dtype: str
    shape: tuple[int, ...]
    guidance: str
    registers: int
    noise: str
    variance_kind: int
    threshold: bool
    keeps: int
    outs: bool
    way: str
    #: How rows and noise steps come: "number", "no dimension", "one" or "a sample"; and their values, in turn.
    row_as: str = "number"
    rows: tuple[int, ...] = (0,)
    step_as: str = "number"
    steps: tuple[int, ...] = (3,)
    purpose: int = 1
    #: Where each row stores its kept tensors, in turn.
    stores: tuple[float, ...] = (-1,)
    #: Dtypes of tensors that are stored in another than the samples': (argument, dtype).
    stored: tuple[tuple[str, str], ...] = ()
    #: "alone": the row's second kept map is the target of the blend, and stores nothing.
    mask: str = "none"
    #: The binding's own arguments; the public ways have one value each.
    scatter: bool = False
    parts: int = 1
    copies: int = 0
    model_input: str = "float32"
    #: (argument, change); "history 2" and "out 0" are entries of lists.
    changes: tuple[tuple[str, str], ...] = ()
    #: (argument that moves, argument whose memory it is put into, elements past its start)
    shared: tuple[tuple[str, str, int], ...] = ()
    #: What the binding gets instead of all keywords: fewer, or as many or more values without names.
    count: int | None = None

    @property
    def private(self) -> bool:
        return self.way in ("binding", "offer")

    @property
    def scatters(self) -> bool:
        return self.way.startswith("rows") or (self.scatter and self.private)

    @property
    def kept(self) -> int:
        return 0 if self.scatters else min(self.keeps, 1) if self.mask == "alone" else self.keeps


def good(plan: Plan) -> dict[str, Any]:
    """Return the valid arguments; those in lists by slot."""
    keeps = plan.kept
    dtype = getattr(torch, plan.dtype)
    whole = Shape(
        plan.seed, dtype, tuple(plan.shape), plan.guidance, plan.registers, plan.noise == "given", plan.variance_kind,
        plan.threshold, keeps,
    )  # fmt: skip
    case = make(whole)
    others = [make(Shape(plan.seed + 1 + i, dtype, (1,))).table for i in range(ROWS_IN_TABLE - 1)]
    table = torch.cat([case.table, *others])
    batch = plan.shape[0] if plan.shape else 1
    stores = (list(plan.stores) * 2 * ROWS_IN_TABLE)[: 2 * ROWS_IN_TABLE]
    table[:, STORE_0 : STORE_1 + 1] = torch.tensor(stores, dtype=table.dtype).reshape(-1, 2)
    if plan.mask == "alone":
        table[:, STORE_1] = -1

    def counters(kind: str, values: tuple[int, ...]) -> int | Tensor:
        values = (*values,) * (batch + 1)
        if kind == "number":
            return values[0]
        return torch.tensor(values[:1] if kind == "one" else values[:batch] if kind == "a sample" else values[0])

    entries: dict[str, Any] = {name: getattr(case, name) for name in TENSORS if hasattr(case, name)}
    entries["table"], entries["guidance_scale"] = table, case.guidance
    drawn = plan.noise == "drawn"
    seeds = batch // plan.parts if plan.private and plan.parts > 0 else batch
    entries["seeds"] = torch.arange(seeds) * -(2**61) + plan.seed if drawn else None
    if plan.mask != "none":
        gen = torch.Generator().manual_seed(plan.seed)
        soft = torch.rand(plan.shape, generator=gen, dtype=torch.float64)
        entries["mask"] = (3 * soft - 1).clamp(0, 1).to(dtype)  # a third each of 0, of 1 and of values in between
    entries["model_input"] = None
    if plan.copies and plan.shape:
        shape = (plan.copies * batch, *plan.shape[1:])
        entries["model_input"] = torch.full(shape, 6.0, dtype=getattr(torch, plan.model_input))
    entries["row_index"] = counters(plan.row_as, plan.rows)
    entries["noise_step"] = counters(plan.step_as, plan.steps)
    entries |= {f"history {j}": h for j, h in enumerate(case.history)}
    if plan.outs:
        entries |= {f"out {o}": torch.full_like(case.sample, 5.0) for o in range(keeps + 1)}
    for name, stored in plan.stored:
        if name in LIKE_SAMPLE and isinstance(entries.get(name), Tensor):
            entries[name] = entries[name].to(getattr(torch, stored))
    return entries


def build(plan: Plan) -> tuple[dict[str, Any], set[str]]:
    """Return the mutated arguments, and the mutations that made unreadable tensors."""
    entries = good(plan)
    # Give each tensor a buffer with room at both ends, so that others can be put over it.
    rooms = {name: in_a_room(t, 4).reshape(t.shape) for name, t in entries.items() if isinstance(t, Tensor)}
    entries |= rooms
    for mover, owner, shift in plan.shared:
        a, b = entries.get(mover), entries.get(owner)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a is b:
            continue
        start, size = b.storage_offset() * b.element_size(), a.element_size()
        offset, room = start // size + shift, b.untyped_storage().nbytes() // size
        if offset >= 0 and offset + a.numel() <= room:
            moved = torch.empty(0, dtype=a.dtype).set_(b.untyped_storage(), offset, a.shape)
            # What the owner's bytes mean in another dtype is no row, and mostly no number.
            entries[mover] = moved.copy_(a.clone()) if shift or a.dtype != b.dtype else moved
    unreadable: dict[int, str] = {}
    arguments: dict[str, Any] = {
        "variance_kind": plan.variance_kind, "keeps": plan.kept, "purpose": plan.purpose,
        "write_history": plan.scatters, "parts": plan.parts if plan.private else 1,
    }  # fmt: skip
    for slot, change in plan.changes:
        if id(entries.get(slot)) in unreadable:
            continue  # torch itself would read what is not there
        if slot in SLOTS and change in TENSOR_CHANGES and isinstance(entries.get(slot), Tensor):
            try:
                entries[slot] = TENSOR_CHANGES[change](entries[slot])
                empty = change in ("freed", "cut") and entries[slot].numel() == 0  # there was nothing to take away
                if change in UNREADABLE and not empty:
                    unreadable[id(entries[slot])] = change
            except Exception:  # torch has no such tensor of this dtype or shape: the good one stays
                continue
    arguments |= {name: entries[name] for name in (*TENSORS, *COUNTERS)}
    arguments["history"] = [entries[f"history {j}"] for j in range(4) if f"history {j}" in entries]
    outs = [entries[name] for name in entries if name.startswith("out ")]
    arguments["out"] = outs if plan.outs else None
    for slot, change in plan.changes:
        if slot in PRIVATE and not plan.private:
            continue
        if slot in arguments and change in OTHER_CHANGES and (slot not in TENSORS or change not in TENSOR_CHANGES):
            arguments[slot] = OTHER_CHANGES[change]
    if arguments["seeds"] is None and isinstance(arguments["noise_step"], Tensor):
        arguments["noise_step"] = 0  # without seeds nobody looks at it
    return arguments, {unreadable[id(t)] for t in tensors_of(arguments) if id(t) in unreadable}


def call(plan: Plan, arguments: dict[str, Any]) -> Any:
    fields = {name: arguments[name] for name in ARGUMENTS}
    if plan.way == "binding":
        assert backends.extension is not None
        if plan.count is not None and plan.count >= len(fields):
            return backends.extension.step(*fields.values())
        if plan.count is not None:
            del fields[REQUIRED[plan.count % len(REQUIRED)]]
        return backends.extension.step(**fields)
    if plan.way == "offer":
        return backends.offer(call_module.StepCall(**fields))
    backend = "cpu" if plan.way.endswith("by cpu") else None
    first = [fields.pop(name) for name in (*REQUIRED, "row_index")]
    for name in PRIVATE:
        del fields[name]
    if plan.scatters:
        return public_rows(first, fields, backend)
    return ops.step(*first, **fields, backend=backend)


def public_rows(first: list[Any], rest: dict[str, Any], backend: str | None) -> tuple[Tensor]:
    rest = {name: value for name, value in rest.items() if name != "keeps"}
    registers, out = rest.pop("history"), rest.pop("out")
    if isinstance(out, (list, tuple)) and len(out) == 1:
        (out,) = out
    return (ops.step_rows(*first, registers, **rest, out=out, backend=backend),)


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    lists = [arguments[name] for name in LISTS]
    flat = [*arguments.values(), *(item for value in lists if isinstance(value, (list, tuple)) for item in value)]
    return [value for value in flat if isinstance(value, Tensor)]


def written_by(arguments: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that the call may write."""
    lists = ("out", "history") if arguments["write_history"] is True else ("out",)
    written = [item for name in lists if isinstance(arguments[name], (list, tuple)) for item in arguments[name]]
    return [value for value in (*written, arguments["model_input"]) if isinstance(value, Tensor)]


def outcome(plan: Plan) -> str:
    """Make the call and check the contract; raise AssertionError if it is violated."""
    arguments, unreadable = build(plan)
    memory = Memory(tensors_of(arguments))
    clean = {name: copy_of(value) for name, value in arguments.items()} if not unreadable else {}
    try:
        results = call(plan, arguments)
    except (AssertionError, SystemError):  # an internal promise was broken, or an error was set beside a result
        raise
    except Exception as error:
        results, word = None, type(error).__name__
    else:
        word = "declined" if isinstance(results, str) else "result"
    # Where an output is no memory, torch's own copy_ to it may raise after another has been written.
    may_change = written_by(arguments) if word == "result" or "wrapper" in unreadable else ()
    changed = memory.changed_outside(may_change)
    assert changed == 0, f"{word}: {changed} bytes outside of the outputs were written"
    if results is None or isinstance(results, str):
        return word
    if unreadable:
        assert plan.way not in ("binding", "offer"), f"a result although a tensor is {unreadable}"
        assert unreadable <= SYMBOLIC, f"a result although a tensor is {unreadable}"
        return word
    assert isinstance(results, tuple)
    outs = arguments["out"] if isinstance(arguments["out"], (list, tuple)) else [arguments["out"]] * len(results)
    assert all(out is None or out is result for out, result in zip(outs, results, strict=True))
    with torch.no_grad():
        again = {name: copy_of(value) for name, value in clean.items()}
        _hold_to_itself(plan, again, [*results, *written_by(arguments)])
        _hold_to_the_formula(plan, clean, results, arguments)
    return word


def noise_of(arguments: dict[str, Any]) -> Tensor | None:
    """Return the noise that is given or drawn."""
    if arguments["seeds"] is None:
        return arguments["noise"]
    drawn = (arguments[name] for name in ("sample", "seeds", "noise_step", "purpose"))
    return reference.drawn_noise(*drawn, int(arguments["parts"]))


def _hold_to_itself(plan: Plan, again: dict[str, Any], got: list[Tensor]) -> None:
    """Assert that the same call on non-overlapping tensors gives the same bits."""
    row, guidance = again["row_index"], again["guidance_scale"]
    rest = {name: again[name] for name in ARGUMENTS if name not in (*REQUIRED, "row_index", *PRIVATE)}
    if again["parts"] != 1 and again["seeds"] is not None:
        rest |= {"noise": noise_of(again), "seeds": None, "noise_step": 0}
    rest["guidance_scale"] = guidance if guidance is None or isinstance(guidance, Tensor) else float(guidance)
    if again["write_history"] is True:
        first = [again["sample"], again["model_output"], again["table"], row]
        expected = public_rows([*first[:3], row if isinstance(row, Tensor) else torch.tensor([row])], rest, "cpu")
    else:
        expected = ops.step(again["sample"], again["model_output"], again["table"], row, **rest, backend="cpu")
    assert_same_bits([copy_of(value) for value in got], [*expected, *written_by(again)])


def _hold_to_the_formula(plan: Plan, clean: dict[str, Any], results: tuple[Tensor, ...], after: dict[str, Any]) -> None:
    """Assert that each sample equals the formula of its row within rounding."""
    sample, table = clean["sample"], clean["table"]
    floats = [t for t in tensors_of(clean) if t.is_floating_point() and not any(t is o for o in written_by(clean))]
    floats += [h for h in clean["history"] or () if h is not None]
    finite = all(bool(torch.isfinite(t).all()) for t in floats if t is not table)
    # Thresholds and clip are above 0 by contract; clamping between bounds in the wrong order is anybody's guess. A
    # register is a whole number.
    positive = all(bool((t > 0).all()) for t in (table[:, 2], clean["threshold"]) if t is not None)
    stores = table[:, STORE_0 : STORE_1 + 1].reshape(-1).tolist()
    whole = all(s in (-1, 0, 1, 2, 3) for s in stores)
    # Two kept tensors in one register are no table: which of them stays is nobody's promise.
    twice = clean["write_history"] is True and any(a == b >= 0 for a, b in zip(stores[::2], stores[1::2], strict=True))
    if not (finite and positive and whole) or twice:
        return
    noise = noise_of(clean)
    rows = (
        clean["row_index"].reshape(-1).tolist() if isinstance(clean["row_index"], Tensor) else [int(clean["row_index"])]
    )
    batch = sample.shape[0] if sample.dim() else 1
    kept = clean["keeps"] if clean["write_history"] is not True else 2 if clean["mask"] is None else 1
    history = [*(clean["history"] or ()), *[None] * 4][:4]
    after_history = [*(after["history"] or ()), *[None] * 4][:4]
    wide = table.dtype
    for i in range(batch):

        def mine(tensor: Tensor | None, i: int = i) -> Tensor | None:
            """Return sample i of a tensor like the sample, or its scalar."""
            if tensor is None or sample.dim() == 0 or tensor.numel() == 1:
                return tensor
            return copy_of(tensor)[i : i + 1]

        row = rows[i] if len(rows) > 1 else rows[0]
        before = mine(sample)
        if row < 0:
            assert_same_bits([mine(results[0])], [before.to(results[0].dtype)])
            continue
        guidance = clean["guidance_scale"]
        if guidance is not None and not isinstance(guidance, Tensor):
            guidance = torch.tensor([float(guidance)], dtype=wide)
        case = Case(
            before, mine(clean["model_output"]), table[row : row + 1].clone(), mine(clean["uncond"]), mine(guidance),
            [mine(h) for h in history], mine(noise), mine(clean["variance"]), mine(clean["threshold"]),
            int(clean["variance_kind"]), kept, mine(clean["mask"]),
        )  # fmt: skip
        values = [mine(result) for result in results]
        if clean["write_history"] is True:
            # What goes to no register cannot be looked at: the formula stands in.
            formula = [torch.as_tensor(value.astype(np.float64)) for value, _ in evaluate(case, "cpu")]
            values = [*values, *(value.to(sample.dtype) for value in formula[1:])]
            for store, o in ((STORE_0, 1), (STORE_1, 2))[:kept]:
                slot = int(table[row, store])
                if slot >= 0:
                    values[o] = mine(after_history[slot])
        assert_within_rounding(case, values, "cpu", [value.dtype for value in values])
        _hold_next_input(after, values[0], table[row, MODEL_INPUT_SCALE], i, batch)


def _hold_next_input(after: dict[str, Any], value: Any, scale: Tensor, i: int, batch: int) -> None:
    target = after["model_input"]
    if target is None:
        return
    target = copy_of(target)
    scaled = scale * value.to(scale.dtype)
    # Double goes to a half type by way of float, as torch takes it.
    once = (scaled.float() if target.element_size() == 2 else scaled).to(target.dtype)
    for copy in range(len(target) // batch):
        at = copy * batch + i
        assert_same_bits([target[at : at + 1]], [once])


if __name__ == "__main__":
    serve(Plan, outcome)
