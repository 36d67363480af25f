# SPDX-License-Identifier: MIT
"""Time of whole sampling loops with small models: diffusers' scheduler before, the drop-in after, on one device.

    python -m benchmarks.end_to_end                        # every loop on the CPU, one thread
    python -m benchmarks.end_to_end --device cuda --json FILE
    python -m benchmarks.end_to_end --only policy,latent --rounds 5

A loop is `set_timesteps`, and model, guidance and step at each timestep.  These are loops in which a step is felt: a
robot's policy (chunks of 16 actions, the model of examples/diffusion_policy.py), handwritten digits (the packaged
model, with guidance), and few-step models of latents (a transformer with flow matching's Euler step, a U-Net with
LCM's), the last two with random weights.  Loops of diffusers and fastdiff take turns; a figure is the median over the
rounds.

The step's share is the time of a loop whose model returns a tensor made beforehand, over the time of the whole loop.

On a GPU each figure ends with a synchronization, and the last column is the drop-in's loop, model included, captured as
one CUDA graph and replayed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import runpy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.command import CommandParser, run_command
from fastdiff.errors import error_message, require, unknown_name
from fastdiff.files import check_writable, write_whole
from fastdiff.graphs.recorder import RECORDERS, WARM_UPS

from .conditions import conditions
from .timing import quantiles, ratios

#: A model as a loop calls it: (sample, timestep) to its output.
Model = Callable[[Tensor, Tensor], Tensor]

GUIDANCE = 3.0
HEADS = (
    "loop", "steps", "diffusers, ms", "fastdiff, ms", "times", "the step's share: diffusers", "fastdiff",
    "one CUDA graph, ms",
)  # fmt: skip


def _policy(device: torch.device) -> Model:
    path = Path(__file__).resolve().parents[1] / "examples" / "diffusion_policy.py"
    if not path.exists():
        got = "needs the examples, which are not installed"
        raise ValueError(error_message("end_to_end", "policy", got, "a checkout", "leave it out by --only"))
    model = runpy.run_path(str(path))["PolicyUnet"]().to(device).eval()
    observation = torch.zeros(1, 4, device=device)
    return lambda x, t: model(x, t, observation)  # type: ignore[no-any-return]


def _digits(device: torch.device) -> Model:
    from fastdiff.digits import NULL_CLASS, load_digit_unet

    model = load_digit_unet(device=device).eval()
    labels = torch.arange(10, device=device)
    both = torch.cat([torch.full_like(labels, NULL_CLASS), labels])
    return lambda x, t: model(torch.cat([x, x]), t, both)  # type: ignore[no-any-return]


def _transformer(device: torch.device) -> Model:
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=4,
        caption_projection_dim=128, joint_attention_dim=64, pooled_projection_dim=64, out_channels=16,
    )  # fmt: skip
    model = model.to(device).eval()
    text, pooled = torch.zeros(1, 16, 64, device=device), torch.zeros(1, 64, device=device)
    return lambda x, t: model(x, text, pooled, t.expand(len(x)), return_dict=False)[0]  # type: ignore[no-any-return]


def _unet(device: torch.device) -> Model:
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )  # fmt: skip
    model = model.to(device).eval()
    return lambda x, t: model(x, t, return_dict=False)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """One loop: a model, a scheduler by the name of its class, a number of steps and the shape of the sample."""

    name: str
    make: Callable[[torch.device], Model]
    scheduler: str
    steps: int
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    guided: bool = False


_POLICY = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}
_DIGITS = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
CASES = (
    Case("policy, DDIM", _policy, "DDIMScheduler", 10, (1, 2, 16), _POLICY),
    Case("policy, DDIM", _policy, "DDIMScheduler", 100, (1, 2, 16), _POLICY),
    Case("policy, DDPM", _policy, "DDPMScheduler", 10, (1, 2, 16), _POLICY),
    Case("policy, DDPM", _policy, "DDPMScheduler", 100, (1, 2, 16), _POLICY),
    Case("digits, DDIM, guided", _digits, "DDIMScheduler", 20, (10, 1, 8, 8), _DIGITS, guided=True),
    Case("latent transformer, flow Euler", _transformer, "FlowMatchEulerDiscreteScheduler", 1, (1, 16, 32, 32)),
    Case("latent transformer, flow Euler", _transformer, "FlowMatchEulerDiscreteScheduler", 4, (1, 16, 32, 32)),
    Case("latent U-Net, LCM", _unet, "LCMScheduler", 1, (1, 4, 32, 32)),
    Case("latent U-Net, LCM", _unet, "LCMScheduler", 4, (1, 4, 32, 32)),
)


class Loop:
    """A case's loop with one scheduler.

    Args:
        case: what to sample.
        kind: the scheduler's class.
        model: the model; None for a tensor made beforehand, which leaves the steps alone.
        device: where it runs.
    """

    def __init__(self, case: Case, kind: Any, model: Model | None, device: torch.device) -> None:
        self.case, self.device = case, device
        self.scheduler = kind(**case.options)
        self.fused = hasattr(kind, "guided_step")
        self.start = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(device)
        self.generator = torch.Generator(device)
        self.extra: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(kind.step).parameters:
            self.extra["generator"] = self.generator
        stored = torch.cat([self.start, self.start]) * 0.1 if case.guided else self.start * 0.1
        self.model: Model = model or (lambda x, t: stored)

    def run(self) -> Tensor:
        """Sample from the start, with the noise of one seed."""
        self.generator.manual_seed(0)
        self.scheduler.set_timesteps(self.case.steps, device=self.device)
        return self.walk(self.scheduler)

    def walk(self, scheduler: Any) -> Tensor:
        """Take all steps of a scheduler whose timesteps are set."""
        x, extra = self.start, self.extra
        for t in scheduler.timesteps:
            output = self.model(x, t)
            if not self.case.guided:
                x = scheduler.step(output, t, x, **extra)[0]
                continue
            uncond, cond = output.chunk(2)
            if self.fused:
                x = scheduler.guided_step(uncond, cond, GUIDANCE, t, x, **extra)[0]
            else:
                x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, **extra)[0]
        return x

    def graph(self) -> Callable[[], None]:
        """Capture the whole loop, and return what replays it.  Noise comes from seeds: a graph holds no generator."""
        recorder = RECORDERS[self.device.type](self.device)
        if self.extra.pop("generator", None) is not None:
            self.scheduler.use_philox(torch.arange(self.case.shape[0], device=self.device))
        self.scheduler.set_timesteps(self.case.steps, device=self.device)

        def body() -> None:
            # A stepper begins at the first timestep, without the copies of `set_timesteps`.
            self.result = self.walk(self.scheduler.stepper())

        with recorder.turn([self.start]):
            for _ in range(WARM_UPS):
                recorder.warm_up(body)
            recorder.capture(body)

        def replay() -> None:
            with recorder.turn([self.start]):
                recorder.replay()

        return replay


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the figures of one loop, milliseconds and ratios."""
    import diffusers

    import fastdiff.diffusers

    torch.manual_seed(0)
    model = case.make(device)
    kinds = {who: getattr(where, case.scheduler) for who, where in
             (("diffusers", diffusers), ("fastdiff", fastdiff.diffusers))}  # fmt: skip
    whole = {who: Loop(case, kind, model, device) for who, kind in kinds.items()}
    alone = {who: Loop(case, kind, None, device) for who, kind in kinds.items()}
    calls: dict[str, Callable[[], object]] = {who: loop.run for who, loop in whole.items()}
    calls |= {f"{who}, steps alone": loop.run for who, loop in alone.items()}
    difference = float((whole["diffusers"].run() - whole["fastdiff"].run()).abs().max())
    if device.type in RECORDERS:
        calls["graph"] = Loop(case, kinds["fastdiff"], model, device).graph()
    for call in calls.values():  # traces, allocations, caches
        for _ in range(2):
            _seconds(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            seconds[name].append(_seconds(calls[name], device))
    return {
        "loop": case.name,
        "scheduler": case.scheduler,
        "steps": case.steps,
        "shape": list(case.shape),
        "difference": difference,
        "milliseconds": {name: quantiles([1e3 * each for each in found]) for name, found in seconds.items()},
        "times": quantiles(ratios(seconds["diffusers"], seconds["fastdiff"])),
        "share": {who: quantiles(ratios(seconds[f"{who}, steps alone"], seconds[who])) for who in kinds},
    }


def row(line: dict[str, Any]) -> str:
    """Return a loop's row of the table."""
    times = line["milliseconds"]
    cells = [line["loop"], str(line["steps"]), _ms(times["diffusers"]), _ms(times["fastdiff"])]
    cells += [f"{line['times']['median']:.2f}", *(f"{100 * each['median']:.1f} %" for each in line["share"].values())]
    cells.append(_ms(times["graph"]) if "graph" in times else "not measured")
    return f"| {' | '.join(cells)} |"


def _ms(figure: dict[str, float]) -> str:
    return f"{figure['median']:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and store it if requested."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginnings of names of loops, separated by commas; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    require("diffusers", "diffusers", "benchmarks.end_to_end")
    if chosen.json is not None:
        check_writable(chosen.json, operation="end_to_end", argument="--json")
    if chosen.rounds < 1:
        raise ValueError(error_message("end_to_end", "--rounds", f"is {chosen.rounds}", "1 or more", "raise --rounds"))
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        got = f"is {chosen.device}, and torch sees no GPU"
        raise ValueError(error_message("end_to_end", "--device", got, "cpu", "run it on a machine with a GPU"))
    names = [name for name in chosen.only.split(",") if name]
    for name in names:
        if not any(case.name.startswith(name) for case in CASES):
            raise unknown_name("end_to_end", "--only", name, {case.name for case in CASES})
    cases = [case for case in CASES if not names or any(case.name.startswith(name) for name in names)]
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    lines: list[dict[str, Any]] = []
    found = {**conditions(), "device": _device_name(device)}
    threads = torch.get_num_threads()
    torch.set_num_threads(chosen.threads)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases:
                lines.append(measure(case, device, chosen.rounds))
                print(row(lines[-1]), flush=True)
                if chosen.json is not None:  # after each loop: a run that is stopped keeps what it has measured
                    report = {"schema": 1, "conditions": found, "threads": chosen.threads, "rounds": chosen.rounds}
                    text = json.dumps({**report, "results": lines}, indent=1) + "\n"
                    write_whole(chosen.json, text.encode(), operation="end_to_end", argument="--json")
    finally:
        torch.set_num_threads(threads)
    print(", ".join(f"{name} {value}" for name, value in found.items()))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(run_command("end_to_end", main))
