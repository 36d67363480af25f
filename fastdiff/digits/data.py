# SPDX-License-Identifier: MIT
"""The handwritten digits of scikit-learn (1797 images of 8x8 pixels, values 0..16), and measures of generated ones.

The digits come from the "Optical Recognition of Handwritten Digits" set of the UCI repository (Alpaydin and Kaynak,
1998), which scikit-learn carries inside its package: nothing is downloaded. The model and the classifier are both
trained on the same fixed four fifths; the last fifth is held out from both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import require
from .unet import IMAGE_SHAPE, NUM_CLASSES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    np = require("numpy", "training", "fastdiff.digits.data")
    Array = Any

_PIXEL_MAX = 16.0


class Digits(NamedTuple):
    """The two parts of the set: pixels ``[N, 64]`` float64 in 0..16, labels ``[N]`` int64 in 0..9."""

    train_pixels: Array
    train_labels: Array
    held_out_pixels: Array
    held_out_labels: Array


class Distances(NamedTuple):
    """Median distance to the nearest training image, of generated images and of held-out real ones."""

    generated: float
    held_out: float


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """Load the set, split 80/20 with equal shares of each class; the split never changes."""
    datasets = require("sklearn.datasets", "training", "load_digits")
    selection = require("sklearn.model_selection", "training", "load_digits")
    pixels, labels = datasets.load_digits(return_X_y=True)
    train_pixels, held_pixels, train_labels, held_labels = selection.train_test_split(
        pixels, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return Digits(train_pixels, train_labels.astype(np.int64), held_pixels, held_labels.astype(np.int64))


def to_images(pixels: Array) -> Tensor:
    """Pixels ``[N, 64]`` in 0..16 to images ``[N, 1, 8, 8]`` float32 in [-1, 1]."""
    scaled = np.asarray(pixels, dtype=np.float32) * (2.0 / _PIXEL_MAX) - 1.0
    return torch.from_numpy(scaled).reshape(-1, *IMAGE_SHAPE)


def to_pixels(images: Tensor) -> Array:
    """Images ``[N, 1, 8, 8]`` to pixels ``[N, 64]`` float64, cut off at 0 and 16 as a scan would be, not rounded."""
    flat = images.detach().to("cpu", torch.float64).reshape(len(images), -1).numpy()
    return np.clip((flat + 1.0) * (_PIXEL_MAX / 2.0), 0.0, _PIXEL_MAX)


def train_classifier() -> tuple[Any, float]:
    """Train a support vector machine on the training split.

    Returns:
        The classifier (``predict`` takes pixels ``[N, 64]``), and the share of held-out real digits it gets right.
    """
    svm = require("sklearn.svm", "training", "train_classifier")
    digits = load_digits()
    classifier = svm.SVC(kernel="rbf", C=10.0, gamma="scale")
    classifier.fit(digits.train_pixels, digits.train_labels)
    return classifier, float(classifier.score(digits.held_out_pixels, digits.held_out_labels))


def recognised(classifier: Any, images: Tensor, labels: Tensor) -> float:
    """Share of ``images [N, 1, 8, 8]`` that the classifier reads as the digit asked for, ``labels [N]``."""
    return float(np.mean(classifier.predict(to_pixels(images)) == labels.cpu().numpy()))


def variance_ratio(images: Tensor, labels: Tensor) -> Array:
    """Return the variance of the generated digits of each class, relative to the real ones.

    Args:
        images: ``[N, 1, 8, 8]``, at least two of each class.
        labels: ``[N]``.

    Returns:
        ``[10]`` float64: the variance of a pixel over the class, averaged over pixels, divided by the same of the
        training images. 1 is as varied as the real digits, 0 is one picture again and again.
    """
    digits = load_digits()
    pixels, classes = to_pixels(images), labels.cpu().numpy()

    def spread(values: Array) -> float:
        return float(values.var(axis=0, ddof=1).mean())

    return np.array(
        [
            spread(pixels[classes == digit]) / spread(digits.train_pixels[digits.train_labels == digit])
            for digit in range(NUM_CLASSES)
        ]
    )


def nearest_distance(images: Tensor) -> Distances:
    """Median Euclidean distance (64 pixels of 0..16) to the nearest training image.

    Copies of training images would be far nearer than held-out real digits, which are new by construction. Generated
    digits may well be somewhat nearer, for guidance draws them to the middle of their class.
    """
    digits = load_digits()
    train = torch.from_numpy(digits.train_pixels)

    def median(pixels: Array) -> float:
        return float(torch.cdist(torch.from_numpy(pixels), train).min(dim=1).values.median())

    return Distances(generated=median(to_pixels(images)), held_out=median(digits.held_out_pixels))
