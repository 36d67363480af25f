# SPDX-License-Identifier: MIT
"""Description of a sampling job: its images, its batches, and the options that decide their bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import checked_integer, checked_type, error_message, unknown_name
from ..philox import spawn_seeds

#: File formats of the images, and the folder that holds the files of each.
FOLDERS = {"png": "images", "safetensors": "shards"}

#: Upper limit of the number of images: `spawn_seeds` numbers the samples of one seed with 32 bits.
MAX_IMAGES = 2**32


@dataclass(frozen=True)
class ShardJob:
    """A number of images in batches of fixed image ids: batch k has the ids from k·batch_size on.

    Args:
        n: number of images, 1 to 2³²; their ids are 0 to n − 1.
        batch_size: images per batch, 1 or more; the last batch may have fewer.
        seed: 0 to 2³² − 1; image i has the seed ``i << 32 | seed``, see `fastdiff.spawn_seeds`.
        file_format: ``png``, one file per image, or ``safetensors``, one file per batch.
        options: everything else that decides the bits, by name, as JSON values.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    n: int
    batch_size: int = 64
    seed: int = 0
    file_format: str = "png"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = {"n": (1, MAX_IMAGES), "batch_size": (1, MAX_IMAGES), "seed": (0, 2**32 - 1)}
        for name, (minimum, maximum) in limits.items():
            value = getattr(self, name)
            if not checked_integer("sample_shards", name, value, minimum) <= maximum:
                got, remedy = f"is {value}", "stay in that range"
                raise ValueError(error_message("sample_shards", name, got, f"{minimum} to {maximum}", remedy))
            object.__setattr__(self, name, int(value))  # NumPy's integers are no values of JSON
        if self.file_format not in FOLDERS:
            raise unknown_name("sample_shards", "file_format", self.file_format, FOLDERS)
        checked_type("sample_shards", "options", self.options, Mapping, "a dict of JSON values", "pass one")
        try:
            json.dumps(dict(self.options), allow_nan=False)
        except (TypeError, ValueError) as error:
            got, remedy = f"cannot be written as JSON ({error})", "pass numbers, texts and lists of them"
            raise type(error)(
                error_message("sample_shards", "options", got, "a dict of JSON values", remedy)
            ) from error

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.n // self.batch_size)

    def ids(self, batch: int) -> range:
        """Return the image ids of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.n))

    def seeds(self, batch: int) -> list[int]:
        """Return the seeds of the images of a batch."""
        ids = self.ids(batch)
        return spawn_seeds(self.seed, len(ids), first=ids.start)

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = {name: getattr(self, name) for name in ("n", "batch_size", "seed", "file_format")}
        options: dict[str, Any] = json.loads(json.dumps(dict(self.options)))
        return {**fields, "options": options}

    def digest(self) -> str:
        """Return the SHA-256 of the fields: jobs with equal fields have the same one."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()
