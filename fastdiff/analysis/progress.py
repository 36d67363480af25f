# SPDX-License-Identifier: MIT
"""Progress bars of work that runs several loops."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ..errors import require

_Item = TypeVar("_Item")


def with_progress(items: Iterable[_Item], total: int, label: str, progress: bool | None) -> Iterator[_Item]:
    """Yield items under a tqdm bar on stderr.

    Args:
        items: what to yield.
        total: how many there are.
        label: of the bar.
        progress: show the bar; None shows it where tqdm is installed.

    Raises:
        ImportError: `progress` is True and tqdm is missing.
    """
    if progress is None:
        progress = importlib.util.find_spec("tqdm") is not None
    if not progress:
        yield from items
        return
    tqdm = require("tqdm", "cli", label).tqdm
    yield from tqdm(items, total=total, desc=label, unit="run", dynamic_ncols=True)
