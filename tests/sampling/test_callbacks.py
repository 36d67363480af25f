# SPDX-License-Identifier: MIT
"""Samples that a callback edits or returns are passed to the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import StepInfo, create_sampler
from fastdiff.graphs import recorder
from fastdiff.guidance import GuidanceMode, GuidedModel
from fastdiff.ops import backends
from fastdiff.sampling.loop import run_loop
from fastdiff.sampling.stepper import Stepper
from fastdiff.solvers.affine import MODEL_OUTPUT, SAMPLE
from fastdiff.solvers.table import Row, StepTable
from support.graph_emulator import EmulatedGraph
from support.oracle import assert_same_bits
from support.solver_cases import DETERMINISTIC

SHAPE = (2, 3, 4, 4)
MODES = ("none", "batched", "sequential")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

needs_graphs = pytest.mark.skipif(
    backends.extension is None, reason="on the CPU the reference looks at its rows: needs the C++ extension"
)


@pytest.fixture(params=[False, pytest.param("step", marks=needs_graphs)], ids=["eager", "captured"])
def cuda_graph(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(recorder.RECORDERS, "cpu", EmulatedGraph)
    return request.param


def _latents(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def _model(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    shift = 0.0 if condition is None else condition.to(x.dtype).reshape(-1, 1, 1, 1)
    return 0.5 * torch.tanh(x + shift) + (t.to(x.dtype) / 2000).reshape(-1, 1, 1, 1)


def _sample(
    callback: Callable[[StepInfo], object] | None,
    mode: str = "none",
    method: str = "ddim",
    model: Callable[..., Tensor] = _model,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    guided = mode != "none"
    sampler = create_sampler("linear", method, num_inference_steps=4, guidance_mode=mode if guided else "batched")
    conditions = (torch.ones(2), torch.zeros(2)) if guided else ()
    options = {"guidance_scale": 3.0 if guided else 1.0, "progress": False, **options}
    return sampler.sample(model, _latents(dtype), *conditions, callback=callback, **options).samples


def _recorded(shown: list[Tensor]) -> Callable[..., Tensor]:
    def model(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        shown.append(x.clone())
        return _model(x, t, *condition)

    return model


def _in_place(info: StepInfo, edited: Tensor) -> None:
    info.sample.copy_(edited)


def _through_numpy(info: StepInfo, edited: Tensor) -> None:
    info.sample.numpy()[...] = edited.numpy()  # torch does not count this as a modification


def _through_data(info: StepInfo, edited: Tensor) -> None:
    info.sample.data.copy_(edited)


def _returned(info: StepInfo, edited: Tensor) -> Tensor:
    return edited


def _returned_transposed(info: StepInfo, edited: Tensor) -> Tensor:
    return edited.transpose(2, 3).contiguous().transpose(2, 3)


EDITS = (_in_place, _through_numpy, _through_data, _returned, _returned_transposed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_model_gets_samples_edited_by_callback(
    edit: Callable[[StepInfo, Tensor], object], model_dtype: torch.dtype | None, mode: str
) -> None:
    shown: list[Tensor] = []
    left: list[Tensor] = []

    def callback(info: StepInfo) -> object:
        left.append(info.sample * 0.5 + info.index)
        return edit(info, left[-1].clone())

    end = _sample(callback, mode, model=_recorded(shown), model_dtype=model_dtype)
    calls = 2 if mode == "sequential" else 1
    copies = 2 if mode == "batched" else 1
    for k, samples in enumerate(left[:-1]):
        expected = torch.cat([samples.to(model_dtype or samples.dtype)] * copies)
        for x in shown[calls * (k + 1) : calls * (k + 2)]:
            assert_same_bits([x.contiguous()], [expected])
    assert torch.equal(end, left[-1]), "an edit after the last step is in the result"


#: Every method with guidance in one call, and two methods, without and with history, in the other modes.
CAPTURED = [(method, "batched") for method in DETERMINISTIC] + [
    (method, mode) for method in ("ddim", "unipc") for mode in MODES if mode != "batched"
]


@pytest.mark.parametrize(("method", "mode"), CAPTURED)
@pytest.mark.parametrize("edit", [_in_place, _returned])
def test_captured_loop_continues_from_edited_samples(
    edit: Callable[[StepInfo, Tensor], object], mode: str, method: str, cuda_graph: Any
) -> None:
    edited = functools.partial(_edit_by, edit)
    expected = _sample(functools.partial(_edit_by, _in_place), mode, method)
    assert not torch.equal(expected, _sample(None, mode, method)), "the edits have an effect"
    assert_same_bits([_sample(edited, mode, method, cuda_graph=cuda_graph)], [expected])


def _edit_by(edit: Callable[[StepInfo, Tensor], object], info: StepInfo) -> object:
    return edit(info, info.sample * 0.9 - 0.1 * info.index)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_dtype", [None, *DTYPES], ids=str)
def test_callback_without_edits_changes_no_bit(model_dtype: torch.dtype | None, dtype: torch.dtype, mode: str) -> None:
    with_one: list[Tensor] = []
    without: list[Tensor] = []
    options: dict[str, Any] = {"dtype": dtype, "model_dtype": model_dtype}
    a = _sample(lambda info: None, mode, model=_recorded(with_one), **options)
    b = _sample(None, mode, model=_recorded(without), **options)
    assert_same_bits([*with_one, a], [*without, b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
def test_model_input_is_scaled_like_by_step(model_dtype: torch.dtype, dtype: torch.dtype) -> None:
    prev = 0.7 * SAMPLE + 0.1 * MODEL_OUTPUT
    table = StepTable(tuple(Row(9.0 - i, prev, (1.0, -0.5), model_input_scale=0.3 + 0.1 * i) for i in range(4)))
    shown: dict[bool, list[Tensor]] = {True: [], False: []}
    for with_callback, inputs in shown.items():
        model = GuidedModel(
            _recorded(inputs), torch.ones(2), torch.zeros(2), 3.0, GuidanceMode.BATCHED, model_dtype=model_dtype
        )
        callback = (lambda info: None) if with_callback else None
        with torch.no_grad():
            run_loop(model, Stepper(table), torch.arange(4), _latents(dtype), callback=callback, progress=False)
    assert_same_bits(shown[True], shown[False])


@pytest.mark.parametrize("answer", [None, 0, True, "stop", [], (1,)], ids=repr)
def test_other_return_values_continue_loop(answer: object, cuda_graph: Any) -> None:
    assert_same_bits([_sample(lambda info: answer, "batched", cuda_graph=cuda_graph)], [_sample(None, "batched")])


def test_return_value_false_stops_at_edited_samples(cuda_graph: Any) -> None:
    def callback(info: StepInfo) -> object:
        info.sample.fill_(7.0)
        return info.index < 1

    assert torch.equal(_sample(callback, "batched", cuda_graph=cuda_graph), torch.full(SHAPE, 7.0))


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (torch.zeros(2, 3, 4, 5), ValueError, r"shape \[2, 3, 4, 5\], expected shape \[2, 3, 4, 4\] like the samples"),
        (torch.zeros(SHAPE).double(), TypeError, r"dtype torch.float64, expected dtype torch.float32"),
        (torch.zeros(SHAPE, device="meta"), ValueError, r"device meta, expected device cpu"),
        (torch.zeros(SHAPE).to_sparse(), TypeError, r"layout torch.sparse_coo, expected layout torch.strided"),
    ],
    ids=["shape", "dtype", "device", "layout"],
)
def test_unsuitable_returned_tensor_is_refused(
    returned: Tensor, error: type[Exception], text: str, cuda_graph: Any
) -> None:
    with pytest.raises(
        error, match=rf"^sample: callback returned a tensor of {text}.*; return samples like info.sample"
    ):
        _sample(lambda info: returned, cuda_graph=cuda_graph)


def test_returned_tensor_is_not_written(cuda_graph: Any) -> None:
    given: list[Tensor] = []
    copies: list[Tensor] = []

    def callback(info: StepInfo) -> Tensor:
        given.append((info.sample * 0.5).requires_grad_())
        copies.append(given[-1].detach().clone())
        return given[-1]

    end = _sample(callback, "none", cuda_graph=cuda_graph)
    assert not end.requires_grad
    assert_same_bits([tensor.detach() for tensor in given], copies)
