# SPDX-License-Identifier: MIT
"""Run tests with an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (``make sanitize``).

    python tests/support/sanitize.py FOLDER TEST...

FOLDER contains the package with the instrumented extension, made by ``FASTDIFF_SANITIZE=1 python setup.py build``. For
every build of the CPU loops that the processor supports, two deliberate faults are tried first, through the extension:
a read past the end of a heap block, and a misaligned read. The run fails if one is not reported, so that an extension
without instrumentation, or without the runtimes, cannot pass.
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

#: A step over 65 floats, one more than whole vectors: the last is read alone, beyond the allocation or misaligned.
#: (Vector loads may be misaligned, and one that is partly outside of a block is reported under another name.)
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
    # The tensor has 65 floats, the allocation 64.
    "ERROR: AddressSanitizer: heap-buffer-overflow": _STEP_AT
    + """
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
step_at((ctypes.c_char * 260).from_address(libc.malloc(256)))
""",
    "runtime error: load of misaligned address": _STEP_AT + "step_at(bytearray(512), offset=1)\n",
}
#: The same step without a fault, which must not be reported.
NO_FAULT = _STEP_AT + "step_at(bytearray(512))\n"


def runtime_environment(package: Path, build: str) -> dict[str, str]:
    """Return the environment for a process that loads the instrumented extension and runs one build of its loops."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")

    def library(name: str) -> str:
        asked = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(asked.stdout.strip())
        if not path.is_absolute():  # the compiler prints the bare name of a library that it does not find
            raise SystemExit(f"sanitize: {compiler[0]} has no {name}, expected GCC with its sanitizers; install them")
        return str(path.resolve())

    # libstdc++ too: AddressSanitizer looks up __cxa_throw when it starts, before torch loads the library.
    preload = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep memory until they exit. Python is not instrumented, so the runtime is not first in the
        # link order; and torch calls free() for memory that other libraries got from new.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # no arenas: a Python object's end is a block's end
        "PYTHONPATH": str(package),
        "FASTDIFF_CPU": build,
        "FASTDIFF_BACKEND": "",
    }


def instrument_problem(package: Path, build: str) -> str:
    """Run each of `FAULTS`; return why the extension in `package` fails to report one, or an empty string."""
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
    # Any other failure is reported by instrument_problem().
    return f"FASTDIFF_CPU is '{build}'" not in done.stderr


def run_tests(package: Path, build: str, tests: list[str], *, last: bool) -> subprocess.CompletedProcess[str]:
    """Run the tests with one build of the loops."""
    # In the package's folder: `-m` searches the current folder first, which may have another extension. Leave out
    # Triton and the reference, which have no C++, and tests that run all builds themselves.
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider"]
    # A report ends the process: output that pytest has captured from the descriptors would be lost.
    options += ["--capture=sys"]
    # Leave out compilers, whose code is not instrumented, and torch's instruction sets, which change none of ours. The
    # bindings are the same for all builds, and their tests take half of the time: run them with the last build.
    left_out = ["triton", "reference", "cpu_build", "opcheck", "compile", "torch_cpu_capability"]
    if not last:
        left_out += ["fuzz", "dropin_loop", "beginnings", "brownian", "blocks", "instruction_sets"]
    chosen = " and ".join(f"not {name}" for name in left_out)
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
        # Start the longest run first.
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
