# SPDX-License-Identifier: MIT
"""One denoising loop in six ways: eager, with a compiled model, and with CUDA graphs of the model or of the whole loop.

Where the model is small, a loop's time on a GPU is that of launching its kernels.  A graph launches many at once:

  eager, diffusers      diffusers' scheduler
  eager, fastdiff       its drop-in: a step is one pass
  compiled              the model under torch.compile(mode="reduce-overhead"), which has CUDA graphs of its own
  graph of the model    fastdiff.patch(pipe, cuda_graph=True): one graph, which all steps of any loop replay
  graph of the loop     the model and the drop-in's steps in one torch.cuda.CUDAGraph, for one number of steps
  sampler, graph        fastdiff's own sampler, cuda_graph=True: the same for its own schedules

    python examples/compiled_loop.py                        # on a GPU if there is one, else on the CPU without graphs
    python examples/compiled_loop.py --steps 50 --without-compile

Printed are the milliseconds of a whole loop, the median over rounds in which all ways take turns, each round until the
device is done; and the largest difference from the first way's samples.  The model is a small U-Net with random
weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

import fastdiff
import fastdiff.diffusers

Loop = Callable[[], Tensor]

SHAPE = 1, 4, 32, 32
SCHEDULE = {"clip_sample": False, "timestep_spacing": "trailing"}


def small_unet(device: str) -> diffusers.UNet2DModel:
    """Return a model of 0.3 million weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SHAPE[-1], in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8, add_attention=False,
    )  # fmt: skip
    return unet.to(device).eval()


def denoise(model: Any, scheduler: Any, latents: Tensor) -> Tensor:
    """Take all steps of a scheduler whose timesteps are set."""
    for t in scheduler.timesteps:
        # A compiled model writes each output over the last one's: this tells it that a new step begins.  The scheduler
        # has used the output by then; one that keeps outputs for later steps (PNDM) needs a clone of each.
        torch.compiler.cudagraph_mark_step_begin()
        output = model(latents, t, return_dict=False)[0]
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def whole_loop(model: Any, scheduler: Any, latents: Tensor, steps: int) -> Loop:
    """Return a loop that sets its timesteps on the latents' device and takes them."""

    def run() -> Tensor:
        scheduler.set_timesteps(steps, device=latents.device)
        return denoise(model, scheduler, latents)

    return run


def graph_of_model(latents: Tensor, steps: int) -> Loop:
    """Patch a pipeline, model included, and use its parts in a loop of one's own, as the pipeline itself does."""
    unet = small_unet(str(latents.device))
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(**SCHEDULE))
    pipe.scheduler = diffusers.DDIMScheduler(**SCHEDULE)  # the pipeline has made one of its own
    fastdiff.patch(pipe, cuda_graph=True)
    return whole_loop(pipe.unet, pipe.scheduler, latents, steps)


def graph_of_loop(model: Any, latents: Tensor, steps: int) -> Loop:
    """Capture model and steps in one graph."""
    scheduler = fastdiff.diffusers.DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps, device=latents.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            # A stepper has a state of its own: each walk begins at the first timestep.
            denoise(model, scheduler.stepper(), latents)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = denoise(model, scheduler.stepper(), latents)

    def run() -> Tensor:
        graph.replay()
        return result

    return run


def sampler_graph(model: Any, latents: Tensor, steps: int) -> Loop:
    """Return the loop of fastdiff's own sampler for the same schedule, captured at its first call."""
    sampler = fastdiff.create_sampler("linear", "ddim", num_inference_steps=steps, timestep_spacing="trailing")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = model(x, t, return_dict=False)[0]
        return output

    return lambda: sampler.sample(predict, latents, cuda_graph=True, check_finite=False, progress=False).samples


def ways(device: str, steps: int, compiled: bool) -> tuple[dict[str, Loop], dict[str, str]]:
    """Return the loops by name, and the reasons why others are missing."""
    model = small_unet(device)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    drop_in = fastdiff.diffusers.DDIMScheduler(**SCHEDULE)
    found = {
        "eager, diffusers": whole_loop(model, diffusers.DDIMScheduler(**SCHEDULE), latents, steps),
        "eager, fastdiff": whole_loop(model, drop_in, latents, steps),
    }
    missing = {}
    if compiled:
        other = torch.compile(model, mode="reduce-overhead")
        found["compiled"] = whole_loop(other, fastdiff.diffusers.DDIMScheduler(**SCHEDULE), latents, steps)
    else:
        missing["compiled"] = "left out"
    if device == "cuda":
        found["graph of the model"] = graph_of_model(latents, steps)
        found["graph of the loop"] = graph_of_loop(model, latents, steps)
        found["sampler, graph"] = sampler_graph(model, latents, steps)
    else:
        missing |= dict.fromkeys(("graph of the model", "graph of the loop", "sampler, graph"), "needs a CUDA device")
    return found, missing


def seconds(loop: Loop, device: str) -> float:
    """Return the time of one loop, until the device is done."""
    started = time.perf_counter()
    loop()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--without-compile", action="store_true", help="leave torch.compile out: it takes a minute")
    chosen = parser.parse_args()
    loops, missing = ways(chosen.device, chosen.steps, not chosen.without_compile)
    samples = {name: loop().clone() for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(chosen.rounds):
        for name, loop in loops.items():
            times[name].append(seconds(loop, chosen.device))
    first = next(iter(loops))
    print(f"{chosen.steps} steps on {chosen.device}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{'way':20} {'ms a loop':>10} {'us a step':>10} {'times':>7}   difference")
    for name, found in times.items():
        taken = statistics.median(found)
        difference = float((samples[name] - samples[first]).abs().max())
        faster = statistics.median(times[first]) / taken
        print(f"{name:20} {taken * 1e3:10.2f} {taken / chosen.steps * 1e6:10.1f} {faster:7.2f}   {difference:.1e}")
    for name, reason in missing.items():
        print(f"{name:20} not measured: {reason}")


if __name__ == "__main__":
    main()
