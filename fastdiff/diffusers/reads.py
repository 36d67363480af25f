# SPDX-License-Identifier: MIT
"""Which attributes of a scheduler its steps depend on: those that a trace of its class has read.

Attributes that no trace has read, such as a counter of the user's own, are compared with nothing.
"""

from __future__ import annotations

from ..ops import backends
from .compiler.inputs import CONFIG

#: What every plan depends on.
_ALWAYS = (CONFIG, "timesteps")
_READS: dict[type, dict[str, None]] = {}


def reads_of(original: type) -> dict[str, None]:
    """The attributes that plans of a diffusers class may depend on, as the keys of a dictionary that only grows."""
    found = _READS.get(original)
    if found is None:
        found = _READS[original] = dict.fromkeys(_ALWAYS)
    return found


def note_read(original: type, name: str) -> None:
    """Count an attribute among those that plans of the class depend on."""
    reads = reads_of(original)
    if name not in reads:
        reads[name] = None
        if backends.extension is not None:
            # What schedulers remember of their last step lacks this attribute.
            backends.extension.advance_epoch()
