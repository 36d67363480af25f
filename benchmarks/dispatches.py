# SPDX-License-Identifier: MIT
"""Number of operators that a step dispatches, and of values that it reads back to the host, counted on the CPU.

Views are not counted. On a GPU every operator on tensors of the sample's size is at least one launch; a small operator
is one if the scheduler keeps its scalars on the device (diffusers keeps timesteps there and sigmas on the host).
Reading a value back (``.item()``, a comparison in an ``if``, ``nonzero``) makes the host wait if the tensor is on the
device.

``python -m benchmarks.dispatches`` prints the table of docs/performance.md.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import GUIDANCE, STEPS, Case

#: Operators whose result, or the size of whose result, is read on the host.
_HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

SHAPE = (1, 4, 64, 64)

#: Name in the table, diffusers' class and arguments, and fastdiff's case.
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmsolver++2m"),
    "Euler": ("EulerDiscreteScheduler", {}, "euler"),
    "Euler-ancestral": ("EulerAncestralDiscreteScheduler", {}, "euler-ancestral (philox)"),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}, "ddpm (philox)"),
    "Heun": ("HeunDiscreteScheduler", {}, "heun"),
    "UniPC": ("UniPCMultistepScheduler", {}, None),
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}, "flow-euler"),
}


@dataclass
class OperatorCounts:
    """Dispatched operators by name, without views; how many are full-size, and how many read values back."""

    names: Counter[str] = field(default_factory=Counter)
    full: int = 0
    reads: int = 0

    @property
    def operators(self) -> int:
        return sum(self.names.values())


class _Counter(TorchDispatchMode):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.counted, self._numel = OperatorCounts(), numel

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view's result is marked as an alias that is not written; an allocation launches nothing.
        aliases = [value.alias_info for value in func._schema.returns]
        name = func._schema.name.partition("::")[2]
        if any(alias is not None and not alias.is_write for alias in aliases) or name.startswith("empty"):
            return result
        self.counted.names[name] += 1
        self.counted.reads += name in _HOST_READS
        tensors = [
            value for value in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)
        ]
        self.counted.full += any(value.numel() >= self._numel for value in tensors)
        return result


def count_operators(run: Callable[[], object], numel: int = 1) -> OperatorCounts:
    """Count the operators that `run` dispatches; one on a tensor of at least `numel` elements counts as full-size."""
    with torch.no_grad(), _Counter(numel) as counter:
        run()
    return counter.counted


def count_diffusers(name: str, arguments: dict[str, Any]) -> tuple[OperatorCounts, int]:
    """Count the operators of a loop with guidance by diffusers' scheduler; return the counts and the number of steps.

    Raises:
        ImportError: diffusers is not installed.
    """
    import diffusers

    scheduler = getattr(diffusers, name)(**arguments)
    scheduler.set_timesteps(STEPS)
    sample, cond, uncond = Case("ddim", SHAPE).tensors()[0]
    timesteps = list(scheduler.timesteps)

    def loop() -> None:
        current = sample
        for timestep in timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(current, timestep)
            guided = uncond + GUIDANCE * (cond - uncond)
            current = scheduler.step(guided, timestep, current, return_dict=False)[0]

    return count_operators(loop, sample.numel()), len(timesteps)


def count_fastdiff(op: str) -> float:
    """Count the torch operators of a fastdiff step besides its kernel, which is called without the dispatcher.

    A dispatch mode would make the step use the dispatcher; the profiler does not. The first loop copies the table and
    the guidance scale to the device once and is not counted.
    """
    from .gpu.cases import GpuCase  # imported late: it imports modules beside this one

    case = GpuCase(op, SHAPE)
    sample, cond, uncond = case.tensors()[0]
    seeds = {"seeds": torch.zeros(SHAPE[0], dtype=torch.int64)} if case.spec.seeded else {}
    out = torch.empty_like(sample)

    def loop() -> None:
        stepper = case.stepper(**seeds)
        current = sample
        while not stepper.done:
            current = stepper.step(current, cond, uncond=uncond, guidance_scale=GUIDANCE, out=out)

    loop()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loop()
    called = [event.name for event in profiler.events() or [] if event.name.startswith(("aten::", "fastdiff::"))]
    return len(called) / len(case.table)


def rows() -> list[dict[str, Any]]:
    """Return the table's lines; an entry is None if diffusers is not installed."""
    lines = []
    for name, (scheduler, arguments, op) in SCHEDULERS.items():
        line: dict[str, Any] = {"solver": name, "diffusers": None, "fastdiff": None}
        with contextlib.suppress(ImportError):
            line["diffusers"] = _a_step(*count_diffusers(scheduler, arguments))
        if op is not None:
            line["fastdiff"] = count_fastdiff(op)
        lines.append(line)
    return lines


def _a_step(counted: OperatorCounts, steps: int) -> dict[str, float]:
    return {
        "full": counted.full / steps,
        "small": (counted.operators - counted.full) / steps,
        "reads": counted.reads / steps,
    }


def markdown(lines: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, for docs/performance.md."""
    text = [
        "| a step of | full-size | small | numbers read back | fastdiff: operators beside its one pass |",
        "|" + "---|" * 5,
    ]
    for line in lines:
        theirs = line["diffusers"] or {}
        cells = [_number(theirs.get(column)) for column in ("full", "small", "reads")] + [_number(line["fastdiff"])]
        text.append(f"| {line['solver']} | {' | '.join(cells)} |")
    return "\n".join(text)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


if __name__ == "__main__":
    print(markdown(rows()))
