# SPDX-License-Identifier: MIT
"""Model calls with and without guidance: output types, conditions, refusals."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.guidance import GuidanceMode, GuidedModel, unwrap

T = torch.tensor(7)
X = torch.randn(3, 2, 4)
PROMPT, NEGATIVE = torch.randn(3, 5), torch.randn(3, 5)


class Recorder:
    """Model that combines all its arguments, sample by sample, and records its calls."""

    def __init__(self, channels: int = 1) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]] = []
        self.channels = channels

    def __call__(self, x: Tensor, t: Tensor, embeds: Tensor | None = None, **kwargs: Any) -> Tensor:
        self.calls.append((x, t, embeds, kwargs))
        assert t.shape == (x.shape[0],)
        shift = 0.0 if embeds is None else embeds.sum(1)[:, None, None]
        mixed = x * t[:, None, None] + shift
        return torch.cat([mixed, mixed.abs() + 1][: self.channels], dim=1)


def guided(model: Any, **options: Any) -> GuidedModel:
    return GuidedModel(
        model, **{"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "guidance_scale": 7.5, **options}
    )


# --- How often, and with what -----------------------------------------------------------------------------------------


@given(batch=st.integers(1, 4), channels=st.integers(1, 2), seed=st.integers(0, 2**32 - 1))
def test_doubled_call_equals_two_calls(batch: int, channels: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, 4, generator=gen)
    embeds = {
        "prompt_embeds": torch.randn(batch, 5, generator=gen),
        "negative_prompt_embeds": torch.randn(batch, 5, generator=gen),
    }
    batched, sequential = Recorder(channels), Recorder(channels)
    a = guided(batched, **embeds, channels=channels)(x, T)
    b = guided(sequential, **embeds, channels=channels, mode=GuidanceMode.SEQUENTIAL)(x, T)
    assert [call[0].shape[0] for call in batched.calls] == [2 * batch]
    assert [call[0].shape[0] for call in sequential.calls] == [batch, batch]
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_conditional_and_unconditional_outputs_are_not_swapped() -> None:
    for mode in GuidanceMode:
        output, uncond, variance = guided(Recorder(), mode=mode)(X, T)
        assert torch.equal(output, X * 7 + PROMPT.sum(1)[:, None, None])
        assert torch.equal(uncond, X * 7 + NEGATIVE.sum(1)[:, None, None])
        assert variance is None


@pytest.mark.parametrize("mode", GuidanceMode)
@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"prompt_embeds": None, "negative_prompt_embeds": None}])
def test_without_guidance_model_is_called_once_on_batch(mode: GuidanceMode, options: dict[str, Any]) -> None:
    model = Recorder()
    output, uncond, variance = guided(model, mode=mode, **options)(X, T)
    assert uncond is None
    assert variance is None
    ((x, _, embeds, _),) = model.calls
    assert x is X
    assert embeds is options.get("prompt_embeds", PROMPT)
    assert output.shape == X.shape


def test_scale_of_zero_is_guidance() -> None:
    assert guided(Recorder(), guidance_scale=0.0)(X, T)[1] is not None


def test_sequential_mode_works_without_negative_condition() -> None:
    model = Recorder()
    output, uncond, _ = guided(model, negative_prompt_embeds=None, mode=GuidanceMode.SEQUENTIAL)(X, T)
    assert [call[2] for call in model.calls] == [None, PROMPT]
    assert torch.equal(uncond, X * 7)
    assert not torch.equal(output, uncond)


def test_keyword_arguments_are_passed_to_every_call() -> None:
    model = Recorder()
    guided(model, mode=GuidanceMode.SEQUENTIAL, model_kwargs={"return_dict": False})(X, T)
    assert [call[3] for call in model.calls] == [{"return_dict": False}] * 2


@pytest.mark.parametrize("mode", GuidanceMode)
def test_learned_variance_is_second_half_of_conditional_channels(mode: GuidanceMode) -> None:
    output, uncond, variance = guided(Recorder(channels=2), channels=2, mode=mode)(X, T)
    assert torch.equal(output, X * 7 + PROMPT.sum(1)[:, None, None])
    assert torch.equal(uncond, X * 7 + NEGATIVE.sum(1)[:, None, None])
    assert torch.equal(variance, output.abs() + 1)


# --- What a model returns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y,),
        lambda y: (y, "more"),
        lambda y: [y],
        lambda y: {"sample": y},
        lambda y: OrderedDict(other=None, sample=y),
        lambda y: SimpleNamespace(sample=y),
    ],
    ids=["tensor", "tuple", "longer tuple", "list", "dict", "ordered dict", "object"],
)
def test_every_supported_output_type_is_accepted(wrap: Any) -> None:
    y = torch.randn(3, 2, 4)
    assert unwrap(wrap(y)) is y
    output, _, _ = GuidedModel(lambda x, t: wrap(y))(X, T)
    assert torch.equal(output, y)


@pytest.mark.parametrize(
    "wrong",
    [None, 1.0, "sample", (), {}, {"out": X}, (None, X), SimpleNamespace(sample=3)],
    ids=lambda wrong: type(wrong).__name__,
)
def test_other_output_types_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^sample: model returned a \w+, expected a tensor, .+; return "):
        GuidedModel(lambda x, t: wrong)(X, T)


@pytest.mark.parametrize(
    ("shape", "channels", "remedy"),
    [
        ((3, 2, 5), 1, "return one output like the sample"),
        ((2, 2, 4), 1, "return one output like the sample"),
        ((3, 4, 4), 1, "set variance_type='learned_range'"),
        ((3, 2, 4), 2, "return the variance as the second half of the channels"),
    ],
)
def test_wrong_shape_has_matching_remedy(shape: tuple[int, ...], channels: int, remedy: str) -> None:
    expected = [3, 2 * channels, 4]
    with pytest.raises(ValueError, match=r"^sample: model returned shape .+, expected .+; ") as raised:
        GuidedModel(lambda x, t: torch.zeros(shape), channels=channels)(X, T)
    assert f"returned shape {list(shape)}, expected {expected}; {remedy}" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("mode", GuidanceMode)
def test_non_finite_output_is_refused_unless_check_is_off(
    value: float, name: str, half: int, mode: GuidanceMode
) -> None:
    condition = (NEGATIVE, PROMPT)[half]

    def model(x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        bad = (embeds == condition[1]).all(1)
        return torch.where(bad[:, None, None], value, torch.zeros_like(x))

    with pytest.raises(ValueError, match=rf"^sample: model returned {name} at timestep 7, expected finite numbers; "):
        guided(model, mode=mode)(X, T)
    outputs = guided(model, mode=mode, check_finite=False)(X, T)
    assert not all(bool(torch.isfinite(output).all()) for output in outputs[:2])


def test_output_of_other_precision_is_converted() -> None:
    output, _, _ = GuidedModel(lambda x, t: x.to(torch.bfloat16))(X, T)
    assert output.dtype == X.dtype
    assert torch.equal(output, X.to(torch.bfloat16).float())


# --- What guidance needs ----------------------------------------------------------------------------------------------


def test_batched_mode_needs_negative_condition_for_labels() -> None:
    with pytest.raises(ValueError, match=r"^sample: negative_prompt_embeds is missing, expected .+; pass it, or "):
        guided(Recorder(), prompt_embeds=torch.ones(3, 5, dtype=torch.int64), negative_prompt_embeds=None)


@pytest.mark.parametrize("mode", GuidanceMode)
def test_conditions_of_two_shapes_are_refused(mode: GuidanceMode) -> None:
    with pytest.raises(ValueError, match=r"^sample: negative_prompt_embeds has shape \[3, 6\], expected \[3, 5\] "):
        guided(Recorder(), negative_prompt_embeds=torch.zeros(3, 6), mode=mode)


def test_mode_is_parsed_from_name_and_unknown_refused() -> None:
    assert GuidanceMode.parse("sequential") is GuidanceMode.SEQUENTIAL
    assert GuidanceMode.parse(GuidanceMode.BATCHED) is GuidanceMode.BATCHED
    with pytest.raises(ValueError, match="guidance_mode is 'both', expected one of batched, sequential; "):
        GuidanceMode.parse("both")
