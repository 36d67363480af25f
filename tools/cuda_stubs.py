# SPDX-License-Identifier: MIT
"""Make a CUDA build of torch importable without CUDA, with stub libraries in place of those that it links.

    python tools/cuda_stubs.py SITE_PACKAGES

Every stub function returns 0, and the device count is 0. torch's CPU code is unchanged, which is enough to test the
package on the CPU; the real libraries take gigabytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

#: System libraries, which need no stub.
_SYSTEM = re.compile(r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libutil|ld-linux.*)\.so")
#: Prefixes of symbols in CUDA's libraries.
_CUDA = re.compile(r"_*(cu|CU|nv|Nv|NV|nccl)|__cuda|cupti")
#: Functions that torch calls when it is imported; 100 is cudaErrorNoDevice.
_DEFINITIONS = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int* count) { if (count) *count = 0; return 100; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int* version) { if (version) *version = 0; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int* version) { if (version) *version = 13000; return 0; }",
    "cudaGetErrorString": 'const char* cudaGetErrorString(int error) { return "no CUDA here"; }',
    "cudaGetErrorName": 'const char* cudaGetErrorName(int error) { return "stub"; }',
}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _names(library: Path, which: str) -> set[str]:
    lines = _output("nm", "-D", which, library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


def _versions(library: Path) -> dict[str, set[str]]:
    """Return the symbol versions that a library requires, for each library that it links."""
    wanted: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in _output("readelf", "-V", library).splitlines():
        if file := re.search(r"File: (\S+)", line):
            current = wanted.setdefault(file.group(1), set())
        if name := re.search(r"Name: (\S+)\s+Flags", line):
            current.add(name.group(1))
    return wanted


def make_stubs(site_packages: Path) -> list[str]:
    """Write stubs of the libraries that torch misses into its own folder; return their names."""
    folder = site_packages / "torch" / "lib"
    libraries = sorted(folder.glob("*.so*"))
    needed: set[str] = set()
    defined: set[str] = set()
    undefined: set[str] = set()
    versions: dict[str, set[str]] = {}
    for library in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.+?)\]", _output("readelf", "-d", library)))
        defined |= _names(library, "--defined-only")
        undefined |= _names(library, "--undefined-only")
        for name, found in _versions(library).items():
            versions.setdefault(name, set()).update(found)
    missing = sorted(name for name in needed - {path.name for path in libraries} if not _SYSTEM.match(name))
    functions = sorted(name for name in undefined - defined if _CUDA.match(name))
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "stubs.c"
        source.write_text("\n".join(_DEFINITIONS.get(name, f"long {name}(void) {{ return 0; }}") for name in functions))
        for name in missing:
            command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", source, "-o", folder / name]
            command.append(f"-Wl,-soname,{name}")
            if version := sorted(versions.get(name, ())):
                script = Path(temporary) / f"{name}.map"
                others = "".join(f"{other} {{ }};\n" for other in version[1:])
                script.write_text(f"{version[0]} {{ global: *; }};\n{others}")
                command.append(f"-Wl,--version-script={script}")
            subprocess.run(command, check=True)
    return missing


if __name__ == "__main__":
    print(*make_stubs(Path(sys.argv[1])))
