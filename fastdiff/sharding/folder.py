# SPDX-License-Identifier: MIT
"""Folder of a sampling job, shared by all its processes.

::

    job.json                      the job, written by the first process
    images/0000000012.png         one file per image, by its id, or
    shards/0000000003.safetensors one file per batch: samples [B, ...], ids [B], seeds [B]
    records/0000000003.json       files of a complete batch with their sizes and SHA-256; written after them
    manifest.json                 the job and the files of all batches; written when the last batch is complete

Each file is written under a temporary name and renamed.  A process that ends at any instant, by SIGKILL too, leaves
complete files, temporary files, and batches without a record, which the next run makes.  Nothing depends on the number
of processes, and no process needs another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.images import image_bytes
from ..data_files import (
    MalformedError,
    brief,
    listed,
    malformed_in_one_sentence,
    object_fields,
    parse_json,
    read_document,
    write_json,
)
from ..errors import checked_type, error_message, require
from ..files import check_writable, is_temporary, read_whole, write_whole
from ..philox import as_seeds
from .job import FOLDERS, ShardJob

JOB_FORM, RECORD_FORM, MANIFEST_FORM, VERSION = "fastdiff-sample-job", "fastdiff-sample-batch", "fastdiff-samples", 1

#: Draws a batch: ``draw(ids, seeds)`` returns the samples of these image ids, ``[len(ids), ...]``.
Draw = Callable[[Sequence[int], Sequence[int]], Tensor]

_OPERATION = "sample_shards"
_ENTRY = {"file", "first_id", "count", "bytes", "sha256"}


class Outcome(str, Enum):
    """Result of `ShardFolder.make` for a batch."""

    DRAWN = "drawn"
    SKIPPED = "skipped"
    REMADE = "remade"


class ShardFolder:
    """The files of a job in a folder.

    Args:
        path: the folder; it is made where it is missing.
        job: the job.

    Raises:
        ValueError: the folder cannot be written to, or holds another job.
    """

    def __init__(self, path: str | Path, job: ShardJob) -> None:
        self.path = Path(path)
        self.job = job
        self._digest = job.digest()
        self._folders = (self.path / FOLDERS[job.file_format], self.path / "records")
        # The packages that write the files are looked for before anything is drawn.
        require("PIL.Image" if job.file_format == "png" else "safetensors.torch", "cli", _OPERATION)
        self._open()

    def make(self, batch: int, draw: Draw) -> Outcome:
        """Draw a batch and write its files, unless it is complete.

        A complete batch has a record, and files with the sizes and hashes that it lists.

        Args:
            batch: index of the batch.
            draw: returns the samples of the batch, ``[B, ...]``; for ``png`` ``[B, 1 or 3, H, W]`` in [−1, 1].

        Raises:
            TypeError, ValueError: the samples do not fit, or the record is of another job.
            OSError: a file cannot be read or written; the batch is then incomplete.
        """
        outcome = self._check(batch)
        if outcome is Outcome.SKIPPED:
            return outcome
        if outcome is Outcome.REMADE:
            self._record_path(batch).unlink(missing_ok=True)  # the batch is incomplete from now on
        ids, seeds = self.job.ids(batch), self.job.seeds(batch)
        samples = _checked_samples(draw(ids, seeds), len(ids))
        entries = []
        for name, covered, data in self._encoded(batch, samples, ids, seeds):
            write_whole(self.path / name, data, operation=_OPERATION, argument="file")
            entries.append(_entry(name, covered, len(data), hashlib.sha256(data).hexdigest()))
        fields = {"job": self._digest, "batch": batch, "files": entries}
        write_json(self._record_path(batch), RECORD_FORM, VERSION, fields, operation=_OPERATION)
        return outcome

    def merge(self, leftovers: Set[Path] = frozenset()) -> Path | None:
        """Write the manifest if all batches are complete, and return its path; None if one is missing.

        Every process calls it at its end: the one that ends last finds all batches.  Sizes of files are checked here,
        hashes by `make`.

        Args:
            leftovers: `temporaries` when this run began.  Those that are still there have no writer, since a write is
                shorter than a run, and are removed with the manifest written.

        Raises:
            ValueError: a record is of another job.
            OSError: a file cannot be read or written.
        """
        if sum(1 for _ in self._folders[1].glob("*.json")) < self.job.batches:
            return None
        files: list[dict[str, Any]] = []
        for batch in range(self.job.batches):
            entries = self._entries(batch)
            if entries is None or any(_size(self.path / entry["file"]) != entry["bytes"] for entry in entries):
                return None
            files += entries
        manifest = self.path / "manifest.json"
        fields = {"job": self.job.fields(), "files": files}
        write_json(manifest, MANIFEST_FORM, VERSION, fields, operation=_OPERATION)
        for path in leftovers & set(self.temporaries()):
            path.unlink(missing_ok=True)
        return manifest

    def temporaries(self) -> Iterator[Path]:
        """Yield the temporary files in the job's folders: of writes under way, and of processes that were killed."""
        for folder in (self.path, *self._folders):
            with os.scandir(folder) as found:
                yield from (folder / entry.name for entry in found if is_temporary(entry.name))

    def _open(self) -> None:
        """Make the folders and the job file, or check the job file that is there."""
        try:
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            got = f"is {str(self.path)!r}, which cannot be made: {error.strerror or error}"
            expected, remedy = "a folder that can be written to", "choose another one, or check its permissions"
            raise ValueError(error_message(_OPERATION, "folder", got, expected, remedy)) from error
        for folder in self._folders:
            check_writable(folder / "new", operation=_OPERATION, argument="folder")
        path = self.path / "job.json"
        if not path.exists():
            write_json(path, JOB_FORM, VERSION, self.job.fields(), operation=_OPERATION)
        with malformed_in_one_sentence(_OPERATION, path, f"a job of version {VERSION}"):
            found = parse_json(read_document(path, operation=_OPERATION), JOB_FORM, VERSION)
        differences = list(_differences(found, self.job.fields()))
        if differences:
            got = f"is {str(self.path)!r}, which holds a job with {' and '.join(differences)}"
            remedy = "pass the options of its job.json, or choose another folder"
            raise ValueError(error_message(_OPERATION, "folder", got, "a folder of the same job", remedy))

    def _check(self, batch: int) -> Outcome:
        """Return SKIPPED for a complete batch, DRAWN for one without a record, REMADE for one that is damaged."""
        if not self._record_path(batch).exists():
            return Outcome.DRAWN
        entries = self._entries(batch)
        if entries is None:
            return Outcome.REMADE
        for entry in entries:
            try:
                data = read_whole(self.path / entry["file"], entry["bytes"] + 1, operation=_OPERATION, argument="file")
            except FileNotFoundError:
                return Outcome.REMADE
            if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                return Outcome.REMADE
        return Outcome.SKIPPED

    def _entries(self, batch: int) -> list[dict[str, Any]] | None:
        """Return the files of a batch's record; None if the record is missing or damaged.

        Raises:
            ValueError: the record is of another job.
        """
        path = self._record_path(batch)
        try:
            fields = parse_json(read_document(path, operation=_OPERATION), RECORD_FORM, VERSION)
            object_fields(fields, "the record", {"job", "batch", "files"}, set())
            found = [object_fields(entry, "a file", _ENTRY, set()) for entry in listed(fields["files"], "files")]
            whole = all(type(entry["bytes"]) is int and entry["bytes"] >= 0 for entry in found)
        except (FileNotFoundError, MalformedError):
            return None
        if fields["job"] != self._digest:
            got, remedy = "is of another job", "choose another folder, and one folder per job"
            raise ValueError(error_message(_OPERATION, f"the record {str(path)!r}", got, "this job's", remedy))
        named = [(entry["file"], entry["first_id"], entry["count"]) for entry in found]
        expected = [(name, ids.start, len(ids)) for name, ids in self._names(batch)]
        return found if whole and fields["batch"] == batch and named == expected else None

    def _record_path(self, batch: int) -> Path:
        return self.path / "records" / f"{batch:010d}.json"

    def _names(self, batch: int) -> list[tuple[str, range]]:
        """Return the names of a batch's files, and the image ids in each."""
        ids = self.job.ids(batch)
        folder = FOLDERS[self.job.file_format]
        if self.job.file_format == "png":
            return [(f"{folder}/{i:010d}.png", range(i, i + 1)) for i in ids]
        return [(f"{folder}/{batch:010d}.safetensors", ids)]

    def _encoded(
        self, batch: int, samples: Tensor, ids: range, seeds: Sequence[int]
    ) -> Iterator[tuple[str, range, bytes]]:
        """Yield name, image ids and content of each file of a batch."""
        names = self._names(batch)
        if self.job.file_format == "png":
            for (name, covered), sample in zip(names, samples, strict=True):
                yield name, covered, image_bytes(sample)
            return
        safetensors = require("safetensors.torch", "cli", _OPERATION)
        tensors = {
            "samples": samples.detach().cpu().contiguous(),
            "ids": torch.tensor(ids, dtype=torch.int64),
            "seeds": as_seeds(list(seeds), len(ids), "cpu"),
        }
        yield *names[0], safetensors.save(tensors)


def _entry(name: str, ids: range, size: int, digest: str) -> dict[str, Any]:
    return {"file": name, "first_id": ids.start, "count": len(ids), "bytes": size, "sha256": digest}


def _checked_samples(samples: object, count: int) -> Tensor:
    """Return the samples of a batch.

    Raises:
        TypeError, ValueError: they are no tensor of `count` samples.
    """
    expected, remedy = f"a tensor of {count} samples", "return one sample per image id, in order"
    checked_type(_OPERATION, "draw", samples, Tensor, f"a function that returns {expected}", remedy)
    assert isinstance(samples, Tensor)
    if samples.dim() == 0 or len(samples) != count:
        got = f"returned a tensor of shape {list(samples.shape)}"
        raise ValueError(error_message(_OPERATION, "draw", got, expected, remedy))
    return samples


def _size(path: Path) -> int | None:
    """Return the size of a file; None if it is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Yield a phrase for each field and option in which two jobs differ."""
    found, wanted = dict(found), dict(wanted)
    theirs, ours = found.pop("options", None), wanted.pop("options")
    pairs = [(found, wanted), (theirs if isinstance(theirs, dict) else {}, ours)]
    for before, now in pairs:
        for name in sorted(before.keys() | now.keys()):
            if name not in before:
                yield f"no {name} (now {brief(now[name])})"
            elif name not in now:
                yield f"{name} {brief(before[name])} (now none)"
            elif json.dumps(before[name], sort_keys=True) != json.dumps(now[name], sort_keys=True):
                yield f"{name} {brief(before[name])} (now {brief(now[name])})"
