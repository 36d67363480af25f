# SPDX-License-Identifier: MIT
"""Which torch an extension was built for: read in its file, before it is loaded.

An extension calls torch's C++ by names and layouts that change from one minor release to the next.  Beside another
torch it fails to load with the name of a symbol, or loads and crashes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

#: As setup.py's `built_for` says it and csrc/built_for.cpp writes it.
_RECORD = re.compile(rb"fastdiff\._C was built for <torch=(\S+) cxx11abi=([01])(?: cuda=(\S+))?>")

#: pip keeps the wheels that it has built, and would take the same one again.
_REMEDY = (
    "`make setup` in a checkout, else `pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall "
    "--no-binary fastdiff-kernels fastdiff-kernels`"
)


def release(version: str) -> str:
    """What two versions of torch share where one extension fits both: "2.13" of "2.13.0+cpu".

    A version that is no release fits itself alone.
    """
    found = re.fullmatch(r"(\d+\.\d+)\.\d+", version.partition("+")[0])
    return found.group(1) if found else version


def why_unfit(extension: Path) -> str:
    """Why an extension must not be loaded beside this torch, as a clause; empty where it may."""
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
