# SPDX-License-Identifier: MIT
"""Tensors that a model or a callback keeps stay as they were handed out; what nobody keeps is written over."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import StepInfo, create_sampler
from fastdiff.sampling import reference_counts as references
from fastdiff.sampling.reference_counts import reference_counts
from fastdiff.sampling.stepper import Stepper
from fastdiff.solvers.affine import HISTORY, MODEL_OUTPUT, PREDICTION, SAMPLE
from fastdiff.solvers.table import Row, StepTable
from support.oracle import assert_same_bits
from support.solver_cases import DETERMINISTIC

SHAPE = (2, 3, 4, 4)


def _saved_by_autograd(x: Tensor) -> object:
    with torch.enable_grad():
        return torch.ones_like(x).requires_grad_() * x


#: How somebody can hold the memory of a tensor.
KEEP: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda x: x,
    "a view": lambda x: x.view(-1),
    "a slice": lambda x: x[:1],
    "detached": lambda x: x.detach(),
    "its data": lambda x: x.data,
    "NumPy's view": lambda x: x.numpy(),
    "a DLPack capsule": torch.utils.dlpack.to_dlpack,
    "its storage": lambda x: x.untyped_storage(),
    "autograd": _saved_by_autograd,
    "nested": lambda x: {"inputs": [(x,)]},
}
#: Everything that a loop's model can be shown: the sample itself, or an input that is prepared for it.
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance": {"guidance_scale": 3.0},
    "sequential": {"guidance_scale": 3.0, "guidance_mode": "sequential"},
    "model_dtype": {"model_dtype": torch.float64},
    "guidance in a model_dtype": {"guidance_scale": 3.0, "model_dtype": torch.bfloat16},
}


def _sample(model: Callable[..., Tensor], loop: str = "plain", method: str = "ddim", **options: Any) -> Tensor:
    given = {"guidance_mode": "batched", **LOOPS[loop]}
    sampler = create_sampler("linear", method, num_inference_steps=4, guidance_mode=given.pop("guidance_mode"))
    conditions = (torch.ones(2), torch.zeros(2)) if "guidance_scale" in given else ()
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return sampler.sample(model, latents, *conditions, progress=False, **given, **options).samples


def _output(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x) + (t.to(x.dtype) / 2000).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", KEEP)
def test_input_that_a_model_keeps_stays_as_it_was(how: str, loop: str) -> None:
    if how == "NumPy's view" and loop == "guidance in a model_dtype":
        pytest.skip("NumPy has no bfloat16")
    kept: list[object] = []
    seen: list[tuple[int, Tensor]] = []
    storages: list[Tensor] = []

    def model(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        seen.append((x.data_ptr(), x.clone()))
        kept.append(KEEP[how](x))
        return _output(x, t)

    def looking(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        storages.append(x.clone())
        return _output(x, t)

    end = _sample(model, loop)
    for address, copy in seen:
        held = torch.empty(0, dtype=copy.dtype).set_(_memory(address, copy))  # type: ignore[call-overload]
        assert_same_bits([held.view(copy.shape)], [copy])
    assert_same_bits([end, *(copy for _, copy in seen)], [_sample(looking, loop), *storages])


def _memory(address: int, like: Tensor) -> torch.UntypedStorage:
    """Return the memory at an address: what is kept there must be alive still."""
    return torch._C._construct_storage_from_data_pointer(address, like.device, like.nbytes)


def test_memory_that_nobody_keeps_is_written_over() -> None:
    for loop in LOOPS:
        shown: list[int] = []

        def model(x: Tensor, t: Tensor, *_: Tensor, shown: list[int] = shown) -> Tensor:
            shown.append(x.data_ptr())
            return _output(x, t)

        _sample(model, loop)
        assert len(set(shown)) == 1, loop


def test_input_that_a_model_returns_is_the_output_that_a_callback_sees() -> None:
    for loop in LOOPS:
        infos: list[StepInfo] = []
        inputs: list[Tensor] = []

        def model(x: Tensor, t: Tensor, *_: Tensor, inputs: list[Tensor] = inputs) -> Tensor:
            inputs.append(x.clone())
            return x

        _sample(model, loop, callback=infos.append)
        calls = len(inputs) // len(infos)
        for i, info in enumerate(infos):
            conditional = inputs[calls * (i + 1) - 1][-SHAPE[0] :]
            assert_same_bits([info.model_output], [conditional.float()])


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("loop", LOOPS)
def test_everything_that_is_handed_out_stays_as_it_was(loop: str, method: str) -> None:
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(*tensors: Tensor) -> None:
        kept.extend(tensors)
        copies.extend(tensor.clone() for tensor in tensors)

    def model(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        output = _output(x, t)
        keep(x, t, *conditions, output)
        return output

    _sample(model, loop, method, callback=lambda info: keep(info.sample, info.model_output))
    assert_same_bits(kept, copies)


def test_results_of_a_stepper_stay_as_they_were() -> None:
    sampler = create_sampler("linear", "dpm_solver", num_inference_steps=6, solver_order=3)
    stepper, sample = sampler.stepper(), torch.randn(SHAPE)
    kept: list[Tensor] = []
    copies: list[Tensor] = []
    while not stepper.done:
        output = torch.randn(SHAPE)
        kept += [sample, output]
        copies += [sample.clone(), output.clone()]
        sample = stepper.step(sample, output)
    assert_same_bits(kept, copies)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_history_that_autograd_has_saved_stays_as_it_was(backend: str | None) -> None:
    keep = Row(0.0, 0.5 * SAMPLE + MODEL_OUTPUT, (1.0, -0.5), clip=0.9, kept=(PREDICTION,), slots=(0,))
    use = Row(0.0, SAMPLE + HISTORY[0], (1.0, -0.5), clip=0.9, kept=(PREDICTION + HISTORY[0],), slots=(0,))
    stepper = Stepper(StepTable((keep, use, use, use)), backend=backend)
    x, m = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = stepper.step(x, m * scale).sum()
    register = stepper._history[0]  # nothing public hands it out
    assert register is not None
    product = register * scale  # autograd saves the register
    before = register.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            stepper.step(x, x)
    (loss + product.sum()).backward()
    assert torch.equal(register, before)


@pytest.mark.parametrize("how", KEEP)
def test_references_count_every_way_to_hold_a_tensor(how: str) -> None:
    x = torch.randn(2, 3)
    before = reference_counts(x)
    held = KEEP[how](x)
    assert reference_counts(x) != before
    del held
    gc.collect()
    assert reference_counts(x) == before


def test_references_of_a_tensor_without_memory_are_unknown() -> None:
    unknown: list[object] = []

    def look(x: Tensor) -> Tensor:
        unknown.append(reference_counts(x))
        return x

    torch.func.vmap(look)(torch.ones(2, 3))
    assert unknown == [None]


def test_loop_overwrites_nothing_where_torch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for loop in LOOPS:
        monkeypatch.setattr(references, "_storage_use_count", None)
        kept: list[Tensor] = []
        copies: list[Tensor] = []

        def model(x: Tensor, t: Tensor, *_: Tensor, kept: list[Tensor] = kept, copies: list[Tensor] = copies) -> Tensor:
            kept.append(x)
            copies.append(x.clone())
            return _output(x, t)

        end = _sample(model, loop)
        monkeypatch.undo()
        assert_same_bits([*kept, end], [*copies, _sample(lambda x, t, *_: _output(x, t), loop)])
