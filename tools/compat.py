# SPDX-License-Identifier: MIT
"""Test the package with other versions of torch, on the CPU (``make compat``).

    python tools/compat.py [--folder DIR] [--build cpu|cuda|none] [--tests "FILES"] VERSION...

For each version: create a virtual environment with this interpreter and that torch, build a copy of the sources against
it, and run the checks of tools/compat_checks.py, each in its own process. One line per version reports the results; the
exit status is 1 if a check failed, 2 if a version could not be set up. Existing environments and copies are kept, so
that a second run compiles only what changed; the output of failed checks goes to stderr.

The wheels of most versions are built for CUDA. They are installed without the CUDA libraries; tools/cuda_stubs.py
makes empty libraries in their place. With ``--build cuda`` the extension gets its CUDA kernels, where nvcc is, and is
loaded without a GPU: `--tests tests/ops/test_extension_errors.py` takes its ways to an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cuda_stubs import make_stubs

ROOT = Path(__file__).resolve().parents[1]
#: The functions of tools/compat_checks.py, without their "check_".
CHECKS = (
    "import",
    "samplers",
    "quantile",
    "gradients",
    "training",
    "compile",
    "export",
    "strict_export",
    "dropins",
    "compiled_dropins",
)
#: Files of a checkout that are not copied.
IGNORED = shutil.ignore_patterns(".git", ".venv", ".*_cache", "build", "dist", "*.egg-info", "__pycache__", "*.so")
#: Requirements of the build and the checks besides torch. diffusers does not depend on torch; torchsde does.
PACKAGES = (
    "setuptools>=77.0.3,<82",
    "wheel",
    "ninja",
    "numpy",
    "scipy",
    "diffusers>=0.35",
    "pytest",
    "hypothesis",
    "psutil",
)
WITHOUT_DEPENDENCIES = ("torchsde==0.2.6", "trampoline==0.1.2")
#: Requirements of torch that only its CUDA build has.
CUDA_ONLY = re.compile(r"nvidia|cuda|triton", re.IGNORECASE)


class SetUpError(Exception):
    """A version could not be set up; the message is the output of the command that failed."""


def run(*command: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Run a command and return what it printed.

    Raises:
        SetUpError: it failed.
    """
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SetUpError(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def make_environment(folder: Path, version: str) -> Path:
    """Create a virtual environment with that torch, unless it exists; return its interpreter."""
    python = folder / "bin" / "python"
    done = folder / ".torch-is-there"
    if done.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-cache-dir", "--no-compile", "--no-deps", f"torch=={version}")
    program = (
        "import importlib.metadata as m; print(*(r for r in m.requires('torch') if 'extra ==' not in r), sep='\\n')"
    )
    requirements = [line.strip() for line in run(python, "-c", program).splitlines() if not CUDA_ONLY.match(line)]
    run(*pip, *requirements, *PACKAGES)
    run(*pip, "--no-deps", *WITHOUT_DEPENDENCIES)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    if subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0:
        make_stubs(Path(site))
    run(python, "-c", "import torch")
    done.touch()
    return python


def copy_sources(target: Path) -> None:
    """Update a copy of the sources. An unchanged file keeps its time, so that its objects are not compiled again."""

    def copy_if_changed(source: str, destination: str) -> str:
        copied = Path(destination)
        if not copied.exists() or copied.stat().st_mtime_ns != Path(source).stat().st_mtime_ns:
            shutil.copy2(source, destination)
        return destination

    shutil.copytree(ROOT, target, ignore=IGNORED, copy_function=copy_if_changed, dirs_exist_ok=True)


def install(python: Path, sources: Path, build: str) -> None:
    """Install the copy in editable mode, like `make`, and build its extension in place."""
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-build-isolation", "--no-deps", "-e", sources, FASTDIFF_BUILD="none")
    for extension in (sources / "fastdiff").glob("_C*.so"):
        extension.unlink()
    if build != "none":
        run(python, "setup.py", "--quiet", "build_ext", "--inplace", cwd=sources, FASTDIFF_BUILD=build, PATH=path)


def run_checks(python: Path, sources: Path, build: str, tests: list[str]) -> dict[str, str]:
    """Run the checks; return the output of each one that failed, by name."""
    commands = {name: [python, sources / "tools" / "compat_checks.py", name] for name in CHECKS}
    if tests:
        commands["tests"] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *tests]
    failed = {}
    for name, command in commands.items():
        try:
            # FASTDIFF_BACKEND of the caller's environment would select another backend than the one under test.
            run(*command, cwd=sources, FASTDIFF_BUILD=build, FASTDIFF_BACKEND="", OMP_NUM_THREADS="1")
        except SetUpError as error:
            failed[name] = str(error)
    return failed


def main() -> int:
    """Test the versions one after another; return the exit status."""
    parser = argparse.ArgumentParser(description="test the package with other versions of torch")
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compat", help="folder of the environments")
    parser.add_argument("--build", choices=("cpu", "cuda", "none"), default="cpu", help="none: without the extension")
    parser.add_argument("--tests", default="", help="test files to run too, separated by spaces")
    options = parser.parse_args()
    status = 0
    tag = f"py{sys.version_info.major}.{sys.version_info.minor}"
    for version in options.versions:
        folder = options.folder.resolve() / f"torch-{version}-{tag}"
        label = f"torch {version:9} {tag:7}"
        try:
            python = make_environment(folder / "venv", version)
            copy_sources(folder / "sources")
            install(python, folder / "sources", options.build)
        except SetUpError as error:
            print(f"{label} could not be set up", flush=True)
            print(error, file=sys.stderr)
            status = 2
            continue
        failed = run_checks(python, folder / "sources", options.build, options.tests.split())
        ran = [*CHECKS, "tests"] if options.tests else [*CHECKS]
        built = run(python, "-c", "import torch; print(torch.__version__)").strip()
        print(
            label,
            f"({built}, build {options.build})",
            *(f"{name}:{'FAIL' if name in failed else 'pass'}" for name in ran),
            flush=True,
        )
        for name, output in failed.items():
            print(f"--- torch {version}, {name}\n{output}", file=sys.stderr)
        status = max(status, 1 if failed else 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
