# SPDX-License-Identifier: MIT
"""Inputs whose elements share addresses: expanded, sliding windows; what is written may not be one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops, sampling
from fastdiff.row_layout import STORE_0, compute_dtype
from fastdiff.samplers import create_sampler
from support.layouts import (
    ANY_LAYOUT,
    OVERLAPPING,
    Layout,
    examples_for,
    is_dense,
    lazily_negated,
    separate,
    shapes_for,
    sliced,
    transposed,
)
from support.oracle import Shape, assert_same_bits, backends_at_hand, cases, device_of, make, plain_row
from support.solver_cases import DETERMINISTIC

BACKENDS = backends_at_hand()
PER_SAMPLE = ("guidance", "threshold", "table")


def leave_nan_in_free_memory(tensor: Tensor, count: int) -> None:
    """Fill what the next outputs of this size are made of."""
    row = plain_row(compute_dtype(tensor.dtype), prev_x=1.0)
    poison = torch.full_like(separate(tensor), float("nan"))
    held = [ops.step(poison, poison, row, 0) for _ in range(count)]
    del held


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_overlapping_inputs_give_the_bits_of_separate_ones(backend: str | None) -> None:
    @examples_for(backend or "", 150)
    @given(
        plan=cases(shapes=shapes_for(backend or "")),
        first=st.sampled_from(OVERLAPPING),
        rest=st.lists(st.sampled_from(ANY_LAYOUT), min_size=9, max_size=9),
        scalars=st.booleans(),
    )
    def check(plan: Shape, first: Layout, rest: list[Layout], scalars: bool) -> None:
        layouts = iter(rest)

        def overlap(name: str, tensor: Tensor) -> Tensor:
            if name in PER_SAMPLE:  # one row, scale or threshold, as it is or expanded
                return (
                    tensor[:1].expand(3 if name == "table" else len(tensor), *tensor.shape[1:]) if scalars else tensor
                )
            layout = first if name == "sample" else next(layouts)
            # A variance is no less than 0.
            return layout(tensor) if name != "variance" or layout is not lazily_negated else tensor

        case = make(plan).to(device_of(backend or "")).with_tensors(overlap)
        expected = case.with_tensors(lambda _, tensor: separate(tensor)).run(backend)
        leave_nan_in_free_memory(case.sample, len(expected))
        results = case.run(backend)
        assert_same_bits(results, expected)
        assert all(result.is_contiguous() or is_dense(case.sample) for result in results)

    check()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_rows_read_overlapping_inputs_and_write_registers_of_any_strides(backend: str | None, layout: Layout) -> None:
    device = device_of(backend or "")

    def inputs() -> list[Tensor]:
        gen = torch.Generator().manual_seed(3)
        return [torch.randn(3, 2, 5, generator=gen).to(device) for _ in range(4)]

    table = torch.cat([plain_row(prev_x=0.5, prev_m=i, prev_z=0.25, prev_h0=0.5, k0_x=i, k0_m=2.0) for i in (1.0, 3.0)])
    table[:, STORE_0] = 1.0
    table = table.to(device)
    rows, seeds = torch.tensor([1, 0, 1, 1, 1])[::2].to(device), torch.tensor(7, device=device).expand(3)
    results = []
    for change in (layout, lambda tensor: separate(layout(tensor))):
        sample, output, *registers = inputs()
        registers = [transposed(registers[0]), sliced(registers[1])]
        model_input = sliced(torch.full((6, 2, 5), float("nan"), device=device))
        new = ops.step_rows(
            change(sample), change(output), table, rows, registers, seeds=seeds,
            noise_step=torch.tensor([4], device=device).expand(3), model_input=model_input, backend=backend,
        )  # fmt: skip
        results.append([new, *map(separate, registers), separate(model_input)])
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_single_steps_and_reductions_read_overlapping_inputs(backend: str | None, layout: Layout) -> None:
    gen = torch.Generator().manual_seed(4)
    x, m, u, z = (layout(torch.randn(3, 2, 5, generator=gen)).to(device_of(backend or "")) for _ in range(4))
    guided: dict[str, Any] = {"guidance_scale": torch.tensor([2.5], device=x.device).expand(3), "backend": backend}
    levels = {"alpha_cumprod": 0.5, "alpha_cumprod_prev": 0.6}
    calls: dict[str, Callable[..., Any]] = {
        "cfg_combine": lambda x, m, u, z: sampling.cfg_combine(m, u, **guided),
        "ddpm_step": lambda x, m, u, z: sampling.ddpm_step(x, m, uncond=u, noise=z, **levels, **guided),
        "ddim_step": lambda x, m, u, z: sampling.ddim_step(x, m, uncond=u, noise=z, eta=1.0, **levels, **guided),
        "dpm_solver_step": lambda x, m, u, z: sampling.dpm_solver_step(
            x, m, uncond=u, previous=[z], alphas_cumprod=[0.4, 0.5, 0.6], **guided
        ),
        "euler_step": lambda x, m, u, z: sampling.euler_step(
            x, m, uncond=u, noise=z, sigma=3.0, sigma_next=1.0, eta=1.0, **guided
        ),
        "quantile": lambda x, m, u, z: ops.quantile(x, 0.7, absolute=True, backend=backend),
        "mean": lambda x, m, u, z: ops.mean(x, backend=backend),
        "std": lambda x, m, u, z: ops.std(x, backend=backend),
        "norm": lambda x, m, u, z: ops.norm(x, backend=backend),
        "dot": lambda x, m, u, z: ops.dot(x, m, backend=backend),
    }
    for name, call in calls.items():
        found, expected = (
            results if isinstance(results, tuple) else (results,)
            for results in (call(x, m, u, z), call(*map(separate, (x, m, u, z))))
        )
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True)), name


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_noise_takes_seeds_and_steps_of_any_memory(backend: str | None) -> None:
    device = device_of(backend or "")
    seeds, steps = torch.tensor([5, 6, 7], device=device), torch.tensor([1, 0, 2], device=device)
    expected = fastdiff.randn((3, 2, 5), seeds, steps, backend=backend)
    for changed in (lambda t: t.repeat_interleave(2)[::2], lambda t: torch._neg_view(-t)):
        assert_same_bits([fastdiff.randn((3, 2, 5), changed(seeds), changed(steps), backend=backend)], [expected])
    one = torch.tensor(5, device=device)
    for_all = fastdiff.randn((3, 2, 5), one.expand(3), one.expand(3), backend=backend)
    assert_same_bits([for_all], [fastdiff.randn((3, 2, 5), [5] * 3, 5, device=device, backend=backend)])


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("layout", OVERLAPPING)
@pytest.mark.parametrize("argument", ["out[0]", "out[1]", "model_input", "history[0]"])
def test_what_is_written_needs_an_address_for_each_element(backend: str | None, layout: Layout, argument: str) -> None:
    device = device_of(backend or "")
    x, target = torch.ones(3, 2, 5, device=device), layout(torch.full((3, 2, 5), 7.0, device=device))
    row, before = plain_row(prev_x=2.0, k0_x=3.0).to(device), target.clone()
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "out[0]": lambda: ops.step(x, x, row, 0, out=[target], backend=backend),
        "out[1]": lambda: ops.step(x, x, row, 0, out=[None, target], keeps=1, backend=backend),
        "model_input": lambda: ops.step(x, x, row, 0, model_input=target, backend=backend),
        "history[0]": lambda: ops.step_rows(x, x, row, rows, [target], backend=backend),
    }
    with pytest.raises(ValueError, match=f"^step: {re.escape(argument)} holds the same element twice, expected .*; "):
        calls[argument]()
    assert torch.equal(target, before)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_a_sampler_takes_latents_and_outputs_that_overlap(backend: str | None, method: str) -> None:
    device = device_of(backend or "")
    sampler = create_sampler("linear", method, num_inference_steps=3, guidance_scale=2.0)
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(device)

    def samples(change: Layout) -> Tensor:
        def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return change((x.mean(1, keepdim=True) * condition.mean()).expand(x.shape))

        latents = change(weights[:, None].expand(3, 4, 5))
        before = latents.clone()
        result = sampler.sample(model, latents, weights, 2 * weights, progress=False, backend=backend).samples
        assert torch.equal(latents, before)
        return result

    assert_same_bits([samples(lambda tensor: tensor)], [samples(separate)])
