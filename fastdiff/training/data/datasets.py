# SPDX-License-Identifier: MIT
"""Data sets: digits, a folder of images, Fashion-MNIST from local files.  Nothing is downloaded."""

from __future__ import annotations

import gzip
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ...errors import checked_integer, error_message, require

#: Endings of the images that a folder is searched for, in any case.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_FASHION = {True: "train", False: "t10k"}


def digits_dataset(*, train: bool = True) -> TensorDataset:
    """Return scikit-learn's handwritten digits: images ``[N, 1, 8, 8]`` in [−1, 1] with labels 0 to 9.

    Args:
        train: the four fifths for training (1437 digits), or the held-out fifth (360).
    """
    from ...digits.data import load_digits, to_images

    digits = load_digits()
    pixels, labels = (
        (digits.train_pixels, digits.train_labels) if train else (digits.held_out_pixels, digits.held_out_labels)
    )
    return TensorDataset(to_images(pixels), torch.from_numpy(labels))


class ImageFolder(Dataset[Any]):
    """The images of a folder and of those in it, as float tensors in [−1, 1].

    Every file is opened once at the start.  Those that cannot be read as images are left out: `skipped` has their
    paths with the reasons, and one warning their number.  Images are turned as their EXIF orientation says, cut to a
    square about their middle and resized (Pillow, bicubic with antialiasing).

    Args:
        folder: searched at all depths for `IMAGE_ENDINGS`; files are sorted by path.
        image_size: height and width in pixels.
        channels: 1 for grey, 3 for RGB, 4 for RGBA; images of other modes are converted, those of 16 bits from 0 to
            65535.  Pixels of 32 bits have no fixed range: their files are left out.
        labels: give ``(image, label)``: the class is the name of the subfolder, numbered in alphabetical order.
        check: decode and convert each file completely at the start; else only its header is read, and a file that
            fails later stops the training with its name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no readable image is in it, `channels` is none of the three, or an image is in no subfolder.
    """

    def __init__(
        self, folder: str | Path, image_size: int, channels: int = 3, *, labels: bool = False, check: bool = True
    ) -> None:
        operation = "ImageFolder"
        root = Path(folder)
        checked_integer(operation, "image_size", image_size, 1)
        if channels not in _MODES:
            got, expected = f"is {channels}", "1, 3 or 4"
            raise ValueError(error_message(operation, "channels", got, expected, "set in_channels to one of them"))
        if not root.is_dir():
            got = f"is {str(root)!r}, which is no folder"
            raise FileNotFoundError(error_message(operation, "folder", got, "a folder of images", "check the path"))
        self.image_size, self.mode = image_size, _MODES[channels]
        self.skipped: dict[Path, str] = {}
        self.paths: list[Path] = []
        pillow = require("PIL.Image", "cli", operation)
        for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file()):
            try:
                with pillow.open(path) as image:
                    if check:
                        _converted(image, self.mode)
                self.paths.append(path)
            except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
                self.skipped[path] = " ".join(str(error).split()) or type(error).__name__
        if not self.paths:
            got = f"is {str(root)!r}, which holds no readable image"
            got += f" ({len(self.skipped)} cannot be read)" if self.skipped else ""
            expected = f"files that end with {', '.join(IMAGE_ENDINGS)}"
            raise ValueError(error_message(operation, "folder", got, expected, "name a folder of images"))
        if self.skipped:
            first, reason = next(iter(self.skipped.items()))
            got = f"is {str(root)!r}, where {len(self.skipped)} files of {len(self.skipped) + len(self.paths)}"
            got += f" cannot be read, {first.name!r} first ({reason})"
            remedy = "the others are used; repair or remove these files to use all"
            warnings.warn(error_message(operation, "folder", got, "images", remedy), stacklevel=2)
        self.classes: list[str] = []
        self.labels: list[int] | None = None
        if labels:
            inside = [path.relative_to(root).parts for path in self.paths]
            if any(len(parts) < 2 for parts in inside):
                got = f"is {str(root)!r}, with images outside of its subfolders"
                raise ValueError(error_message(operation, "folder", got, "a subfolder a class", "move them into one"))
            self.classes = sorted({parts[0] for parts in inside})
            self.labels = [self.classes.index(parts[0]) for parts in inside]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """Return an image ``[C, size, size]`` float32, with its label where labels were asked for."""
        pillow = require("PIL.Image", "cli", "ImageFolder")
        operations = require("PIL.ImageOps", "cli", "ImageFolder")
        path = self.paths[index]
        try:
            with pillow.open(path) as image:
                turned = _converted(image, self.mode)
                size = (self.image_size, self.image_size)
                pixels = operations.fit(turned, size, method=pillow.Resampling.BICUBIC).tobytes()
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            got = f"is {str(path)!r}, which could be read before and cannot be any more ({error})"
            remedy = "restore the file, or start again without it"
            raise ValueError(error_message("ImageFolder", "image", got, "a readable image", remedy)) from error
        values = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        shaped = values.reshape(self.image_size, self.image_size, -1).permute(2, 0, 1)
        tensor = shaped.to(torch.float32) / 127.5 - 1
        return tensor if self.labels is None else (tensor, self.labels[index])


def _converted(image: Any, mode: str) -> Any:
    """Return an image of Pillow, turned as its EXIF orientation says, in a mode of 8 bits a channel.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be decoded or converted.
    """
    turned = require("PIL.ImageOps", "cli", "ImageFolder").exif_transpose(image)
    # A grey PNG of 16 bits has mode I in Pillow 10.
    sixteen = turned.mode.startswith("I;16") or (turned.mode == "I" and image.format == "PNG")
    if turned.mode in ("I", "F") and not sixteen:
        raise ValueError(f"pixels of 32 bits, mode {turned.mode}, have no fixed range")
    if sixteen:  # Pillow's own conversion cuts off what is above 255
        turned = turned.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    return turned.convert(mode)


def fashion_mnist_dataset(folder: str | Path, *, train: bool = True) -> TensorDataset:
    """Read Fashion-MNIST (arXiv 1708.07747), or another set in MNIST's format, from its idx files in a local folder.

    Args:
        folder: has ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, or ``t10k-…``, also with ``.gz``.
        train: the files of the training part, or of the test part.

    Returns:
        Images ``[N, 1, 28, 28]`` float32 in [−1, 1] and labels ``[N]`` int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short, or is none of the format.
    """
    part = _FASHION[train]
    images = _read_idx(Path(folder), f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(Path(folder), f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        got = f"has {len(images)} images and {len(labels)} labels"
        raise ValueError(error_message("fashion_mnist_dataset", "folder", got, "equal numbers", "take one set's files"))
    return TensorDataset(images.unsqueeze(1).to(torch.float32) / 127.5 - 1, labels.long())


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    operation = "fashion_mnist_dataset"
    path = next((folder / file for file in (name, f"{name}.gz") if (folder / file).is_file()), None)
    if path is None:
        got = f"is {str(folder)!r}, which has no {name} or {name}.gz"
        raise FileNotFoundError(error_message(operation, "folder", got, "the idx files", "put them there"))
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = struct.unpack_from(f">HBB{dimensions}I", data)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise _no_idx(path, str(error)) from error
    shape, offset = header[3:], 4 + 4 * dimensions
    count = 1
    for length in shape:
        count *= length
    if header[:3] != (0, 8, dimensions) or len(data) != offset + count or not count:
        raise _no_idx(path, f"{len(data)} bytes, header {header}")
    return torch.frombuffer(bytearray(data[offset:]), dtype=torch.uint8).reshape(shape)


def _no_idx(path: Path, why: str) -> ValueError:
    got = f"is {str(path)!r}, which is cut short or no idx file ({why})"
    return ValueError(error_message("fashion_mnist_dataset", "folder", got, "whole idx files", "copy the file again"))
