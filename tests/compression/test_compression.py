# SPDX-License-Identifier: MIT
"""Quantized and pruned models: what is changed, what is not, and the report."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from fastdiff.compression import prune, quantize
from fastdiff.digits.workload import digits_workload

LOOP = {"steps": 2}
PRUNED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@pytest.fixture
def workload():
    return digits_workload(3, features=False)


def weights(model, kinds=PRUNED):
    return [module.weight.detach() for module in model.modules() if isinstance(module, kinds)]


def test_pruning_sets_the_smallest_weights_to_zero(workload):
    model = workload.model
    original = copy.deepcopy(model.state_dict())
    pruned, report = prune(model, 0.3, workload=workload, **LOOP)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert list(pruned.state_dict()) == list(original)
    before = torch.cat([weight.flatten() for weight in weights(model)])
    after = torch.cat([weight.flatten() for weight in weights(pruned)])
    gone = after == 0
    assert int(gone.sum()) == round(0.3 * len(before))
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(after[~gone], before[~gone])
    assert report.zeros == int(gone.sum()) / len(before)
    assert report.share == pytest.approx(len(before) / sum(parameter.numel() for parameter in model.parameters()))
    assert report.bytes_after == report.bytes_before == sum(4 * p.numel() for p in model.parameters())
    assert min(report.seconds_before, report.seconds_after) > 0

    from fastdiff.analysis import parse_method

    first, second = (
        replace(workload, model=either).run(parse_method("ddim"), 2).samples.double() for either in (model, pruned)
    )
    assert report.distance.mean == pytest.approx(float((first - second).square().mean((1, 2, 3)).sqrt().mean()))
    assert report.distance.mean > 0


def test_masks_outlast_training_and_pruning_again(workload):
    pruned, _ = prune(workload.model, 0.5, workload=workload, permanent=False, **LOOP)
    pruned.requires_grad_(True)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    pruned(torch.randn(2, 1, 8, 8), torch.tensor(5)).square().mean().backward()
    zeros = [weight == 0 for weight in weights(pruned)]
    optimizer.step()
    pruned(torch.randn(2, 1, 8, 8), torch.tensor(5))
    assert all(bool((weight[zero] == 0).all()) for weight, zero in zip(weights(pruned), zeros, strict=True))
    _, again = prune(pruned, 0.5, workload=replace(workload, model=pruned), **LOOP)
    assert again.zeros == pytest.approx(0.75, abs=1e-3)  # the half of what is left; rounded to whole weights


def test_structured_pruning_in_place_takes_the_weakest_channels(workload):
    model = workload.model
    before, parameters = copy.deepcopy(model), list(model.parameters())
    options = {"structured": True, "exclude": ("leave", "attention"), "inplace": True}
    changed, report = prune(model, 0.25, workload=workload, **options, **LOOP)
    assert changed is model
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    for name, module in model.named_modules():
        if not isinstance(module, PRUNED):
            continue
        old, dim = before.get_submodule(name).weight, 1 if isinstance(module, nn.ConvTranspose2d) else 0
        norms = old.transpose(0, dim).flatten(1).norm(dim=1)
        zero = (module.weight.transpose(0, dim).flatten(1) == 0).all(1)
        expected = 0 if name.startswith(("leave", "attention")) else round(0.25 * len(norms))
        assert int(zero.sum()) == expected, name
        assert expected == 0 or norms[zero].max() <= norms[~zero].min()
    assert report.layers == len(weights(model)) - 3


def test_quantization_keeps_weights_within_half_a_step(workload):
    pytest.importorskip("torchao")
    model = workload.model
    original = copy.deepcopy(model.state_dict())
    quantized, report = quantize(model, workload=workload, **LOOP)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    rows = elements = 0
    for old, new in zip(weights(model, nn.Linear), weights(quantized, nn.Linear), strict=True):
        # A row has 127 steps to its largest weight, or 127.5 where both ends are used.
        half_step = old.abs().amax(1, keepdim=True) / 127 / 2
        assert ((new.dequantize() - old).abs() <= 1.01 * half_step).all()
        assert not torch.equal(new.dequantize(), old)
        rows, elements = rows + len(old), elements + old.numel()
    # A byte for four a weight, and for each row a float32 scale and at most as much again.
    assert 3 * elements - 8 * rows <= report.bytes_before - report.bytes_after <= 3 * elements - 4 * rows
    assert 0 < report.distance.mean < 0.05 * report.spread  # 8 bits
    assert report.share == pytest.approx(elements / sum(value.numel() for value in original.values()))


def test_layers_that_share_a_weight_are_counted_once(workload):
    model = workload.model
    layers = [module for module in model.modules() if isinstance(module, PRUNED)]
    for i, layer in enumerate(layers):
        layer.weight = next(one.weight for one in layers[: i + 1] if one.weight.shape == layer.weight.shape)
    elements = {id(one): one.numel() for one in weights(model)}
    distinct = sum({id(layer.weight): layer.weight.numel() for layer in layers}.values())
    assert distinct < sum(elements.values())
    _, report = prune(model, 0.5, workload=workload, **LOOP)
    assert report.layers == len(layers)
    assert report.share == pytest.approx(distinct / sum(parameter.numel() for parameter in model.parameters()))


def test_compressed_models_are_refused_by_quantization(workload):
    pytest.importorskip("torchao")
    masked = prune(workload.model, workload=workload, permanent=False, **LOOP).model
    with pytest.raises(ValueError, match="quantize: model keeps a mask beside the weight of"):
        quantize(masked, workload=replace(workload, model=masked), **LOOP)
    small = quantize(workload.model, workload=workload, **LOOP).model
    for compress in (quantize, prune):
        with pytest.raises(ValueError, match="model has a quantized weight in"):
            compress(small, workload=replace(workload, model=small), **LOOP)


def test_half_models_are_compared_in_their_dtype():
    pytest.importorskip("diffusers")
    from fastdiff.training import DiffusionConfig, DiffusionModel

    with pytest.warns(UserWarning, match="DiffusionConfig"):  # sizes below the usual ones
        model = DiffusionModel(DiffusionConfig(image_size=8, model_channels=8, channel_mult=(1,), num_heads=1))
    half, report = prune(model.to(torch.bfloat16), 0.3, **LOOP)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert 0 < report.distance.mean < 10


def test_arguments_that_do_not_fit_are_refused(workload):
    model = workload.model
    for error, message, call in (
        (ValueError, "prune: amount is 1.0", lambda: prune(model, 1.0, workload=workload)),
        (ValueError, "prune: exclude has 'nowhere'", lambda: prune(model, exclude=("nowhere",), workload=workload)),
        (TypeError, "prune: exclude is a text", lambda: prune(model, exclude="leave", workload=workload)),
        (ValueError, "prune: workload has another model", lambda: prune(copy.deepcopy(model), workload=workload)),
        (TypeError, "prune: model is a DigitUNet", lambda: prune(model)),
        (ValueError, "quantize: model is a Conv2d", lambda: quantize(
            conv := nn.Conv2d(1, 1, 1), workload=replace(workload, model=conv))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
