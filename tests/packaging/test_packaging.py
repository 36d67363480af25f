# SPDX-License-Identifier: MIT
"""Distributions, the cost of importing the package, and the build decisions of setup.py."""

from __future__ import annotations

import email
import email.message
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastdiff
from fastdiff import built_for
from fastdiff.ops import backends
from support import sanitize
from support.fork_server import run_program
from support.setup_script import load_setup

ROOT = Path(__file__).resolve().parents[2]

# What the extras bring, by the names that are imported.
OPTIONAL_MODULES = {
    *("PIL", "accelerate", "diffusers", "k_diffusion", "matplotlib", "rich", "safetensors"),
    *("pandas", "pyarrow", "ray", "scipy", "sklearn", "torchao", "torchdiffeq", "torchsde", "tqdm", "triton", "typer"),
}

EXTRAS = {"triton", "diffusers", "plots", "cli", "training", "compression", "spacings", "ray", "test", "docs"}

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
    """Return True for a message with operation, argument, value, expectation, and a remedy after the semicolon."""
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
def test_build_auto_falls_back_with_warning(facts: tuple[str | None, ...], mode: str, named: str) -> None:
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
def test_build_error_names_missing_tool_and_remedy(
    requested: str, facts: tuple[str | None, ...], named: list[str]
) -> None:
    with pytest.raises(setup_py.BuildError) as refusal:
        setup_py.decide(requested, facts)
    assert _is_full_sentence(str(refusal.value))
    for part in named:
        assert part in str(refusal.value)


def test_sanitizers_are_enabled_on_request() -> None:
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


def test_make_sanitize_refuses_uninstrumented_extension() -> None:
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


def test_named_toolkit_precedes_toolkit_on_path(tmp_path: Path) -> None:
    first, second = _toolkit(tmp_path / "a", "12.8"), _toolkit(tmp_path / "b", "13.0")
    path = f"{second / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert setup_py.find_toolkit({"CUDA_HOME": str(first), "PATH": path}) == ("12.8", str(first), "")
    assert setup_py.find_toolkit({"PATH": path}) == ("13.0", str(second), "")


def test_named_empty_toolkit_is_a_problem(tmp_path: Path) -> None:
    release, home, problem = setup_py.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert (release, home) == (None, None)
    assert str(tmp_path) in problem


def test_failing_compiler_is_a_problem_with_its_message(tmp_path: Path) -> None:
    broken = _executable(tmp_path / "broken", "echo 'fatal error: Python.h: No such file or directory' >&2; exit 1")
    compiler, problem = setup_py.find_compiler({"CXX": str(broken), "PATH": os.environ["PATH"]})
    assert compiler is None
    assert "Python.h" in problem
    compiler, problem = setup_py.find_compiler({"PATH": str(tmp_path)})
    assert compiler is None
    assert "on PATH" in problem


def test_setup_ignores_visible_gpus() -> None:
    assert "torch.cuda." not in (ROOT / "setup.py").read_text()


# ---------------------------------------------------------------------------------------------------- what is declared


def test_no_root_package_shadows_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_listed_packages_match_disk() -> None:
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


def test_extras_match_documentation() -> None:
    metadata = importlib.metadata.metadata("fastdiff-kernels")
    assert set(metadata.get_all("Provides-Extra") or []) == EXTRAS
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def test_extras_named_in_messages_exist() -> None:
    named = set()
    for module in (path for folder in ("fastdiff", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        named |= set(re.findall(r"fastdiff-kernels\[(\w+)\]", module.read_text(encoding="utf-8")))
    assert named <= EXTRAS


def test_version_is_consistent() -> None:
    import fastdiff

    assert fastdiff.__version__ == importlib.metadata.version("fastdiff-kernels")


def test_command_line_entry_point_is_declared() -> None:
    scripts = {entry.name: entry.value for entry in importlib.metadata.distribution("fastdiff-kernels").entry_points}
    assert scripts == {"fastdiff": "fastdiff.__main__:main"}


# ---------------------------------------------------------------------------------------------------- what is imported


def test_import_needs_only_torch(tmp_path: Path) -> None:
    # Some builds of torch load triton or tqdm themselves, so what counts is what fastdiff adds.
    program = "import sys, torch; before = set(sys.modules); import fastdiff; print(*set(sys.modules) - before)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert OPTIONAL_MODULES & set(answer.stdout.split()) == set()


@pytest.mark.parametrize("start", ["root", "elsewhere"])
def test_benchmarks_import_from_any_folder(start: str, tmp_path: Path) -> None:
    program = "import importlib.util; print(importlib.util.find_spec('fastdiff.benchmarks').origin)"
    folder = ROOT if start == "root" else tmp_path
    answer = run_program(program, env=dict(os.environ), cwd=folder)
    assert Path(answer.stdout.strip()).parts[-2:] == ("benchmarks", "__init__.py")


@pytest.mark.parametrize("start", ["root", "elsewhere"])
def test_kernels_import_from_any_folder(start: str, tmp_path: Path) -> None:
    program = "import importlib.util; print(importlib.util.find_spec('fastdiff.kernels').origin)"
    folder = ROOT if start == "root" else tmp_path
    answer = run_program(program, env=dict(os.environ), cwd=folder)
    assert Path(answer.stdout.strip()).parts[-2:] in {("triton", "__init__.py"), ("kernels", "__init__.py")}


# ---------------------------------------------------------------------------------------- wheels, and what they ask for


class Released(NamedTuple):
    """Distributions that tools/build_wheels.sh makes of this tree, with a compiler that skips all sources but one."""

    sdist: set[str]
    pure: Path
    built: Path


#: The real compiler for what says which torch the extension is for, and for all that is no source of ours.
_COMPILER = """
for word in "$@"; do
    case $word in *csrc/built_for.cpp) break ;; *csrc/*.cpp) source=$word ;; esac
    [ "$before" = -o ] && object=$word
    before=$word
done
[ -z "$source" ] && exec c++ "$@"
echo | exec c++ -fPIC -x c++ -c - -o "$object"
"""
FILES_URL = "https://files.example/fastdiff/v0.1.0"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    folder = tmp_path_factory.mktemp("released")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFTOVERS)
    programs = folder / "programs"
    _executable(programs / "auditwheel", 'while [ "$1" != --wheel-dir ]; do shift; done; cp "$3" "$2"')
    environ = {
        **os.environ,
        "CXX": str(_executable(programs / "compiler", _COMPILER)),
        "FASTDIFF_BUILD": "cpu",
        "FASTDIFF_FILES_URL": FILES_URL,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    command = [tree / "tools" / "build_wheels.sh", sys.executable]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if setup_py.find_compiler(os.environ)[0] is None:
        pytest.skip("needs a C++ compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    (pure,) = (tree / "dist").glob("*-py3-none-any.whl")
    (built,) = set((tree / "dist").glob("*.whl")) - {pure}
    return Released(names, pure, built)


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def _required(wheel: Path) -> list[str]:
    return [line for line in _metadata(wheel).get_all("Requires-Dist") or [] if "extra ==" not in line]


def test_pure_wheel_requires_tested_torch_range(released: Released) -> None:
    (required,) = _required(released.pure)
    assert set(required.removeprefix("torch").split(",")) == set(setup_py.TORCH.removeprefix("torch").split(","))
    assert set(required.removeprefix("torch").split(",")) == {">=2.6", "<2.15"}


def test_declared_torch_range_matches_documentation(released: Released) -> None:
    text = (ROOT / "docs" / "packaging.md").read_text()
    proven = re.findall(r"^\| (\d+\.\d+)\.\d+ \| ([\d., ]+) \|", text, flags=re.MULTILINE)
    releases = sorted({tuple(map(int, release.split("."))) for release, _ in proven})
    lowest, highest = releases[0], releases[-1]
    assert f"torch>={lowest[0]}.{lowest[1]},<{highest[0]}.{highest[1] + 1}" == setup_py.TORCH
    pythons = {python for _, several in proven for python in several.split(", ")}
    prefix = "Programming Language :: Python :: 3."
    declared = _metadata(released.pure).get_all("Classifier") or []
    assert {line.rpartition(" ")[2] for line in declared if line.startswith(prefix)} == pythons


def test_wheel_with_extension_names_its_torch(released: Released) -> None:
    release = ".".join(str(torch.__version__).split(".")[:2])
    assert _required(released.built) == [f"torch=={release}.*"]
    assert _metadata(released.built)["Version"] == f"{fastdiff.__version__}+torch{release}.cpu"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert released.built.name.startswith(
        f"fastdiff_kernels-{fastdiff.__version__}+torch{release}.cpu-{tag}-{tag}-linux"
    )


def test_extension_of_wheel_records_its_torch(released: Released, tmp_path: Path) -> None:
    with zipfile.ZipFile(released.built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        extension = Path(archive.extract(name, tmp_path))
    assert name.startswith("fastdiff/_C.")
    assert built_for.why_unfit(extension) == ""
    other = extension.read_bytes().replace(f"torch={torch.__version__} ".encode(), b"torch=2.5.1 ")
    extension.write_bytes(other)
    assert "was built for torch 2.5.1" in built_for.why_unfit(extension)


def test_wheel_readme_links_to_files_url(released: Released) -> None:
    metadata = _metadata(released.pure)
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert f"![100 generated digits, ten of each class]({FILES_URL}/docs/images/digits.png)" in text
    targets = re.findall(r"\]\(([^)]+)\)", "".join(re.split(r"```.*?```", text, flags=re.DOTALL)))
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith("https://")] == []
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL") or [])
    assert addresses["Changelog"] == f"{FILES_URL}/CHANGELOG.md"
    for address in addresses.values():
        assert (ROOT / address.removeprefix(f"{FILES_URL}/")).exists()


def test_wheel_readme_without_url_has_no_links() -> None:
    text = setup_py.readme("")
    assert "*(Picture: 100 generated digits, ten of each class.)*" in text
    assert "](" not in "".join(re.split(r"```.*?```", text, flags=re.DOTALL))
    code = [
        re.findall(r"```python\n.*?```", each, flags=re.DOTALL) for each in (text, (ROOT / "README.md").read_text())
    ]
    assert code[0] == code[1] != []


@pytest.mark.parametrize("url", ["http://files.example/", "files", "https://a b/"])
def test_invalid_files_url_is_refused(url: str) -> None:
    with pytest.raises(setup_py.BuildError) as refusal:
        setup_py.files_url({"FASTDIFF_FILES_URL": url})
    assert _is_full_sentence(str(refusal.value))
    assert repr(url) in str(refusal.value)
    assert setup_py.files_url({}) == setup_py.files_url({"FASTDIFF_FILES_URL": ""}) == ""


@pytest.mark.parametrize(
    ("torch_version", "requirement"),
    [
        ("2.13.0+cu130", "torch==2.13.*"),
        ("2.7.1", "torch==2.7.*"),
        ("2.15.0.dev20261101+cpu", "torch==2.15.0.dev20261101"),
    ],
)
def test_package_with_extension_requires_its_torch(torch_version: str, requirement: str) -> None:
    facts = COMPLETE._replace(torch=torch_version)
    assert setup_py.torch_requirement("cpu", facts) == setup_py.torch_requirement("cuda", facts) == requirement
    assert setup_py.torch_requirement("none", facts) == setup_py.TORCH


# -------------------------------------------------------------------------------------- an extension for another torch


def _says(tmp_path: Path, mode: str, facts: tuple[object, ...]) -> str:
    """Return the reason why an extension that setup.py builds for these facts does not fit; empty if it does."""
    extension = tmp_path / "_C.so"
    extension.write_bytes(
        b"\x7fELF" + bytes(5000) + f"fastdiff._C was built for <{setup_py.built_for(mode, facts)}>".encode()
    )
    return built_for.why_unfit(extension)


def _beside(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None = None, cxx11_abi: bool = True) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "compiled_with_cxx11_abi", lambda: cxx11_abi)


def test_extension_fits_torch_of_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, cuda in (("2.13.0+cpu", None), ("2.13.1+cpu", None), ("2.13.0+cu126", "12.6")):
        _beside(monkeypatch, version, cuda)
        assert _says(tmp_path, "cpu", CPU_TORCH) == ""
    _beside(monkeypatch, "2.13.0+cu132", "13.2")
    assert _says(tmp_path, "cuda", COMPLETE) == ""
    _beside(monkeypatch, "2.15.0a0+gitabc")
    assert _says(tmp_path, "cpu", CPU_TORCH._replace(torch="2.15.0a0+gitabc")) == ""


@pytest.mark.parametrize(
    ("mode", "facts", "beside", "named"),
    [
        ("cpu", CPU_TORCH, ("2.14.1",), ["was built for torch 2.13.0+cpu", "expected torch 2.14.1"]),
        ("cpu", CPU_TORCH._replace(torch="2.1.0"), ("2.13.0",), ["was built for torch 2.1.0"]),
        (
            "cpu",
            CPU_TORCH._replace(torch="2.15.0a0+gitabc"),
            ("2.15.0a0+gitdef",),
            ["2.15.0a0+gitabc", "2.15.0a0+gitdef"],
        ),
        ("cpu", CPU_TORCH, ("2.13.0", None, False), ["_GLIBCXX_USE_CXX11_ABI=1", "expected 0"]),
        ("cuda", COMPLETE, ("2.13.0+cpu",), ["was built for CUDA 13.0", "expected no CUDA"]),
        ("cuda", COMPLETE, ("2.13.0+cu126", "12.6"), ["was built for CUDA 13.0", "expected CUDA 12.6"]),
    ],
)
def test_extension_for_other_torch_is_not_loaded(
    mode: str,
    facts: tuple[object, ...],
    beside: tuple[Any, ...],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _beside(monkeypatch, *beside)
    said = _says(tmp_path, mode, facts)
    for part in [*named, "the C++ extension", "; build it again: "]:
        assert part in said


def test_extension_without_record_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file of zeros would not load either; what counts is that nobody tries, and that the reason is ours.
    for content in (b"", bytes(100)):
        extension = tmp_path / "_C.so"
        extension.write_bytes(content)
        spec = importlib.machinery.ModuleSpec("fastdiff._C", None, origin=str(extension))
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
            patched.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
            loaded, reason = fastdiff.extension._load_extension()
        assert loaded is None
        assert "does not say which torch it was built for" in reason
    assert "cannot be read" in built_for.why_unfit(tmp_path / "none")


def test_built_extension_fits_installed_torch() -> None:
    if backends.extension is None:
        pytest.skip(backends.extension_error)
    extension = Path(str(backends.extension.__file__))
    assert built_for.why_unfit(extension) == ""
    assert f"torch={torch.__version__} ".encode() in extension.read_bytes()


# ------------------------------------------------------------------------------------------------- what is distributed


def test_sdist_contains_files_for_building_and_testing(released: Released) -> None:
    in_sdist = released.sdist
    needed = {"setup.py", "pyproject.toml", "Makefile", "requirements-dev.txt", "LICENSE", ".clang-format", ".ci/run"}
    needed |= {
        "fastdiff/py.typed",
        "fastdiff/digits/weights.safetensors",
        "fastdiff/digits/figures.json",
        "fastdiff/digits/encoder.safetensors",
    }
    for folder in ("csrc", "kernels", "tests", "fastdiff", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".sh"}:
                needed.add(path.relative_to(ROOT).as_posix())
    assert needed - in_sdist == set()
    assert [name for name in in_sdist if name.endswith((".so", ".pyc", ".o"))] == []


def test_wheel_contains_every_module_and_data(released: Released) -> None:
    in_wheel = set(zipfile.ZipFile(released.pure).namelist())
    assert released.pure.name == "fastdiff_kernels-0.1.0-py3-none-any.whl"
    needed = {
        "fastdiff/py.typed",
        "fastdiff/digits/weights.safetensors",
        "fastdiff/digits/figures.json",
        "fastdiff/digits/encoder.safetensors",
    }
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastdiff").rglob("*.py")}
    needed |= {f"fastdiff/kernels/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    needed |= {f"fastdiff/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    needed |= {f"fastdiff/benchmarks/gpu/{path.name}" for path in (ROOT / "benchmarks" / "gpu").glob("*.py")}
    assert {"fastdiff/kernels/step.py", "fastdiff/benchmarks/__main__.py"} <= needed
    packaged = {path for path in in_wheel if ".dist-info/" not in path}
    assert packaged == needed
    assert any(path.endswith(".dist-info/licenses/LICENSE") for path in in_wheel)


def test_one_translation_unit_includes_torch_extension() -> None:
    """torch/extension.h takes 50 s to compile: only csrc/bindings.cpp reaches it, through headers too."""
    csrc = ROOT / "csrc"

    def reaches(path: Path, seen: set[Path]) -> bool:
        if path in seen:
            return False
        seen.add(path)
        included = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        own = [found.resolve() for name in included for found in (path.parent / name, csrc / name) if found.is_file()]
        return "torch/extension.h" in included or any(reaches(header, seen) for header in own)

    heavy = {path.relative_to(csrc).as_posix() for path in csrc.rglob("*.cpp") if reaches(path.resolve(), set())}
    assert heavy == {"bindings.cpp"}


def test_every_source_is_compiled_once() -> None:
    """A source is a translation unit, or is included by its folder's unit.cpp."""
    compiled = [ROOT / name for name in setup_py.sources("cpu")]
    parts = [
        unit.parent / name
        for unit in compiled
        for name in re.findall(r'^#include "(\w+\.cpp)"$', unit.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(compiled + parts) == sorted((ROOT / "csrc").rglob("*.cpp"))
