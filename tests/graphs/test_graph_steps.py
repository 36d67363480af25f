# SPDX-License-Identifier: MIT
"""Captured loops on steps that a caller gives, with rescaled guidance, and the refusals: emulated on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastdiff import StepInfo
from fastdiff.graphs import recorder
from fastdiff.ops import backends
from support.graph_cases import Inputs, model_of, sampler_of
from support.graph_emulator import EmulatedGraph
from support.oracle import assert_same_bits

pytestmark = pytest.mark.skipif(
    backends.extension is None, reason="on the CPU the reference looks at its rows: needs the C++ extension"
)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGraph]:
    monkeypatch.setitem(recorder.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph.made


@pytest.mark.parametrize("mode", ["loop", "step"])
@pytest.mark.parametrize("name", ["ddim-0.0", "multistep-dpmsolver++-2", "ancestral-1.0"])
@pytest.mark.parametrize("bound", [{}, {"thresholding": True}], ids=str)
def test_captured_loop_rescales_guidance(
    name: str, mode: str, bound: dict[str, Any], emulated: list[EmulatedGraph]
) -> None:
    sampler, model = sampler_of(name, "batched", guidance_rescale=0.7, **bound), model_of(name)
    for seed in (1, 2):
        inputs = Inputs(seed, "batched")
        options = {"guidance_scale": inputs.scale, "seeds": inputs.seeds, "progress": False}
        given = model, inputs.latents, *inputs.conditions
        expected = sampler.sample(*given, **options)
        assert not torch.equal(sampler.sample(*given, guidance_rescale=0.0, **options).samples, expected.samples)
        found = sampler.sample(*given, cuda_graph=mode, **options)
        assert_same_bits([found.samples], [expected.samples])
        assert (found.complete, found.sigmas, found.timesteps) == (True, expected.sigmas, expected.timesteps)
    assert len(emulated) == 1


@pytest.mark.parametrize(
    "steps", [{"start_step": 2}, {"timesteps": [900, 400, 100]}, {"sigmas": [9.0, 1.0, 0.0]}], ids=str
)
def test_captured_loop_takes_given_steps(steps: dict[str, Any], emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("ancestral-1.0"), model_of("ancestral-1.0"), Inputs(1, "none")
    for _ in range(2):
        options = {"seeds": inputs.seeds, "progress": False, **steps}
        expected = sampler.sample(model, inputs.latents, **options).samples
        assert_same_bits([sampler.sample(model, inputs.latents, cuda_graph=True, **options).samples], [expected])
    assert len(emulated) == 1
    sampler.sample(model, inputs.latents, seeds=inputs.seeds, cuda_graph=True)
    assert len(emulated) == 2


def test_captured_steps_say_what_they_do_not_know() -> None:
    sampler, model, inputs, seen = sampler_of("ancestral-1.0"), model_of("ancestral-1.0"), Inputs(1, "none"), []

    def stop(info: StepInfo) -> bool:
        seen.append(info)
        return info.index < 2

    torch.manual_seed(3)
    result = sampler.sample(model, inputs.latents, cuda_graph="step", callback=stop, progress=False)
    assert (result.complete, result.steps) == (False, 3)
    assert [info.sigma for info in seen] == sampler.sigmas[:3].tolist()
    assert all(math.isnan(figure) for figure in seen[0].times)
    with pytest.raises(RuntimeError, match="StepInfo: x0 is not known"):
        assert seen[0].x0 is not None
    assert result.seeds is not None
    again = sampler.sample(model, inputs.latents, seeds=result.seeds, callback=stop, progress=False)
    assert_same_bits([again.samples], [result.samples])
    with pytest.raises(ValueError, match="return_trajectory is given beside cuda_graph"):
        sampler.sample(model, inputs.latents, cuda_graph=True, return_trajectory=2)


@pytest.mark.parametrize("mode", ["loop", "step"])
def test_loop_captured_with_zeros_for_negative_condition_takes_them_again(mode: str) -> None:
    sampler, model = sampler_of("ddim-0.0", "batched"), model_of("ddim-0.0")
    inputs, other = Inputs(1, "batched"), Inputs(2, "batched")
    prompt = inputs.conditions[0]
    loop = sampler.capture(model, inputs.latents, prompt, guidance_scale=3.0, mode=mode)
    given = model, other.latents, other.conditions[0]
    zeros = torch.zeros_like(prompt)
    expected = sampler.sample(*given, zeros, guidance_scale=3.0, progress=False).samples
    assert_same_bits([loop.replay(*given[1:]), loop.replay(*given[1:], zeros)], [expected] * 2)
    found = sampler.sample(*given, guidance_scale=3.0, cuda_graph=mode).samples
    assert_same_bits([found], [expected])
    strict = sampler.capture(model, inputs.latents, *inputs.conditions, guidance_scale=3.0, mode=mode)
    with pytest.raises((TypeError, ValueError), match="negative_prompt_embeds"):
        strict.replay(*given[1:])
