# SPDX-License-Identifier: MIT
"""Tensors of different dtypes in one step: bit for bit what the widened tensors give, each result rounded once."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_compile import step_arguments
from torch import Tensor

from fastdiff import Purpose, ops
from fastdiff.ops import backends
from fastdiff.ops.call import RESULT_DTYPES
from fastdiff.row_layout import MODEL_INPUT_SCALE, STORE_0, STORE_1
from support.layouts import LAYOUTS, shapes_for
from support.mixed import copied, random_batch
from support.mixed_dtypes import SCALARS, by_definition, dtypes_for, mixed_batch, mixed_case, poisoned, widened
from support.oracle import (
    DTYPES,
    INTERPRETED,
    Case,
    Shape,
    assert_same_bits,
    backends_at_hand,
    cases,
    device_of,
    make,
    plain_row,
)

BACKENDS = backends_at_hand()
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")


def examples_for(backend: str | None, examples: int) -> settings:
    """A call of Triton's interpreter takes 10 ms and more; compiled, most examples are a kernel to compile."""
    if backend == "triton" and INTERPRETED:
        return settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    return settings(max_examples=min(examples, 25) if backend == "triton" else examples)


# --- The definition --------------------------------------------------------------------------------------------------


@pytest.mark.answers
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_step_is_the_widened_step_rounded_once(backend: str) -> None:
    @examples_for(backend, 150)
    @given(plan=cases(shapes=shapes_for(backend)), kinds=st.lists(st.sampled_from(["tensor", "dtype"]), min_size=3))
    def check(plan: Shape, kinds: list[str]) -> None:
        case, outs = mixed_case(plan, backend)
        case = case.to(device_of(backend))
        targets = [t if k == "tensor" else t.dtype for t, k in zip(poisoned(case, outs), kinds, strict=False)]
        results = case.run(backend, out=targets)
        assert all(r is t for r, t in zip(results, targets, strict=True) if isinstance(t, Tensor))
        assert_same_bits(results, by_definition(case, outs, backend))

    check()


@given(plan=cases(), layouts=st.lists(st.sampled_from(LAYOUTS), min_size=9, max_size=9))
def test_mixed_step_of_any_layout_on_the_chosen_backend(plan: Shape, layouts: list[Callable[[Tensor], Tensor]]) -> None:
    # By the short way into the extension, and by the long one where a layout asks for it.
    case, outs = mixed_case(plan)
    expected = by_definition(case, outs)
    each = iter(layouts * 2)
    other = case.with_tensors(lambda name, tensor: tensor if name in SCALARS else next(each)(tensor))
    assert_same_bits(other.run(out=outs), expected)
    assert_same_bits(other.run(out=poisoned(other, outs)), expected)


@needs_extension
def test_mixed_sizes_around_registers_tiles_and_shares_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rng = random.Random(5)
        sizes = [1, 7, 8, 9, 15, 16, 17, 31, 33, 511, 512, 513, 1023, 1025, 65537, 131075]
        for size in sizes:
            for shape in ((size,), (2, size), (3, max(size // 3, 1))):
                plan = Shape(rng.randrange(2**32), torch.float64, shape, rng.choice(("none", "scalar", "a sample")),
                             rng.randrange(16), rng.random() < 0.7, rng.randrange(3), rng.random() < 0.3,
                             rng.randrange(3), rng.random() < 0.5)  # fmt: skip
                case, outs = mixed_case(plan)
                assert_same_bits(case.run("cpu", out=poisoned(case, outs)), by_definition(case, outs, "cpu"))
    finally:
        torch.set_num_threads(before)


@needs_extension
@given(plan=cases(), seed=st.integers(0, 2**32 - 1))
def test_every_mixed_form_of_the_loop_gives_the_bits_of_the_definition(plan: Shape, seed: int) -> None:
    # Rows as solvers have them, which take loops of their own: few columns, one output or two.
    rng = random.Random(seed)
    case, outs = mixed_case(plan)
    for column in range(8, 32):
        if rng.random() < 0.6:
            case.table[0, column] = 0.0
    assert_same_bits(case.run("cpu", out=poisoned(case, outs)), by_definition(case, outs, "cpu"))


@needs_extension
def test_extension_takes_mixed_calls_as_they_are() -> None:
    for first in DTYPES:
        for second in DTYPES:
            x, m = torch.randn(2, 9).to(first), torch.randn(2, 9).to(second)
            table = plain_row(
                torch.float64 if torch.float64 in (first, second) else torch.float32, prev_x=1.0, k0_m=2.0
            )
            out = (second, torch.empty(2, 9, dtype=first))
            done = backends.extension.step(  # type: ignore[union-attr]
                sample=x, model_output=m, table=table, row_index=0, keeps=1, out=out
            )
            assert isinstance(done, tuple)
            assert_same_bits(done, [x.to(table.dtype).to(second), (2 * m.to(table.dtype)).to(first)])
            # A table of the other compute dtype is declined, for a sentence to be said.
            other = table.to(torch.float32 if table.dtype == torch.float64 else torch.float64)
            declined = backends.extension.step(  # type: ignore[union-attr]
                sample=x, model_output=m, table=other, row_index=0, keeps=1, out=out
            )
            assert declined == "dtype"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_noise_drawn_inside_a_mixed_step_is_float32s(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    x = torch.randn(3, 4, 5, 6, device=device).to(dtype)
    seeds = torch.tensor([5, -1, 2**40], device=device)
    row = plain_row(prev_x=0.5, prev_z=0.25, k0_z=1.0).to(device)
    results = ops.step(x, x, row, 0, seeds=seeds, noise_step=3, keeps=1, out=[torch.float32] * 2, backend=backend)
    wide = ops.step(x.float(), x.float(), row, 0, seeds=seeds, noise_step=3, keeps=1, backend=backend)
    assert_same_bits(results, wide)
    assert torch.equal(results[1], ops.randn(x.shape, seeds, 3, Purpose.STEP, device=device, backend=backend))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_new_outputs_have_the_samples_dtype_unless_one_is_named(backend: str | None) -> None:
    x, m = torch.randn(2, 5, device=device_of(backend or "")).half(), torch.randn(2, 5, device=device_of(backend or ""))
    row = plain_row(prev_x=1.0, prev_m=1.0, k0_m=1.0, k1_m=1.0).to(x.device)
    results = ops.step(x, m, row, 0, keeps=2, out=[None, torch.float32, None], backend=backend)
    assert [r.dtype for r in results] == [torch.float16, torch.float32, torch.float16]
    assert_same_bits(results, [(x.float() + m).half(), m, m.half()])
    assert all(r.dtype == torch.float16 for r in ops.step(x, m, row, 0, keeps=2, backend=backend))


# --- Sharing memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_mixed_outputs_may_be_inputs_of_their_dtype(backend: str | None) -> None:
    @examples_for(backend, 80)
    @given(plan=cases(shapes=shapes_for(backend or "")), layout=st.sampled_from(LAYOUTS))
    def check(plan: Shape, layout: Callable[[Tensor], Tensor]) -> None:
        case, outs = mixed_case(plan, backend, double=False)
        if layout.__name__ == "expanded":
            return
        case = case.to(device_of(backend or ""))
        there: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor) -> Tensor:
            if name not in SCALARS:
                there[name] = tensor = layout(tensor)
            return tensor

        own = case.with_tensors(keep)
        allowed = dtypes_for(backend)
        names = [
            name for name in random.Random(plan.seed).sample(list(there), len(there)) if there[name].dtype in allowed
        ]
        outs = [there[name].dtype for name in names[: len(outs)]] + outs[len(names) :]
        expected = by_definition(case, outs, backend)
        targets = [there[name] for name in names[: len(outs)]] + poisoned(own, outs)[len(names) :]
        assert_same_bits(own.run(backend, out=targets), expected)

    check()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", ["sample", "model_output", "noise", "history"])
def test_output_over_an_input_of_another_dtype_gets_the_fresh_result(backend: str | None, name: str) -> None:
    row = plain_row(p=1.0, q=0.5, clip=0.8, prev_x=0.5, prev_m=0.25, prev_d=2.0, prev_h0=1.0, prev_z=0.1)
    device = device_of(backend or "")
    for size in (3, 64, 1100):
        for first in (0, 1, size // 2, size):
            # A half tensor anywhere within the bytes of a float one.
            room = torch.zeros(size, device=device)
            inside = room.view(torch.float16)[first : first + size].copy_(torch.randn(size, device=device))
            tensors = {n: torch.randn(size, device=device) for n in ("sample", "model_output", "noise", "history")}
            tensors[name] = inside
            arguments = [tensors["sample"], tensors["model_output"], row.to(device)]
            rest = {"history": [tensors["history"]], "noise": tensors["noise"]}
            case = Case(*arguments, **rest)
            expected = case.with_tensors(lambda _, t: t.clone()).run(backend, out=[torch.float32])
            assert_same_bits(case.run(backend, out=[room]), expected)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_outputs_of_two_dtypes_in_the_same_memory_are_refused_and_interleaved_ones_written(backend: str | None) -> None:
    device = device_of(backend or "")
    x = torch.arange(10.0, device=device)
    case = Case(x, x, plain_row(prev_x=1.0, k0_x=2.0).to(device), keeps=1)
    room = torch.full((10,), float("nan"), device=device)
    for start in (0, 7, 10):
        half = room.view(torch.float16)[start : start + 10]
        with pytest.raises(ValueError, match=r"^step: out\[1\] shares memory with another output, expected .*; "):
            case.run(backend, out=[room, half])
    assert bool(room.isnan().all())
    # Records of six bytes: a float and a half, neither of which lies on the other's bytes.
    record = torch.zeros(10, 8, dtype=torch.uint8, device=device)
    wide, narrow = record.view(torch.float32)[:, 0], record.view(torch.float16)[:, 2]
    case.run(backend, out=[wide, narrow])
    assert torch.equal(wide, x)
    assert torch.equal(narrow, 2 * x.half())
    assert torch.equal(record[:, 6:], torch.zeros_like(record[:, 6:]))


# --- A row per sample, registers, the next model input ---------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_mixed_registers_are_written_as_the_widened_ones_rounded(backend: str | None) -> None:
    @examples_for(backend, 100)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        batch, prev = mixed_batch(seed, backend)
        batch = copied(batch, device_of(backend or ""))
        compute = batch["table"].dtype
        wide = copied(batch)
        for name in ("sample", "model_output", "uncond", "noise", "variance"):
            wide[name] = None if wide[name] is None else wide[name].to(compute)
        wide["history"] = [None if h is None else h.to(compute) for h in wide["history"]]
        expected = ops.step_rows(**{**wide, "model_input": None}, backend=backend).to(prev)
        got = ops.step_rows(**batch, out=prev, backend=backend)
        kept = [None if h is None else w.to(h.dtype) for h, w in zip(batch["history"], wide["history"], strict=True)]
        assert_same_bits([got], [expected])
        assert_same_bits([h for h in batch["history"] if h is not None], [h for h in kept if h is not None])
        target = batch["model_input"]
        if target is None:
            return
        # Of the sample as it has been rounded.
        scale = torch.ones(len(expected), dtype=compute, device=got.device)
        rows = batch["row_index"].expand(len(expected))
        scale[rows >= 0] = batch["table"][rows[rows >= 0], MODEL_INPUT_SCALE]
        scaled = scale.reshape(-1, *[1] * (expected.dim() - 1)) * expected.to(compute)
        once = (scaled.float() if target.element_size() == 2 else scaled).to(target.dtype)
        assert_same_bits([target], [torch.cat([once] * (len(target) // len(once)))])

    check()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_skipped_samples_of_a_mixed_step_are_converted_and_their_kept_tensors_stay(backend: str | None) -> None:
    device = device_of(backend or "")
    x = torch.tensor([[1.5, -0.0, float("inf")], [2.0, 3.0, 65504.0]], device=device).half()
    table = plain_row(prev_x=2.0, k0_x=4.0).to(device)
    rows = torch.tensor([-1, 0], device=device)
    before = torch.full((2, 3), 7.0, device=device)
    prev, kept = ops.step(x, x, table, rows, keeps=1, out=[torch.float32, before.clone()], backend=backend)
    assert_same_bits([prev], [torch.stack([x[0].float(), 2 * x[1].float()])])
    assert_same_bits([kept], [torch.stack([before[0], 4 * x[1].float()])])
    prev, kept = ops.step(x, x, table, rows, keeps=1, out=[torch.float32] * 2, backend=backend)
    assert_same_bits([kept], [torch.stack([torch.zeros(3, device=device), 4 * x[1].float()])])


# --- Through torch's dispatcher --------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(plan=cases(shapes=st.sampled_from([(3,), (2, 5), (2, 3, 4, 4)])))
def test_operator_on_mixed_tensors_passes_opcheck(plan: Shape) -> None:
    case, outs = mixed_case(plan)
    arguments = step_arguments(case, **dict(zip(RESULT_DTYPES, outs, strict=False)))
    assert_same_bits(torch.ops.fastdiff.step(*arguments), by_definition(case, outs))
    torch.library.opcheck(torch.ops.fastdiff.step.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_mixed_step_gives_the_bits_of_the_eager_one() -> None:
    case, outs = mixed_case(Shape(4, torch.float64, (2, 3, 4), "scalar", 3, True, keeps=2), double=False)
    target = torch.empty(2, 3, 4, dtype=torch.bfloat16)
    eager = case.run(out=[outs[0], target.clone(), None])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(sample: Tensor) -> tuple[Tensor, ...]:
        return ops.step(
            sample, case.model_output, case.table, 0, uncond=case.uncond, guidance_scale=case.guidance,
            history=case.history, noise=case.noise, keeps=2, out=[outs[0], target, None],
        )  # fmt: skip

    assert_same_bits(compiled(case.sample), eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_mixed_step_are_those_of_the_widened_one_in_each_tensors_dtype(backend: str) -> None:
    @settings(max_examples=6 if backend == "triton" else 40)
    @given(plan=cases(shapes=st.sampled_from([(3,), (2, 5), (2, 3, 4)])))
    def check(plan: Shape) -> None:
        case, outs = mixed_case(plan, backend)
        case = case.to(device_of(backend))
        leaves: list[Tensor] = []

        def leaf(name: str, tensor: Tensor) -> Tensor:
            if name in ("table", "threshold"):
                return tensor
            leaves.append(tensor.clone().requires_grad_())
            return leaves[-1]

        own = case.with_tensors(leaf)
        shapes = [torch.randn(case.sample.shape, dtype=torch.float64).to(case.sample.device, d) for d in outs]

        def gradients(wide: bool) -> list[Tensor | None]:
            chosen = widened(own) if wide else own
            with torch.enable_grad():
                results = ops.step(
                    chosen.sample, chosen.model_output, chosen.table, 0, uncond=chosen.uncond,
                    guidance_scale=chosen.guidance, history=chosen.history, noise=chosen.noise,
                    variance=chosen.variance, threshold=chosen.threshold,
                    variance_kind=chosen.variance_kind, keeps=chosen.keeps, out=None if wide else outs, backend=backend,
                )  # fmt: skip
                results = tuple(r.to(d) for r, d in zip(results, outs, strict=True))
                # The reference sees that an output depends on nothing.
                pairs = [(r, w) for r, w in zip(results, shapes, strict=True) if r.requires_grad]
                if not pairs:
                    return [None] * len(leaves)
                return list(
                    torch.autograd.grad([r for r, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
                )

        for got, expected, tensor in zip(gradients(False), gradients(True), leaves, strict=True):
            got = torch.zeros_like(tensor) if got is None else got
            expected = torch.zeros_like(tensor) if expected is None else expected
            assert got.dtype == tensor.dtype
            assert_same_bits([got + 0.0], [expected + 0.0])

    check()


def test_mixed_step_under_vmap_is_that_of_each() -> None:
    case, outs = mixed_case(Shape(9, torch.float64, (4, 2, 5), "none", 1, True, keeps=1), double=False)

    def one(sample: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        return ops.step(
            sample, output, case.table, 0, history=[case.history[0][0]], noise=case.noise[0], keeps=1, out=outs,  # type: ignore[index]
        )  # fmt: skip

    mapped = torch.func.vmap(one)(case.sample, case.model_output)
    each = [one(case.sample[i], case.model_output[i]) for i in range(4)]
    assert_same_bits(mapped, [torch.stack(results) for results in zip(*each, strict=True)])


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_mixed_bad_input_is_refused_in_a_sentence_and_nothing_is_written(backend: str | None) -> None:
    device = device_of(backend or "")
    x = torch.randn(2, 3, device=device)
    row = plain_row(prev_x=1.0, k0_x=1.0).to(device)
    written = torch.full((2, 3), float("nan"), device=device)
    faults: list[tuple[dict[str, Any], str]] = [
        (
            {"out": [written, torch.int64]},
            "step: out[1] is torch.int64, expected float16, bfloat16, float32 or float64; ",
        ),
        (
            {"out": [written, torch.float64]},
            "step: out[1] has dtype torch.float64, expected float16, bfloat16 or float32 beside a float32 table; ",
        ),
        ({"noise": x.double(), "out": [written, None]}, "step: noise has dtype torch.float64, expected "),
        ({"noise": x.long(), "out": [written, None]}, "step: noise has dtype torch.int64, expected "),
        (
            {"table": row.double(), "noise": x.half(), "out": [written, None]},
            "step: table has dtype torch.float64, expected torch.float32 for samples of torch.float32; ",
        ),
        (
            {"uncond": x.half(), "guidance_scale": torch.ones(2, device=device).half(), "out": [written, None]},
            "step: guidance_scale has dtype torch.float16, expected torch.float32 like table; ",
        ),
    ]
    for change, message in faults:
        arguments = {"sample": x, "model_output": x, "table": row, "row_index": 0, "keeps": 1, **change}
        with pytest.raises(TypeError, match="^" + re.escape(message)):
            ops.step(**arguments, backend=backend)
    assert bool(written.isnan().all())


def test_register_table_has_where_its_rows_store() -> None:
    # What `mixed_batch` rests on: rows that store nowhere would show nothing.
    stores = [random_batch(seed, torch.float32)["table"][:, [STORE_0, STORE_1]] for seed in range(40)]
    assert sum(bool((s >= 0).any()) for s in stores) > 20
    assert make(Shape(1, torch.float32, (2,))).sample.dtype == torch.float32
