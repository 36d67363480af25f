# SPDX-License-Identifier: MIT
"""Data of training: order, shares of processes, batches, folders of images and idx files."""

from __future__ import annotations

import gzip
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from fastdiff.philox import Purpose
from fastdiff.training import (
    DiffusionConfig,
    ImageFolder,
    Jitter,
    LossTerms,
    TrainingBatch,
    digits_dataset,
    fashion_mnist_dataset,
)
from fastdiff.training.data.batches import read_batch
from fastdiff.training.data.order import DataOrder, seeded_draws
from fastdiff.training.model.conditioning import Conditioning
from fastdiff.training.seeded_uniforms import seeded_uniforms
from fastdiff.training.trainer.validation import mean_loss

PIL_Image = pytest.importorskip("PIL.Image")


def _numbered(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.float32).reshape(-1, 1))


def _ids(order: DataOrder, epoch: int, skip: int = 0) -> list[list[int]]:
    found = []
    for share in order.epoch(epoch, skip):
        ids = share.sample_ids.tolist()
        assert share.data[0].flatten().tolist() == ids
        found.append(ids)
    return found


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(3, 40),
    batch=st.integers(1, 7),
    world=st.integers(1, 3),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2**40),
)
def test_processes_share_the_batches_of_one(count: int, batch: int, world: int, drop_last: bool, epoch: int) -> None:
    def order(size: int, rank: int, ranks: int) -> DataOrder:
        return DataOrder(DataLoader(_numbered(count), size, shuffle=True, drop_last=drop_last), 5, rank, ranks)

    if drop_last and count < batch * world:
        with pytest.raises(ValueError, match=f"dataloader has {count} samples, expected at least {batch * world}"):
            order(batch, 0, world)
        return
    one = _ids(order(batch * world, 0, 1), epoch)
    shares = [_ids(order(batch, rank, world), epoch) for rank in range(world)]
    together = [[number for part in parts for number in part] for parts in zip(*shares, strict=True)]
    # A rest with fewer samples than processes has no share for each, and is left out.
    assert together == [ids for ids in one if len(ids) >= world]
    assert order(batch, 0, world).batches == len(together)
    seen = [number for ids in together for number in ids]
    assert len(set(seen)) == len(seen) > count - batch * world
    assert _ids(order(batch, 0, world), epoch, skip=1) == shares[0][1:]
    totals = [share.total for share in order(batch, 0, world).epoch(epoch)]
    assert totals == [len(ids) for ids in together]


def test_order_changes_with_epoch_and_seed_alone() -> None:
    loader = DataLoader(_numbered(50), 50, shuffle=True)
    torch.manual_seed(0)
    first = _ids(DataOrder(loader, 1), 0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert _ids(DataOrder(loader, 1), 0) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert first != _ids(DataOrder(loader, 1), 1) != _ids(DataOrder(loader, 2), 0)
    assert _ids(DataOrder(DataLoader(_numbered(50), 50), 1), 3) == [list(range(50))]


class _Drawn(Dataset[Any]):
    """Items with a random transform, by torch and by Python."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([[float(index), float(torch.rand(())), random.random()]])


@pytest.mark.parametrize("workers", [0, 1])
def test_transforms_belong_to_sample_and_epoch(workers: int) -> None:
    def drawn(batch: int, epoch: int) -> dict[float, list[float]]:
        loader = DataLoader(_Drawn(), batch, shuffle=True, num_workers=workers)
        rows = torch.cat([share.data for share in DataOrder(loader, 3).epoch(epoch)])[:, 0]
        return {row[0]: row[1:] for row in rows.tolist()}

    random.seed(1)
    expected = random.Random(1).random()
    first = drawn(2, 0)
    assert random.random() == expected
    assert drawn(3, 0) == first
    assert len({tuple(values) for values in first.values()}) == 6
    assert all(first[key] != value for key, value in drawn(2, 1).items())


def test_other_iterables_keep_their_order() -> None:
    batches = [torch.full((size, 1), float(i)) for i, size in enumerate((2, 3, 2, 2, 1))]
    order = DataOrder(batches, 0, rank=1, world=2)
    assert order.batches == 2
    shares = list(order.epoch(0))
    assert [share.sample_ids.tolist() for share in shares] == [[2, 3, 4], [7, 8]]
    assert [share.total for share in shares] == [5, 4]
    assert [share.sample_ids.tolist() for share in order.epoch(0, skip=1)] == [[7, 8]]
    with pytest.raises(TypeError, match="dataloader is a int"):
        DataOrder(3, 0)


def test_loaders_that_are_not_read_by_index() -> None:
    images = _numbered(10).tensors[0]

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(images)

    stream = DataOrder(DataLoader(Stream(), 4), 0)
    assert stream.batches is None  # its data set has no length
    assert [len(share.sample_ids) for share in stream.epoch(0)] == [4, 4, 2]
    part = DataOrder(DataLoader(TensorDataset(images), 2, sampler=SequentialSampler(range(4))), 0)
    assert torch.equal(torch.cat([share.data[0] for share in part.epoch(0)]), images[:4])
    shared = DataLoader(TensorDataset(images), 2, sampler=DistributedSampler(range(10), 2, 0))
    DataOrder(shared, 0)
    with pytest.raises(ValueError, match="leave DistributedSampler and"):
        DataOrder(shared, 0, 0, 2)


def test_transforms_of_a_tensor_data_set_are_seeded() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
            return (super().__getitem__(index)[0] + torch.rand(1),)

    loader = DataLoader(Noisy(torch.zeros(6, 1)), 3)
    one, other = ([share.data[0] for share in DataOrder(loader, 0).epoch(0)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_seeded_draws_leave_generators_as_they_were() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with seeded_draws(-7):
        inside = torch.rand(3)
    with seeded_draws(-7):
        assert torch.equal(torch.rand(3), inside)
    assert torch.equal(torch.rand(3), expected)


def test_batches_are_read_and_refused() -> None:
    images = torch.zeros(2, 3, 4, 4)
    assert read_batch(images, "f").images is images
    assert read_batch((images, torch.tensor([1, 2])), "f").labels.tolist() == [1, 2]  # type: ignore[union-attr]
    found = read_batch({"images": images, "prompts": ["a", "b"]}, "f", 3)
    assert found.prompts == ["a", "b"]
    for bad, error, reason in (
        (images.byte(), TypeError, "127.5"),
        (torch.zeros(()), ValueError, r"\[B, C"),
        ((images, torch.zeros(2)), ValueError, r"\[2\] integers"),
        ({"images": images, "prompt": ["a"]}, ValueError, "'prompt'"),
        ({"prompts": ["a"]}, ValueError, "images"),
        ({"images": images, "prompts": "ab"}, ValueError, "one string"),
        ({"images": images, "prompts": ["a"]}, ValueError, "1 values"),
        ({"images": images, "encoder_hidden_states": images[0]}, ValueError, "tokens, width"),
        ("images", TypeError, "is a str"),
    ):
        with pytest.raises(error, match=reason):
            read_batch(bad, "f")
    with pytest.raises(ValueError, match="have 3 channels, expected 1"):
        read_batch(images, "f", 1)


def _save(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL_Image.new(mode, size, 255 if mode == "L" else (255, 0, 0)).save(path)


def test_image_folder_skips_and_counts_what_cannot_be_read(tmp_path: Path) -> None:
    _save(tmp_path / "cats" / "a.png", (9, 7))
    _save(tmp_path / "dogs" / "b.PNG", (5, 12), "L")
    whole = (tmp_path / "cats" / "a.png").read_bytes()
    (tmp_path / "dogs" / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "dogs" / "text.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    with pytest.warns(UserWarning, match=r"2 files of 4 cannot be read, 'cut.png' first"):
        folder = ImageFolder(tmp_path, 4, labels=True)
    assert sorted(path.name for path in folder.skipped) == ["cut.png", "text.jpg"]
    assert folder.classes == ["cats", "dogs"]
    image, label = folder[0]
    assert (len(folder), image.shape, label) == (2, (3, 4, 4), 0)
    assert image[0].unique().tolist() == [1.0]
    assert image[1:].unique().tolist() == [-1.0]
    assert folder[1][0].shape == (3, 4, 4)
    folder.paths[0].write_text("gone bad")
    with pytest.raises(ValueError, match="cannot be any more"):
        folder[0]


def test_image_folder_converts_or_skips_other_modes(tmp_path: Path) -> None:
    values = torch.randint(0, 65536, (6, 6))
    depth = PIL_Image.frombytes("I;16", (6, 6), struct.pack("<36H", *values.flatten().tolist()))
    depth.save(tmp_path / "depth.png")
    depth.convert("I").save(tmp_path / "unknown_range.tif")
    exif = PIL_Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    broad = PIL_Image.new("L", (8, 4), 0)
    broad.paste(255, (0, 0, 4, 4))
    broad.save(tmp_path / "turned.webp", exif=exif, lossless=True)
    broken = (tmp_path / "turned.webp").read_bytes().replace(b"MM\0*", b"M?\0*")
    (tmp_path / "wrong_exif.webp").write_bytes(broken)
    PIL_Image.new("LAB", (4, 4)).save(tmp_path / "lab.tif")  # Pillow has no conversion to L
    with pytest.warns(UserWarning, match="3 files of 5 cannot be read"):
        folder = ImageFolder(tmp_path, 6, 1)
    assert sorted(path.name for path in folder.skipped) == ["lab.tif", "unknown_range.tif", "wrong_exif.webp"]
    levels = (folder[0][0] + 1) * 127.5
    assert (levels - values / 257).abs().max() <= 0.5 + 1e-4  # rounded to 8 bits; float32 of 255 has an error of 2e-5
    turned = folder[1][0]
    assert turned[0].min() > 0.9  # the left half is at the top now
    assert turned[-1].max() < -0.9


def test_image_folder_refuses_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ImageFolder(tmp_path / "nothing", 4)
    with pytest.raises(ValueError, match="holds no readable image"):
        ImageFolder(tmp_path, 4)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"\(1 cannot be read\)"):
        ImageFolder(tmp_path, 4)
    _save(tmp_path / "a.png", (4, 4))
    with pytest.raises(ValueError, match="outside of its subfolders"):
        ImageFolder(tmp_path, 4, labels=True)
    with pytest.raises(ValueError, match="channels is 2"):
        ImageFolder(tmp_path, 4, 2)


def test_fashion_mnist_files(tmp_path: Path) -> None:
    pixels = bytes(range(24))
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    images.write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 2, 3, 4) + pixels))
    labels.write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + bytes([7, 9]))
    found, classes = fashion_mnist_dataset(tmp_path).tensors
    assert classes.tolist() == [7, 9]
    assert torch.equal(found, torch.arange(24.0).reshape(2, 1, 3, 4) / 127.5 - 1)
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        fashion_mnist_dataset(tmp_path)
    packed = bytearray(images.read_bytes())
    packed[10] |= 7  # the deflate stream begins with a block of no known kind
    images.write_bytes(packed)
    with pytest.raises(ValueError, match="cut short or no idx file"):
        fashion_mnist_dataset(tmp_path)
    images.write_bytes(images.read_bytes()[:20])
    with pytest.raises(ValueError, match="cut short"):
        fashion_mnist_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        fashion_mnist_dataset(tmp_path, train=False)


def test_jitter_belongs_to_seeds() -> None:
    images = digits_dataset().tensors[0][:8]
    seeds = torch.arange(8) * 7919
    changed = Jitter(0.5)(images, seeds)
    order = torch.randperm(8)
    assert torch.equal(Jitter(0.5)(images[order], seeds[order]), changed[order])
    assert torch.equal(Jitter(0.0)(images, seeds), images)
    same = [torch.equal(a, b) for a, b in zip(images, changed, strict=True)]
    assert 0 < sum(same) < 8
    assert (changed - images).abs().max() > 0.05
    with pytest.raises(ValueError, match="share is 2"):
        Jitter(2)


def test_jitter_moves_by_pixels_on_both_axes() -> None:
    """A bright dot of a wide image is found where the turn and the shift in pixels put it."""
    height, width = 16, 48
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = rows + 0.5 - height / 2, columns + 0.5 - width / 2  # pixels from the middle
    dot = torch.exp(-((down - 3) ** 2 + (across - 2) ** 2) / 4)
    jitter = Jitter(share=1.0, degrees=40.0, scale=0.0, pixels=2.0)
    seeds = torch.arange(6) * 104729
    moved = jitter((dot * 2 - 1).expand(6, 1, height, width).contiguous(), seeds)[:, 0] + 1
    draws = seeded_uniforms(seeds, Purpose.JITTER, 6)
    mass = moved.sum((1, 2))
    for i, (turn, x, y) in enumerate(zip(*((draws[:, k] * 2 - 1).tolist() for k in (0, 3, 4)), strict=True)):
        # The pixel at p is read at R·p + shift, so the dot at (2, 3) moves to R⁻¹·((2, 3) − shift).
        angle, a, b = math.radians(40 * turn), 2 - 2 * x, 3 - 2 * y
        expected = math.cos(angle) * a + math.sin(angle) * b, -math.sin(angle) * a + math.cos(angle) * b
        found = (moved[i] * across).sum() / mass[i], (moved[i] * down).sum() / mass[i]
        # Cubic interpolation keeps the middle of a smooth dot within a few hundredths of a pixel.
        assert abs(float(found[0]) - expected[0]) < 0.05
        assert abs(float(found[1]) - expected[1]) < 0.05


def test_seeded_uniforms_are_uniform_and_apart() -> None:
    numbers = seeded_uniforms(torch.arange(20_000), 1, 3)
    assert numbers.shape == (20_000, 3)
    assert 0 < float(numbers.min()) < float(numbers.max()) < 1
    # The mean of 60 000 uniform numbers deviates by 0.0012; five deviations, for fixed seeds.
    assert abs(float(numbers.mean()) - 0.5) < 0.006
    assert abs(float(torch.corrcoef(numbers.T)[0, 1])) < 0.04
    assert not torch.equal(numbers[:, 0], seeded_uniforms(torch.arange(20_000), 2, 1)[:, 0])


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("kind", ["indexed", "shuffled", "dropped", "list"])
def test_validation_counts_each_sample_once_on_any_number_of_processes(kind: str, world: int) -> None:
    """Of 5 samples in batches of 2; the mean is that of one process up to the order of additions in float64."""
    images = torch.rand(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loader: Any = DataLoader(TensorDataset(images), 2, shuffle=kind == "shuffled", drop_last=kind == "dropped")
    if kind == "list":
        loader = list(images.split(2))
    conditioning = Conditioning(None, None, 0.0, torch.device("cpu"))

    def share(rank: int, ranks: int) -> tuple[list[int], Tensor]:
        seen: list[int] = []
        sums: list[Tensor] = []

        def loss_of(batch: TrainingBatch) -> LossTerms:
            seen.extend(batch.sample_ids.tolist())
            return LossTerms(batch.images[:, 0].exp(), torch.zeros(len(batch.images)))

        def reduce_sum(sum_: Tensor) -> Tensor:
            sums.append(sum_)
            return torch.ones(2)

        order = DataOrder(loader, 0, rank, ranks, complete=True)
        mean_loss(loss_of, order, conditioning, DiffusionConfig(in_channels=1).validate(), reduce_sum, torch.float64)
        return seen, sums[0]

    one, whole = share(0, 1)
    parts = [share(rank, world) for rank in range(world)]
    assert sorted(number for ids, _ in parts for number in ids) == sorted(one)
    assert len(one) == (4 if kind == "dropped" else 5)
    total = torch.stack([sums for _, sums in parts]).sum(0)
    torch.testing.assert_close(total[0] / total[1], whole[0] / whole[1], rtol=1e-14, atol=0)
