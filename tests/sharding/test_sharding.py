# SPDX-License-Identifier: MIT
"""Jobs over several processes: one set of files for any number of them, resumed, repaired, or refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.sharding import ShardJob, process_rank, sample_shards
from support.child_environment import child_environment
from support.shard_jobs import SHAPE, Drawn, Refuses, flat_samples, tree

pytest.importorskip("PIL")
pytest.importorskip("safetensors")

FORMATS = pytest.mark.parametrize("file_format", ["png", "safetensors"])


def finish(draw: Any, folder: Path, **job: Any) -> Any:
    """Run a job in one process."""
    return sample_shards(draw, folder, **job, rank=0, world_size=1, progress=False)


@FORMATS
@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_any_number_of_processes_leaves_the_files_of_one(file_format: str, world_size: int, tmp_path: Path) -> None:
    n, batch_size = random.randint(5, 30), random.randint(2, 6)
    job = {"n": n, "batch_size": batch_size, "seed": random.randrange(2**32), "file_format": file_format}
    finish(Drawn(coupled=True), tmp_path / "one", **job)
    draw = Drawn(coupled=True)
    ranks = random.sample(range(world_size), world_size)
    reports = [
        sample_shards(draw, tmp_path / "many", **job, rank=rank, world_size=world_size, progress=False)
        for rank in ranks
    ]
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert sorted(draw.calls) == [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
    assert sum(report.images for report in reports) == n
    assert sum(report.drawn for report in reports) == -(-n // batch_size)
    last = max(i for i, rank in enumerate(ranks) if rank < -(-n // batch_size))
    assert [report.manifest is not None for report in reports] == [i >= last for i in range(world_size)]


def test_processes_without_a_batch_draw_nothing(tmp_path: Path) -> None:
    report = sample_shards(Refuses(), tmp_path, 3, batch_size=4, rank=1, world_size=2, progress=False)
    assert (report.drawn, report.images, report.manifest) == (0, 0, None)


def test_samples_are_those_of_their_seeds_at_any_batch_size(tmp_path: Path) -> None:
    n, seed = 7, random.randrange(2**32)
    draw = Drawn()
    found = []
    for batch_size in (1, 3, n, 50):
        folder = tmp_path / str(batch_size)
        finish(draw, folder, n=n, batch_size=batch_size, seed=seed, file_format="safetensors")
        found.append(flat_samples(folder))
    for i in range(n):
        own = i * 2**32 + seed
        alone = draw.sampler.sample(draw.model, fastdiff.randn((1, *SHAPE), own), seeds=own, progress=False).samples
        assert all(torch.equal(samples[i], alone[0]) for samples in found)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_rounded_pixels(channels: int, tmp_path: Path) -> None:
    from PIL import Image

    images = torch.rand(2, channels, 5, 6, dtype=torch.float64) * 2.4 - 1.2
    finish(lambda ids, seeds: images, tmp_path, n=2)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "images" / f"{i:010d}.png") as picture:
            assert picture.size == (6, 5)
            for y in range(5):
                for x in range(6):
                    values = picture.getpixel((x, y))
                    expected = [min(max((v + 1) * 127.5, 0), 255) for v in image[:, y, x].tolist()]
                    # Half a step of rounding, and the rounding of the float32 that the pixel is computed in.
                    found = [values] if channels == 1 else values
                    assert all(abs(a - b) <= 0.5001 for a, b in zip(found, expected, strict=True))


@FORMATS
def test_manifest_lists_job_and_files(file_format: str, tmp_path: Path) -> None:
    import hashlib

    report = finish(
        Drawn(), tmp_path, n=5, batch_size=2, seed=3, file_format=file_format, options={"steps": 3, "w": [1.5]}
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert report.manifest == tmp_path / "manifest.json"
    job = {"n": 5, "batch_size": 2, "seed": 3, "file_format": file_format, "options": {"steps": 3, "w": [1.5]}}
    assert manifest["job"] == job
    covered = [i for entry in manifest["files"] for i in range(entry["first_id"], entry["first_id"] + entry["count"])]
    assert covered == list(range(5))
    for entry in manifest["files"]:
        data = (tmp_path / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "a bit flipped": lambda image, record: _flip(image),
    "cut short": lambda image, record: image.write_bytes(image.read_bytes()[:-1]),
    "longer": lambda image, record: image.write_bytes(image.read_bytes() + b"x"),
    "missing": lambda image, record: image.unlink(),
    "record cut short": lambda image, record: record.write_bytes(record.read_bytes()[:-9]),
    "record of other files": lambda image, record: record.write_text(record.read_text().replace(image.name, "../x")),
    "record without a size": lambda image, record: record.write_text(record.read_text().replace("bytes", "size")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@FORMATS
def test_rerun_makes_damaged_batch_again_and_skips_others(
    damage: Callable[[Path, Path], None], file_format: str, tmp_path: Path
) -> None:
    job = {"n": 6, "batch_size": 2, "file_format": file_format}
    finish(Drawn(), tmp_path, **job)
    before = tree(tmp_path)
    name = "images/0000000003.png" if file_format == "png" else "shards/0000000001.safetensors"
    damage(tmp_path / name, tmp_path / "records" / "0000000001.json")
    draw = Drawn()
    report = finish(draw, tmp_path, **job)
    assert draw.calls == [[2, 3]]
    assert (report.drawn, report.skipped, report.remade, report.images) == (0, 2, 1, 2)
    assert tree(tmp_path) == before


def test_batch_without_record_is_drawn(tmp_path: Path) -> None:
    finish(Drawn(), tmp_path, n=4, batch_size=2)
    before = tree(tmp_path)
    (tmp_path / "records" / "0000000001.json").unlink()
    (tmp_path / "manifest.json").unlink()
    draw = Drawn()
    report = finish(draw, tmp_path, n=4, batch_size=2)
    assert (draw.calls, report.drawn, report.remade) == ([[2, 3]], 1, 0)
    assert tree(tmp_path) == before


def test_damaged_batch_of_another_process_leaves_no_manifest(tmp_path: Path) -> None:
    finish(Drawn(), tmp_path, n=4, batch_size=2)
    (tmp_path / "images" / "0000000003.png").unlink()
    assert sample_shards(Refuses(), tmp_path, 4, batch_size=2, rank=0, world_size=2, progress=False).manifest is None


JOB = {"n": 4, "batch_size": 2, "seed": 1, "options": {"steps": 3, "eta": None}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 5}, ["n 4 (now 5)"]),
        ({"batch_size": 4}, ["batch_size 2 (now 4)"]),
        ({"seed": 2}, ["seed 1 (now 2)"]),
        ({"file_format": "safetensors"}, ["file_format 'png' (now 'safetensors')"]),
        ({"options": {"steps": 4, "eta": None}}, ["steps 3 (now 4)"]),
        ({"options": {"steps": 3, "eta": 0.0, "n": 1}}, ["eta None (now 0.0)", "no n (now 1)"]),
        ({"options": {"steps": 3}}, ["eta None (now none)"]),
    ],
)
def test_folder_of_other_options_is_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    finish(Drawn(), tmp_path, **JOB)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="choose another folder") as caught:
        finish(Refuses(), tmp_path, **{**JOB, **change})
    for word in words:
        assert word in str(caught.value)
    assert tree(tmp_path) == before


def test_record_of_another_job_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        finish(Drawn(), tmp_path / name, n=2, seed=seed)
    shutil.copy(tmp_path / "a" / "records" / "0000000000.json", tmp_path / "b" / "records")
    with pytest.raises(ValueError, match="is of another job"):
        finish(Refuses(), tmp_path / "b", n=2, seed=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 2**32 + 1}, "n is 4294967297, expected 1 to 4294967296"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"file_format": "jpg"}, "file_format is 'jpg', expected one of png, safetensors"),
        ({"options": {"x": object()}}, "options cannot be written as JSON"),
        ({"options": {"x": float("nan")}}, "options cannot be written as JSON"),
        ({"options": 3}, "options is a int"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1 for 2 processes"),
        ({"world_size": 0}, "world_size is 0"),
        ({"draw": 3}, "draw is a int"),
        ({"folder": "/proc/nope"}, "folder is '/proc/nope', which cannot be made"),
        ({"folder": __file__}, "which cannot be made: Not a directory"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"draw": Refuses(), "folder": tmp_path / "new", "n": 4, **arguments}
    with pytest.raises((ValueError, TypeError)) as caught:
        sample_shards(**given, progress=False)
    assert str(caught.value).startswith("sample_shards: ")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (None, "draw is a NoneType, expected a function that returns a tensor of 2 samples"),
        (torch.zeros(3, 1, 4, 4), r"draw returned a tensor of shape \[3, 1, 4, 4\]"),
        (torch.tensor(1.0), r"draw returned a tensor of shape \[\]"),
        (torch.zeros(2, 4, 4, 4), r"image has shape \[4, 4, 4\]"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        finish(lambda ids, seeds: samples, tmp_path, n=2)
    assert not list((tmp_path / "records").iterdir())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "-1", "the variable RANK is '-1'"),
        ("RANK", "²", "the variable RANK is '²'"),
        ("RANK", "1", "rank is 1, expected 0 to 0 for 1 processes"),
        ("WORLD_SIZE", "two", "the variable WORLD_SIZE is 'two'"),
        ("WORLD_SIZE", "0", "world_size is 0"),
    ],
)
def test_malformed_environment_is_refused(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^sample_shards: {words}"):
        process_rank()


def test_rank_comes_from_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "")
    assert process_rank() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert process_rank() == (2, 5)
    assert process_rank(0, 1) == (0, 1)


@FORMATS
def test_full_disk_raises_one_sentence_and_rerun_completes(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"n": 6, "batch_size": 2, "file_format": file_format}
    finish(Drawn(), tmp_path / "whole", **job)
    write, room = os.write, random.randint(1, 8 if file_format == "safetensors" else 10)

    def full(descriptor: int, data: Any) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr("fastdiff.files.os.write", full)
        with pytest.raises(OSError, match=r"^sample_shards: .*No space left on device.*; free some space") as caught:
            finish(Drawn(), tmp_path / "full", **job)
    assert caught.value.errno == errno.ENOSPC
    left = tree(tmp_path / "full")
    assert left.items() <= tree(tmp_path / "whole").items(), "files are complete or absent, and none is temporary"
    finish(Drawn(), tmp_path / "full", **job)
    assert tree(tmp_path / "full") == tree(tmp_path / "whole")


def test_temporary_files_of_earlier_runs_alone_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "images" / ".fastdiff-0123.tmp", tmp_path / "records" / ".fastdiff-4567.tmp"
    old.parent.mkdir()
    old.write_bytes(b"x")

    def draw(ids: Any, seeds: Any) -> torch.Tensor:
        new.write_bytes(b"of another process")
        return torch.zeros(len(ids), *SHAPE)

    finish(draw, tmp_path, n=2)
    assert not old.exists()
    assert new.exists()


def test_batches_partition_ids_with_seeds_of_their_own() -> None:
    n, batch_size = random.randint(1, 400), random.randint(1, 50)
    job = ShardJob(n, batch_size, seed=9)
    assert [i for batch in range(job.batches) for i in job.ids(batch)] == list(range(n))
    assert [s for batch in range(job.batches) for s in job.seeds(batch)] == fastdiff.spawn_seeds(9, n)
    last = ShardJob(2**32, 2**31, seed=9)
    assert last.batches == 2
    assert last.ids(1).stop == 2**32


def test_killed_runs_end_in_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    job = {"n": 120, "batch_size": 2, "seed": 5}
    program = (
        "import sys; from fastdiff.sharding import sample_shards; from support.shard_jobs import Drawn\n"
        f"sample_shards(Drawn(pause=0.05), sys.argv[1], **{job!r}, progress=False)"
    )
    folder = tmp_path / "killed"
    for _ in range(2):
        before = len(list(folder.glob("records/*.json")))
        child = subprocess.Popen([sys.executable, "-c", program, str(folder)], env=child_environment())
        try:
            # The child is killed in its loop, not while it imports torch.
            while len(list(folder.glob("records/*.json"))) == before and child.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0.0, 0.4))
        finally:
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, "it was killed, and had not ended"
        assert not (folder / "manifest.json").exists()
    draw = Drawn()
    report = finish(draw, folder, **job)
    assert report.skipped >= 2
    assert report.drawn == len(draw.calls) == 60 - report.skipped
    finish(Drawn(), tmp_path / "undisturbed", **job)
    assert tree(folder) == tree(tmp_path / "undisturbed")


def test_integers_of_numpy_describe_the_same_job() -> None:
    assert ShardJob(np.int64(3), np.int32(2), np.int64(1)).digest() == ShardJob(3, 2, 1).digest()  # type: ignore[arg-type]
