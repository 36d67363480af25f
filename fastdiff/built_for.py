# SPDX-License-Identifier: MIT
"""The torch version an extension was built for, read from its file before it is loaded.

torch's C++ symbols and layouts change from one minor release to the next.  With another torch an extension fails to
load with an undefined symbol, or loads and crashes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

#: The record that setup.py's `built_for` composes and csrc/built_for.cpp stores.
_RECORD = re.compile(rb"fastdiff\._C was built for <torch=(\S+) cxx11abi=([01])(?: cuda=(\S+))?>")

#: Without these options pip would reuse its cached wheel.
_REMEDY = (
    "`make setup` in a checkout, else `pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall "
    "--no-binary fastdiff-kernels fastdiff-kernels`"
)


def release(version: str) -> str:
    """Return the part of a torch version that an extension depends on: "2.13" for "2.13.0+cpu".

    A version that is not a release is returned whole: an extension built for it fits no other.
    """
    found = re.fullmatch(r"(\d+\.\d+)\.\d+", version.partition("+")[0])
    return found.group(1) if found else version


def why_unfit(extension: Path) -> str:
    """Return why an extension must not be loaded with the installed torch, as a clause; empty if it may be."""
    try:
        found = _RECORD.search(extension.read_bytes())
    except OSError as error:
        return f"the C++ extension cannot be read: {error}"
    torch_here, abi_here, cuda_here = str(torch.__version__), torch.compiled_with_cxx11_abi(), torch.version.cuda
    if found is None:
        got, expected = "does not say which torch it was built for", f"torch {torch_here}"
    else:
        version, abi, cuda = (group.decode() for group in found.groups(default=b""))
        if release(version) != release(torch_here):
            got, expected = f"was built for torch {version}", f"torch {torch_here}, which is here"
        elif (abi == "1") != abi_here:
            got = f"was built with _GLIBCXX_USE_CXX11_ABI={abi}"
            expected = f"{int(abi_here)}, like the torch {torch_here} that is here"
        elif cuda and cuda.partition(".")[0] != (cuda_here or "").partition(".")[0]:
            got = f"was built for CUDA {cuda}"
            expected = f"{f'CUDA {cuda_here}' if cuda_here else 'no CUDA'}, like the torch {torch_here} that is here"
        else:
            return ""
    return f"the C++ extension {got}, expected {expected}; build it again: {_REMEDY}"
