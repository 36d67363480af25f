# SPDX-License-Identifier: MIT
"""Runs tests over an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (``make sanitize``).

    python tests/support/sanitize.py FOLDER TEST...

FOLDER holds the package with the instrumented extension, as ``FASTDIFF_SANITIZE=1 python setup.py build`` makes it.
For every build of the CPU loops that the processor has, two faults are committed first, through the extension itself:
a read past the end of a heap block, and a read at an address that no float may have. Where either goes unreported
the run fails, so that an extension without instruments, or without their runtimes, cannot pass for a clean one.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ("generic", "avx2", "avx512")

#: A step over 65 floats, one more than fills registers: the last is read alone, past what malloc gave or misaligned.
#: (Registers are loaded from any address, and an access that only ends outside of a block has no name of its own.)
_STEP_AT = """
import ctypes, torch
from fastdiff.ops.backends import extension
table = torch.zeros(1, 32)
table[0, 8] = 1.0
def step_at(buffer, offset=0):
    sample = torch.frombuffer(buffer, dtype=torch.float32, count=65, offset=offset)
    extension.step(sample=sample, model_output=sample, table=table, row_index=0)
"""
FAULTS = {
    # 65 floats are announced, 64 are there.
    "ERROR: AddressSanitizer: heap-buffer-overflow": _STEP_AT
    + """
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
step_at((ctypes.c_char * 260).from_address(libc.malloc(256)))
""",
    "runtime error: load of misaligned address": _STEP_AT + "step_at(bytearray(512), offset=1)\n",
}
#: The same step with nothing wrong: a fault's report has to come from the fault.
NO_FAULT = _STEP_AT + "step_at(bytearray(512))\n"


def runtime_environment(package: Path, build: str) -> dict[str, str]:
    """What a process needs to load the instrumented extension of `package` and to run one build of its loops."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")

    def library(name: str) -> str:
        asked = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(asked.stdout.strip())
        if not path.is_absolute():  # what the compiler does not find it prints as it was asked
            raise SystemExit(f"sanitize: {compiler[0]} has no {name}, expected GCC with its sanitizers; install them")
        return str(path.resolve())

    # libstdc++ with them: AddressSanitizer looks for the real __cxa_throw when it starts, before torch brings it.
    preload = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep memory until they exit. Python starts uninstrumented, so the runtime is not first in
        # the link order; and torch frees with free() what other libraries got from new.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # no arenas: a Python object's end is a block's end
        "PYTHONPATH": str(package),
        "FASTDIFF_CPU": build,
        "FASTDIFF_BACKEND": "",
    }


def instrument_problem(package: Path, build: str) -> str:
    """Why the extension in `package` is not known to report faults; empty where it reports each of `FAULTS`.

    None of it is asked of the file (its symbols, its flags): the faults are committed.
    """
    environment = runtime_environment(package, build)

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=package, capture_output=True, text=True, check=False
        )

    clean = run(NO_FAULT)
    if clean.returncode != 0:
        return f"a step without a fault ends with {clean.returncode}: {clean.stderr}"
    for report, program in FAULTS.items():
        done = run(program)
        if done.returncode == 0 or report not in done.stderr:
            return f"a deliberate fault ended with {done.returncode} and without '{report}': {done.stderr or 'no word'}"
    return ""


def processor_has(package: Path, build: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", "import torch, fastdiff._C"],
        env=runtime_environment(package, build), cwd=package, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Any other failure than this one is the extension's, and shows as a problem below.
    return f"FASTDIFF_CPU is '{build}'" not in done.stderr


def run_tests(package: Path, build: str, tests: list[str], *, last: bool) -> subprocess.CompletedProcess[str]:
    """The tests with one build of the loops."""
    # From the package's folder: `-m` puts the current one first, and there lies the other extension. Triton and the
    # reference have no C++ of ours, and what runs all builds by itself is run here build by build.
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider"]
    # A report ends the process: what pytest holds back of the descriptors would be lost with it.
    options += ["--capture=sys"]
    # The bindings are one code for all builds, and their tests take as long as all else: once, with the last.
    chosen = "not triton and not reference and not cpu_build" + (
        "" if last else " and not fuzz and not dropin_loop and not beginnings and not brownian"
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", chosen, *tests],
        env={"HYPOTHESIS_PROFILE": "sanitize", **runtime_environment(package, build)},
        cwd=package, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


def main(package: Path, tests: list[str]) -> int:
    builds = [build for build in BUILDS if processor_has(package, build)]
    for build in BUILDS:
        if build not in builds:
            print(f"sanitize: {build}: skipped, this processor lacks it")
            continue
        problem = instrument_problem(package, build)
        if problem:
            print(f"sanitize: {build}: {problem}", file=sys.stderr)
            return 1
    print(f"sanitize: {', '.join(builds)}: deliberate faults are reported; running the tests", flush=True)
    failed = 0
    with ThreadPoolExecutor(min(len(builds), os.cpu_count() or 1)) as pool:
        # The longest run first.
        runs = {
            build: pool.submit(run_tests, package, build, tests, last=build == builds[-1]) for build in builds[::-1]
        }
        for build in builds:
            done = runs[build].result()
            print(f"sanitize: {build}:\n{done.stdout}", flush=True)
            failed = failed or done.returncode
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), [str(Path(name).resolve()) for name in sys.argv[2:]]))
