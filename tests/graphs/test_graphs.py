# SPDX-License-Identifier: MIT
"""Captured loops, with an emulation of CUDA graphs on the CPU: the bits of the eager loop for any inputs."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import BaseSampler, CapturedLoop, StepInfo, ops
from fastdiff.digits import IMAGE_SHAPE, NULL_CLASS, load_digit_unet
from fastdiff.graphs import recorder
from fastdiff.graphs.cache import CAPACITY
from fastdiff.guidance import GuidanceMode, GuidedModel
from fastdiff.ops import backends
from fastdiff.sampling.loop import run_loop
from support.graph_cases import GUIDANCE, METHODS, SHAPE, STOCHASTIC, Inputs, Model, model_of, sampler_of
from support.graph_emulator import EmulatedGraph, RefuseSyncs, poison, storages, values_unreadable
from support.oracle import INTERPRETED, assert_same_bits

pytestmark = pytest.mark.skipif(
    backends.extension is None, reason="on the CPU the reference looks at its rows: needs the C++ extension"
)

MODES = ("loop", "step")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGraph]:
    """Enable emulated capture on the CPU; return the list of graphs."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph.made


def _eager(sampler: BaseSampler, model: Any, inputs: Inputs, **options: Any) -> Tensor:
    keywords = {**inputs.keywords(), **options}
    return sampler.sample(model, inputs.latents, *inputs.conditions, progress=False, **keywords).samples


def _poison(loop: CapturedLoop, graph: EmulatedGraph) -> None:
    """Poison all memory that a replay has to write before it reads."""
    graph.poison()
    for buffer in (loop._x, loop._prepared, loop._guidance, *loop._history, *loop._conditions.tensors()):
        if buffer is not None:
            poison(buffer)
    loop._row_index.fill_(len(loop.table) + 7)
    if loop._seeds is not None:
        loop._seeds.fill_(-1)


def _check(name: str, guidance: str, mode: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    fields, seeds = options.pop("fields", {}), options.pop("seeds", (1, 2))
    sampler, model = sampler_of(name, guidance, **fields), model_of(name)
    first = Inputs(0, guidance, dtype)
    loop = sampler.capture(
        model, first.latents, *first.conditions, guidance_scale=first.scale, mode=mode, **options
    )  # fmt: skip
    graph = EmulatedGraph.made[-1]
    for seed in seeds:
        inputs = Inputs(seed, guidance, dtype)
        expected = _eager(sampler, model, inputs, **options)
        assert not expected.isnan().any()
        for _ in range(2):
            _poison(loop, graph)
            given = inputs.latents.clone(), *inputs.conditions
            assert_same_bits([loop.replay(*given, **inputs.keywords())], [expected])
            assert torch.equal(given[0], inputs.latents), "the latents are the caller's"
    assert graph.replays == 2 * len(seeds) * (1 if mode == "loop" else len(sampler.table))


# --- The bits of the eager loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_captured_loop_matches_eager_loop_bitwise(name: str, emulated: list[EmulatedGraph]) -> None:
    # All pairs of the two ways with the ways of guidance would be eight times as many; each way meets every kind.
    i = list(METHODS).index(name)
    _check(name, GUIDANCE[i % 4], MODES[i // 4 % 2])
    _check(name, GUIDANCE[(i + 1) % 4], MODES[(i // 4 + 1) % 2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", ["ddpm-learned_range", "ddpm-learned", "heun-churn", "multistep-dpmsolver++-3"])
def test_captured_loop_thresholds_and_scales_like_eager_loop(
    name: str, guidance: str, mode: str, emulated: list[EmulatedGraph]
) -> None:
    _check(name, guidance, mode, fields={"thresholding": True, "sample_max_value": 1.5})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    ("dtype", "model_dtype"),
    [
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, None),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_captured_loop_converts_like_eager_loop(
    dtype: torch.dtype, model_dtype: torch.dtype | None, guidance: str, mode: str, emulated: list[EmulatedGraph]
) -> None:
    _check("multistep-sde-dpmsolver++-2", guidance, mode, dtype, model_dtype=model_dtype)


def test_captured_loop_keeps_layouts(emulated: list[EmulatedGraph]) -> None:
    for latents in (
        Inputs(1).latents.contiguous(memory_format=torch.channels_last),
        Inputs(1).latents.transpose(2, 3),
        Inputs(1).latents[:1].expand(SHAPE),
        Inputs(1).latents[:0],
    ):
        sampler, model = sampler_of("ancestral-1.0"), Model()
        seeds = list(range(len(latents)))
        expected = sampler.sample(model, latents, seeds=seeds, progress=False).samples
        got = sampler.sample(model, latents, seeds=seeds, cuda_graph=True).samples
        assert_same_bits([got], [expected])
        assert got.stride() == expected.stride()


@pytest.mark.skipif(not INTERPRETED or bool(backends.why_missing("triton")), reason="needs Triton's interpreter")
def test_captured_loop_by_triton_matches_eager_loop_bitwise(emulated: list[EmulatedGraph]) -> None:
    # The interpreter takes 20 ms and more a launch.
    _check("multistep-sde-dpmsolver++-2", "batched", "loop", seeds=(1,), fields={"steps": 2}, backend="triton")


@pytest.mark.parametrize("mode", MODES)
def test_captured_loop_starts_from_init_noise_sigma(mode: str, emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("euler-churn"), Model(), Inputs(3)
    object.__setattr__(sampler.table, "initial_scale", 1.37)
    expected = _eager(sampler, model, inputs)
    assert_same_bits([_eager(sampler, model, inputs, cuda_graph=mode)], [expected])


@pytest.mark.parametrize("mode", MODES)
def test_captured_digits_equal_eager_loop(
    mode: str, emulated: list[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr("fastdiff.digits.unet._check_inputs", lambda *_: None)  # on the CPU it looks at the labels
    model, sampler = load_digit_unet(), sampler_of("multistep-dpmsolver++-2", "batched")
    for classes in ([3, 7], [0, 9]):
        latents, labels = torch.randn(2, *IMAGE_SHAPE), torch.tensor(classes)
        given = model, latents, labels, torch.full_like(labels, NULL_CLASS)
        expected = sampler.sample(*given, guidance_scale=3.0, progress=False).samples
        assert_same_bits([sampler.sample(*given, guidance_scale=3.0, cuda_graph=mode).samples], [expected])
    assert len(emulated) == 1


# --- What is read anew, and what is not ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_captured_loop_reads_only_buffers_table_and_weights(
    guidance: str, mode: str, emulated: list[EmulatedGraph]
) -> None:
    sampler = sampler_of("ddpm-learned_range", guidance, thresholding=True)
    model, inputs = model_of("learned"), Inputs(0, guidance)
    kwargs = {"shift": torch.ones(SHAPE[1:])} if guidance == "none" else {}
    loop = sampler.capture(
        model, inputs.latents, *inputs.conditions, guidance_scale=inputs.scale, mode=mode, model_kwargs=kwargs
    )
    tables = loop._coefficients, loop._prediction_coefficients
    known = storages([*loop._buffers, *tables, *model.parameters()])  # type: ignore[list-item]
    read = storages(emulated[-1].reads())
    assert read <= known, "a replay depends on what nobody fills"
    callers = storages([inputs.latents, inputs.seeds, *inputs.conditions, *kwargs.values()])
    assert not read & callers, "a replay reads the caller's memory"


@pytest.mark.parametrize("mode", MODES)
def test_captured_loop_sees_in_place_weight_changes(mode: str, emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("ddim-0.0"), Model(), Inputs(1)
    _eager(sampler, model, inputs, cuda_graph=mode)
    with torch.no_grad():
        model.gains.mul_(0.5)
    assert_same_bits([_eager(sampler, model, inputs, cuda_graph=mode)], [_eager(sampler, model, inputs)])
    assert len(emulated) == 1
    model.gains = nn.Parameter(model.gains.detach() * 3)  # elsewhere in memory: another graph
    assert_same_bits([_eager(sampler, model, inputs, cuda_graph=mode)], [_eager(sampler, model, inputs)])
    assert len(emulated) == 2


@pytest.mark.parametrize("mode", MODES)
def test_captured_loop_accepts_nested_keyword_tensors(mode: str, emulated: list[EmulatedGraph]) -> None:
    def model(x: Tensor, t: Tensor, *, added: dict[str, Any], gain: float) -> Tensor:
        return gain * torch.tanh(x + added["shift"] + added["list"][0])

    sampler, inputs = sampler_of("ddim-1.0"), Inputs(1)

    def kwargs(shift: float, gain: float = 0.5) -> dict[str, Any]:
        return {"added": {"shift": torch.full((), shift), "list": [torch.full((1,), 2 * shift)]}, "gain": gain}

    for shift, gain, graphs in ((0.1, 0.5, 1), (0.7, 0.5, 1), (0.7, 0.25, 2), (0.2, 0.5, 2)):
        expected = _eager(sampler, model, inputs, model_kwargs=kwargs(shift, gain))
        assert_same_bits(
            [_eager(sampler, model, inputs, model_kwargs=kwargs(shift, gain), cuda_graph=mode)], [expected]
        )
        assert len(emulated) == graphs
    loop = sampler.capture(model, inputs.latents, mode=mode, model_kwargs=kwargs(0.1))
    with pytest.raises(
        ValueError, match=r"replay: model_kwargs\['gain'\] is 0.25, expected 0.5, which the graph holds"
    ):
        loop.replay(inputs.latents, model_kwargs=kwargs(0.1, 0.25))
    with pytest.raises(ValueError, match=r"model_kwargs\['added'\] is missing"):
        loop.replay(inputs.latents)
    with pytest.raises(ValueError, match=r"model_kwargs\['more'\] is given"):
        loop.replay(inputs.latents, model_kwargs={**kwargs(0.1), "more": 1})
    with pytest.raises(TypeError, match=r"model_kwargs\['added'\]\['shift'\] is a float, expected a tensor"):
        loop.replay(inputs.latents, model_kwargs={"added": {"shift": 0.1, "list": [torch.zeros(1)]}, "gain": 0.5})


def test_captured_loop_accepts_guidance_scale_per_sample(emulated: list[EmulatedGraph]) -> None:
    sampler, model, first, inputs = sampler_of("ddim-0.0"), Model(), Inputs(0, "batched"), Inputs(1, "batched")
    loop = sampler.capture(model, first.latents, *first.conditions, guidance_scale=torch.ones(SHAPE[0]))
    scales = torch.tensor([1.5, 1.0, -2.0])
    together = loop.replay(inputs.latents, *inputs.conditions, guidance_scale=scales)
    eager = _eager(sampler, model, inputs, guidance_scale=scales)
    assert_same_bits([together], [eager])
    for i, scale in ((0, 1.5), (2, -2.0)):
        alone = _eager(sampler, model, inputs, guidance_scale=scale)
        assert_same_bits([together[i]], [alone[i]])
    # A number goes for all.
    every = loop.replay(inputs.latents, *inputs.conditions, guidance_scale=1.5)
    assert_same_bits([every], [_eager(sampler, model, inputs, guidance_scale=1.5)])
    with pytest.raises(ValueError, match=r"guidance_scale is a tensor of shape \[2\], expected shape \[3\]"):
        loop.replay(inputs.latents, *inputs.conditions, guidance_scale=torch.ones(2))


def test_guidance_scale_of_one_is_a_separate_graph(emulated: list[EmulatedGraph]) -> None:
    sampler, model = sampler_of("ddim-0.0", "batched"), Model()
    for i, (scale, graphs) in enumerate(((2.0, 1), (7.5, 1), (1.0, 2), (-1.0, 2), (1.0, 2))):
        inputs = Inputs(i, "batched")
        inputs.scale = scale
        assert_same_bits([_eager(sampler, model, inputs, cuda_graph=True)], [_eager(sampler, model, inputs)])
        assert len(emulated) == graphs
    loop = sampler.capture(model, inputs.latents, *inputs.conditions, guidance_scale=1.0)
    with pytest.raises(
        ValueError, match=r"guidance_scale is 2, expected 1, for the loop was captured without guidance"
    ):
        loop.replay(inputs.latents, *inputs.conditions, guidance_scale=2.0)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_missing_seeds_come_from_torch_generator(name: str, emulated: list[EmulatedGraph]) -> None:
    sampler, model, latents = sampler_of(name), Model(), Inputs(1).latents

    def drawn() -> Tensor:
        return sampler.sample(model, latents, cuda_graph=True).samples

    torch.manual_seed(5)
    first, second = drawn(), drawn()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert_same_bits([drawn(), drawn()], [first, second])


def test_next_replay_keeps_result(emulated: list[EmulatedGraph]) -> None:
    sampler, model = sampler_of("ddim-0.0"), Model()
    first = _eager(sampler, model, Inputs(1), cuda_graph=True)
    before = first.clone()
    _eager(sampler, model, Inputs(2), cuda_graph=True)
    assert_same_bits([first], [before])


# --- The emulation sees faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_emulation_detects_constant_step_index(
    mode: str, emulated: list[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_row(self: CapturedLoop) -> None:
        assert self._model is not None
        # The host counts instead of the device.
        output, _, _ = self._model(self._x, self._timesteps[taken[0]], self._prepared)
        ops.step(self._x, output, self._coefficients, taken[0], out=(self._x,))
        taken[0] = (taken[0] + 1) % len(self.table)

    sampler, model = sampler_of("ddim-0.0"), Model()
    monkeypatch.setattr(CapturedLoop, "_take_row", take_row)
    monkeypatch.setattr("fastdiff.graphs.captured.WARM_UPS", 0)
    taken = [0]
    loop = sampler.capture(model, Inputs(0).latents, mode=mode)
    got, expected = loop.replay(Inputs(1).latents), _eager(sampler, model, Inputs(1))
    # All rows in one graph may count on the host: each is recorded apart. One graph for any row may not.
    assert torch.equal(got, expected) == (mode == "loop")


def test_emulation_detects_constant_guidance_scale(
    emulated: list[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = CapturedLoop._take_row

    def take_row(self: CapturedLoop) -> None:
        monkeypatch.setattr(self, "_guidance", self._captured_scale)  # the number instead of the tensor
        honest(self)

    sampler, model, first, inputs = sampler_of("ddim-0.0"), Model(), Inputs(0, "batched"), Inputs(1, "batched")
    monkeypatch.setattr(CapturedLoop, "_take_row", take_row)
    loop = sampler.capture(model, first.latents, *first.conditions, guidance_scale=first.scale)
    loop._guidance = None  # nothing to fill
    got = loop.replay(inputs.latents, *inputs.conditions, guidance_scale=inputs.scale)
    assert not torch.equal(got, _eager(sampler, model, inputs))
    assert_same_bits([got], [_eager(sampler, model, inputs, guidance_scale=first.scale)])
    # A number is an argument of the step: the graph reads no memory of anyone else's for it.
    assert storages(emulated[-1].reads()) <= storages(loop._buffers) | storages(
        [loop._coefficients, *model.parameters()]
    )


def _conditional(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x * x.max().item(),
        _conditional,
        lambda x: x * float(x[0, 0, 0, 0]),
        lambda x: x + x[x > 0].sum(),
        lambda x: x + len(x.nonzero()),
        lambda x: x + torch.randn_like(x),
        lambda x: nn.functional.dropout(x, 0.5, training=True),
        lambda x: x.cpu() * 0.5,
        lambda x: x * torch.tensor(0.5),
        lambda x: x * sum(x.flatten().tolist()),
        lambda x: x + torch.from_numpy(x.numpy()),
    ],
    ids=["item", "if", "float", "mask", "nonzero", "randn", "dropout", "cpu", "tensor", "tolist", "numpy"],
)
def test_capture_refuses_unsupported_operations(
    fault: Callable[[Tensor], Tensor], emulated: list[EmulatedGraph]
) -> None:
    sampler = sampler_of("ddim-0.0")
    remedy = "take host syncs, random draws and shapes that depend on values out of the model"
    with pytest.raises(
        RuntimeError, match=rf"sample: model cannot be captured as a CUDA graph \(operation.*; {remedy}"
    ):
        sampler.sample(lambda x, t: fault(x), Inputs(0).latents, cuda_graph=True)
    assert len(sampler._graphs) == 0
    assert sampler.sample(lambda x, t: fault(x), Inputs(0).latents, progress=False).steps == 5


# --- Callbacks, results, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm-learned_range", "heun", "multistep-dpmsolver++-2"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_callback_of_captured_steps_gets_arguments_of_eager_loop(
    name: str, guidance: str, emulated: list[EmulatedGraph]
) -> None:
    sampler, model, inputs = sampler_of(name, guidance), model_of(name), Inputs(1, guidance)
    told: dict[str, list[StepInfo]] = {"eager": [], "step": []}
    expected = _eager(sampler, model, inputs, callback=told["eager"].append)
    got = _eager(sampler, model, inputs, callback=told["step"].append, cuda_graph="step")
    assert_same_bits([got], [expected])
    for a, b in zip(told["step"], told["eager"], strict=True):
        assert (a.index, a.total, a.timestep) == (b.index, b.total, b.timestep)
        assert_same_bits([a.sample, a.model_output], [b.sample, b.model_output])


def test_callback_sees_output_of_model_that_returns_input(emulated: list[EmulatedGraph]) -> None:
    sampler, inputs = sampler_of("ddim-0.0"), Inputs(1)
    told: dict[str, list[StepInfo]] = {"eager": [], "step": []}
    _eager(sampler, lambda x, t: x, inputs, callback=told["eager"].append)
    _eager(sampler, lambda x, t: x, inputs, callback=told["step"].append, cuda_graph="step")
    for a, b in zip(told["step"], told["eager"], strict=True):
        assert_same_bits([a.sample, a.model_output], [b.sample, b.model_output])


def test_callback_can_stop_captured_steps_and_may_not_replay_them(emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("ddim-0.0"), Model(), Inputs(1)
    result = sampler.sample(model, inputs.latents, callback=lambda info: info.index < 2, cuda_graph="step")
    assert result.steps == 3
    loop = sampler.capture(model, inputs.latents, mode="step")
    with pytest.raises(RuntimeError, match="replay: callback replays the loop that calls it"):
        loop.replay(inputs.latents, callback=lambda info: loop.replay(inputs.latents))
    assert_same_bits([loop.replay(inputs.latents)], [_eager(sampler, model, inputs)])


def test_result_of_captured_loop_has_time(emulated: list[EmulatedGraph]) -> None:
    result = sampler_of("heun").sample(Model(), Inputs(1).latents, cuda_graph=True)
    assert result.steps == 9
    assert result.processing_time > 0
    assert result.model_time != result.model_time, "NaN: a graph does not tell"
    assert result.step_share != result.step_share
    again = pickle.loads(pickle.dumps(result))
    assert again.processing_time == result.processing_time


def test_samples_of_captured_loop_are_checked(emulated: list[EmulatedGraph]) -> None:
    sampler, latents = sampler_of("ddim-0.0"), Inputs(1).latents
    with pytest.raises(ValueError, match="samples became NaN or infinite"):
        sampler.sample(lambda x, t: x * float("nan"), latents, cuda_graph=True)
    result = sampler.sample(lambda x, t: x * float("nan"), latents, cuda_graph=True, check_finite=False)
    assert bool(result.samples.isnan().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph": "whole"}, "cuda_graph is 'whole', expected one of loop, step"),
        ({"callback": print}, "callback is given, and cuda_graph='loop' .* choose cuda_graph='step'"),
        ({"progress": True}, "progress is given, and cuda_graph='loop' .* choose cuda_graph='step'"),
        ({"generator": torch.Generator()}, r"generator is given beside cuda_graph.*spawn_seeds"),
        ({"check_finite": True}, "check_finite is True beside cuda_graph"),
        ({"seeds": [1, 2]}, "seeds holds 2, expected one for each of 3 samples"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sample_refuses_options_unsupported_by_graphs(
    options: dict[str, Any], message: str, emulated: list[EmulatedGraph]
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of("ancestral-1.0").sample(Model(), Inputs(0).latents, **{"cuda_graph": True, **options})
    assert not emulated


def test_sample_refuses_graphs_without_cuda() -> None:
    for call in (sampler_of("ddim-0.0").sample, sampler_of("ddim-0.0").capture):
        options = {"cuda_graph": True} if call.__name__ == "sample" else {}
        with pytest.raises(
            ValueError, match=r"sample: latents is on cpu, expected a CUDA device.*leave out cuda_graph"
        ):
            call(Model(), Inputs(0).latents, **options)


def test_replay_refuses_inputs_of_other_shape_or_dtype(emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("ddim-1.0", "batched"), Model(), Inputs(0, "batched")
    loop = sampler.capture(model, inputs.latents, *inputs.conditions, guidance_scale=2.0)
    expected = loop.replay(inputs.latents, *inputs.conditions, seeds=inputs.seeds)
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, r"latents has shape \[2, 2, 4, 5\]", (inputs.latents[:2], *inputs.conditions), {}),
        (ValueError, r"latents has shape .*float64", (inputs.latents.double(), *inputs.conditions), {}),
        (TypeError, r"latents is a list", ([1.0], *inputs.conditions), {}),
        (TypeError, r"prompt_embeds is a NoneType, expected a tensor", (inputs.latents,), {}),
        (ValueError, r"guidance_scale is a tensor of shape \[3\], expected a number",
         (inputs.latents, *inputs.conditions), {"guidance_scale": torch.ones(3)}),
        (ValueError, "one for each of 3", (inputs.latents, *inputs.conditions), {"seeds": [1]}),
        (ValueError, "cuda_graph='step'", (inputs.latents, *inputs.conditions), {"callback": print}),
        (ValueError, r"model_kwargs\['shift'\] is given", (inputs.latents, *inputs.conditions),
         {"model_kwargs": {"shift": 1}}),
    ]  # fmt: skip
    for kind, message, given, options in refused:
        with pytest.raises(kind, match=message):
            loop.replay(*given, **options)
    assert_same_bits([loop.replay(inputs.latents, *inputs.conditions, seeds=inputs.seeds)], [expected])


# --- The loops that a sampler keeps ----------------------------------------------------------------------------------


def test_sampler_caches_loop_per_input_signature(emulated: list[EmulatedGraph]) -> None:
    sampler, model = sampler_of("ddim-1.0", "batched"), Model()
    plain, guided = Inputs(0), Inputs(0, "batched")

    def graphs(inputs: Inputs, **options: Any) -> int:
        assert_same_bits(
            [_eager(sampler, model, inputs, **{"cuda_graph": True, **options})],
            [_eager(sampler, model, inputs, **{k: v for k, v in options.items() if k != "cuda_graph"})],
        )
        return len(emulated)

    assert [graphs(plain), graphs(plain), graphs(Inputs(4))] == [1, 1, 1]
    assert [graphs(guided), graphs(Inputs(5, "batched"))] == [2, 2]
    assert [graphs(plain, cuda_graph="step"), graphs(plain, cuda_graph="loop")] == [3, 3]
    assert [graphs(plain, model_dtype=torch.float64), graphs(plain)] == [4, 4]
    sampler.clear_graphs()
    assert len(sampler._graphs) == 0
    assert graphs(plain) == 5
    sampler.set_timesteps(3)
    assert len(sampler._graphs) == 0
    assert graphs(plain) == 6


def test_sampler_cache_evicts_least_recently_used_loop(emulated: list[EmulatedGraph]) -> None:
    sampler, models = sampler_of("ddim-0.0"), [Model() for _ in range(CAPACITY + 1)]
    for model in (*models[:CAPACITY], models[0], models[CAPACITY]):
        _eager(sampler, model, Inputs(0), cuda_graph=True)
    assert len(sampler._graphs) == CAPACITY
    _eager(sampler, models[0], Inputs(0), cuda_graph=True)
    assert len(emulated) == CAPACITY + 1
    _eager(sampler, models[1], Inputs(0), cuda_graph=True)
    assert len(emulated) == CAPACITY + 2


def test_sampler_cache_does_not_keep_models_alive(emulated: list[EmulatedGraph]) -> None:
    sampler, latents = sampler_of("ddim-0.0"), Inputs(0).latents
    model = Model()
    sampler.sample(model, latents, cuda_graph=True)
    sampler.sample(model.forward, latents, cuda_graph=True)  # a method, another object at each look
    sampler.sample(model.forward, latents, cuda_graph=True)
    assert len(emulated) == 2
    assert len(sampler._graphs) == 2
    del model
    gc.collect()
    assert len(sampler._graphs) == 0
    model = Model()
    loop = sampler.capture(model, latents)
    expected = sampler.sample(model, latents, progress=False).samples
    del model
    gc.collect()
    assert_same_bits([loop.replay(latents)], [expected])


def test_copies_of_sampler_drop_captured_loops(emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("ancestral-1.0"), Model(), Inputs(0)
    expected = _eager(sampler, model, inputs, cuda_graph=True)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert len(other._graphs) == 0
        assert_same_bits([_eager(other, model, inputs, cuda_graph=True)], [expected])
    assert len(sampler._graphs) == 1


def test_threads_replay_one_at_a_time(emulated: list[EmulatedGraph]) -> None:
    sampler, model = sampler_of("ancestral-1.0"), Model()
    expected = [_eager(sampler, model, Inputs(i)) for i in range(4)]
    results: list[list[Tensor]] = [[] for _ in expected]

    def caller(i: int) -> None:
        for _ in range(3):
            results[i].append(_eager(sampler, model, Inputs(i), cuda_graph="step"))

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(len(expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert_same_bits(got, [wanted] * 3)
    assert len(emulated) == 1


def test_loops_captured_in_inference_mode_work_outside(emulated: list[EmulatedGraph]) -> None:
    sampler, model, inputs = sampler_of("ancestral-1.0"), Model(), Inputs(0)
    with torch.inference_mode():
        _eager(sampler, model, inputs, cuda_graph=True)
    assert_same_bits([_eager(sampler, model, inputs, cuda_graph=True)], [_eager(sampler, model, inputs)])
    with torch.inference_mode():
        _eager(sampler, model, inputs, cuda_graph=True)
    assert len(emulated) == 1


# --- The eager loop waits for nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "generator"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("thresholding", [True, False], ids=["thresholding", "plain"])
def test_eager_loop_reads_no_value(thresholding: bool, guidance: str, seeded: bool) -> None:
    for name in METHODS:
        sampler, inputs = sampler_of(name, guidance, thresholding=thresholding), Inputs(1, guidance)
        model = GuidedModel(
            model_of(name),
            *inputs.conditions,
            guidance_scale=inputs.scale,
            mode=GuidanceMode.parse(sampler.config.guidance_mode),
            channels=2 if "learned" in name else 1,
            check_finite=False,
        )
        generator = None if seeded else torch.Generator().manual_seed(0)
        with torch.no_grad(), values_unreadable(), RefuseSyncs():
            stepper = sampler.stepper(seeds=inputs.seeds if seeded else None)
            result = run_loop(
                model, stepper, sampler.timesteps, inputs.latents, generator=generator, progress=False,
                check_finite=False,
            )  # fmt: skip
        if seeded:
            assert_same_bits([result.samples], [_eager(sampler, model_of(name), inputs)])
        assert not result.samples.isnan().any()


def test_eager_loop_that_reads_value_is_detected() -> None:
    sampler, inputs = sampler_of("ddim-0.0"), Inputs(1)
    with (
        torch.no_grad(),
        values_unreadable(),
        RefuseSyncs(),
        pytest.raises(RuntimeError, match="waits for the device"),
    ):
        run_loop(GuidedModel(Model()), sampler.stepper(), sampler.timesteps, inputs.latents, progress=False)
