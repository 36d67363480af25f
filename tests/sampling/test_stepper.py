# SPDX-License-Identifier: MIT
"""A loop over a table: rows in order, registers written in place, and nothing moved by a step that fails."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import reference
from fastdiff.ops.call import StepCall
from fastdiff.ops.thresholding import dynamic_threshold
from fastdiff.row_layout import Variance
from fastdiff.sampling.stepper import Stepper
from fastdiff.solvers.affine import HISTORY, MODEL_OUTPUT, NOISE, PREDICTION, SAMPLE
from fastdiff.solvers.table import Row, StepTable


def x0_row(prev: object, **rest: object) -> Row:
    return Row(0.0, prev, (1.0, -0.5), **rest)  # type: ignore[arg-type]


#: Two registers, one written again, both read: what a third-order multistep solver does.
RING = StepTable(
    (
        x0_row(0.5 * SAMPLE + MODEL_OUTPUT, kept=(PREDICTION,), slots=(0,)),
        x0_row(SAMPLE - 0.5 * HISTORY[0], kept=(PREDICTION, 2.0 * SAMPLE), slots=(1, 3)),
        x0_row(PREDICTION + HISTORY[1] - HISTORY[0], kept=(PREDICTION + HISTORY[0],), slots=(0,)),
        x0_row(PREDICTION + HISTORY[0] + HISTORY[1] + HISTORY[3]),
    )
)
NOISY = StepTable((x0_row(SAMPLE + 0.5 * NOISE), x0_row(SAMPLE), x0_row(SAMPLE + 0.5 * NOISE)))
LEARNED = StepTable((x0_row(SAMPLE + NOISE), x0_row(SAMPLE)), variance=Variance.LEARNED)
THRESHOLDED = StepTable((x0_row(SAMPLE + PREDICTION), x0_row(PREDICTION)), thresholding=True)


def walk_by_hand(table: StepTable, sample: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """The same loop with plain Python registers and the reference."""
    registers: list[Tensor | None] = [None] * 4
    rows, samples = table.coefficients_as(sample.dtype), []
    for i, output in enumerate(outputs):
        call = StepCall(
            sample=sample,
            model_output=output,
            table=rows,
            row_index=i,
            history=tuple(registers),
            keeps=len(table.kept_slots[i]),
        )
        sample, *kept = reference.step(call)
        for j, tensor in zip(table.kept_slots[i], kept, strict=True):
            registers[j] = tensor
        samples.append(sample)
    return samples


@given(seed=st.integers(0, 2**32 - 1), in_place=st.booleans())
def test_a_loop_is_the_rows_in_order_with_registers(seed: int, in_place: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    x, *outputs = torch.randn(5, 2, 3, generator=gen, dtype=torch.float64)
    expected = walk_by_hand(RING, x, outputs)
    stepper, sample = Stepper(RING), x.clone()
    for i, output in enumerate(outputs):
        assert (stepper.index, stepper.done) == (i, False)
        result = stepper.step(sample, output, out=sample if in_place else None)
        assert (result is sample) == in_place
        sample = result
        # Products fused or not: a few roundings of numbers below 100.
        assert torch.allclose(sample, expected[i], rtol=0, atol=100 * 16 * 2.0**-53)
    assert stepper.done


def test_a_step_past_the_end_raises_and_leaves_the_stepper_at_the_end() -> None:
    stepper, x = Stepper(StepTable((x0_row(SAMPLE),))), torch.ones(2, 3)
    stepper.step(x, x)
    for _ in range(2):
        with pytest.raises(IndexError, match=r"^step: index is 1, expected less than the table's 1 rows; "):
            stepper.step(x, x)
        assert stepper.index == 1


@given(fails_at=st.integers(0, 3))
def test_a_failed_step_leaves_index_and_registers_so_that_it_can_be_taken_again(fails_at: int) -> None:
    x, *outputs = torch.randn(5, 2, 3, dtype=torch.float64)
    undisturbed, disturbed = Stepper(RING), Stepper(RING)
    a = b = x
    for i, output in enumerate(outputs):
        a = undisturbed.step(a, output)
        if i == fails_at:
            with pytest.raises(ValueError, match=r"^step: model_output has shape"):
                disturbed.step(b, output[:, :2])
            with pytest.raises(ValueError, match=r"^step: guidance_scale is missing"):
                disturbed.step(b, output, uncond=output)
            assert disturbed.index == i
        b = disturbed.step(b, output)
        assert torch.equal(a, b)


def test_registers_are_allocated_once_and_never_lie_on_a_sample() -> None:
    table = StepTable((RING.source[0], *[x0_row(SAMPLE + HISTORY[0], kept=(PREDICTION,), slots=(0,))] * 5))
    stepper, samples, kept = Stepper(table), [torch.randn(2, 3)], set()
    for _ in range(6):
        samples.append(stepper.step(samples[-1], torch.randn(2, 3)))
        register = stepper._history[0]  # nothing public tells where a register lies
        assert register is not None
        kept.add(register.data_ptr())
    assert len(kept) == 1
    assert len({sample.data_ptr() for sample in samples}) == len(samples)
    assert kept.isdisjoint(sample.data_ptr() for sample in samples)


def test_noise_is_drawn_where_a_row_wants_it_and_only_there() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    stepper, gen, same = Stepper(NOISY), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first, second, third = (stepper.step(x, x, generator=gen) for _ in range(3))
    assert torch.equal(first, 0.5 * torch.randn(2, 3, generator=same, dtype=torch.float64))
    assert torch.equal(second, x)
    assert torch.equal(third, 0.5 * torch.randn(2, 3, generator=same, dtype=torch.float64))


def test_given_noise_is_used_and_the_generator_left_alone() -> None:
    x, z, gen = torch.zeros(2, 3), torch.randn(2, 3), torch.Generator().manual_seed(3)
    before = gen.get_state()
    assert torch.equal(Stepper(NOISY).step(x, x, noise=z, generator=gen), 0.5 * z)
    assert torch.equal(gen.get_state(), before)


def test_one_generator_a_sample_makes_the_batch_irrelevant() -> None:
    x = torch.zeros(3, 4)
    together = Stepper(NOISY).step(x, x, generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    alone = Stepper(NOISY).step(x[:1], x[:1], generator=[torch.Generator().manual_seed(2)])
    assert torch.equal(together[1:2], alone)


def test_a_learned_variance_that_is_missing_raises_where_noise_is_drawn_and_only_there() -> None:
    x, v, z = torch.zeros(2, 3), torch.full((2, 3), 4.0), torch.randn(2, 3)
    stepper = Stepper(LEARNED)
    with pytest.raises(ValueError, match=r"^step: variance is missing, expected the model's second output.+; pass "):
        stepper.step(x, x, noise=z)
    assert stepper.index == 0
    assert torch.equal(stepper.step(x, x, noise=z, variance=v), 2.0 * z)
    assert torch.equal(stepper.step(x, x), x)  # the row without noise needs none


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([None, 1.0, 7.5]))
def test_thresholding_clamps_each_sample_to_its_quantile_and_divides(seed: int, scale: float | None) -> None:
    gen = torch.Generator().manual_seed(seed)
    x, m, u = 3 * torch.randn(3, 2, 11, generator=gen, dtype=torch.float64)
    guided = m if scale is None else u + scale * (m - u)
    d = x - 0.5 * guided
    bound = dynamic_threshold(d, 0.8, 2.5)[:, None]
    expected = x + d.clamp(-bound, bound) / bound
    stepper = Stepper(THRESHOLDED, dynamic_thresholding_ratio=0.8, sample_max_value=2.5)
    guidance = {} if scale is None else {"uncond": u, "guidance_scale": scale}
    # A few roundings of numbers below 200.
    assert torch.allclose(stepper.step(x, m, **guidance), expected, rtol=0, atol=200 * 16 * 2.0**-53)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("table", [RING, NOISY], ids=["registers", "none"])
@pytest.mark.parametrize(
    "other", [torch.zeros(3, 3), torch.zeros(2, 3).double(), torch.zeros(2, 3).half()], ids=["shape", "double", "half"]
)
def test_another_shape_or_dtype_in_mid_loop_is_refused(table: StepTable, other: Tensor, backend: str | None) -> None:
    stepper, x = Stepper(table, backend=backend), torch.zeros(2, 3)
    stepper.step(x, x)
    with pytest.raises((TypeError, ValueError), match=r"^step: sample has (shape|dtype) .+, expected .+; start a new "):
        stepper.step(other, other)
    assert stepper.index == 1
    stepper.step(x, x)


def test_the_backend_is_forced_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    step = ops.step

    def spy(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        asked.append(kwargs["backend"])
        return step(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "step", spy)
    stepper, x = Stepper(THRESHOLDED, backend="reference"), torch.ones(2, 3)
    stepper.step(x, x)
    stepper.step(x, x)
    assert asked == ["reference"] * 4  # two a step: the prediction that is measured, then the step


def test_a_non_contiguous_sample_keeps_its_loop() -> None:
    wide, m = torch.randn(2, 8), torch.randn(2, 4)
    stepper, plain = Stepper(RING), Stepper(RING)
    a, b = wide[:, ::2], wide[:, ::2].clone()
    for _ in range(4):
        a, b = stepper.step(a, m), plain.step(b, m)
        assert torch.equal(a, b)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_way_of_a_gpu_s_steps_is_the_same_loop(seed: int) -> None:
    # Through `ops.step`, which the CPU's extension answers as well.
    gen = torch.Generator().manual_seed(seed)
    x, *outputs = torch.randn(5, 2, 3, generator=gen)
    usual, other = Stepper(RING), Stepper(RING)
    a, b = x.clone(), x.clone()
    for output in outputs:
        a = usual.step(a, output, uncond=x, guidance_scale=2.0)
        other._look_at(b)
        other._direct = False
        b = other.step(b, output, uncond=x, guidance_scale=2.0)
        assert torch.equal(a, b)
    assert other.done


# --- Copies -----------------------------------------------------------------------------------------------------------


def _pickled(stepper: Stepper) -> Stepper:
    again = pickle.loads(pickle.dumps(stepper))
    assert isinstance(again, Stepper)
    return again


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, _pickled])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("at", range(4))
def test_a_copy_goes_on_with_registers_of_its_own(
    at: int, backend: str | None, duplicate: Callable[[Stepper], Stepper]
) -> None:
    x, *outputs = torch.randn(5, 2, 3, dtype=torch.float64)
    others = torch.randn(4, 2, 3, dtype=torch.float64)
    alone, first = Stepper(RING, backend=backend), Stepper(RING, backend=backend)
    for output in outputs[:at]:
        sample = alone.step(x, output)
        assert torch.equal(first.step(x, output), sample)
    second, turned = duplicate(first), duplicate(alone)
    assert second.index == at
    # In turns, with other outputs in the copy: neither sees what the other keeps.
    for output, other in zip(outputs[at:], others[at:], strict=True):
        assert torch.equal(second.step(x, other), turned.step(x, other))
        assert torch.equal(first.step(x, output), alone.step(x, output))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, _pickled])
def test_a_copy_draws_the_same_noise_from_seeds(duplicate: Callable[[Stepper], Stepper]) -> None:
    first, x = Stepper(NOISY, seeds=[1, 2]), torch.zeros(2, 3)
    first.step(x, x)
    second = duplicate(first)
    for _ in range(2):
        assert torch.equal(first.step(x, x), second.step(x, x))


# --- What is no tensor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("wrong", [None, 5, [1.0], "x"], ids=repr)
def test_samples_and_outputs_that_are_no_tensors_are_refused(
    wrong: object, backend: str | None, steps_before: int
) -> None:
    stepper, x = Stepper(RING, backend=backend), torch.ones(2, 3)
    for _ in range(steps_before):
        stepper.step(x, x)
    for name, arguments in (("sample", (wrong, x)), ("model_output", (x, wrong))):
        with pytest.raises(TypeError, match=rf"^step: {name} is a {type(wrong).__name__}, expected a torch.Tensor; .+"):
            stepper.step(*arguments)  # type: ignore[arg-type]
    assert stepper.index == steps_before
    stepper.step(x, x)


@pytest.mark.parametrize("seeds", [None, [1, 2]])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(2, 3).to(torch.float8_e4m3fn),
        torch.ones(2, 3, dtype=torch.int64),
    ],
    ids=["sparse", "complex", "float8", "int64"],
)
def test_samples_that_no_step_takes_are_refused_and_leave_the_stepper_new(
    wrong: Tensor, seeds: list[int] | None
) -> None:
    stepper, x = Stepper(NOISY, seeds=seeds), torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^step: sample has (layout|dtype) torch\.\w+, expected .+; convert it first"):
        stepper.step(wrong, wrong)
    stepper.step(x, x)  # another dtype and shape than those that were refused


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (True, TypeError, "is a bool"),
        ("3", TypeError, "is a str"),
        (10**400, ValueError, "is an integer of 1329 bits, beyond the range of a float"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_guidance_scale_that_is_no_number_is_refused(
    value: object, error: type[Exception], got: str, backend: str | None
) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(error, match=rf"^step: guidance_scale {got}, expected .+; .+"):
        Stepper(RING, backend=backend).step(x, x, uncond=x, guidance_scale=value)  # type: ignore[arg-type]


def test_a_table_or_a_ratio_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Stepper: table is a int, expected a StepTable; .+"):
        Stepper(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Stepper: dynamic_thresholding_ratio has type NoneType, expected .+; .+"):
        Stepper(THRESHOLDED, dynamic_thresholding_ratio=None)  # type: ignore[arg-type]


def test_a_stepper_takes_the_former_name_of_guidance_scale() -> None:
    x, output, uncond = torch.randn(3, 2, 3)
    expected = Stepper(NOISY, seeds=[1, 2]).step(x, output, uncond=uncond, guidance_scale=2.5)
    with pytest.warns(DeprecationWarning, match=r"^step: guidance is renamed to guidance_scale") as warned:
        found = Stepper(NOISY, seeds=[1, 2]).step(x, output, uncond=uncond, guidance=2.5)
    assert torch.equal(found, expected)
    assert warned[0].filename == __file__
