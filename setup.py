# SPDX-License-Identifier: MIT
"""Build fastdiff: the Python packages, and the extension ``fastdiff._C`` if this machine can compile it.

``FASTDIFF_BUILD`` selects what is compiled:

======== ==============================================================================================
``none`` nothing; the pure-Python package runs on the reference and Triton backends
``cpu``  the C++ extension; a missing compiler or torch is an error
``cuda`` the C++ extension with the CUDA kernels; a missing toolkit or a torch without CUDA is an error
``auto`` (default) ``cuda`` where that is possible, else ``cpu``, else ``none`` with a warning
======== ==============================================================================================

``auto`` depends on installed software, never on a visible GPU, so that a build machine without a GPU builds for one. It
falls back only if a tool is absent; sources that fail to compile are an error in every mode. ``Facts`` describes the
machine; ``decide`` is a pure function of it, so that it can be tested for any machine.

The requirements of the package depend on the mode. The pure-Python package requires a range of torch versions, a
package with an extension requires the torch release it was built for. On a package index the README cannot link to the
files beside it; ``FASTDIFF_FILES_URL`` is the address where they are served (docs/packaging.md).

``FASTDIFF_SANITIZE=1`` compiles the C++ with AddressSanitizer and UndefinedBehaviorSanitizer. Python loads such an
extension only with their runtimes preloaded: ``make sanitize`` builds one in a separate folder and tests it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

#: Requirement of the pure-Python package: the versions of torch that it is tested with (docs/packaging.md).
TORCH = "torch>=2.6,<2.15"

MODES = ("auto", "cpu", "cuda", "none")

# Listed explicitly, because discovery would find `kernels` at the root: a top-level package of that name would shadow
# the PyPI package `kernels`, which diffusers imports.
PACKAGES = [
    "fastdiff",
    "fastdiff.analysis",
    "fastdiff.analysis.plots",
    "fastdiff.benchmarks",
    "fastdiff.benchmarks.gpu",
    "fastdiff.classroom",
    "fastdiff.cli",
    "fastdiff.compression",
    "fastdiff.diffusers",
    "fastdiff.diffusers.compiler",
    "fastdiff.diffusers.runtime",
    "fastdiff.digits",
    "fastdiff.editing",
    "fastdiff.graphs",
    "fastdiff.guidance",
    "fastdiff.kernels",
    "fastdiff.loops",
    "fastdiff.noise",
    "fastdiff.ops",
    "fastdiff.rl",
    "fastdiff.samplers",
    "fastdiff.sampling",
    "fastdiff.schedules",
    "fastdiff.sharding",
    "fastdiff.solvers",
    "fastdiff.training",
    "fastdiff.training.analyzer",
    "fastdiff.training.data",
    "fastdiff.training.few_steps",
    "fastdiff.training.losses",
    "fastdiff.training.model",
    "fastdiff.training.pictures",
    "fastdiff.training.trainer",
]
PACKAGE_DIR = {
    "fastdiff.benchmarks": "benchmarks",
    "fastdiff.benchmarks.gpu": "benchmarks/gpu",
    "fastdiff.kernels": "kernels/triton",
}
PACKAGE_DATA = {"fastdiff": ["py.typed"], "fastdiff.digits": ["*.safetensors", "figures.json"]}

# The commands that build the extension, and dist_info, from which pip reads the wheel's requirements in advance. Other
# commands (sdist, egg_info, clean, …) need no compiler.
BUILD_COMMANDS = frozenset(
    {"build", "build_ext", "bdist_wheel", "bdist", "install", "develop", "editable_wheel", "dist_info"}
)

# No -march=native: a wheel runs on other machines; the extension selects an instruction set when it is loaded. No
# -ffast-math and no contraction: every fma is explicit, so that all builds agree bit for bit. -fno-trapping-math
# changes no result and lets gcc vectorise selects; -fno-math-errno lets it inline sqrt. No -std: torch adds its own.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
# The last -O and -g apply. The first report ends the process, because later results would prove nothing. The standard
# library's assertions catch an index beyond an array that is still within its object.
SANITIZE_FLAGS = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-D_GLIBCXX_ASSERTIONS",
]
NVCC_FLAGS = ["-O3", "--fmad=false", "-Xcompiler=-ffp-contract=off,-fvisibility=hidden,-Wall,-Wextra"]

PURE_PYTHON = "set FASTDIFF_BUILD=none for the pure-Python package"


class Facts(NamedTuple):
    """Inputs of a build. A ``*_problem`` is the reason why the entry above it is None."""

    compiler: str | None = None  # the C++ compiler, "c++"
    compiler_problem: str = "there is none"
    torch: str | None = None  # version of the torch that can be imported, "2.13.0+cpu"
    torch_problem: str = "there is none"
    torch_cuda: str | None = None  # the CUDA release that torch is built for, "13.0"
    torch_cxx11_abi: bool = True  # whether that torch has the C++11 ABI of the standard library
    toolkit: str | None = None  # the release of the CUDA toolkit, "13.0"
    toolkit_home: str | None = None
    toolkit_problem: str = "there is none"


class Decision(NamedTuple):
    """The mode to build (``none``, ``cpu`` or ``cuda``), and a warning if a problem prevented a better one."""

    mode: str
    warning: str = ""


class BuildError(Exception):
    """The requested build is not possible here; the message is a full sentence with a remedy."""


def _error_message(argument: str, got: str, expected: str, remedy: str) -> str:
    """The shape of ``fastdiff.errors.error_message``; the package cannot be imported before it is built."""
    return f"setup.py: {argument} {got}, expected {expected}; {remedy}"


def _cpp_problem(facts: Facts) -> str:
    """Return why the C++ extension cannot be built, or an empty string."""
    if facts.torch is None:
        return _error_message(
            "torch",
            f"cannot be imported ({facts.torch_problem})",
            "the torch that will load the extension",
            f"install torch first and build with `pip install --no-build-isolation`, or {PURE_PYTHON}",
        )
    if facts.compiler is None:
        return _error_message(
            "the C++ compiler",
            f"is not usable ({facts.compiler_problem})",
            "g++ or clang++ with the headers of Python",
            f"install them (on Debian: apt-get install g++ python3-dev) or name one in CXX, or {PURE_PYTHON}",
        )
    return ""


def _cuda_problem(facts: Facts) -> str:
    """Return why the CUDA kernels cannot be built, or an empty string."""
    remedy = "or set FASTDIFF_BUILD=cpu to leave the CUDA kernels out"
    if facts.torch_cuda is None:
        like = f"for CUDA {facts.toolkit.partition('.')[0]}.x like the toolkit" if facts.toolkit else "for CUDA"
        also = "" if facts.toolkit else f" and the CUDA toolkit (missing as well: {facts.toolkit_problem})"
        return _error_message(
            f"torch {facts.torch}", "is built without CUDA", f"a torch built {like}{also}", f"install one, {remedy}"
        )
    major = facts.torch_cuda.partition(".")[0]
    if facts.toolkit is None:
        return _error_message(
            "the CUDA toolkit",
            f"is missing ({facts.toolkit_problem})",
            f"nvcc of release {major}.x, the major release that torch {facts.torch} is built for",
            f"install that toolkit and point CUDA_HOME to it, {remedy}",
        )
    if facts.toolkit.partition(".")[0] != major:
        return _error_message(
            "the CUDA toolkit",
            f"in {facts.toolkit_home} has release {facts.toolkit}",
            f"{major}.x, the major release that torch {facts.torch} is built for",
            f"point CUDA_HOME to such a toolkit or install a torch built for CUDA {facts.toolkit}, {remedy}",
        )
    return ""


def decide(requested: str, facts: Facts) -> Decision:
    """Choose the mode from the value of ``FASTDIFF_BUILD`` and the facts of the machine.

    Raises:
        BuildError: the value is unknown, or this machine cannot build that mode.
    """
    if requested not in MODES:
        raise BuildError(
            _error_message(
                "FASTDIFF_BUILD", f"is {requested!r}", f"one of {', '.join(MODES)}", "pick a name from that list"
            )
        )
    if requested == "none":
        return Decision("none")

    cpp_problem = _cpp_problem(facts)
    if requested == "auto" and cpp_problem:
        return Decision("none", f"{cpp_problem}. FASTDIFF_BUILD=auto goes on with the pure-Python package.")
    if cpp_problem:
        raise BuildError(cpp_problem)
    if requested == "cpu":
        return Decision("cpu")

    cuda_problem = _cuda_problem(facts)
    if requested == "cuda" and cuda_problem:
        raise BuildError(cuda_problem)
    if cuda_problem:
        # Warn only if torch itself is built for CUDA: otherwise the kernels could not be used.
        usable = facts.torch_cuda is not None
        return Decision("cpu", f"{cuda_problem}. FASTDIFF_BUILD=auto goes on without CUDA kernels." if usable else "")
    return Decision("cuda")


def cuda_architectures(toolkit: str) -> str:
    """Return the GPU architectures to compile for: data-centre Ampere, Hopper and Blackwell, and PTX for later ones.

    The value has the format of ``TORCH_CUDA_ARCH_LIST``, which overrides it.
    """
    major, minor = (int(part) for part in toolkit.split(".")[:2])
    return "8.0;9.0;10.0+PTX" if (major, minor) >= (12, 8) else "8.0;9.0+PTX"  # sm_100 came with CUDA 12.8


def find_compiler(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """Find a C++ compiler that compiles against Python's headers; return it, or None and why not."""
    if sys.platform == "win32":
        return None, "the sources are written for g++ and clang++, not for Windows"
    problem = "none of c++, g++ and clang++ is on PATH"
    for command in [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if shutil.which(words[0], path=environ.get("PATH")) is None:
            if "CXX" in environ:
                problem = f"CXX names {command!r}, which is not on PATH"
            continue
        # Only a trial compilation detects a missing Python.h or a compiler without its standard library.
        probe = subprocess.run(
            [*words, "-I", sysconfig.get_path("include"), "-x", "c++", "-fsyntax-only", "-"],
            input="#include <Python.h>\n#include <vector>\n",
            text=True,
            capture_output=True,
            check=False,
        )
        if probe.returncode == 0:
            return command, ""
        complaint = next((line for line in probe.stderr.splitlines() if "error" in line), "it failed without a message")
        problem = f"{command} says: {complaint.strip()}"
    return None, problem


def find_toolkit(environ: Mapping[str, str]) -> tuple[str | None, str | None, str]:
    """Find the CUDA toolkit; return its release and folder, or None, None and why not.

    If CUDA_HOME or CUDA_PATH names a folder, only that folder is searched. Otherwise the folder of the nvcc on PATH is
    searched first; an nvcc without headers beside it (a wrapper script) is ignored.
    """
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        homes = [Path(named)]
        problem = f"{named}, named by CUDA_HOME, holds no bin/nvcc with include/cuda_runtime.h"
    else:
        on_path = shutil.which("nvcc", path=environ.get("PATH"))
        homes = [Path(on_path).resolve().parents[1]] if on_path else []
        homes.append(Path("/usr/local/cuda"))
        problem = "no nvcc with its headers under CUDA_HOME, on PATH or in /usr/local/cuda"
    for home in homes:
        nvcc = home / "bin" / "nvcc"
        headers = [home / "include", *home.glob("targets/*/include")]
        if not nvcc.is_file() or not any((folder / "cuda_runtime.h").is_file() for folder in headers):
            continue
        answer = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=False)
        release = re.search(r"release (\d+\.\d+)", answer.stdout)
        if release:
            return release.group(1), str(home), ""
        problem = f"{nvcc} --version names no release"
    return None, None, problem


def gather(environ: Mapping[str, str]) -> Facts:
    """Collect the facts of this machine."""
    compiler, compiler_problem = find_compiler(environ)
    toolkit, toolkit_home, toolkit_problem = find_toolkit(environ)
    torch_version = torch_cuda = None
    cxx11_abi = True
    torch_problem = ""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing
        torch_problem = str(error)
    else:
        torch_version, torch_cuda = str(torch.__version__), torch.version.cuda
        cxx11_abi = torch.compiled_with_cxx11_abi()
    return Facts(
        compiler=compiler,
        compiler_problem=compiler_problem,
        torch=torch_version,
        torch_problem=torch_problem,
        torch_cuda=torch_cuda,
        torch_cxx11_abi=cxx11_abi,
        toolkit=toolkit,
        toolkit_home=toolkit_home,
        toolkit_problem=toolkit_problem,
    )


def built_for(mode: str, facts: Facts) -> str:
    """Describe the torch that an extension is built for; fastdiff/built_for.py reads it from the binary."""
    cuda = f" cuda={facts.torch_cuda}" if mode == "cuda" else ""
    return f"torch={facts.torch} cxx11abi={int(facts.torch_cxx11_abi)}{cuda}"


def torch_requirement(mode: str, facts: Facts) -> str:
    """Return the package's requirement on torch: with an extension, the release that it was built for."""
    if mode == "none":
        return TORCH
    public = str(facts.torch).partition("+")[0]
    release = re.fullmatch(r"(\d+\.\d+)\.\d+", public)  # otherwise a pre-release, which is required exactly
    return f"torch=={release.group(1)}.*" if release else f"torch=={public}"


def files_url(environ: Mapping[str, str]) -> str:
    """Read ``FASTDIFF_FILES_URL``: an address that ends in a slash, or an empty string.

    Raises:
        BuildError: it is no https address.
    """
    url = environ.get("FASTDIFF_FILES_URL") or ""
    if url and not re.fullmatch(r"https://[^\s()]+", url):
        expected = "an https address under which the files of this commit are served"
        raise BuildError(_error_message("FASTDIFF_FILES_URL", f"is {url!r}", expected, "correct it, or unset it"))
    return f"{url.rstrip('/')}/" if url else ""


def readme(url: str) -> str:
    """Return README.md with relative links and images made absolute under `url`.

    Without a URL a link is replaced by its text, and an image by its description.
    """

    def absolute(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if url:
            return f"{image}[{text}]({url}{target})"
        return f"*(Picture: {text}.)*" if image else text

    parts = re.split(
        r"(^```.*?^```$)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for i in range(0, len(parts), 2):  # the odd parts are code blocks
        parts[i] = re.sub(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)([^)]+)\)", absolute, parts[i])
    return "".join(parts)


def sources(mode: str) -> list[str]:
    """List the sources of the extension, relative to the root, sorted."""
    # Those of bindings and dropin are included by one file each: parsing torch's headers takes 13 s a unit.
    units = ["csrc/bindings/unit.cpp", "csrc/dropin/unit.cpp"]
    patterns = ["csrc/*.cpp", *units, "csrc/triton/*.cpp", "csrc/cpu/*.cpp"]
    patterns += ["csrc/cuda/*.cu"] if mode == "cuda" else []
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def sanitize_flags(environ: Mapping[str, str]) -> list[str]:
    """Return the compiler and linker flags for the value of ``FASTDIFF_SANITIZE``.

    Raises:
        BuildError: the value is neither 0 nor 1.
    """
    wanted = environ.get("FASTDIFF_SANITIZE") or "0"
    if wanted not in ("0", "1"):
        raise BuildError(
            _error_message(
                "FASTDIFF_SANITIZE", f"is {wanted!r}", "0 or 1", "set 1 to build with sanitizers, or unset it"
            )
        )
    return SANITIZE_FLAGS if wanted == "1" else []


def extension(mode: str, facts: Facts, sanitize: list[str]) -> tuple[Extension, type]:
    """Return the description of ``fastdiff._C`` and the command that builds it; imports torch's build helpers."""
    if facts.compiler and facts.compiler != "c++":
        os.environ.setdefault("CXX", facts.compiler)  # used by torch to compile and by setuptools to link
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and shutil.which("ninja", path=scripts):
        # The environment has ninja but is not activated.
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    if mode == "cuda":
        assert facts.toolkit is not None
        assert facts.toolkit_home is not None
        os.environ["CUDA_HOME"] = facts.toolkit_home
        # By default torch compiles for the visible GPUs.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures(facts.toolkit))

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildOrExplain(BuildExtension):
        """torch's build command, with a remedy in its error message."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise CompileError(
                    _error_message(
                        f"the {mode} build of fastdiff._C",
                        f"failed ({error})",
                        "every source to compile and link",
                        f"read the compiler's message above, or {PURE_PYTHON}",
                    )
                ) from error

    # OpenMP is enabled for compiling only (at::parallel_for is a header) and not linked: the symbols come from the
    # OpenMP runtime that torch has loaded, and a second runtime would create a second thread pool.
    cxx_flags = CXX_FLAGS + ([] if sys.platform == "darwin" else ["-fopenmp"]) + sanitize
    # On every command line, so that another torch compiles all objects again: ninja does not track torch's headers.
    macros = [("FASTDIFF_BUILT_FOR", f'"{built_for(mode, facts)}"')]
    if mode == "cuda":
        macros.append(("FASTDIFF_CUDA", None))
    describe: Any = CUDAExtension if mode == "cuda" else CppExtension
    described = describe(
        "fastdiff._C",
        sources(mode),
        depends=[path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.[chi]*"))],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": NVCC_FLAGS},
        extra_link_args=sanitize,
    )
    # Headers of torch, Python and CUDA as system headers, so that -Wall and -Wextra apply to fastdiff's sources only.
    for folder in described.include_dirs[1:]:
        cxx_flags += ["-isystem", folder]
    described.include_dirs = described.include_dirs[:1]
    return described, BuildOrExplain


def main() -> None:
    """Choose the mode, then call setuptools."""
    arguments: dict[str, Any] = {}
    try:
        url = files_url(os.environ)
        mode, facts = "none", Facts()
        if BUILD_COMMANDS.intersection(sys.argv[1:]):
            requested = os.environ.get("FASTDIFF_BUILD") or "auto"
            facts = Facts() if requested == "none" else gather(os.environ)
            mode, warning = decide(requested, facts)
            sanitize = sanitize_flags(os.environ)
            if warning:
                print(f"warning: {warning}", file=sys.stderr)
            if mode != "none":
                described, command = extension(mode, facts, sanitize)
                arguments = {"ext_modules": [described], "cmdclass": {"build_ext": command}}
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None
    setup(
        packages=PACKAGES,
        package_dir=PACKAGE_DIR,
        package_data=PACKAGE_DATA,
        include_package_data=False,  # a wheel contains the files listed here, not those that MANIFEST.in matches
        install_requires=[torch_requirement(mode, facts)],
        long_description=readme(url),
        long_description_content_type="text/markdown",
        project_urls={"Source": url, "Changelog": f"{url}CHANGELOG.md", "Design": f"{url}docs/design.md"}
        if url
        else {},
        zip_safe=False,
        **arguments,
    )


if __name__ == "__main__":
    main()
