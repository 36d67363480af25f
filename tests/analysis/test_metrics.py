# SPDX-License-Identifier: MIT
"""Metrics of samples against independent formulas, and the packaged encoder of digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff.analysis import frechet_distance, inception_score, precision_recall, reference_distance
from fastdiff.analysis.metrics import estimate

#: Sums of some thousand float64 terms; the matrix root of scipy loses about half the digits of small eigenvalues.
EXACT, ROOT = 1e-12, 1e-6


def features(rows: int, columns: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64) + shift


def test_frechet_distance_matches_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    real, generated = features(60, 5), features(40, 5, 0.7)
    a, b = real.numpy(), generated.numpy()
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=ROOT)


def test_frechet_distance_of_shifted_and_scaled_features() -> None:
    real, shift = features(50, 4), torch.randn(4, dtype=torch.float64)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=ROOT * float(real.var(0).sum()))
    assert frechet_distance(real, real + shift) == pytest.approx(float(shift.square().sum()), rel=ROOT, abs=ROOT)
    # In one dimension: (μ₁ − μ₂)² + (σ₁ − σ₂)².
    line = features(30, 1)
    expected = float((line.mean() - 3 * line.mean()) ** 2 + (line.std() - 3 * line.std()) ** 2)
    assert frechet_distance(line, 3 * line) == pytest.approx(expected, rel=ROOT)


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    """Covariances are singular then, and the distance is still finite and symmetric."""
    real, generated = features(5, 8), features(4, 8)
    there, back = frechet_distance(real, generated), frechet_distance(generated, real)
    assert 0 < there == pytest.approx(back, rel=ROOT)


def test_inception_score_matches_formula() -> None:
    logits = torch.randn(30, 6, dtype=torch.float64) * 2
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits) == pytest.approx(expected, rel=EXACT)


def test_inception_score_has_its_bounds() -> None:
    assert inception_score(torch.randn(1, 7).expand(9, 7)) == pytest.approx(1.0)
    assert inception_score(1e4 * torch.eye(7)) == pytest.approx(7.0)


def test_precision_recall_match_sklearn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    real, generated = features(40, 3), features(50, 3, 1.0)

    def inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
        radii = neighbors.NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, k]
        return float((np.linalg.norm(points[:, None] - centres[None], axis=2) <= radii).any(1).mean())

    for k in (1, 3):
        found = precision_recall(real, generated, k)
        assert found.precision == inside(generated.numpy(), real.numpy(), k)
        assert found.recall == inside(real.numpy(), generated.numpy(), k)


def test_precision_and_recall_tell_quality_from_diversity() -> None:
    real = features(80, 2)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e3) == (0.0, 0.0)
    few = real[:1] + 1e-3 * torch.randn(40, 2, dtype=torch.float64)  # one mode
    narrow = precision_recall(real, few)
    assert narrow.precision == 1.0
    assert narrow.recall < 0.2


def test_reference_distance_and_estimate_match_formula() -> None:
    samples, reference = torch.randn(7, 2, 3, 3), torch.randn(7, 2, 3, 3)
    apart = (samples.double() - reference.double()).numpy().reshape(7, -1)
    expected = np.sqrt((apart**2).mean(1))
    found = reference_distance(samples, reference)
    np.testing.assert_allclose(found.numpy(), expected, rtol=EXACT)
    mean, error = estimate(found)
    assert mean == pytest.approx(expected.mean(), rel=EXACT)
    assert error == pytest.approx(expected.std(ddof=1) / np.sqrt(7), rel=EXACT)
    assert np.isnan(estimate(found[:1]).error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3)), r"^frechet_distance: real has shape \[1, 3\]"),
        (lambda: frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2)), "generated has 2 features a row, expected 3"),
        (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(3, 2)), r"generated has shape .*N of 4 or more"),
        (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), 0), "neighbours is 0"),
        (lambda: inception_score(torch.zeros(3)), "logits has shape"),
        (lambda: reference_distance(torch.zeros(2, 3), torch.zeros(2, 4)), r"samples has shape \[2, 3\]"),
    ],
)
def test_metrics_refuse_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"has dtype torch\.int64"):
        frechet_distance(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))


def test_packaged_encoder_has_its_recorded_accuracy() -> None:
    pytest.importorskip("sklearn")
    safetensors = pytest.importorskip("safetensors")
    from fastdiff.digits.encoder import ENCODER_PATH, load_digit_encoder
    from fastdiff.digits.train_encoder import held_out_accuracy

    assert ENCODER_PATH.stat().st_size < 200_000
    with safetensors.safe_open(ENCODER_PATH, framework="pt") as file:
        recorded = float(file.metadata()["held_out_accuracy"])
    # One of 360 digits may fall to the other side of a rounding of another machine.
    assert held_out_accuracy(load_digit_encoder()) == pytest.approx(recorded, abs=1.5 / 360)
    assert recorded >= 0.98


def test_encoder_ranks_digits_above_noise() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("safetensors")
    from fastdiff.digits import data
    from fastdiff.digits.encoder import load_digit_encoder

    encoder, digits = load_digit_encoder(), data.load_digits()
    real, held_out = data.to_images(digits.train_pixels), data.to_images(digits.held_out_pixels)
    blurred = held_out + 0.7 * torch.randn(held_out.shape)
    near, far = (frechet_distance(encoder(real), encoder(images)) for images in (held_out, blurred))
    assert near < far / 5
    assert precision_recall(encoder(real), encoder(held_out)).precision > 0.8
    assert inception_score(encoder.classify(held_out)) > inception_score(encoder.classify(blurred))
    assert encoder(held_out[:2].double()).shape == (2, 32)
    with pytest.raises(ValueError, match=r"^DigitEncoder: images has shape"):
        encoder(torch.zeros(2, 64))
    with pytest.raises(FileNotFoundError, match=r"^load_digit_encoder: path is 'nowhere'"):
        load_digit_encoder("nowhere")


def test_encoder_training_learns_and_refuses_bad_input() -> None:
    pytest.importorskip("sklearn")
    from fastdiff.digits import train_encoder

    assert train_encoder.held_out_accuracy(train_encoder.train(epochs=1, batch=64, lr=3e-3, seed=1)) > 0.3
    with pytest.raises(ValueError, match=r"^train_encoder: --epochs is 0, expected 1 to"):
        train_encoder.main(["--out", ".", "--epochs", "0"])
