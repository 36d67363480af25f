# SPDX-License-Identifier: MIT
"""torch.compile, torch.export and the dispatcher's operators: one graph, no recompilation, the same bits."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends, checks, reference
from fastdiff.ops.call import RESULT_DTYPES, StepCall
from fastdiff.row_layout import Variance
from fastdiff.sampling.stepper import Stepper
from fastdiff.solvers.affine import Affine
from fastdiff.solvers.table import Row, StepTable
from support.oracle import DTYPES, Case, Shape, assert_same_bits, make, plain_row

ROW = plain_row(prev_x=1.0, prev_m=2.0)
#: Three rows that clip, keep a tensor, read it and add noise.
TABLE = StepTable(
    tuple(
        Row(1.0, Affine([0.9, 0.1 * i, 0.2, 0.1 * i, 0, 0, 0, 0.3]), (0.5, 0.1), clip=1.0,
            kept=(Affine([0, 0, 1, 0, 0, 0, 0, 0]),), slots=(0,), model_input_scale=0.5)
        for i in range(3)
    ),
    drop_unread=False,
)  # fmt: skip
here = pytest.mark.parametrize("backend", [name for name in ("cpu", "reference") if not backends.why_missing(name)])
compilers = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# --- The operators ---------------------------------------------------------------------------------------------------


def step_arguments(plan: Shape | Case, backend: str = "", **more: Any) -> tuple[Any, ...]:
    case = make(plan) if isinstance(plan, Shape) else plan
    given: dict[str, Any] = {
        "sample": case.sample, "model_output": case.model_output, "table": case.table, "row_index": 0,
        "row_indices": None, "uncond": case.uncond, "guidance_scale": case.guidance,
        **{f"history_{j}": (list(case.history) + [None] * 4)[j] for j in range(4)},
        "noise": case.noise, "variance": case.variance, "mask": None, "threshold": case.threshold,
        "variance_kind": case.variance_kind, "keeps": case.keeps, "seeds": None, "noise_step": 0, "noise_steps": None,
        "purpose": 1, "parts": 1, "model_input_dtype": None, "model_input_copies": 1, **dict.fromkeys(RESULT_DTYPES),
        "backend": backend, **more,
    }  # fmt: skip
    names = [argument.name for argument in torch.ops.fastdiff.step.default._schema.arguments]
    return tuple(given[name] for name in names)


EVERYTHING = Shape(1, torch.float32, (2, 3, 5), "a sample", 5, True, 1, True, 2, True)
DRAWS = {"seeds": torch.tensor([1, 2]), "noise_step": 3}
MASK = torch.rand(2, 3, 5)
PLANS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "everything": (EVERYTHING, {}),
    "bare": (Shape(2, torch.bfloat16, (2, 3, 5)), {}),
    "empty": (Shape(3, torch.float32, (0, 3), "scalar", 1, True), {}),
    "0-dim": (Shape(4, torch.float64, (), "scalar", 15, True, 2, True, 1, True), {}),
    "a row a sample": (EVERYTHING, {"row_indices": torch.tensor([0, -1])}),
    "a row for all": (EVERYTHING, {"row_indices": torch.tensor([0])}),
    "masked": (replace(EVERYTHING, keeps=1), {"mask": MASK}),
    "parts": (Shape(9, torch.float32, (4, 5)), {**DRAWS, "parts": 2}),
    "drawn": (Shape(5, torch.float16, (2, 3, 4, 4), keeps=1), DRAWS),
    "drawn at steps": (Shape(6, torch.float32, (2, 5)), {**DRAWS, "noise_steps": torch.tensor([7, 8])}),
    "model input": (Shape(7, torch.float32, (2, 5)), {"model_input_dtype": torch.float16}),
    "two model inputs": (EVERYTHING, {"model_input_dtype": torch.float64, "model_input_copies": 2}),
    "all new": (Shape(8, torch.float16, (2, 3, 4)), {
        **DRAWS, "row_indices": torch.tensor([0, -1]), "model_input_dtype": torch.float32, "model_input_copies": 2}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatcher_operator_equals_step(dtype: torch.dtype) -> None:
    plan = Shape(1, dtype, (2, 3, 5), "a sample", 5, True, 1, True, 2, True)
    assert_same_bits(torch.ops.fastdiff.step(*step_arguments(plan)), make(plan).run())


@here
@pytest.mark.parametrize("name", PLANS)
def test_step_passes_opcheck(name: str, backend: str) -> None:
    plan, more = PLANS[name]
    torch.library.opcheck(torch.ops.fastdiff.step.default, step_arguments(plan, backend, **more))


@pytest.mark.parametrize("name", ["everything", "a row a sample", "two model inputs", "drawn at steps"])
def test_step_passes_opcheck_with_gradients(name: str) -> None:
    plan, more = PLANS[name]
    arguments = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and a.shape[-1:] != (32,) else a
        for a in step_arguments(plan, **more)
    ]
    torch.library.opcheck(torch.ops.fastdiff.step.default, tuple(arguments))


@here
@pytest.mark.parametrize("slots", [[], [0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("asked", [(None, 1), (torch.float16, 2)])
def test_step_by_rows_passes_opcheck(slots: list[int], asked: tuple[Any, int], backend: str) -> None:
    table = torch.randn(3, 32)
    table[:, 2], table[:, 6], table[:, 7] = 0.8, (slots or [-1])[0], (slots or [-1])[-1] if len(slots) > 1 else -1
    tensors = [torch.randn(2, 3, 4) for _ in range(4)]
    arguments = (
        tensors[0], tensors[1], table, torch.tensor([2, -1]), tensors[2], torch.tensor([2.0]),
        [torch.randn(2, 3, 4) for _ in slots], slots, None, None, None, None, 0, torch.tensor([1, 2]), 3, None, 1, 1,
        *asked,
        None, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastdiff.step_rows.default, arguments)


@here
@pytest.mark.parametrize("steps", [None, torch.tensor([4, 5])])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_noise_passes_opcheck(steps: Tensor | None, dtype: torch.dtype, backend: str) -> None:
    arguments = (torch.tensor([1, 2]), [2, 3, 5], steps, 3, 0, dtype, backend)
    torch.library.opcheck(torch.ops.fastdiff.randn.default, arguments)


def reversed_in_memory(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def every_other(tensor: Tensor) -> Tensor:
    return reversed_in_memory(tensor.repeat_interleave(2, dim=2))[..., ::2]


@here
@pytest.mark.parametrize("layout", [reversed_in_memory, every_other])
@pytest.mark.parametrize("threshold", [False, True])
def test_fake_operator_has_strides_of_results(
    layout: Callable[[Tensor], Tensor], threshold: bool, backend: str
) -> None:
    # Inductor lays out what follows by them.
    plan = Shape(7, torch.float32, (2, 3, 4), "none", 0, False, 0, threshold, 1)
    arguments = list(step_arguments(plan, backend, model_input_dtype=torch.float16, model_input_copies=2))
    arguments[0] = layout(arguments[0])
    torch.library.opcheck(torch.ops.fastdiff.step.default, tuple(arguments), test_utils="test_faketensor")
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = torch.ops.fastdiff.step(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert [f.stride() for f in fakes] == [r.stride() for r in torch.ops.fastdiff.step(*arguments)]


def test_eager_tracer_sees_operator_not_constant() -> None:
    table = torch.randn(1, 32)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, m: ops.step(x, m, table, 0)[0] + 1)
    graph = traced(torch.ones(2, 3), torch.ones(2, 3))
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(graph(x, m), ops.step(x, m, table, 0)[0] + 1)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", [None, *(name for name in ("cpu", "reference") if not backends.why_missing(name))])
def test_function_with_step_compiles_to_one_graph_bitwise(compiler: str, backend: str | None) -> None:
    case = make(Shape(11, torch.float32, (2, 3, 5), "a sample", 3, True, 0, True, 1, True))

    def function(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        prev, kept = ops.step(
            x * 2, m, case.table, 0, uncond=case.uncond, guidance_scale=2.5, history=case.history, noise=case.noise,
            threshold=case.threshold, keeps=1, backend=backend,
        )  # fmt: skip
        return prev + 1, kept

    with torch.no_grad():
        expected = function(case.sample, case.model_output)
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        assert_same_bits(compiled(case.sample, case.model_output), expected)


@pytest.mark.skipif(backends.extension is None, reason="there is one backend on the CPU without the extension")
def test_compiled_function_selects_backend_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    step = reference.step
    monkeypatch.setattr(reference, "step", lambda call: (ran.append("reference"), step(call))[1])
    seeds = torch.tensor([1, 2])

    def outside(x: Tensor) -> Tensor:
        return ops.step(x, x, ROW, 0)[0] + fastdiff.randn((2, 3), seeds) * ops.mean(x)[:, None]

    def inside(x: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            first = ops.step(x, x, ROW, 0)[0]
            with ops.use_backend(None):
                return ops.step(first, x, ROW, 0)[0]

    x = torch.randint(-9, 9, (2, 3)).float()  # whose steps are exact
    compiled = torch.compile(outside, fullgraph=True, backend="aot_eager")
    for name, wanted in ((None, []), ("reference", ["reference"]), (None, [])):
        # In a block of the caller's, and in a thread that is in none.
        with ops.use_backend(name), ThreadPoolExecutor(1) as pool:
            expected = outside(x)
            ran.clear()
            torch.testing.assert_close(compiled(x), expected)
            assert ran == wanted
            pool.submit(compiled, x).result(timeout=300)
            assert ran == wanted
    assert graphs() == 1
    ran.clear()
    block = torch.compile(inside, fullgraph=True, backend="aot_eager")
    for name in (None, "reference"):
        with ops.use_backend(name):
            ran.clear()
            assert torch.equal(block(x), 5 * x)
            # The inner block leaves the choice to the device whatever surrounds the function.
            assert ran == ["reference"]


def test_compiled_function_refuses_like_step() -> None:
    compiled = torch.compile(lambda x, m: ops.step(x, m, ROW, 0)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="model_output has shape"):
        compiled(torch.ones(2, 3), torch.ones(2, 4))


@compilers
def test_step_with_row_tensor_compiles_once_and_writes_given_outputs(compiler: str) -> None:
    rows = TABLE.coefficients_as(torch.float32)

    def step(x: Tensor, m: Tensor, row: Tensor, h: Tensor, out: Tensor, kept: Tensor, model_input: Tensor) -> Tensor:
        return ops.step(
            x, m, rows, row, history=[h], seeds=torch.tensor([1, 2]), noise_step=row, keeps=1, out=[out, kept],
            model_input=model_input,
        )[0]  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    x, m, h = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    for row in ([0], [1], [2]):
        ours, its = ([torch.full((n, 3), 7.0) for n in (2, 2, 4)] for _ in range(2))
        a, b = (f(x, m, torch.tensor(row), h, *written) for f, written in ((compiled, ours), (step, its)))
        assert a is ours[0]
        assert_same_bits([a, *ours], [b, *its])
    assert graphs() == 1


def test_compiled_function_keeps_history_of_skipped_sample() -> None:
    rows, x = TABLE.coefficients_as(torch.float32), torch.randn(2, 3)

    def step(row: Tensor, kept: Tensor) -> Tensor:
        return ops.step(x, x, rows, row, keeps=1, out=[None, kept])[0]

    kept = torch.full((2, 3), 7.0)
    prev = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.tensor([-1, 1]), kept)
    assert torch.equal(prev[0], x[0])
    assert torch.equal(kept[0], torch.full((3,), 7.0))
    assert not torch.equal(kept[1], torch.full((3,), 7.0))


def test_integer_rows_compile_to_few_graphs() -> None:
    # The first value is compiled for itself; what follows makes the row a symbol, but torch compiles 0 and 1 apart.
    rows, x = torch.randn(9, 32), torch.randn(2, 3)
    compiled = torch.compile(lambda row: ops.step(x, x, rows, row)[0], fullgraph=True, backend="aot_eager")
    for row in range(3):
        assert torch.equal(compiled(row), ops.step(x, x, rows, row)[0])
    assert graphs() <= 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for row in range(3, 9):
            assert torch.equal(compiled(row), ops.step(x, x, rows, row)[0])


@compilers
def test_compiled_step_rows_writes_registers(compiler: str) -> None:
    table = torch.randn(3, 32)
    table[:, 2], table[:, 6], table[:, 7] = 0.8, 0, 2

    def step(x: Tensor, rows: Tensor, h0: Tensor, h2: Tensor, model_input: Tensor, out: Tensor) -> Tensor:
        return ops.step_rows(x, x + 1, table, rows, [h0, None, h2], model_input=model_input, out=out)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    ours, its = ([torch.full((n, 3), 0.5) for n in (2, 2, 4, 2)] for _ in range(2))
    x = torch.randn(2, 3)
    for rows in ([0, 1], [2, -1], [1, 1]):
        a, b = (f(x, torch.tensor(rows), *written) for f, written in ((compiled, ours), (step, its)))
        assert_same_bits([a, *ours], [b, *its])
    assert graphs() == 1


@compilers
def test_stepper_loop_compiles_to_one_graph(compiler: str) -> None:
    w = torch.randn(3, 3)

    def loop(x: Tensor) -> Tensor:
        stepper = Stepper(TABLE, seeds=[1, 2])
        while not stepper.done:
            x = stepper.step(x, x @ w, uncond=x, guidance_scale=3.0)
        return x

    compiled = torch.compile(loop, fullgraph=True, backend=compiler)
    for _ in range(2):
        x = torch.randn(2, 3)
        assert_same_bits([compiled(x)], [loop(x)])
    assert graphs() == 1


@compilers
def test_gradient_of_compiled_loop_equals_eager(compiler: str) -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        stepper = Stepper(TABLE, seeds=[1, 2])
        while not stepper.done:
            x = stepper.step(x, x @ w, uncond=x, guidance_scale=3.0)
        return x.square().sum()

    x = torch.randn(2, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss(x, w), w)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x, w), w)
    # Three steps in float64, each a few hundred roundings of 2⁻⁵³ of values below 100.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=3 * 300 * 100 * 2.0**-53)


def test_seeded_noise_compiles_bitwise() -> None:
    def draw(seeds: Tensor, step: Tensor) -> Tensor:
        return fastdiff.randn((2, 3, 5), seeds, step, dtype=torch.float16) * 2

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 2):
        arguments = torch.tensor([step, 9]), torch.tensor([step])
        assert_same_bits([compiled(*arguments)], [draw(*arguments)])
    assert graphs() == 1


# --- torch.export ----------------------------------------------------------------------------------------------------


class Sampler(torch.nn.Module):
    """Three steps with a small model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("table", TABLE.coefficients_as(torch.float32))

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        kept: tuple[Tensor, ...] = ()
        for row in range(3):
            x, *kept = ops.step(  # type: ignore[assignment]
                x, self.model(x), self.table, row, uncond=x, guidance_scale=3.3125, history=tuple(kept), keeps=1,
                seeds=seeds, noise_step=row,
            )  # fmt: skip
        return x


@pytest.mark.parametrize("strict", [False, True])
def test_exported_module_is_saved_and_loaded_bitwise(strict: bool) -> None:
    module, inputs = Sampler(), (torch.randn(2, 3), torch.tensor([1, 2]))
    program = torch.export.export(module, inputs, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    expected = module(torch.ones(2, 3), inputs[1])
    # An eager call that looks its scale up: no tensor of the trace was kept for that.
    (eager,) = ops.step(inputs[0], inputs[0], ROW, 0, uncond=inputs[0], guidance_scale=3.3125, backend="reference")
    assert type(eager) is Tensor
    for one in (program, loaded, program.run_decompositions()):
        assert_same_bits([one.module()(torch.ones(2, 3), inputs[1])], [expected])


# --- Other versions of torch -----------------------------------------------------------------------------------------

SOURCES = sorted(Path(fastdiff.__file__).parent.rglob("*.py"))


def test_sources_avoid_syntax_unknown_to_older_torch() -> None:
    """Check for syntax that `make compat` would find with older versions of torch.

    Before 2.13 Dynamo reads no `isinstance` of a union in a bar's form; 2.6 reads no `list[...]` in an operator's
    signature, and imports nothing that has one.
    """
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.Call(func=ast.Name(id="isinstance"), args=[_, ast.BinOp(op=ast.BitOr())]):
                    found.append(f"{where}: isinstance of a union")
                case ast.FunctionDef(decorator_list=[ast.Call(func=ast.Attribute(attr="custom_op"))]):
                    annotations = [node.returns, *(argument.annotation for argument in node.args.args)]
                    if any("list[" in ast.unparse(each) for each in annotations if each is not None):
                        found.append(f"{where}: list[...] in an operator's signature")
    assert found == []


def test_traced_checks_use_no_enum() -> None:
    # Before 2.13 Dynamo neither iterates an enum's class nor compares its members.
    tree = ast.parse(Path(str(checks.__file__)).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 10
    names = {node.id for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)}
    assert names & {"Variance", "Purpose"} == set()


def test_learned_variance_compiles_for_enum_and_int() -> None:
    rows, x = TABLE.coefficients_as(torch.float32), torch.randn(2, 3)
    for kind in (Variance.LEARNED, int(Variance.LEARNED)):

        def step(x: Tensor, kind: int = kind) -> Tensor:
            return ops.step(x, x, rows, 0, variance=x, variance_kind=kind, keeps=1)[0]

        torch._dynamo.reset()
        assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(x.abs()), step(x.abs()))
    with pytest.raises(ValueError, match=r"variance_kind is 3, expected 0, 1 or 2"):
        ops.step(x, x, rows, 0, variance_kind=3, keeps=1)


class Incomparable(IntEnum):
    """Numbers that support only `int`, like enum members in Dynamo before 2.13."""

    ONE = 1
    TWO = 2

    def _refuse(self, other: object) -> bool:
        raise TypeError("does not support the operator")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __hash__ = int.__hash__


def test_sources_do_not_compare_enum_members() -> None:
    x = torch.ones(2, 3)
    purpose, kind = Incomparable.ONE, Incomparable.TWO
    drawn = {"seeds": torch.tensor([1, 2])}
    fields = {"sample": x, "model_output": x, "table": ROW, "row_index": 0, **drawn}
    checks.check(StepCall(**fields, variance=x, variance_kind=kind, purpose=purpose))
    assert torch.equal(fastdiff.randn((2, 3), [1, 2], purpose=purpose), fastdiff.randn((2, 3), [1, 2], purpose=1))
    with pytest.raises(ValueError, match="purpose is -1, expected 0 to"):
        checks.check(StepCall(**fields, purpose=-1))


@pytest.mark.parametrize("call", ["step", "step_rows", "randn"])
def test_calls_on_a_gpu_are_traced_without_one(call: str) -> None:
    def run(x: Tensor, table: Tensor, rows: Tensor, seeds: Tensor) -> list[Tensor]:
        if call == "step":
            return list(ops.step(x, x, table, 1, uncond=x, guidance_scale=3.0, seeds=seeds, noise_step=2, keeps=1))
        if call == "step_rows":
            return [ops.step_rows(x, x, table, rows, seeds=seeds, noise_step=rows)]
        return [fastdiff.randn(x.shape, seeds, 3, device=x.device)]

    device = torch.device("cuda:0")
    # Fake tensors have a device and no memory; what Dynamo cannot trace it names here as on a GPU.
    with FakeTensorMode():
        x, table = torch.empty((2, 3, 4), device=device), torch.empty(TABLE.coefficients.shape, device=device)
        rows, seeds = (torch.empty(2, dtype=torch.int64, device=device) for _ in range(2))
        outputs = torch.compile(run, backend="eager", fullgraph=True, dynamic=False)(x, table, rows, seeds)
    assert {output.device for output in outputs} == {device}
    assert graphs() == 1
