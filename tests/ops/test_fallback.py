# SPDX-License-Identifier: MIT
"""No silent fallback: one warning if the reference replaces a compiled backend, errors for mistyped variables.

Each case is a separate process, because the warning appears once per process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import environment, extension, ops
from fastdiff.ops import backends, fallback
from support.fork_server import run_program

ROOT = Path(fastdiff.__file__).parents[1]

#: Blocks the extension, counts the warnings, and prints the lines of code that they name.
PRELUDE = """
import sys, warnings
if {blocked}: sys.modules["fastdiff._C"] = None
import torch, fastdiff
from fastdiff import ops
seen = []
warnings.showwarning = lambda message, kind, file, line, *rest: seen.append((message, kind, file, line))
x, table = torch.randn(2, 4, 8, 8), fastdiff.create_sampler("linear", "ddim", num_inference_steps=2).table
rows = table.coefficients_as(torch.float32)
assert not seen, seen
"""
REPORT = """
print(len(seen), *[str(message) for message, *_ in seen], sep="\\n")
"""

#: Every way to a step; each is taken twice.
WAYS = {
    "step": "ops.step(x, x, rows, 0)",
    "step_rows": "ops.step_rows(x, x, rows, torch.tensor([0, 1]))",
    "functional": "fastdiff.sampling.ddim_step(x, x, alpha_cumprod=0.5, alpha_cumprod_prev=0.6)",
    "operator": """torch.ops.fastdiff.mean(x, "")""",
    "randn": "fastdiff.randn((2, 3), [1, 2])",
    "mean": "ops.mean(x)",
    "quantile": "ops.quantile(x, 0.5)",
    "stepper": "fastdiff.Stepper(table).step(x, x)",
    "sampler": """
fastdiff.create_sampler("linear", "ddpm", num_inference_steps=2).sample(lambda x, t: x / 2, x, progress=False)""",
    "vmap": "torch.func.vmap(lambda x: ops.step(x, x, rows, 0)[0])(x)",
    "gradient": "ops.step(x.requires_grad_(), x, rows, 0)[0].sum().backward()",
    "dropin": """
from fastdiff.diffusers import DDIMScheduler
s = DDIMScheduler(); s.set_timesteps(4)
for t in s.timesteps: x = s.step(x, t, x).prev_sample""",
    "patched": """
import diffusers
from fastdiff.diffusers import EulerDiscreteScheduler
s = EulerDiscreteScheduler.from_config(diffusers.EulerDiscreteScheduler().config); s.set_timesteps(4)
for t in s.timesteps: x = s.step(s.scale_model_input(x, t), t, x).prev_sample""",
    "compiled": """
f = torch.compile(lambda x: ops.step(x, x, rows, 0)[0], fullgraph=True, backend="eager"); f(x)""",
    "exported": """
class Step(torch.nn.Module):
    def forward(self, x): return ops.step(x, x, rows, 0)[0]
torch.export.export(Step(), (x,)).module()(x)""",
}


#: Imports a copy of the package by its place, whatever an editable installation puts in front of the path.
COPY = """
import importlib.util, sys
# An editable installation finds modules that the copy lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
spec = importlib.util.spec_from_file_location("fastdiff", {0!r} + "/__init__.py", submodule_search_locations=[{0!r}])
sys.modules["fastdiff"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastdiff"])
"""


def run_python(code: str, package: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTDIFF_", "PYTHONWARNINGS"))}
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    if package != ROOT:
        code = COPY.format(str(package / "fastdiff")) + code
    return run_program(code, cwd=package, env={**kept, "TRITON_INTERPRET": "0", "PYTHONPATH": path, **variables})


def warned(code: str, *, blocked: bool = True, package: Path = ROOT, **variables: str) -> list[str]:
    """Run code twice in a new process and return the messages of the warnings."""
    done = run_python(PRELUDE.format(blocked=blocked) + f"for _ in range(2):\n{_indented(code)}" + REPORT, package,
                      **variables)  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *messages = done.stdout.splitlines()
    assert int(count) == len(messages), done.stdout
    return messages


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.strip().splitlines())


@pytest.fixture(scope="module")
def messages_by_way() -> dict[str, list[str]]:
    """Return the warnings of each entry point, called twice after resetting the warnings."""
    code = (
        PRELUDE.format(blocked=True)
        + f"""
import json
from fastdiff.ops import fallback
kept, found = dict(globals()), dict()
for way, code in {WAYS!r}.items():
    fallback._warned.clear(); seen.clear()
    for _ in range(2): exec(code, dict(kept))
    found[way] = [str(message) for message, *_ in seen]
print(json.dumps(found))
"""
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_missing_extension_warns_once_for_every_entry_point(messages_by_way: dict[str, list[str]], way: str) -> None:
    (message,) = messages_by_way[way]
    assert "backend is 'reference' for tensors on cpu" in message
    assert "the C++ extension was not built: " in message
    for remedy in ("--no-build-isolation", "--no-cache-dir", "FASTDIFF_BACKEND=reference"):
        assert remedy in message


def test_process_warns_once_at_callers_line() -> None:
    ways = "\n".join(WAYS[way].strip() for way in ("sampler", "mean", "step", "randn", "stepper", "dropin"))
    done = run_python(PRELUDE.format(blocked=True) + ways + "\nprint(len(seen), seen[0][1].__name__, seen[0][2])")
    assert done.stdout.split() == ["1", "FallbackWarning", "<string>"], done.stderr


def test_requested_reference_does_not_warn() -> None:
    code = """
ops.step(x, x, rows, 0, backend="reference"), ops.mean(x, backend="reference")
with ops.use_backend("reference"): ops.step(x, x, rows, 0), fastdiff.randn((1, 2), 3)
ops.backend_for(x), ops.backend_status()"""
    assert warned(code) == []
    assert warned(WAYS["step"] + WAYS["dropin"], FASTDIFF_BACKEND="reference") == []


@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
def test_compiled_code_does_not_warn() -> None:
    every = "\n".join(code.strip() for name, code in WAYS.items() if name not in ("gradient", "compiled", "exported"))
    assert warned(every, blocked=False) == []


def test_warning_can_be_filtered_or_raised_without_side_effects() -> None:
    code = (
        PRELUDE.format(blocked=True)
        + """
warnings.simplefilter("error", fastdiff.FallbackWarning)
stepper, before = fastdiff.Stepper(table), x.clone()
for _ in range(2):
    try: stepper.step(x, x, out=x)
    except fastdiff.FallbackWarning: print("error")
print(stepper.index, torch.equal(x, before))
warnings.simplefilter("ignore", fastdiff.FallbackWarning)
stepper.step(x, x, out=x)
print(stepper.index, len(seen), issubclass(fastdiff.FallbackWarning, RuntimeWarning))
"""
    )
    done = run_python(code)
    assert done.stdout.split() == ["error", "error", "0", "True", "1", "0", "True"], done.stderr


# --- An extension that is there and does not load -----------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a copy of the package without its extension."""
    shutil.copytree(ROOT / "fastdiff", tmp_path / "fastdiff", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def test_damaged_extension_warns(package: Path) -> None:
    (package / "fastdiff" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library at all")
    (message,) = warned(WAYS["step"], blocked=False, package=package)
    assert "the C++ extension " in message
    assert "was not built" not in message
    assert "--force-reinstall" in message


def test_extension_for_other_python_is_named(package: Path) -> None:
    (package / "fastdiff" / "_C.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    (message,) = warned(WAYS["dropin"], blocked=False, package=package)
    assert "built for another Python: found _C.cpython-27-x86_64-linux-gnu.so, expected _C." in message
    assert "--force-reinstall" in message


def test_env_command_shows_warning_text(package: Path) -> None:
    pytest.importorskip("typer")
    code = "import sys; sys.argv = ['fastdiff', 'env']; from fastdiff.__main__ import main; main()"
    done = run_python(code, package, COLUMNS="2000")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "on the CPU is answered by reference" in text
    assert text.count("the C++ extension was not built: ") >= 2, "as the backend's status, and as the reason"
    done = run_python(code, package, COLUMNS="2000", FASTDIFF_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert "a step on the CPU is refused: step: backend 'cpu' was asked for and is missing" in done.stdout


# --- Devices ------------------------------------------------------------------------------------------------------


def test_gpu_without_compiled_backend_warns_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(fallback, "_warned", set())
    monkeypatch.setattr(backends, "forced", None)
    monkeypatch.setattr(backends, "why_missing", lambda name: "" if name == "reference" else f"no {name} here")
    with pytest.warns(
        fastdiff.FallbackWarning, match=r"^step: .*on cuda.*'cuda' or 'triton'; no cuda here; no triton "
    ):
        assert fallback.backend_to_run(OnGpu()) == "reference"  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fallback.backend_to_run(OnGpu())  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_devices_without_a_compiled_backend_do_not_warn(device: str) -> None:
    assert fallback.why_reference(device) == ""


# --- Variables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *((name, "bogus") for name in environment.CHOICES),
        ("FASTDIFF_CPU", "AVX2"),
        ("FASTDIFF_KEEP_MIB", "many"),
        ("FASTDIFF_KEEP_MIB", "9" * 5000),
    ],
)
def test_unknown_environment_value_is_refused_at_import(variable: str, value: str) -> None:
    # Without the extension and without Triton as well, which read some of these themselves.
    code = "import sys; sys.modules['fastdiff._C'] = sys.modules['triton'] = None; import fastdiff"
    done = run_python(code, **{variable: value})
    assert done.returncode == 1
    assert f"ValueError: fastdiff: {variable} is '{value}', expected " in done.stderr


def test_empty_environment_values_are_unset() -> None:
    empty = dict.fromkeys([*environment.CHOICES, "FASTDIFF_KEEP_MIB"], "")
    assert warned("ops.backend_for(x)", blocked=False, **empty) == []


def test_unsupported_instruction_set_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the extension's refusal on a processor with AVX2 only."""
    text = "fastdiff: FASTDIFF_CPU is 'avx512', expected generic, avx2 or avx512, and one that this processor has"

    def refuse(name: str) -> None:
        raise ImportError(text)

    with monkeypatch.context() as lacking:
        lacking.setattr(extension.importlib, "import_module", refuse)
        with pytest.raises(ValueError, match=text):
            extension._load_extension()
    source = (ROOT / "csrc" / "bindings.cpp").read_text()
    assert '"fastdiff: FASTDIFF_CPU is \'"' in source, "what the extension says begins so"


def test_all_environment_variables_are_listed() -> None:
    """Every FASTDIFF variable that the Python or C++ code reads is validated."""
    checked = {*environment.CHOICES, "FASTDIFF_KEEP_MIB"}
    read = set()
    for path in [*ROOT.glob("fastdiff/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]:
        for line in path.read_text().splitlines():
            if "environ" in line or "getenv" in line:
                read |= {word.split('"')[0] for word in line.split('"')[1:] if word.startswith("FASTDIFF_")}
    assert read <= checked, read - checked
    assert environment.CHOICES["FASTDIFF_BACKEND"] == ops.BACKENDS
