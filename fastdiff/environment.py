# SPDX-License-Identifier: MIT
"""The environment variables that name one of a few choices, and the reason why the extension does not load.

``FASTDIFF_KEEP_MIB`` is a number and is read by `fastdiff.ops.memory`; ``FASTDIFF_BUILD`` and ``FASTDIFF_SANITIZE`` are
read by setup.py alone.
"""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from .errors import unknown_name

#: Variables and the values that they may have.  An empty value is an unset variable.
CHOICES = {
    "FASTDIFF_BACKEND": ("cpu", "cuda", "triton", "reference"),
    "FASTDIFF_CPU": ("generic", "avx2", "avx512"),
    "FASTDIFF_TRITON_LAUNCHER": ("held", "jit"),
}

#: pip would otherwise take a wheel that it built earlier, without a compiler or for another torch.
INSTALL = (
    "with torch and a C++ compiler installed, run FASTDIFF_BUILD=cpu (or cuda) pip install --no-build-isolation "
    "--no-cache-dir --force-reinstall --no-deps on fastdiff's source"
)


def chosen(variable: str) -> str | None:
    """Return the value of a variable in `CHOICES`; None where it is unset or empty.

    Raises:
        ValueError: the value is none of the choices.
    """
    value = os.environ.get(variable)
    if value and value not in CHOICES[variable]:
        raise unknown_name("fastdiff", variable, value, CHOICES[variable])
    return value or None


def why_absent(error: ImportError) -> str:
    """Return the reason why ``fastdiff._C`` cannot be imported, and the remedy, as a clause.

    Args:
        error: raised by the import.

    Raises:
        ValueError: the extension loads, but ``FASTDIFF_CPU`` names an instruction set that this processor lacks.
    """
    text = str(error)
    if text.startswith("fastdiff: FASTDIFF_CPU "):
        raise ValueError(text) from None
    if not isinstance(error, ModuleNotFoundError) or error.name != "fastdiff._C":
        return f"the C++ extension does not load: {text}; {INSTALL}"
    # The import system passes over a file whose suffix is another interpreter's.
    own = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = [path.name for path in sorted(Path(__file__).parent.glob("_C.*")) if path.suffix in (".so", ".pyd")]
    foreign = [name for name in found if name not in own]
    if foreign:
        return f"the C++ extension was built for another Python: found {foreign[0]}, expected {own[0]}; {INSTALL}"
    return f"the C++ extension was not built: {INSTALL}"


for _variable in CHOICES:
    chosen(_variable)  # a mistyped value is refused at import, whether or not its backend is here
