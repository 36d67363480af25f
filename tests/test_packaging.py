# SPDX-License-Identifier: MIT
"""What is distributed, what importing it costs, and what setup.py decides to compile on which machine."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastdiff
import sanitize
from setup_script import load_setup

ROOT = Path(__file__).resolve().parents[1]

# What the extras bring, by the names that are imported.
OPTIONAL_MODULES = {
    *("PIL", "accelerate", "diffusers", "k_diffusion", "matplotlib", "rich", "safetensors"),
    *("scipy", "sklearn", "torchdiffeq", "torchsde", "tqdm", "triton", "typer"),
}

EXTRAS = {"triton", "diffusers", "plots", "cli", "training", "spacings", "test", "docs"}

# What a checkout holds besides its sources; a build has to work without it.
LEFTOVERS = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "build", "dist"),
    *("*.egg-info", "__pycache__", "*.so", "*.o"),
)


setup_py = load_setup()
Facts = setup_py.Facts

COMPLETE = Facts(compiler="c++", torch="2.13.0+cu130", torch_cuda="13.0", toolkit="13.0", toolkit_home="/opt/cuda")
CPU_TORCH = COMPLETE._replace(torch="2.13.0+cpu", torch_cuda=None)
NO_TOOLKIT = COMPLETE._replace(toolkit=None, toolkit_home=None, toolkit_problem="no nvcc on PATH")
OTHER_TOOLKIT = COMPLETE._replace(toolkit="12.8")
NO_COMPILER = COMPLETE._replace(compiler=None, compiler_problem="none of c++ and g++ is on PATH")
NO_TORCH = COMPLETE._replace(torch=None, torch_cuda=None, torch_problem="No module named 'torch'")


def _is_full_sentence(message: str) -> bool:
    """Operation, argument, what it got, what was expected, and a remedy after the semicolon."""
    return re.fullmatch(r"setup\.py: .+, expected .+; .+", message, flags=re.DOTALL) is not None


# ---------------------------------------------------------------------------------------------------- the build's mode


@pytest.mark.parametrize(
    ("requested", "facts", "mode"),
    [
        ("none", Facts(), "none"),
        ("none", COMPLETE, "none"),
        ("cpu", COMPLETE, "cpu"),
        ("cpu", CPU_TORCH, "cpu"),
        ("cpu", NO_TOOLKIT, "cpu"),
        ("cuda", COMPLETE, "cuda"),
        ("cuda", COMPLETE._replace(toolkit="13.2"), "cuda"),
        ("auto", COMPLETE, "cuda"),
        ("auto", CPU_TORCH, "cpu"),
        ("auto", CPU_TORCH._replace(toolkit=None, toolkit_home=None), "cpu"),
    ],
)
def test_build_mode_follows_the_machine(requested: str, facts: tuple[str | None, ...], mode: str) -> None:
    assert setup_py.decide(requested, facts) == (mode, "")


@pytest.mark.parametrize(
    ("facts", "mode", "named"),
    [
        (NO_TORCH, "none", "--no-build-isolation"),
        (NO_COMPILER, "none", "C++ compiler"),
        (Facts(), "none", "torch"),
        (NO_TOOLKIT, "cpu", "CUDA toolkit"),
        (OTHER_TOOLKIT, "cpu", "12.8"),
    ],
)
def test_build_auto_steps_down_with_a_warning(facts: tuple[str | None, ...], mode: str, named: str) -> None:
    decision = setup_py.decide("auto", facts)
    assert decision.mode == mode
    assert named in decision.warning
    assert _is_full_sentence(decision.warning)
    assert "FASTDIFF_BUILD=auto goes on" in decision.warning


@pytest.mark.parametrize(
    ("requested", "facts", "named"),
    [
        ("gpu", COMPLETE, ["FASTDIFF_BUILD is 'gpu'", "auto, cpu, cuda, none"]),
        ("cpu", NO_COMPILER, ["C++ compiler", "none of c++ and g++ is on PATH", "FASTDIFF_BUILD=none"]),
        ("cpu", NO_TORCH, ["torch cannot be imported", "No module named 'torch'", "--no-build-isolation"]),
        ("cuda", NO_COMPILER, ["C++ compiler"]),
        ("cuda", NO_TORCH, ["torch cannot be imported"]),
        ("cuda", NO_TOOLKIT, ["CUDA toolkit is missing", "no nvcc on PATH", "13.x", "CUDA_HOME", "FASTDIFF_BUILD=cpu"]),
        ("cuda", CPU_TORCH, ["torch 2.13.0+cpu is built without CUDA", "13.x", "FASTDIFF_BUILD=cpu"]),
        ("cuda", OTHER_TOOLKIT, ["/opt/cuda has release 12.8", "expected 13.x", "2.13.0+cu130"]),
        (
            "cuda",
            CPU_TORCH._replace(toolkit=None, toolkit_home=None, toolkit_problem="no nvcc on PATH"),
            ["is built without CUDA", "the CUDA toolkit (missing as well: no nvcc on PATH)"],
        ),
    ],
)
def test_build_refuses_with_what_is_missing_and_a_remedy(
    requested: str, facts: tuple[str | None, ...], named: list[str]
) -> None:
    with pytest.raises(setup_py.BuildError) as refusal:
        setup_py.decide(requested, facts)
    assert _is_full_sentence(str(refusal.value))
    for part in named:
        assert part in str(refusal.value)


def test_sanitizers_are_compiled_in_where_they_are_asked_for() -> None:
    assert setup_py.sanitize_flags({}) == setup_py.sanitize_flags({"FASTDIFF_SANITIZE": "0"}) == []
    assert setup_py.sanitize_flags({"FASTDIFF_SANITIZE": ""}) == []
    flags = setup_py.sanitize_flags({"FASTDIFF_SANITIZE": "1"})
    # Without the second, undefined behaviour would be reported and the tests pass.
    assert {"-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"} <= set(flags)
    with pytest.raises(setup_py.BuildError) as refusal:
        setup_py.sanitize_flags({"FASTDIFF_SANITIZE": "yes"})
    assert _is_full_sentence(str(refusal.value))


@pytest.mark.parametrize("flags", [[], ["-fsanitize=address"]])
def test_sanitizers_reach_the_compiler_and_the_linker(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Describing an extension sets PATH and CXX; they are put back.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    described, _ = setup_py.extension("cpu", CPU_TORCH, flags)
    assert [flag for flag in described.extra_compile_args["cxx"] if flag.startswith("-fsanitize")] == flags
    assert described.extra_link_args == flags


def test_an_extension_without_instruments_is_refused_by_make_sanitize() -> None:
    if fastdiff.ops.backends.extension is None or "LD_PRELOAD" in os.environ:
        pytest.skip("needs the plain extension")
    try:
        problem = sanitize.instrument_problem(ROOT, "generic")
    except SystemExit as missing:
        pytest.skip(str(missing))
    assert "a deliberate fault ended with 0 and without 'ERROR: AddressSanitizer: heap-buffer-overflow'" in problem


@pytest.mark.parametrize(
    ("toolkit", "architectures"),
    [("12.4", "8.0;9.0+PTX"), ("12.8", "8.0;9.0;10.0+PTX"), ("13.0", "8.0;9.0;10.0+PTX")],
)
def test_cuda_architectures_follow_the_toolkit(toolkit: str, architectures: str) -> None:
    assert setup_py.cuda_architectures(toolkit) == architectures


def _executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _toolkit(home: Path, release: str) -> Path:
    _executable(home / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.88'")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def test_toolkit_is_the_named_one_before_that_on_path(tmp_path: Path) -> None:
    first, second = _toolkit(tmp_path / "a", "12.8"), _toolkit(tmp_path / "b", "13.0")
    path = f"{second / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert setup_py.find_toolkit({"CUDA_HOME": str(first), "PATH": path}) == ("12.8", str(first), "")
    assert setup_py.find_toolkit({"PATH": path}) == ("13.0", str(second), "")


def test_toolkit_that_is_named_but_empty_is_a_problem(tmp_path: Path) -> None:
    release, home, problem = setup_py.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert (release, home) == (None, None)
    assert str(tmp_path) in problem


def test_compiler_that_cannot_compile_is_a_problem_with_its_message(tmp_path: Path) -> None:
    broken = _executable(tmp_path / "broken", "echo 'fatal error: Python.h: No such file or directory' >&2; exit 1")
    compiler, problem = setup_py.find_compiler({"CXX": str(broken), "PATH": os.environ["PATH"]})
    assert compiler is None
    assert "Python.h" in problem
    compiler, problem = setup_py.find_compiler({"PATH": str(tmp_path)})
    assert compiler is None
    assert "on PATH" in problem


def test_setup_never_asks_for_a_visible_gpu() -> None:
    assert "torch.cuda." not in (ROOT / "setup.py").read_text()


# ---------------------------------------------------------------------------------------------------- what is declared


def test_root_has_no_package_that_shadows_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_listed_are_those_on_disk() -> None:
    found = set(setup_py.PACKAGE_DIR)
    for init in (ROOT / "fastdiff").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    # A folder of modules without an __init__.py would be left out of a wheel in silence.
    for module in (ROOT / "fastdiff").rglob("*.py"):
        found.add(".".join(module.parent.relative_to(ROOT).parts))
    assert sorted(setup_py.PACKAGES) == sorted(found)
    for package in setup_py.PACKAGES:
        folder = setup_py.PACKAGE_DIR.get(package, package.replace(".", "/"))
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder}/__init__.py is missing"


def test_base_dependency_is_torch_alone() -> None:
    requirements = importlib.metadata.requires("fastdiff-kernels") or []
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.6"]


def test_extras_are_the_documented_ones() -> None:
    metadata = importlib.metadata.metadata("fastdiff-kernels")
    assert set(metadata.get_all("Provides-Extra") or []) == EXTRAS
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def test_extras_named_in_messages_exist() -> None:
    named = set()
    for module in (path for folder in ("fastdiff", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        named |= set(re.findall(r"fastdiff-kernels\[(\w+)\]", module.read_text(encoding="utf-8")))
    assert named <= EXTRAS


def test_version_is_the_same_everywhere() -> None:
    import fastdiff

    assert fastdiff.__version__ == importlib.metadata.version("fastdiff-kernels")


def test_command_line_entry_point_is_declared() -> None:
    scripts = {entry.name: entry.value for entry in importlib.metadata.distribution("fastdiff-kernels").entry_points}
    assert scripts == {"fastdiff": "fastdiff.__main__:main"}


# ---------------------------------------------------------------------------------------------------- what is imported


def test_import_needs_torch_alone(tmp_path: Path) -> None:
    # Some builds of torch load triton or tqdm themselves, so what counts is what fastdiff adds.
    program = "import sys, torch; before = set(sys.modules); import fastdiff; print(*set(sys.modules) - before)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert OPTIONAL_MODULES & set(answer.stdout.split()) == set()


@pytest.mark.parametrize("start", ["root", "elsewhere"])
def test_benchmarks_are_found_from_any_folder(start: str, tmp_path: Path) -> None:
    program = "import importlib.util; print(importlib.util.find_spec('fastdiff.benchmarks').origin)"
    folder = ROOT if start == "root" else tmp_path
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    assert Path(answer.stdout.strip()).parts[-2:] == ("benchmarks", "__init__.py")


@pytest.mark.parametrize("start", ["root", "elsewhere"])
def test_kernels_are_found_from_any_folder(start: str, tmp_path: Path) -> None:
    program = "import importlib.util; print(importlib.util.find_spec('fastdiff.kernels').origin)"
    folder = ROOT if start == "root" else tmp_path
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    assert Path(answer.stdout.strip()).parts[-2:] in {("triton", "__init__.py"), ("kernels", "__init__.py")}


# ------------------------------------------------------------------------------------------------- what is distributed


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """Names in the sdist, names in the pure wheel that is built from that sdist, and the wheel's file name."""
    folder = tmp_path_factory.mktemp("distributions")
    tree, out = folder / "tree", folder / "out"
    shutil.copytree(ROOT, tree, ignore=LEFTOVERS)
    environ = {**os.environ, "FASTDIFF_BUILD": "none"}
    program = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def build(hook: str, source: Path, pattern: str) -> Path:
        command = [sys.executable, "-c", program, hook, str(out)]
        done = subprocess.run(command, cwd=source, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return next(out.glob(pattern))

    out.mkdir()
    sdist = build("build_sdist", tree, "*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("build_wheel", unpacked, "*.whl")
    in_sdist = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    return in_sdist, set(zipfile.ZipFile(wheel).namelist()), wheel.name


def test_sdist_holds_what_building_and_testing_need(distributions: tuple[set[str], set[str], str]) -> None:
    in_sdist, _, _ = distributions
    needed = {"setup.py", "pyproject.toml", "Makefile", "requirements-dev.txt", "LICENSE", ".clang-format", ".ci/run"}
    needed |= {"fastdiff/py.typed", "fastdiff/digits/weights.safetensors", "fastdiff/digits/figures.json"}
    for folder in ("csrc", "kernels", "tests", "fastdiff", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}:
                needed.add(path.relative_to(ROOT).as_posix())
    assert needed - in_sdist == set()
    assert [name for name in in_sdist if name.endswith((".so", ".pyc", ".o"))] == []


def test_wheel_holds_every_module_and_the_data(distributions: tuple[set[str], set[str], str]) -> None:
    _, in_wheel, name = distributions
    assert name == "fastdiff_kernels-0.1.0-py3-none-any.whl"
    needed = {"fastdiff/py.typed", "fastdiff/digits/weights.safetensors", "fastdiff/digits/figures.json"}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastdiff").rglob("*.py")}
    needed |= {f"fastdiff/kernels/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    needed |= {f"fastdiff/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    needed |= {f"fastdiff/benchmarks/gpu/{path.name}" for path in (ROOT / "benchmarks" / "gpu").glob("*.py")}
    assert {"fastdiff/kernels/step.py", "fastdiff/benchmarks/__main__.py"} <= needed
    packaged = {path for path in in_wheel if ".dist-info/" not in path}
    assert packaged == needed
    assert any(path.endswith(".dist-info/licenses/LICENSE") for path in in_wheel)
