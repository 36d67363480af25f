# SPDX-License-Identifier: MIT
"""Where infinities and NaN go: a term of weight 0 is no part of a sum, of the prediction's least of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.row_layout import STORE_0, STORE_1
from support.dropin_helpers import classes, quiet, values_of
from support.oracle import (
    DTYPES,
    FORMS,
    INTERPRETED,
    Case,
    assert_same_bits,
    backends_at_hand,
    device_of,
    form_case,
    plain_row,
)

BACKENDS = backends_at_hand()
POISONS = (float("nan"), float("inf"), -float("inf"))
#: Of the tensor that the prediction does not read: the row's weight, the tensor and its column.
LEFT_OUT = {"p": ("sample", "x"), "q": ("model_output", "m")}


def poisoned(case: Case, name: str, poison: float) -> Case:
    return replace(case, **{name: torch.full_like(getattr(case, name), poison)})


def without(case: Case, weight: str) -> Case:
    """The case with 0 for this weight of the prediction."""
    table = case.table.clone()
    table[0, "pq".index(weight)] = 0.0
    return replace(case, table=table)


def forms_for(backend: str, weight: str) -> list[Any]:
    """The forms whose outputs depend on the prediction and on nothing of the tensor that it leaves out."""
    column = LEFT_OUT[weight][1]
    found = [form for form in FORMS if any("d" in c for c in form) and not any(column in c for c in form)]
    return found if backend == "cpu" else found[:: len(found) // 4]


@pytest.mark.answers
@pytest.mark.parametrize("weight", LEFT_OUT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_prediction_leaves_out_what_its_weight_is_zero_for(backend: str, weight: str) -> None:
    # Every form of row that is compiled on the CPU, of every dtype, guided or not, in packs and in single numbers.
    name = LEFT_OUT[weight][0]
    for i, form in enumerate(forms_for(backend, weight)):
        for guided in (False, True):
            dtype = DTYPES[(i + guided) % 4]
            if INTERPRETED and backend == "triton" and dtype == torch.bfloat16:
                dtype = torch.float32
            case = without(form_case(form, dtype, i, guided=guided, size=83), weight).to(device_of(backend))
            expected = case.run(backend)
            assert all(bool(result.isfinite().all()) for result in expected)
            for poison in POISONS:
                assert_same_bits(poisoned(case, name, poison).run(backend), expected)
                if guided and name == "model_output":
                    assert_same_bits(poisoned(case, "uncond", poison).run(backend), expected)


@pytest.mark.answers
@pytest.mark.parametrize("weight", LEFT_OUT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholded_prediction_leaves_out_what_its_weight_is_zero_for(backend: str, weight: str) -> None:
    name = LEFT_OUT[weight][0]
    device = device_of(backend)
    for dtype in DTYPES[2:]:
        case = form_case((("d", "z"),), dtype, 3, guided=True, size=83).to(device)
        bound = torch.tensor([0.5, 1.5], dtype=dtype, device=device)
        case = without(replace(case, threshold=bound), weight)
        expected = case.run(backend)
        for poison in POISONS:
            assert_same_bits(poisoned(case, name, poison).run(backend), expected)


@pytest.mark.answers
@pytest.mark.parametrize("backend", BACKENDS)
def test_prediction_leaves_out_a_sample_in_rows_of_their_own(backend: str) -> None:
    device = device_of(backend)
    first = plain_row(p=0.0, q=1.0, clip=0.5, prev_d=1.0)
    table = torch.cat([first, plain_row(p=1.0, q=0.0, clip=0.5, prev_d=1.0)]).to(device)
    table[:, [STORE_0, STORE_1]] = -1.0
    x, m = torch.full((2, 70), 0.25, device=device), torch.full((2, 70), -0.25, device=device)
    x[0], m[1] = float("nan"), float("inf")
    result = ops.step_rows(x, m, table, torch.tensor([0, 1], device=device), [None] * 4, backend=backend)
    assert result[0].tolist() == [-0.25] * 70
    assert result[1].tolist() == [0.25] * 70


@pytest.mark.answers
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [0.5, -0.5])
def test_clamp_is_torch_s(backend: str, bound: float) -> None:
    # NaN stays, an infinity becomes the bound, and a bound below 0 is the result, for a clip and for a threshold.
    device = device_of(backend)
    m = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0, -3.0, 0.25] * 8], device=device)
    (clipped,) = ops.step(m, m, plain_row(q=1.0, clip=bound, prev_d=1.0).to(device), 0, backend=backend)
    torch.testing.assert_close(clipped, torch.clamp(m, -bound, bound), rtol=0, atol=0, equal_nan=True)
    (held,) = ops.step(
        m,
        m,
        plain_row(q=1.0, prev_d=1.0).to(device),
        0,
        threshold=torch.tensor([bound], device=device),
        backend=backend,
    )
    torch.testing.assert_close(held, torch.clamp(m, -bound, bound) / bound, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_leaves_out_what_the_prediction_leaves_out(backend: str) -> None:
    device = device_of(backend)
    row = plain_row(p=0.0, q=2.0, clip=0.7, prev_d=1.0).to(device)
    x = torch.full((2, 40), float("nan"), device=device, requires_grad=True)
    m = torch.linspace(-1, 1, 80, device=device).reshape(2, 40).requires_grad_()
    threshold = torch.tensor([0.5, 0.6], device=device)
    for bounds in ({}, {"threshold": threshold}):
        (result,) = ops.step(x, m, row, 0, backend=backend, **bounds)
        of_x, of_m = torch.autograd.grad(result.sum(), (x, m), allow_unused=True)
        d = (2 * m.detach()).requires_grad_()
        right = torch.clamp(d, -0.7, 0.7)
        if bounds:
            right = torch.clamp(right, -threshold[:, None], threshold[:, None]) / threshold[:, None]
        (of_d,) = torch.autograd.grad(right.sum(), d)
        torch.testing.assert_close(of_m, 2 * of_d)  # a product and a quotient, each rounded once
        assert of_x is None or not bool(of_x.any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", [{"clip_sample": True}, {"thresholding": True}], ids=str)
def test_sampler_that_predicts_the_sample_ignores_a_last_sample_that_is_not_finite(
    backend: str, fields: dict[str, Any]
) -> None:
    # The last step is x0 alone, and x0 is the model's output: x has weight 0 everywhere.
    sampler = fastdiff.create_sampler("linear", "ddim", prediction_type="sample", num_inference_steps=1, **fields)
    output = torch.linspace(-0.9, 0.9, 96, device=device_of(backend)).reshape(2, 48)
    for poison in POISONS:
        stepper = sampler.stepper(backend=backend)
        assert torch.equal(stepper.step(torch.full_like(output, poison), output), output)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "LCM", "DDIMParallel"])
@pytest.mark.parametrize("bounds", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}], ids=str)
def test_dropin_lets_go_of_what_diffusers_lets_go_of(name: str, bounds: dict[str, Any]) -> None:
    # x0 of a model that predicts it does not depend on the sample, whatever that holds; and clamp keeps NaN.
    def predicted(cls: type, x: Tensor, output: Tensor) -> Tensor:
        scheduler = cls(prediction_type="sample", **bounds)
        with quiet():
            scheduler.set_timesteps(4)
        t = scheduler.timesteps[1]
        return values_of(scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)))[1]

    theirs, ours = classes(name)
    output = torch.linspace(-1.4, 1.4, 96).reshape(2, 3, 4, 4)
    for poison in POISONS:
        x = torch.full_like(output, poison)
        torch.testing.assert_close(predicted(ours, x, output), predicted(theirs, x, output), equal_nan=True)
    if "thresholding" not in bounds:
        for poison in POISONS:
            bad = output.clone()
            bad[0, 0, 0] = poison
            torch.testing.assert_close(predicted(ours, output, bad), predicted(theirs, output, bad), equal_nan=True)
