# SPDX-License-Identifier: MIT
"""The attributes that steps of a class depend on: those that some trace of the class has read.

No guard compares any other attribute, such as a counter of the user's own.
"""

from __future__ import annotations

from ...ops import backends
from ..compiler.inputs import CONFIG

#: Attributes that every plan depends on.
_ALWAYS = (CONFIG, "timesteps")
_READS: dict[type, dict[str, None]] = {}


def attributes_read(original: type) -> dict[str, None]:
    """Return the attributes that plans of a diffusers class may depend on, as the keys of a dict that only grows."""
    found = _READS.get(original)
    if found is None:
        found = _READS[original] = dict.fromkeys(_ALWAYS)
    return found


def note_read(original: type, name: str) -> None:
    """Add an attribute to those that plans of a class depend on."""
    reads = attributes_read(original)
    if name not in reads:
        reads[name] = None
        if backends.extension is not None:
            backends.extension.advance_read_epoch()  # guards made until now lack this attribute
