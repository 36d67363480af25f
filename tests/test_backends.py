# SPDX-License-Identifier: MIT
"""Which backend answers: chosen by device, forced in three ways, never swapped in silence; and torch's dispatcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends, fused
from oracle import DTYPES, Shape, assert_same_bits, backends_at_hand, device_of, make, plain_row

BACKENDS = backends_at_hand()
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
X = torch.ones(2, 3)
ROW = plain_row(prev_x=1.0, prev_m=2.0)


def which_ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that `_checked_step` hands calls to, as they come."""
    ran: list[str] = []

    def spy(name: str) -> None:
        before = backends.RUN[name]
        monkeypatch.setitem(backends.RUN, name, lambda call: (ran.append(name), before(call))[1])

    for name in backends.RUN:
        spy(name)
    reference = fused._reference_step
    monkeypatch.setattr(fused, "_reference_step", lambda call, out: (ran.append("reference"), reference(call, out))[1])
    return ran


# --- The choice ------------------------------------------------------------------------------------------------------


@needs_extension
def test_compiled_code_answers_on_the_cpu() -> None:
    assert ops.backend_for(X) == "cpu"


def test_without_the_extension_the_reference_answers_and_a_forced_cpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "the C++ extension does not load: no such symbol")
    assert ops.backend_for(X) == "reference"
    for name in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match=rf"^step: backend '{name}' .* missing: .*does not load: no such symbol"):
            ops.backend_for(X, name)
        with pytest.raises(RuntimeError, match="no such symbol"):
            ops.step(X, X, ROW, 0, backend=name)
        assert ops.backend_status()[name] == "the C++ extension does not load: no such symbol"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_backend_is_the_one_that_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = which_ran(monkeypatch)
    x, row = X.to(device_of(backend)), ROW.to(device_of(backend))
    assert torch.equal(ops.step(x, x, row, 0, backend=backend)[0], 3 * x)
    with ops.use_backend(backend):
        assert ops.backend_for(x) == backend
        assert torch.equal(ops.step(x, x, row, 0)[0], 3 * x)
    assert ran == [backend, backend]


def test_an_argument_outranks_a_block_and_blocks_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    default = ops.backend_for(X)
    with ops.use_backend("reference"):
        assert ops.backend_for(X) == "reference"
        with ops.use_backend(None):
            assert ops.backend_for(X) == default
        assert ops.backend_for(X) == "reference"
        if backends.extension is not None:
            assert ops.backend_for(X, "cpu") == "cpu"
    assert ops.backend_for(X) == default


def test_a_block_that_raises_puts_the_choice_back() -> None:
    default = ops.backend_for(X)
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert ops.backend_for(X) == default


def test_an_unknown_name_is_refused_with_the_list_of_names() -> None:
    message = r"backend is 'cpp', expected one of cpu, cuda, reference, triton; "
    with pytest.raises(ValueError, match=message):
        ops.backend_for(X, "cpp")
    with pytest.raises(ValueError, match=message):
        ops.step(X, X, ROW, 0, backend="cpp")
    before = backends.forced
    with pytest.raises(ValueError, match=message), ops.use_backend("cpp"):
        pass
    assert backends.forced == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so cuda may well be there")
def test_cuda_is_missing_with_a_reason_where_there_is_no_device() -> None:
    with pytest.raises(RuntimeError, match=r"^step: backend 'cuda' was asked for and is missing: .{20,}"):
        ops.step(X, X, ROW, 0, backend="cuda")


def test_triton_without_a_gpu_or_the_interpreter_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_load_triton", lambda: (fastdiff, ""))
    with pytest.raises(RuntimeError, match="missing: torch finds no GPU, and TRITON_INTERPRET is not 1"):
        ops.backend_for(X, "triton")


def test_triton_that_cannot_be_imported_is_missing_with_the_extra_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._load_triton.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"missing: triton cannot be imported .*fastdiff-kernels\[triton\]"):
            ops.backend_for(X, "triton")
    finally:
        backends._load_triton.cache_clear()


def test_a_backend_for_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_missing", lambda name: "")
    with pytest.raises(ValueError, match=r"^step: backend is 'cuda' for tensors on cpu, expected one "):
        ops.backend_for(X, "cuda")


def test_status_says_available_or_why_not() -> None:
    status = ops.backend_status()
    assert tuple(status) == ops.BACKENDS
    assert status["reference"] == "available"
    for name, text in status.items():
        assert text == (backends.why_missing(name) or "available")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter that imports this very fastdiff."""
    path = os.pathsep.join([str(Path(fastdiff.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_the_environment_forces_a_backend_for_a_process() -> None:
    code = "import torch, fastdiff; print(fastdiff.ops.backend_for(torch.ones(1)))"
    done = run_python(code, FASTDIFF_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_a_wrong_name_in_the_environment_is_refused_at_import() -> None:
    done = run_python("import fastdiff", FASTDIFF_BACKEND="gpu")
    assert done.returncode != 0
    assert "FASTDIFF_BACKEND is 'gpu', expected one of cpu, cuda, reference, triton; " in done.stderr


# --- torch's dispatcher ----------------------------------------------------------------------------------------------


def library_arguments(plan: Shape, backend: str) -> tuple[object, ...]:
    case = make(plan)
    return (
        case.sample, case.model_output, case.table, 0, case.uncond, case.guidance, list(case.history), case.noise,
        case.variance, case.threshold, case.variance_kind, case.keeps, backend,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_of_the_dispatcher_gives_the_step(dtype: torch.dtype) -> None:
    plan = Shape(1, dtype, (2, 3, 5), "a sample", 5, True, 1, True, 2, True)
    results = torch.ops.fastdiff.step(*library_arguments(plan, ""))
    assert_same_bits(results, make(plan).run())


@pytest.mark.parametrize("backend", [name for name in ("cpu", "reference") if not backends.why_missing(name)])
@pytest.mark.parametrize(
    "plan",
    [
        Shape(1, torch.float32, (2, 3, 5), "a sample", 5, True, 1, True, 2, True),
        Shape(2, torch.bfloat16, (2, 3, 5)),
        Shape(3, torch.float32, (0, 3), "scalar", 1, True),
        Shape(4, torch.float64, (), "scalar", 15, True, 2, True, 1, True),
    ],
    ids=["everything", "bare", "empty", "0-dim"],
)
def test_the_operator_passes_opcheck(plan: Shape, backend: str) -> None:
    torch.library.opcheck(torch.ops.fastdiff.step.default, library_arguments(plan, backend))


def reversed_in_memory(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def every_other(tensor: Tensor) -> Tensor:
    return reversed_in_memory(tensor.repeat_interleave(2, dim=2))[..., ::2]


@pytest.mark.parametrize("backend", [name for name in ("cpu", "reference") if not backends.why_missing(name)])
@pytest.mark.parametrize("layout", [reversed_in_memory, every_other])
@pytest.mark.parametrize("threshold", [False, True])
def test_the_fake_of_the_operator_tells_the_strides_of_the_results(
    layout: object, threshold: bool, backend: str
) -> None:
    # Inductor lays out what follows by them.
    case = make(Shape(7, torch.float32, (2, 3, 4), "none", 0, False, 0, threshold, 1))
    sample = layout(case.sample)  # type: ignore[operator]
    arguments = (sample, case.model_output, case.table, 0, None, None, [], None, None, case.threshold, 0, 1, backend)
    torch.library.opcheck(torch.ops.fastdiff.step.default, arguments, test_utils="test_faketensor")
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fakes = torch.ops.fastdiff.step(*faked)
    assert [f.stride() for f in fakes] == [r.stride() for r in torch.ops.fastdiff.step(*arguments)]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", [None, *(name for name in ("cpu", "reference") if not backends.why_missing(name))])
def test_a_function_around_a_step_compiles_in_one_graph_to_the_same_bits(compiler: str, backend: str | None) -> None:
    case = make(Shape(11, torch.float32, (2, 3, 5), "a sample", 3, True, 0, True, 1, True))

    def loop(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        prev, kept = ops.step(
            x * 2, m, case.table, 0, uncond=case.uncond, guidance=2.5, history=case.history, noise=case.noise,
            threshold=case.threshold, keeps=1, backend=backend,
        )  # fmt: skip
        return prev + 1, kept

    torch._dynamo.reset()
    with torch.no_grad():
        expected = loop(case.sample, case.model_output)
        compiled = torch.compile(loop, fullgraph=True, backend=compiler)
        assert_same_bits(compiled(case.sample, case.model_output), expected)


def test_a_compiled_function_refuses_what_the_step_refuses() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, m: ops.step(x, m, ROW, 0)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="model_output has shape"):
        compiled(torch.ones(2, 3), torch.ones(2, 4))


def test_a_gradient_through_the_compiled_operator_raises_instead_of_being_zero() -> None:
    torch._dynamo.reset()
    x = torch.ones(2, 3, requires_grad=True)
    compiled = torch.compile(lambda x: ops.step(x, x.detach(), ROW, 0)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"(?i)autograd|requires grad"):
        compiled(x).sum().backward()
