# SPDX-License-Identifier: MIT
"""The digit model: its size, its call protocol, its refusals, its packaged weights and the figures beside them."""

from __future__ import annotations

import json

import pytest
import torch

from fastdiff.digits import (
    IMAGE_SHAPE,
    NULL_CLASS,
    NUM_CLASSES,
    WEIGHTS_PATH,
    DigitUNet,
    load_digit_unet,
)


@pytest.fixture(scope="module")
def model() -> DigitUNet:
    return load_digit_unet()


def noise(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, *IMAGE_SHAPE), generator=torch.Generator().manual_seed(seed))


def test_model_and_file_are_small() -> None:
    assert sum(parameter.numel() for parameter in DigitUNet().parameters()) < 480_000
    assert WEIGHTS_PATH.stat().st_size < 2_000_000


def test_weights_load_for_sampling(model: DigitUNet) -> None:
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_weights_say_what_they_predict() -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(WEIGHTS_PATH, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["prediction_type"] == "v_prediction"
    assert metadata["schedule"].startswith("cosine")
    assert metadata["T"] == "1000"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_has_shape_and_dtype_of_input(model: DigitUNet, batch: int, dtype: torch.dtype) -> None:
    x = noise(batch).to(dtype)
    out = model(x, torch.tensor(500), torch.zeros(batch, dtype=torch.int64))
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())


def test_timesteps_of_all_kinds_agree(model: DigitUNet) -> None:
    x, labels = noise(4), torch.arange(4)
    expected = model(x, torch.full((4,), 321), labels)
    for t in (torch.tensor(321), torch.tensor(321.0), torch.tensor([321.0]), torch.full((4,), 321.0)):
        torch.testing.assert_close(model(x, t, labels), expected)


def test_fractional_timesteps_are_kept(model: DigitUNet) -> None:
    x, labels = noise(4), torch.arange(4)
    whole, half, following = (model(x, torch.tensor(t), labels) for t in (400.0, 400.5, 401.0))
    torch.testing.assert_close(model(x, torch.full((4,), 400.5), labels), half)
    assert not torch.equal(half, whole)
    # Between two timesteps the prediction is nearly the middle: the model is smooth in t, not stepped.
    torch.testing.assert_close(half, (whole + following) / 2, atol=1e-2, rtol=0)


def test_none_is_the_null_class(model: DigitUNet) -> None:
    x, t = noise(3), torch.tensor(700)
    null = model(x, t, torch.full((3,), NULL_CLASS))
    torch.testing.assert_close(model(x, t), null, atol=0, rtol=0)
    assert not torch.allclose(model(x, t, torch.tensor([1, 2, 3])), null)


def test_images_of_a_batch_do_not_mix(model: DigitUNet) -> None:
    x, t, labels = noise(4), torch.tensor([10, 300, 600, 999]), torch.tensor([0, 5, 9, NULL_CLASS])
    together = model(x, t, labels)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], t[i], labels[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, NULL_CLASS + 1]), f"encoder_hidden_states holds {NULL_CLASS + 1}, expected 0..{NULL_CLASS}"),
        (torch.tensor([-1, 3]), "encoder_hidden_states holds -1"),
        (torch.tensor([1, 2, 3]), r"encoder_hidden_states has shape \[3\].*expected \[2\]"),
        (torch.tensor([1.0, 2.0]), "encoder_hidden_states .*torch.float32"),
    ],
)
def test_bad_labels_are_refused(model: DigitUNet, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(noise(2), torch.tensor(5), labels)


def test_bad_images_and_timesteps_are_refused(model: DigitUNet) -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 1, 8, 9\]"):
        model(torch.zeros(2, 1, 8, 9), torch.tensor(5))
    with pytest.raises(ValueError, match=r"x .*torch.int64"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.tensor(5))
    with pytest.raises(ValueError, match=r"t has shape \[3\], expected \[\] or \[2\]"):
        model(noise(2), torch.tensor([1, 2, 3]))


def test_missing_weights_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"load_digit_unet: path is 'nowhere\.safetensors'"):
        load_digit_unet("nowhere.safetensors")


def test_figures_belong_to_the_weights(model: DigitUNet) -> None:
    figures = json.loads(WEIGHTS_PATH.with_name("figures.json").read_text(encoding="utf-8"))
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(WEIGHTS_PATH, framework="pt") as file:
        assert file.metadata()["command"] == figures["command"]
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert [entry["guidance"] for entry in figures["evaluation"]] == [1.5, 2.0, 3.0]
    for entry in figures["evaluation"]:
        assert entry["recognised"] >= 0.97
        assert len(entry["variance_ratio"]) == NUM_CLASSES
        assert min(entry["variance_ratio"]) >= 0.6


def test_split_is_fixed_and_stratified() -> None:
    pytest.importorskip("sklearn")
    from fastdiff.digits import data

    digits = data.load_digits()
    assert len(digits.train_labels) == 1437
    assert len(digits.held_out_labels) == 360
    for digit in range(NUM_CLASSES):
        assert abs((digits.held_out_labels == digit).mean() - (digits.train_labels == digit).mean()) < 0.01


def test_pixels_and_images_round_trip() -> None:
    pytest.importorskip("sklearn")
    from fastdiff.digits import data

    pixels = data.load_digits().held_out_pixels
    images = data.to_images(pixels)
    assert tuple(images.shape[1:]) == IMAGE_SHAPE
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert (data.to_pixels(images) == pixels).all()
    assert data.to_pixels(images * 2).max() == 16.0


def test_measures_on_real_digits() -> None:
    pytest.importorskip("sklearn")
    from fastdiff.digits import data

    classifier, accuracy = data.train_classifier()
    assert accuracy >= 0.97
    digits = data.load_digits()
    images, labels = data.to_images(digits.held_out_pixels), torch.from_numpy(digits.held_out_labels)
    assert data.recognised(classifier, images, labels) == pytest.approx(accuracy)
    assert ((data.variance_ratio(images, labels) > 0.7) & (data.variance_ratio(images, labels) < 1.3)).all()
    distances = data.nearest_distance(images)
    assert distances.generated == pytest.approx(distances.held_out)
    assert data.nearest_distance(data.to_images(digits.train_pixels)).generated == 0.0


def test_packaged_model_draws_digits(model: DigitUNet) -> None:
    """A small version of the packaged figures, so that weights that came to harm do not pass."""
    pytest.importorskip("sklearn")
    from fastdiff.digits import data, train

    labels = torch.arange(NUM_CLASSES).repeat_interleave(4)
    images = train.ddim_sampler(model, steps=15)(labels, 2.0, 0)
    classifier, _ = data.train_classifier()
    assert data.recognised(classifier, images, labels) >= 0.95
