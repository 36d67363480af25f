# SPDX-License-Identifier: MIT
"""Tensors with unusual memory, and in-place writes under autograd."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff import ops
from fastdiff.ops import backends
from support.oracle import Case, assert_same_bits, available_backends, device_of, plain_row

BACKENDS = [None, *available_backends()]
COMPILED = [backend for backend in BACKENDS if backend != "reference"]


def cut_short(tensor: Tensor, elements: int) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(elements * tensor.element_size())
    return tensor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held", [0, 7])
@pytest.mark.parametrize(
    "name", ["sample", "model_output", "table", "uncond", "guidance", "history", "threshold", "out"]
)
def test_tensor_with_freed_or_truncated_storage_is_refused(backend: str | None, held: int, name: str) -> None:
    # torch itself reads on past the end of such a storage. FSDP frees storages like this.
    x = torch.ones(8, 4, device=device_of(backend or ""))
    row = plain_row(prev_x=1.0, prev_m=1.0, prev_d=1.0, prev_h0=1.0).to(x.device)
    tensors = {"model_output": x, "table": row, "uncond": x, "history": x, "sample": x, "out": torch.zeros_like(x)}
    tensors |= {"guidance": torch.ones(8, device=x.device), "threshold": torch.ones(8, device=x.device)}
    tensors[name] = cut_short(tensors[name], held)
    shown = {"history": "history[0]", "out": "out[0]", "guidance": "guidance_scale"}.get(name, name)
    message = rf"^step: {re.escape(shown)} has a storage of {4 * held} bytes, expected the "
    with pytest.raises(ValueError, match=message):
        ops.step(
            *(tensors[argument] for argument in ("sample", "model_output", "table")), 0, uncond=tensors["uncond"],
            guidance_scale=tensors["guidance"], history=[tensors["history"]], threshold=tensors["threshold"],
            out=[tensors["out"]], backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_over_scalar_argument_is_correct(backend: str | None) -> None:
    # Rows and scalars are read for every tile and every sum, after elements have been written.
    device = device_of(backend or "")
    x = torch.randn(2, 600, device=device)
    row = plain_row(p=1.0, prev_x=0.5, prev_m=2.0, prev_d=1.0, k0_x=2.0, k0_d=1.0).to(device)
    scales, bounds = torch.tensor([2.0, 3.0], device=device), torch.tensor([0.5, 0.25], device=device)
    expected = Case(x, x, row, uncond=-x, guidance=scales, threshold=bounds, keeps=1).run(backend)
    for name in ("table", "guidance", "threshold"):
        for first in (0, 590, 1199):
            room = torch.zeros(1300, device=device)
            values = {"table": row, "guidance": scales, "threshold": bounds}
            inside = room[first : first + values[name].numel()].view(values[name].shape)
            values[name] = inside.copy_(values[name])
            case = Case(
                x, x, values["table"], uncond=-x, guidance=values["guidance"], threshold=values["threshold"], keeps=1
            )  # fmt: skip
            assert_same_bits(case.run(backend, out=[room[:1200].view(2, 600), torch.zeros_like(x)]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_output_is_written_correctly(backend: str | None) -> None:
    x = torch.randn(6, device=device_of(backend or ""))
    out = torch._neg_view(torch.zeros_like(x))
    Case(x, x, plain_row(prev_x=1.0).to(x.device)).run(backend, out=[out])
    assert torch.equal(out, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "strides"), [((3, 4), (1, 1)), ((2, 3, 2), (3, 2, 1)), ((2, 2), (2, 2))])
def test_output_with_overlapping_elements_is_refused(
    backend: str | None, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    x = torch.ones(shape, device=device_of(backend or ""))
    room = torch.full((12,), float("nan"), device=x.device)
    with pytest.raises(ValueError, match=r"^step: out\[0\] holds the same element twice, expected .*; "):
        Case(x, x, plain_row(prev_x=1.0).to(x.device)).run(backend, out=[room.as_strided(shape, strides)])
    assert bool(room.isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["model_output", "table", "threshold"])
def test_sparse_tensor_is_refused_with_one_sentence(backend: str | None, name: str) -> None:
    x = torch.ones(2, 3, device=device_of(backend or ""))
    tensors = {"model_output": x, "table": plain_row(prev_x=1.0).to(x.device), "threshold": x[:, 0].clone()}
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises(TypeError, match=rf"^step: {name} has layout torch.sparse_coo, expected torch.strided; "):
        ops.step(x, tensors["model_output"], tensors["table"], 0, threshold=tensors["threshold"], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_detects_overwritten_saved_tensor(backend: str | None) -> None:
    weight = torch.ones(5, device=device_of(backend or ""), requires_grad=True)
    x = torch.full_like(weight, 2.0, requires_grad=False)
    loss = (weight * x).sum()  # saves x, whose values are the gradient
    with torch.no_grad():
        ops.step(x, x, plain_row(prev_x=3.0).to(x.device), 0, out=[x], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_inference_tensors_may_be_written_in_place(backend: str | None) -> None:
    with torch.inference_mode():
        x = torch.ones(5, device=device_of(backend or ""))
    with torch.no_grad():
        ops.step(x, x, plain_row(prev_x=3.0).to(x.device), 0, out=[x], backend=backend)
    assert bool((x == 3).all())


def in_fake_mode(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    mode = FakeTensorMode()
    with mode:
        return f(*(mode.from_tensor(tensor) for tensor in tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [torch.func.functionalize, None], ids=["functional", "fake"])
def test_tensors_without_memory_use_dispatcher(
    backend: str | None, run: Callable[..., Callable[..., Tensor]] | None
) -> None:
    # The binding used to read through the null pointer of a functional tensor.
    x, m = torch.randn(2, 3, 4, device=device_of(backend or ""))
    row = plain_row(prev_x=1.0, prev_m=2.0).to(x.device)

    def f(x: Tensor, m: Tensor, row: Tensor) -> Tensor:
        return ops.step(x, m, row, 0, backend=backend)[0]

    result = in_fake_mode(f, x, m, row) if run is None else run(f)(x, m, row)
    assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)
    if run is not None:
        assert_same_bits([result], [f(x, m, row)])


@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
def test_binding_declines_tensors_without_memory() -> None:
    x = torch.ones(3)
    table = plain_row(prev_x=1.0)
    for bad in (cut_short(x, 0), cut_short(x, 2), torch._to_functional_tensor(x)):
        for sample, output in ((bad, x), (x, bad), (bad, bad)):
            declined = backends.extension.step(  # type: ignore[union-attr]
                sample=sample, model_output=output, table=table, row_index=0
            )
            assert declined in ("storage", "wrapper")
