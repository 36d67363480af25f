# SPDX-License-Identifier: MIT
"""Samplers by the names that the commands take."""

from __future__ import annotations

from typing import Any

from ..errors import unknown_name
from ..solvers import SamplingMethod

#: Fields of SamplingConfig by the names of samplers: those of the registry, and the values of `SamplingMethod` besides.
SAMPLERS: dict[str, dict[str, Any]] = {
    name: fields for method in SamplingMethod for name, fields in method.presets.items()
}
ALIASES: dict[str, dict[str, Any]] = {
    method.value: {"method": method} for method in SamplingMethod if method.value not in SAMPLERS
}


def sampler_fields(name: str) -> dict[str, Any]:
    """Return the fields of `SamplingConfig` for a sampler's name."""
    known = {**SAMPLERS, **ALIASES}
    if name not in known:
        raise unknown_name("sample", "--sampler", name, known)
    return known[name]
