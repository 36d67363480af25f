# SPDX-License-Identifier: MIT
"""Host time of a call beside ``torch.add(x, y, out=z)``, the time of one launch, in the same run.

Times are of calls in the middle of a loop that wait for nothing: operators, steppers, and drop-in schedulers with
torch's noise and without, on the C++ and on the Triton backend. The entries of a group alternate round by round with
the yardstick, and a ratio is that of two times of one round. `pure` measures an install without the extension.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff import ops
from fastdiff.ops import backends

from ..timing import quantiles, ratios
from . import results
from .cases import GpuCase
from .clock import Clock, Unit, clock_for
from .machine import machine

YARDSTICK = "torch.add"
SHAPE, SMALL = (1, 4, 128, 128), (1, 2, 4, 4)
#: Calls of a unit, below the launch queue's thousand entries, and steps of a drop-in's loop, each planned once.
CALLS, STEPS = 100, 30
BACKENDS = ("C++", "Triton")


class DropIn(NamedTuple):
    """A drop-in scheduler whose loop is measured.

    Attributes:
        name: of diffusers' class.
        options: arguments of its constructor.
        scales: its loop calls `scale_model_input` before each step, as a pipeline does.
        draws: a step draws noise by torch, one launch more.
    """

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    scales: bool = False
    draws: bool = False


DROPINS = (
    DropIn("DDIMScheduler", {"clip_sample": False}),
    DropIn("DPMSolverMultistepScheduler"),
    DropIn("FlowMatchEulerDiscreteScheduler"),
    DropIn("EulerDiscreteScheduler", scales=True),
    DropIn("DDPMScheduler", {"clip_sample": False}, draws=True),
    DropIn("EulerAncestralDiscreteScheduler", scales=True, draws=True),
    DropIn("KDPM2DiscreteScheduler", scales=True),
    DropIn("LMSDiscreteScheduler", scales=True),  # the last, since its coefficients are integrals
)
#: The drop-in whose guided step is compared with its plain one.
GUIDED = "DDIMScheduler"


def measure(
    device: str, path: Path, *, rehearse: bool, rounds: int, seconds: float = 60.0, pure: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Measure all entries, store them group by group, and return the section of the report.

    Args:
        device: "cuda", or "cpu" in a dry run.
        path: the file of the results.
        rehearse: small tensors and few calls.
        rounds: rounds in which the entries of a group alternate with the yardstick.
        seconds: no group begins later; the entries of the others are listed as not measured.
        pure: this is an install without the extension; the section is stored beside the other's.

    Raises:
        RuntimeError: `pure` is asked for, and the extension is there.
    """
    if pure and backends.extension is not None:
        raise RuntimeError("host: --pure measures an install without the extension, and this one has it")
    deadline = time.monotonic() + seconds
    section: dict[str, Any] = {
        "shape": list(SMALL if rehearse else SHAPE),
        "rounds": rounds,
        "entries": {},
        "absent": {},
        "failed": {},
        "machine": machine(device),
    }
    groups = _groups(device, rehearse, section["absent"])
    section["not_measured"] = [name for group in groups for name in group]
    clock = clock_for(device)
    for group in groups:
        if time.monotonic() > deadline:
            break
        with torch.no_grad():
            made = {YARDSTICK: _yardstick(device, rehearse), **_made(group, section["absent"], section["failed"])}
            taken = _in_turns(clock, made, rounds)
        entries = {
            name: {"microseconds": quantiles(times), "times": quantiles(ratios(times, taken[YARDSTICK]))}
            for name, times in taken.items()
        }
        for backend in BACKENDS:  # a ratio of its own, since both are a multiple of the yardstick
            step, guided = f"{GUIDED}.step, {backend}", f"{GUIDED}.guided_step, {backend}"
            if step in taken and guided in taken:
                entries[guided]["over_step"] = quantiles(ratios(taken[guided], taken[step]))
        section["entries"] = {**entries, **section["entries"]}  # the yardstick's of the first group
        section["not_measured"] = [name for name in section["not_measured"] if name not in group]
        results.store(path, rehearse, **{"host_pure" if pure else "host": section})
    return section


def show(section: dict[str, Any]) -> str:
    """Return the entries as text, one per line."""
    lines = [
        f"{entry['microseconds']['median']:>10.2f} µs {entry['times']['median']:>8.2f}×  {name}"
        for name, entry in section["entries"].items()
    ]
    for kind in ("absent", "failed"):
        lines += [f"{kind:>22}  {name}: {reason}" for name, reason in section[kind].items()]
    lines += [f"{'not measured':>22}  {name}" for name in section["not_measured"]]
    return "\n".join(lines)


def _groups(device: str, rehearse: bool, absent: dict[str, str]) -> list[dict[str, Callable[[], Unit]]]:
    """Return what makes the units of each group, by name; `absent` receives the missing backends and the reason."""
    shape, calls = (SMALL, 2) if rehearse else (SHAPE, CALLS)
    default = backends.backend_for(torch.empty(0, device=device))
    groups: list[dict[str, Callable[[], Unit]]] = [{} for _ in range(2 + len(DROPINS))]
    for label, backend in (("C++", "cuda" if device == "cuda" else "cpu"), ("Triton", "triton")):
        if reason := backends.why_missing(backend):
            absent[label] = reason
            continue
        # The default is not forced: that is what users call.
        forced = None if backend == default else backend
        groups[0][f"ops.step, {label}"] = partial(_operator, shape, device, forced, calls)
        groups[1][f"Stepper.step, {label}"] = partial(_stepper, shape, device, forced, calls)
        # Triton's interpreter takes a tenth of a second a step: a dry run has one drop-in on it.
        measured = DROPINS[:1] if rehearse and backend == "triton" else DROPINS
        for group, dropin in zip(groups[2:], measured, strict=False):
            group[f"{dropin.name}.step, {label}"] = partial(_dropin, dropin, shape, device, forced, rehearse)
            if dropin.name == GUIDED:
                name = f"{dropin.name}.guided_step, {label}"
                group[name] = partial(_dropin, dropin, shape, device, forced, rehearse, guided=True)
    theirs = DROPINS[0]
    groups[2][f"diffusers' {theirs.name}.step"] = partial(_dropin, theirs, shape, device, None, rehearse, ours=False)
    return [group for group in groups if group]


def _yardstick(device: str, rehearse: bool) -> Unit:
    x, y, z = (torch.randn(SMALL if rehearse else SHAPE, device=device) for _ in range(3))
    return _repeated(lambda: torch.add(x, y, out=z), 2 if rehearse else CALLS)


def _made(
    makers: dict[str, Callable[[], Unit]], absent: dict[str, str], failed: dict[str, str]
) -> dict[str, Unit]:  # fmt: skip
    """Return the warmed-up units; `absent` and `failed` receive the others and the reason."""
    found = {}
    for name, make in makers.items():
        try:
            unit = make()
            for _ in range(2):  # compile, trace, allocate
                unit.prepare()
                unit.run()
        except ImportError as error:
            absent[name] = str(error)
        except Exception as error:  # one entry that fails must not end the run
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            found[name] = unit
    return found


def _repeated(call: Callable[[], object], calls: int) -> Unit:
    def run() -> None:
        for _ in range(calls):
            call()

    return Unit(lambda: None, run, calls)


def _forcing(unit: Unit, backend: str | None) -> Unit:
    """Return the unit with its functions called under a forced backend; None forces nothing."""
    if backend is None:
        return unit

    def within(call: Callable[[], object]) -> Callable[[], None]:
        def forced() -> None:
            with ops.use_backend(backend):
                call()

        return forced

    return Unit(within(unit.prepare), within(unit.run), unit.steps)


def _operator(shape: tuple[int, ...], device: str, backend: str | None, calls: int) -> Unit:
    """Return calls of `ops.step` in the middle of a DDIM loop with guidance, in place."""
    case = GpuCase("ddim", shape, device=device)
    sample, cond, uncond = case.tensors()[0]
    table = case.table.coefficients_as(sample.dtype, sample.device)
    current = sample.clone()

    def call() -> None:
        ops.step(current, cond, table, 3, uncond=uncond, guidance_scale=3.0, out=(current,), backend=backend)

    return Unit(lambda: current.copy_(sample), _repeated(call, calls).run, calls)


def _stepper(shape: tuple[int, ...], device: str, backend: str | None, calls: int) -> Unit:
    """Return the steps of steppers without the first, which uploads the table."""
    case = GpuCase("ddim", shape, device=device)
    sample, cond, uncond = case.tensors()[0]
    current = torch.empty_like(sample)
    rows = len(case.table)
    loops = max(1, calls // (rows - 1))
    steppers: list[Any] = []

    def take(stepper: Any) -> None:
        stepper.step(current, cond, uncond=uncond, guidance_scale=3.0, out=current)

    def prepare() -> None:
        current.copy_(sample)
        steppers[:] = [case.stepper(backend) for _ in range(loops)]
        for stepper in steppers:
            take(stepper)

    def run() -> None:
        for stepper in steppers:
            for _ in range(rows - 1):
                take(stepper)

    return Unit(prepare, run, loops * (rows - 1))


def _dropin(
    dropin: DropIn,
    shape: tuple[int, ...],
    device: str,
    backend: str | None,
    rehearse: bool,
    *,
    guided: bool = False,
    ours: bool = True,
) -> Unit:
    """Return the steps of one loop without its first two.

    Raises:
        ImportError: diffusers is not installed.
    """
    import diffusers

    import fastdiff.diffusers as dropins

    scheduler = getattr(dropins if ours else diffusers, dropin.name)(**dropin.options)
    sample, cond, uncond = (torch.randn(shape, device=device) * 0.1 for _ in range(3))
    state: list[Any] = [None, ()]

    def take(timestep: Any, current: Any) -> Any:
        given = scheduler.scale_model_input(current, timestep) if dropin.scales else current
        del given  # a pipeline's model would read it
        if guided:
            return scheduler.guided_step(uncond, cond, 3.0, timestep, current, return_dict=False)[0]
        return scheduler.step(cond, timestep, current, return_dict=False)[0]

    def prepare() -> None:
        scheduler.set_timesteps(4 if rehearse else STEPS, device=device)
        timesteps, current = list(scheduler.timesteps), sample
        for timestep in timesteps[:2]:
            current = take(timestep, current)
        state[:] = [current, timesteps[2:]]

    def run() -> None:
        current = state[0]
        for timestep in state[1]:
            current = take(timestep, current)

    prepare()
    return _forcing(Unit(prepare, run, len(state[1])), backend)


def _in_turns(clock: Clock, made: dict[str, Unit], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        for name in made if turn % 2 == 0 else reversed(made):
            microseconds = clock.host(made[name])
            if turn > 0:  # the first round is a warm-up
                taken[name].append(microseconds)
    return taken
