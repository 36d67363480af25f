# SPDX-License-Identifier: MIT
"""How many operators a step dispatches, and how often it reads a number back: counted on the CPU, where both are known.

Views move nothing and are left out. Of the rest those of the sample's size are at least a launch each on a GPU; the
small ones are where the scheduler keeps its scalars on the device (diffusers keeps timesteps there and sigmas on the
host). A number that is read back (``.item()``, a comparison in an ``if``, ``nonzero``) is a wait of the host for the
device, where its tensor is on the device.

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

#: Operators whose result is on the host, or whose size is.
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

SHAPE = (1, 4, 64, 64)

#: The column's name, diffusers' class and arguments, and our own case.
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
class Counted:
    """What passed through the dispatcher; views are not in it."""

    names: Counter[str] = field(default_factory=Counter)
    full: int = 0
    reads: int = 0

    @property
    def operators(self) -> int:
        return sum(self.names.values())


class _Counter(TorchDispatchMode):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.counted, self._numel = Counted(), numel

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view's result is marked as an alias that is not written; what allocates without computing launches nothing.
        aliases = [value.alias_info for value in func._schema.returns]
        name = func._schema.name.partition("::")[2]
        if any(alias is not None and not alias.is_write for alias in aliases) or name.startswith("empty"):
            return result
        self.counted.names[name] += 1
        self.counted.reads += name in _READS
        tensors = [
            value for value in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)
        ]
        self.counted.full += any(value.numel() >= self._numel for value in tensors)
        return result


def count_operators(run: Callable[[], object], numel: int = 1) -> Counted:
    """What `run` dispatches; `numel`: from how many elements on an operator counts as full-size."""
    with torch.no_grad(), _Counter(numel) as counter:
        run()
    return counter.counted


def of_diffusers(name: str, arguments: dict[str, Any]) -> tuple[Counted, int]:
    """Guidance and steps of a loop by diffusers' scheduler of that class, and how many steps.

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


def of_ours(op: str) -> float:
    """How many operators of torch a step of ours calls beside its one pass, which goes straight to the extension.

    A dispatch mode would send the step round through the dispatcher; the profiler looks on without that. The first loop
    brings the table and the scale to the device, once, and is not counted.
    """
    from .gpu.cases import GpuCase  # it builds on this module's neighbours

    case = GpuCase(op, SHAPE)
    sample, cond, uncond = case.tensors()[0]
    seeds = {"seeds": torch.zeros(SHAPE[0], dtype=torch.int64)} if case.recipe.seeded else {}
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
    """The table's lines; a step of diffusers that is not installed is None."""
    lines = []
    for name, (scheduler, arguments, op) in SCHEDULERS.items():
        line: dict[str, Any] = {"solver": name, "diffusers": None, "fastdiff": None}
        with contextlib.suppress(ImportError):
            line["diffusers"] = _a_step(*of_diffusers(scheduler, arguments))
        if op is not None:
            line["fastdiff"] = of_ours(op)
        lines.append(line)
    return lines


def _a_step(counted: Counted, steps: int) -> dict[str, float]:
    return {
        "full": counted.full / steps,
        "small": (counted.operators - counted.full) / steps,
        "reads": counted.reads / steps,
    }


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table, for docs/performance.md."""
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
