# SPDX-License-Identifier: MIT
"""What Triton makes of the step kernel for NVIDIA GPUs, compiled ahead of time on any machine.

Elsewhere the kernel runs under Triton's interpreter, which knows nothing of rounding, fusion or vector accesses.  Here
the PTX and the machine code are looked at: 16 bytes an access, the roundings that were written, no local memory.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels" / "triton").glob("*.py"))

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}  # bytes an element

#: Configurations: what a call has, and so how many tensors the kernel reads and writes and how many terms it adds.
PLAIN = {
    "HAS_UNCOND": True,
    "GUIDANCE_A_SAMPLE": False,
    "HISTORY": 0,
    "HAS_NOISE": False,
    "HAS_THRESHOLD": False,
    "VARIANCE": 0,
    "KEEPS": 0,
}
FULL = {
    "HAS_UNCOND": True,
    "GUIDANCE_A_SAMPLE": True,
    "HISTORY": 15,
    "HAS_NOISE": True,
    "HAS_THRESHOLD": True,
    "VARIANCE": 1,
    "KEEPS": 2,
}
CONFIGURATIONS = {"plain": PLAIN, "full": FULL, "sqrt": {**FULL, "VARIANCE": 2}}

CASES = [(config, dtype, 90) for config in CONFIGURATIONS for dtype in DTYPES]
CASES += [(config, dtype, arch) for arch in (80, 100) for config in ("plain", "full") for dtype in DTYPES]
#: Those whose fma can be counted: exp of float64 is a polynomial, of fma too.
COUNTED = [case for case in CASES if case[:2] != ("full", "fp64")]

# Compiles what it reads from stdin. A process of its own, because with TRITON_INTERPRET=1, as the other tests want it,
# `triton.jit` makes no function that could be compiled.
PROGRAM = r"""
import importlib.util, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

path, folder, cases = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("step", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kernel = module._step_kernel
names = kernel.arg_names
scalars = ("table_ptr", "guidance_ptr", "threshold_ptr")
results = {}
for key, constants, dtype, arch, aligned in cases:
    constants = {**constants, "BLOCK": module.BLOCK}
    compute = "fp64" if dtype == "fp64" else "fp32"
    signature = {n: "*" + (compute if n in scalars else dtype) for n in names if n.endswith("_ptr")}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {n: signature.get(n, "i32") for n in names}
    # As launch() would find them: torch's memory is aligned, and so is the size of a sample.
    divisible = [n for n in names if n.endswith("_ptr") or n in ("inner", "model_stride")] if aligned else []
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": module.NUM_WARPS, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with open(f"{folder}/{key}.cubin", "wb") as file:
        file.write(done.asm["cubin"])
    results[key] = {"ptx": done.asm["ptx"], "shared": done.metadata.shared}
json.dump({"results": results, "block": module.BLOCK, "threads": 32 * module.NUM_WARPS, "names": names}, sys.stdout)
"""


def _key(config: str, dtype: str, arch: int) -> str:
    return f"{config}-{dtype}-{arch}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answer of `PROGRAM`, and the machine code of each case beside it."""
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").is_dir():
        pytest.skip("needs a build of triton that can compile for NVIDIA GPUs")
    folder = tmp_path_factory.mktemp("triton")
    cases = [(_key(*case), CONFIGURATIONS[case[0]], case[1], case[2], True) for case in CASES]
    cases.append(("unaligned", PLAIN, "fp32", 90, False))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(ROOT / "kernels" / "triton" / "step.py"), str(folder), cases]),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return {**json.loads(answer.stdout), "folder": folder, "cuobjdump": shutil.which("cuobjdump", path=str(tools))}


def _opcodes(ptx: str) -> Counter[str]:
    """How often each instruction stands in the PTX."""
    return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))


def _count(opcodes: Counter[str], pattern: str) -> int:
    """Elements that instructions of this form treat; those on pairs (``f32x2``) count twice."""
    return sum(n * (2 if "x2" in op else 1) for op, n in opcodes.items() if re.fullmatch(pattern, op))


def _tensors_read(config: dict[str, Any]) -> int:
    return 2 + config["HAS_UNCOND"] + config["HISTORY"].bit_count() + config["HAS_NOISE"] + bool(config["VARIANCE"])


@pytest.mark.parametrize(("config", "dtype", "arch"), CASES)
def test_triton_step_moves_16_bytes_an_access(compiled: dict[str, Any], config: str, dtype: str, arch: int) -> None:
    opcodes = _opcodes(compiled["results"][_key(config, dtype, arch)]["ptx"])
    accesses = compiled["block"] // compiled["threads"] * DTYPES[dtype] // 16
    constants = CONFIGURATIONS[config]
    wide = r"\.global(\.\w+)*\.(v4\.[bfu]32|v2\.[bfu]64|b128)"
    assert _count(opcodes, "ld" + wide) == accesses * _tensors_read(constants)
    assert _count(opcodes, "st" + wide) == accesses * (1 + constants["KEEPS"])
    # What is left are scalars of the row: none is stored, none is wide.
    assert _count(opcodes, r"st\.global.*") == _count(opcodes, "st" + wide)


@pytest.mark.parametrize(("config", "dtype", "arch"), CASES)
def test_triton_step_rounds_as_it_is_written(compiled: dict[str, Any], config: str, dtype: str, arch: int) -> None:
    opcodes = _opcodes(compiled["results"][_key(config, dtype, arch)]["ptx"])
    # ptxas fuses a product and a sum only where neither names its rounding, and flushes subnormal numbers only if told.
    floats = [op for op in opcodes if re.match(r"(add|sub|mul|fma|mad|div|sqrt|rcp|ex2|lg2|rsqrt)\..*f(16|32|64)", op)]
    # Triton's exp of float32 is 2 to the power x·log2(e), by the hardware's approximation.
    approximate = {"ex2.approx.f32", "ex2.approx.ftz.f32"} if CONFIGURATIONS[config]["VARIANCE"] == 1 else set()
    assert [op for op in floats if not re.match(r"\w+\.rn\.f", op) and op not in approximate] == []
    narrow = {"fp16": r"cvt\.rn\.f16x2\.f32", "bf16": r"cvt\.rn\.bf16x2\.f32"}
    elements = compiled["block"] // compiled["threads"]
    if dtype in narrow:
        assert _count(opcodes, narrow[dtype]) == elements * (1 + CONFIGURATIONS[config]["KEEPS"])
        assert _count(opcodes, r"cvt\..*f16(x2)?\.f32") == _count(opcodes, narrow[dtype])


@pytest.mark.parametrize(("config", "dtype", "arch"), COUNTED)
def test_triton_step_fuses_the_products_that_are_written_and_no_others(
    compiled: dict[str, Any], config: str, dtype: str, arch: int
) -> None:
    opcodes = _opcodes(compiled["results"][_key(config, dtype, arch)]["ptx"])
    constants = CONFIGURATIONS[config]
    terms = 3 + constants["HISTORY"].bit_count() + constants["HAS_NOISE"]
    elements = compiled["block"] // compiled["threads"]
    # The guidance's and the prediction's, the exponent's and two of its reduction, and one a term of an output.
    fused = constants["HAS_UNCOND"] + 1 + 3 * (constants["VARIANCE"] == 1) + terms * (1 + constants["KEEPS"])
    assert _count(opcodes, r"fma\.rn\..*") == elements * fused
    assert _count(opcodes, r"div\.rn\.f\d+") == elements * constants["HAS_THRESHOLD"]
    assert _count(opcodes, r"sqrt\.rn\.f\d+") == elements * (constants["VARIANCE"] == 2)
    # p·x; the noise's; and exp's: log2(e) twice, once to reduce, and the power of two.
    products = 1 + bool(constants["VARIANCE"]) + 3 * (constants["VARIANCE"] == 1)
    assert _count(opcodes, r"mul\.rn\..*") == elements * products


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_triton_step_is_not_fused_further_by_the_assembler(compiled: dict[str, Any], dtype: str) -> None:
    # In machine code at last: a division, a root and an exp have fma inside, so only the plain step can be counted.
    key = _key("plain", dtype, 90)
    listing = _cuobjdump(compiled, "-sass", key)
    found = len(re.findall(r"\bFFMA\b", listing))
    assert found == _count(_opcodes(compiled["results"][key]["ptx"]), r"fma\.rn\.f32")


def _cuobjdump(compiled: dict[str, Any], option: str, key: str) -> str:
    if compiled["cuobjdump"] is None:
        pytest.skip("needs cuobjdump, which this build of triton leaves out")
    command = [compiled["cuobjdump"], option, str(compiled["folder"] / f"{key}.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("config", "dtype", "arch"), CASES)
def test_triton_step_keeps_everything_in_registers(
    compiled: dict[str, Any], config: str, dtype: str, arch: int
) -> None:
    result = compiled["results"][_key(config, dtype, arch)]
    # Shared memory would mean that a tensor changes its layout between threads on the way.
    assert result["shared"] == 0
    assert re.findall(r"\b(?:ld|st)\.(?:local|shared)|\.local\b", result["ptx"]) == []
    usage = _cuobjdump(compiled, "--dump-resource-usage", _key(config, dtype, arch))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    assert (stack, local) == (0, 0)
    # Four blocks on a multiprocessor of 65536 registers, so that one's loads hide behind another's. A double takes two.
    assert registers <= 65536 // compiled["threads"] // (2 if dtype == "fp64" else 4)


def test_triton_step_without_known_alignment_still_compiles(compiled: dict[str, Any]) -> None:
    opcodes = _opcodes(compiled["results"]["unaligned"]["ptx"])
    assert _count(opcodes, r"(ld|st)\.global(\.\w+)*\.v\d.*") == 0


# --- The source ------------------------------------------------------------------------------------------------------


def test_triton_step_takes_no_float_argument(compiled: dict[str, Any]) -> None:
    # A coefficient as an argument would be double precision under Inductor, cost a launch time, and be baked into a
    # captured graph. What is not a pointer or a compile-time choice is a count or an index.
    runtime = {n for n in compiled["names"] if not n.endswith("_ptr") and not n.isupper()}
    assert runtime == {"row", "inner", "model_stride", "blocks_a_sample"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_triton_kernels_are_for_every_gpu(path: Path) -> None:
    # Nothing that only NVIDIA's compiler knows: no libdevice, no inline assembly, no intrinsics of one vendor.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert [name for name in imported if re.search(r"libdevice|extra|nvidia|cuda|amd|hip", name)] == []
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attributes & {"inline_asm_elementwise", "extern_elementwise", "extra", "libdevice"} == set()
