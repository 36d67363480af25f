# SPDX-License-Identifier: MIT
"""A module's forward as a graph, on the emulation of CUDA graphs: the bits of the module for any inputs and weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.graphs import CapturedForward, recorder
from fastdiff.graphs.cache import CAPACITY
from support.graph_emulator import EmulatedGraph
from support.oracle import assert_same_bits


class Scaled(nn.Module):
    """A part whose Python numbers matter, as a LoRA's scale does, or an attention processor's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scaling = {"adapter": 0.5}
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) * self.scaling["adapter"] * self.processor.scale[0]
        return result


class Processor:
    """An object that is no module, with a number in a list."""

    def __init__(self) -> None:
        self.scale = [1.5]


class Denoiser(nn.Module):
    """Model with a timestep, a condition, options and nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Scaled()
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.runs = 0

    def forward(
        self, sample: Tensor, timestep: Any, condition: Tensor | None = None, more: Any = None, flip: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep)
        out = self.part(sample + self.shift) * torch.cos(timestep / 100).to(sample.dtype)
        if condition is not None:
            out = out + condition
        if more is not None:
            out = out * more["gain"][0]
        return (-out if flip else out), {"input": sample, "count": 3}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGraph]:
    """Enable emulated capture on the CPU; return the list of graphs."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph.made


def captured(model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(3)
    model = Denoiser() if model is None else model
    vars(model)["forward"] = CapturedForward(model)
    return model


def count(model: nn.Module) -> int:
    return len(vars(model)["forward"])


def eager(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(model).forward(model, *args, **kwargs)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Compare a call with the module's own."""
    with torch.no_grad():
        expected, others = eager(model, *args, **kwargs)
        for graph in EmulatedGraph.made:
            graph.poison()
        given = [tensor.clone() for tensor in args if isinstance(tensor, Tensor)]
        got, more = model(*args, **kwargs)
    assert_same_bits([got, more["input"]], [expected, others["input"]])
    assert more["count"] == 3
    assert_same_bits([tensor for tensor in args if isinstance(tensor, Tensor)], given)


def sample(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 6)), generator=torch.Generator().manual_seed(seed))


# --- One graph for all calls of a form -------------------------------------------------------------------------------


def test_one_graph_serves_all_timesteps_and_inputs(graphs: list[EmulatedGraph]) -> None:
    model = captured()
    for index, timestep in enumerate(torch.tensor([90, 50, 10, 0])):
        check(model, sample(index), timestep, sample(index + 9), more={"gain": [sample(index + 20, 1)]})
    assert count(model) == len(graphs) == 1
    assert graphs[0].replays == 4


@pytest.mark.parametrize("timesteps", [(90, 10), (0.5, 7.25), (torch.tensor([3, 4]), torch.tensor([9, 1]))])
def test_timestep_may_be_a_number_or_one_a_sample(graphs: list[EmulatedGraph], timesteps: tuple[Any, ...]) -> None:
    model = captured()
    for timestep in timesteps:
        value = timestep[:, None] if isinstance(timestep, Tensor) else timestep
        with torch.no_grad():
            expected = eager(model, sample(1), value)[0]
            got = model(sample(1), value)[0]
        # A number becomes float64 or int64, as in diffusers' models; the cosine here is of float32 then.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


def test_results_are_not_written_by_later_calls(graphs: list[EmulatedGraph]) -> None:
    model = captured()
    with torch.no_grad():
        first, kept = model(sample(1), torch.tensor(5)), model(sample(2), torch.tensor(4))
    before = first[0].clone(), kept[1]["input"].clone()
    with torch.no_grad():
        model(sample(3), torch.tensor(3))
    assert_same_bits([first[0], kept[1]["input"]], before)
    assert first[0].data_ptr() != kept[0].data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        ((sample(1, 4, 6), torch.tensor(5)), {}),
        ((sample(1, 6, 2).t(), torch.tensor(5)), {}),
        ((sample(1), torch.tensor(5.0)), {}),
        ((sample(1), torch.tensor(5), sample(7)), {}),
        ((sample(1), torch.tensor(5)), {"flip": True}),
    ],
    ids=["shape", "strides", "timestep dtype", "condition", "option"],
)
def test_another_form_gets_another_graph(graphs: list[EmulatedGraph], other: Any) -> None:
    model = captured()
    check(model, sample(2), torch.tensor(7))
    check(model, *other[0], **other[1])
    check(model, sample(2), torch.tensor(8))
    assert len(graphs) == 2


class Halved(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample / 2


def test_another_dtype_and_autocast_get_another_graph(graphs: list[EmulatedGraph]) -> None:
    model = captured(Halved())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for seed in (1, 2):
            with torch.no_grad():
                assert_same_bits([model(sample(seed).to(dtype))], [sample(seed).to(dtype) / 2])
    assert len(graphs) == 3
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=True):
        model(sample(1))
    assert len(graphs) == 4


def test_graphs_are_bounded_and_the_latest_are_kept(graphs: list[EmulatedGraph]) -> None:
    model = captured()
    for size in range(1, CAPACITY + 3):
        check(model, sample(1, size, 6), torch.tensor(5))
    assert count(model) == CAPACITY
    made = len(graphs)
    check(model, sample(2, CAPACITY + 2, 6), torch.tensor(5))
    assert len(graphs) == made
    check(model, sample(2, 1, 6), torch.tensor(5))
    assert len(graphs) == made + 1


# --- Weights and the state of Python ---------------------------------------------------------------------------------


def _lists(model: Any) -> None:
    model.part.processor.scale[0] = 0.25


CHANGES: dict[str, tuple[Callable[[Any], object], int]] = {
    "weights in place": (lambda m: m.part.linear.weight.data.mul_(2.0), 1),
    "weights replaced": (lambda m: setattr(m.part.linear.weight, "data", m.part.linear.weight.data * 3), 2),
    "another parameter": (lambda m: setattr(m.part.linear, "weight", nn.Parameter(torch.ones(6, 6))), 2),
    "another submodule": (lambda m: setattr(m.part, "linear", nn.Linear(6, 6)), 2),
    "another buffer": (lambda m: setattr(m, "shift", m.shift + 1), 2),
    "a number in a dict": (lambda m: m.part.scaling.update(adapter=2.0), 2),
    "a number in an object's list": (_lists, 2),
    "another object": (lambda m: setattr(m.part, "processor", Processor()), 2),
    "a hook": (lambda m: m.part.register_forward_hook(lambda _m, _i, out: out + 1), 2),
    "another class": (lambda m: setattr(m.part, "__class__", type("Other", (Scaled,), {})), 2),
    "an equal number": (lambda m: m.part.scaling.update(adapter=float("0.5")), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_module_is_seen(graphs: list[EmulatedGraph], change: str) -> None:
    model, (apply, expected) = captured(), CHANGES[change]
    check(model, sample(1), torch.tensor(5))
    with torch.no_grad():
        before = model(sample(1), torch.tensor(5))[0]
    apply(model)
    check(model, sample(1), torch.tensor(5))
    assert len(graphs) == expected
    with torch.no_grad():
        same = torch.equal(model(sample(1), torch.tensor(5))[0], before)
    assert same == (change in ("an equal number", "another class") or change == "another object")


def test_settings_in_turn_keep_their_graphs(graphs: list[EmulatedGraph]) -> None:
    model: Any = captured()
    for scale in (0.5, 2.0, 0.5, 2.0):
        model.part.scaling["adapter"] = scale
        check(model, sample(1), torch.tensor(5))
    assert len(graphs) == 2


def test_graph_of_moved_weights_is_dropped(graphs: list[EmulatedGraph]) -> None:
    model: Any = captured()
    check(model, sample(1), torch.tensor(5))
    model.part.linear.weight.data = model.part.linear.weight.data.clone()
    check(model, sample(1), torch.tensor(5))
    assert count(model) == 1


# --- Its own way -----------------------------------------------------------------------------------------------------


def test_gradients_take_the_module_itself(graphs: list[EmulatedGraph]) -> None:
    model = captured()
    model(sample(1), torch.tensor(5))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not graphs
    model.requires_grad_(False)
    model(sample(1), torch.tensor(5))
    assert len(graphs) == 1


def test_wrong_arguments_raise_the_modules_own_errors(graphs: list[EmulatedGraph]) -> None:
    model = captured()
    with torch.no_grad(), pytest.raises(TypeError, match="unknown"):
        model(sample(1), torch.tensor(5), unknown=sample(1))
    with torch.no_grad(), pytest.raises(TypeError, match="multiple values"):
        model(sample(1), torch.tensor(5), sample=sample(1))
    assert count(model) == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_no_graphs(graphs: list[EmulatedGraph], again: Callable[[Any], Any]) -> None:
    model = captured()
    check(model, sample(1), torch.tensor(5))
    other = again(model)
    assert count(other) == 0
    with torch.no_grad():
        other.part.linear.weight.mul_(2.0)
    check(other, sample(1), torch.tensor(5))
    check(model, sample(1), torch.tensor(5))
    assert len(graphs) == 2


class Waiting(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample * float(sample.mean())


class Drawing(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample + torch.randn_like(sample)


class Wrapped(nn.Module):
    def forward(self, sample: Tensor, extra: Any = None) -> Any:
        return Result(sample + 1)


class Unnamed(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] + 1


class Listed(nn.Module):
    def forward(self, samples: list[Tensor], timestep: Tensor) -> list[Tensor]:
        return [sample * timestep for sample in samples]


def test_list_of_samples_is_captured(graphs: list[EmulatedGraph]) -> None:
    model = captured(Listed())
    for seed in (1, 2):
        given = [sample(seed), sample(seed, 3, 2)]
        with torch.no_grad():
            assert_same_bits(model(given, torch.tensor(seed)), [each * seed for each in given])
    assert [graph.replays for graph in graphs] == [2]


class Result:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Waiting(), {}, r"cuda_graph: Waiting cannot be captured as a CUDA graph \(.*not permitted"),
        (Drawing(), {}, "cuda_graph: Drawing cannot be captured as a CUDA graph .*draws from a generator"),
        (Unnamed(), {}, "cuda_graph: Unnamed has a forward whose arguments have no names"),
        (Wrapped(), {}, "cuda_graph: Wrapped returns a Result, expected tensors"),
        (Wrapped(), {"extra": Processor()}, "cuda_graph: Wrapped is given extra with a Processor, expected tensors"),
    ],
    ids=["waits", "draws", "arguments", "result", "argument"],
)
def test_models_that_cannot_be_captured_are_refused(
    graphs: list[EmulatedGraph], model: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    model = captured(model)
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match=message):
        model(sample(1), **arguments)
    assert count(model) == 0


def test_device_without_graphs_is_refused() -> None:
    model = captured()
    with torch.no_grad(), pytest.raises(ValueError, match="Denoiser is called on cpu, expected a CUDA device"):
        model(sample(1), torch.tensor(5))
