# SPDX-License-Identifier: MIT
"""A dozen calls, one of each kind of kernel, whose results are compared with the CPU's; for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitizer_calls

Tensors end where their memory ends (PYTORCH_NO_CUDA_MEMORY_CACHING=1), and their sizes leave part of a vector and part
of a block over. ``--device cpu`` compares the reference with the CPU's code instead: the calls without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.command import CommandParser
from fastdiff.row_layout import NUM_REGISTERS, compute_dtype
from fastdiff.solvers import StepTable

Call = Callable[[str, str], list[Tensor]]
#: Ulps of the largest number by which the reference may differ: a rounding for each of some ten products.
ROUNDINGS = 10


def _table(method: str, **options: Any) -> StepTable:
    table: StepTable = (
        fastdiff.create_sampler("linear", num_inference_steps=8, method=method, **options).stepper().table
    )
    return table


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]


def _step(
    method: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    row: int,
    *,
    layout: str = "",
    drawn: bool = False,
    **options: Any,
) -> Call:
    """Return a guided step of a solver's row; `layout` is "odd", a view that no vector is aligned to, or "last"."""

    def call(device: str, backend: str) -> list[Tensor]:
        table = _table(method, **options)
        tensors = _inputs(shape, dtype, device, 3 + NUM_REGISTERS)
        if layout == "odd":
            tensors = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(shape) for t in tensors]
        if layout == "last":
            tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        seeds = {"seeds": torch.arange(shape[0], device=device), "noise_step": row} if drawn else {}
        keeps = len(table.kept_slots[row])
        return list(
            ops.step(
                tensors[0],
                tensors[1],
                table.coefficients_as(dtype, device),
                row,
                uncond=tensors[2],
                guidance_scale=3.0,
                history=tensors[3:],
                keeps=keeps,
                backend=backend,
                **seeds,
            )
        )

    return call


def _rows(device: str, backend: str) -> list[Tensor]:
    """Rows of two solvers in one batch, a sample that is skipped, histories written in place, the next model input."""
    tables = [_table("ddim"), _table("dpm_solver", solver_order=2)]
    dtype, shape = torch.bfloat16, (4, 3, 5, 7)
    table = torch.cat([t.coefficients_as(dtype, "cpu") for t in tables]).to(device)
    tensors = _inputs(shape, dtype, device, 3 + NUM_REGISTERS)
    model_input = torch.empty((8, *shape[1:]), dtype=dtype, device=device)
    rows = torch.tensor([3, len(tables[0]) + 4, -1, 5], device=device)
    scale = torch.full((4,), 3.0, dtype=compute_dtype(dtype), device=device)
    out = ops.step_rows(
        tensors[0], tensors[1], table, rows, tensors[3:], uncond=tensors[2], guidance_scale=scale,
        seeds=torch.arange(4, device=device), noise_step=rows.clamp(min=0), model_input=model_input, backend=backend,
    )  # fmt: skip
    # A skipped sample's model input is its own.
    return [out, *tensors[3:], model_input]


def _reduction(kind: str, shape: tuple[int, ...]) -> Call:
    def call(device: str, backend: str) -> list[Tensor]:
        x, y = _inputs(shape, torch.float32, device, 2)
        if kind == "quantile":
            return [ops.quantile(x, 0.995, absolute=True, backend=backend)]
        if kind == "dot":
            return [ops.dot(x, y, backend=backend)]
        return [ops.std(x, backend=backend), ops.mean(x, backend=backend), ops.norm(x, backend=backend)]

    return call


def _randn(device: str, backend: str) -> list[Tensor]:
    return [fastdiff.randn((3, 1027), torch.arange(3, device=device), 5, device=device, backend=backend)]


CALLS: dict[str, Call] = {
    "DDIM, float32": _step("ddim", (2, 4, 33, 17), torch.float32, 3),
    "DDIM, bfloat16": _step("ddim", (2, 4, 33, 17), torch.bfloat16, 3),
    "DDIM, float16, odd addresses": _step("ddim", (3, 1027), torch.float16, 3, layout="odd"),
    "DPM-Solver++ 3M, float64": _step("dpm_solver", (2, 513), torch.float64, 4, solver_order=3),
    "DPM-Solver++ 2M, bfloat16": _step("dpm_solver", (1, 16, 5, 9, 11), torch.bfloat16, 4, solver_order=2),
    "DDPM, noise drawn": _step("ddpm", (2, 3, 65, 7), torch.float32, 3, drawn=True),
    "DDPM, noise drawn, channels last, bfloat16": _step(
        "ddpm", (2, 3, 5, 31), torch.bfloat16, 3, layout="last", drawn=True
    ),
    "one element a sample": _step("ddim", (5, 1), torch.float32, 3),
    "rows of two solvers": _rows,
    "randn": _randn,
    "quantile": _reduction("quantile", (2, 5003)),
    "mean, std and norm": _reduction("std", (3, 5003)),
    "dot of one element": _reduction("dot", (4, 1)),
}


class Difference(NamedTuple):
    """How the results of a call differ from the CPU's: numbers that differ in a bit, the largest distance in ulps."""

    numbers: int
    ulps: float


def differences(device: str, backend: str) -> Iterator[tuple[str, Difference]]:
    """Run the calls on a device; yield for each how its results differ from those of compiled code on the CPU."""
    for name, call in CALLS.items():
        got = call(device, backend)
        if device == "cuda":
            torch.cuda.synchronize()
        pairs = list(zip(got, call("cpu", "cpu"), strict=True))
        yield (
            name,
            Difference(
                sum(int((_bits(a.cpu()) != _bits(b)).sum()) for a, b in pairs),
                max(_ulps(a.cpu(), b) for a, b in pairs),
            ),
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _ulps(a: Tensor, b: Tensor) -> float:
    """Return the largest difference in units of the last place of the largest number."""
    scale = max(b.double().abs().max().item(), 1.0) * torch.finfo(b.dtype).eps
    return (a.double() - b.double()).abs().max().item() / scale


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calls on the C++ and the Triton backend, or with ``--device cpu`` on the reference; return 1 on a fault.

    On a GPU no bit may differ. The reference rounds products that compiled code fuses into sums.
    """
    parser = CommandParser(prog="python -m benchmarks.gpu.sanitizer_calls", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    failed = 0
    for backend in ("cuda", "triton") if device == "cuda" else ("reference",):
        for name, found in differences(device, backend):
            wrong = found.numbers > 0 if device == "cuda" else not found.ulps <= ROUNDINGS
            failed += wrong
            same = f"{found.numbers} numbers differ, by {found.ulps:.2g} ulps at most"
            print(f"{backend}: {name}: {same if found.numbers else 'equal'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
