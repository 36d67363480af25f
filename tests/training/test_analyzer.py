# SPDX-License-Identifier: MIT
"""Analysis of models: counts against formulas, and the table of timed samplers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from fastdiff.digits.unet import SelfAttention
from fastdiff.digits.workload import digits_workload
from fastdiff.training import DiffusionAnalyzer, DiffusionConfig, DiffusionModel

pytestmark = pytest.mark.filterwarnings("ignore:DiffusionConfig:UserWarning")  # sizes below the usual ones


def test_operations_and_memory_follow_from_the_shapes():
    batch, channels, side = 3, 8, 4
    attending = SelfAttention(channels, heads=2)
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1), attending, nn.Flatten(), nn.Linear(channels * side**2, 5)
    )
    analysis = DiffusionAnalyzer().analyze_model(model, (torch.randn(batch, 2, side, side),))
    places = side**2
    convolution = 2 * batch * places * channels * 2 * 9
    # Query by key and weights by value, each a product of places × size by size × places in every head.
    attention = 2 * (2 * batch * 2 * places * places * (channels // 2))
    projections = 2 * batch * places * channels * (3 * channels + channels)
    linear = 2 * batch * channels * places * 5
    own = {row.name: row.flops for row in analysis.layers}
    assert (own["0"], own["1"], own["1.qkv"] + own["1.out"], own["3"]) == (convolution, attention, projections, linear)
    assert analysis.flops == convolution + attention + projections + linear
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (analysis.parameters, analysis.parameter_bytes, analysis.batch_size) == (count, 4 * count, batch)
    assert "(model)" not in str(analysis)


def test_bytes_kept_for_backward_are_the_inputs_of_the_layers():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    analysis = DiffusionAnalyzer().analyze_model(model, {"input": torch.randn(5, 8)})
    # The input, and the output of the rectifier, which is the second layer's input too.
    assert analysis.backward_bytes == 5 * (8 + 16) * 4
    assert analysis.training_bytes == 4 * analysis.parameter_bytes + analysis.backward_bytes


def test_analysis_leaves_model_and_generator_as_they_are():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    analysis = DiffusionAnalyzer().analyze_model(model, (torch.randn(2, 2, 3, 3, generator=torch.Generator()),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False]
    assert analysis.buffer_bytes == 4 * 4 * 2 + 8  # running mean and variance, and the count of batches


class _Counting(nn.Module):
    """A layer that is called by two containers, noise, and a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4))
        self.second = nn.Sequential(self.first[0], nn.Linear(4, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.second(self.first(x + torch.randn_like(x)))


def test_shared_layers_buffers_and_generators_are_counted_and_kept():
    model, state = _Counting(), torch.get_rng_state()
    inputs = torch.randn(1, 4, generator=torch.Generator())
    analysis = DiffusionAnalyzer().analyze_model(model, (inputs,))
    assert {row.name: row.flops for row in analysis.layers} == {"first.0": 2 * 2 * 16, "second.1": 2 * 32}
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.calls) == 0
    with pytest.raises(TypeError, match="analyze_model: inputs is a Tensor"):
        DiffusionAnalyzer().analyze_model(model, inputs)


def test_model_of_a_configuration_needs_no_inputs():
    config = DiffusionConfig(image_size=8, hidden_size=8, num_layers=2, num_heads=2, num_res_blocks=1)
    model, analyzer = DiffusionModel(config), DiffusionAnalyzer()
    one, two = analyzer.analyze_model(model), analyzer.analyze_model(model, batch_size=2)
    assert two.flops == 2 * one.flops > 0
    assert sum(row.flops for row in two.layers) == two.flops
    assert sum(row.parameters for row in two.layers) == two.parameters
    assert min(row.flops for row in two.layers) >= 0
    with pytest.raises(TypeError, match="analyze_model: model is a Linear without inputs"):
        analyzer.analyze_model(nn.Linear(2, 2))
    benchmark = analyzer.benchmark_sampling(model, steps=2)
    assert [row.sampler for row in benchmark.rows] == ["ddim", "dpmsolver++", "unipc"]


def test_benchmark_has_a_row_and_a_line_for_each_sampler():
    analyzer, workload = DiffusionAnalyzer(), digits_workload(3, features=False)
    benchmark = analyzer.benchmark_sampling(workload, ("ddim", "euler"), (2, 1), rounds=2)
    expected = [(sampler, count) for sampler in ("ddim", "euler") for count in (1, 2)]
    assert [(row.sampler, row.steps) for row in benchmark.rows] == expected
    for row in benchmark.rows:
        assert row.seconds > 0
        assert row.milliseconds_per_step == pytest.approx(1e3 * row.seconds / row.steps)
        assert row.images_per_second == pytest.approx(3 / row.seconds)
    assert str(benchmark).count("\n") == 1 + len(benchmark.rows)
    pytest.importorskip("matplotlib")
    lines = [line.get_ydata() for axis in benchmark.plot().axes for line in axis.get_lines()]
    seconds = [row.seconds for row in benchmark.rows]
    assert [list(line) for line in lines[:2]] == [seconds[:2], seconds[2:]]
    with pytest.raises(ValueError, match="benchmark_sampling: methods is 'magic'"):
        analyzer.benchmark_sampling(workload, ("magic",))
