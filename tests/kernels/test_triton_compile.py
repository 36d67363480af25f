# SPDX-License-Identifier: MIT
"""Triton's code for NVIDIA GPUs, compiled ahead of time on any machine.

Other tests use Triton's interpreter, which does not model rounding, fusion or vector accesses.  These tests check the
PTX and the machine code: 16 bytes per access, the explicit roundings, no local memory.
"""

from __future__ import annotations

import ast
import itertools
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

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels" / "triton").glob("*.py"))

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}  # bytes an element

#: Configurations: what a call has, and so how many tensors the kernel reads and writes and how many terms it adds.
PLAIN = {
    "HAS_UNCOND": True,
    "GUIDANCE_SCALES": 0,
    "HISTORY": 0,
    "HAS_NOISE": False,
    "MASKED": False,
    "HAS_THRESHOLD": False,
    "VARIANCE": 0,
    "KEEPS": 0,
    "ROWS": 0,
    "WRITE_HISTORY": False,
    "MIXED_HISTORY": False,
    "DRAWS": 0,
    "NOISE_STEPS": 0,
    "MODEL_INPUTS": 0,
}
FULL = {
    **PLAIN,
    "HAS_UNCOND": True,
    "GUIDANCE_SCALES": 2,
    "HISTORY": 15,
    "HAS_NOISE": True,
    "HAS_THRESHOLD": True,
    "VARIANCE": 1,
    "KEEPS": 2,
}
ROWS = {
    **PLAIN,
    "GUIDANCE_SCALES": 2,
    "HISTORY": 15,
    "ROWS": 2,
    "WRITE_HISTORY": True,
    "DRAWS": 1,
    "NOISE_STEPS": 2,
}
CONFIGURATIONS = {
    "plain": PLAIN,
    "full": FULL,
    "sqrt": {**FULL, "VARIANCE": 2},
    "rows": ROWS,
    "drawn": {**PLAIN, "DRAWS": 1, "GUIDANCE_SCALES": 1},
    "channels-last": {**PLAIN, "DRAWS": 2},
    "next": {**PLAIN, "MODEL_INPUTS": 2},
    "masked": {**PLAIN, "HISTORY": 12, "KEEPS": 1, "MASKED": True},
}

CASES = [(config, dtype, 90) for config in CONFIGURATIONS for dtype in DTYPES]
#: For the others the plain step of every dtype, and each of the largest ones in a narrow and in a wide dtype.
CASES += [("plain", dtype, arch) for arch in (80, 100) for dtype in DTYPES]
CASES += [
    (config, dtype, arch)
    for arch, pairs in ((80, ("bf16", "fp32")), (100, ("fp16", "fp64")))
    for config, dtype in itertools.product(("full", "rows"), pairs)
]
#: Those whose fma can be counted: exp of float64 is a polynomial, of fma too.
COUNTED = [case for case in CASES if case[:2] != ("full", "fp64")]

#: Steps whose tensors have dtypes of their own: what they have, the dtype of those not named, and those named.
MIXED: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "half samples": ({**PLAIN, "HISTORY": 1, "KEEPS": 1}, "fp16", {"history_0_ptr": "fp32", "keep_0_ptr": "fp32"}),
    "half model": (PLAIN, "fp32", {"model_output_ptr": "bf16", "uncond_ptr": "bf16"}),
    "other half": ({**PLAIN, "HAS_NOISE": True}, "bf16", {"model_output_ptr": "fp16", "noise_ptr": "fp32"}),
    "double": ({**PLAIN, "KEEPS": 1}, "fp16", {"uncond_ptr": "fp64", "keep_0_ptr": "bf16"}),
    "registers": (
        {**ROWS, "MIXED_HISTORY": True, "HISTORY": 3, "DRAWS": 0},
        "bf16",
        {"history_0_ptr": "fp32", "history_1_ptr": "fp16"},
    ),
}

#: Of the kernel of normal numbers: dtypes and architectures.
RANDN = [(dtype, arch) for arch in ARCHITECTURES for dtype in DTYPES if arch == 90 or dtype in ("bf16", "fp32")]
#: And of steps on mixed tensors: all for Hopper; for the others the two of most conversions and registers.
MIXED_CASES = [
    (name, arch) for arch in ARCHITECTURES for name in MIXED if arch == 90 or name in ("double", "registers")
]

# Compiles what it reads from stdin. A process of its own, because with TRITON_INTERPRET=1, as the other tests want it,
# `triton.jit` makes no function that could be compiled.
PROGRAM = r"""
import importlib, importlib.util, json, pathlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

path, folder, cases = json.load(sys.stdin)
# The package without the one above it, whose import of torch would be most of the time.
spec = importlib.util.spec_from_file_location("kernels", f"{path}/__init__.py", submodule_search_locations=[path])
sys.modules["kernels"] = importlib.util.module_from_spec(spec)
module, philox, config = (importlib.import_module(f"kernels.{name}") for name in ("step", "philox", "config"))
names = module._step_kernel.arg_names
scalars = ("table_ptr", "guidance_scale_ptr", "threshold_ptr")
integers = ("row_indices_ptr", "seeds_ptr", "noise_steps_ptr", "steps_ptr")
results = {}
for key, constants, dtype, arch, aligned, *own in cases:
    own = own[0] if own else {}
    kernel = module._step_kernel if constants else philox._randn_kernel
    kind = "randn" if constants is None else "draw" if constants["DRAWS"] else "step"
    chosen = config.lookup(f"sm_{arch}", kind, {"fp32": 4, "fp64": 8}.get(dtype, 2))
    constants = {**(constants or {"STEPS": 2}), "BLOCK": chosen.block}
    compute = "fp64" if "fp64" in (dtype, *own.values()) else "fp32"
    args = kernel.arg_names
    signature = {n: "*" + (compute if n in scalars else dtype) for n in args if n.endswith("_ptr")}
    signature |= {n: "*" + kind for n, kind in own.items()}
    signature |= {n: "*i64" for n in integers}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {n: signature.get(n, "i32") for n in args}
    # As launch() would find them: torch's memory is aligned, and so is the size of a sample.
    sizes = ("inner", "model_stride", "copy_stride")
    divisible = [n for n in args if n.endswith("_ptr") or n in sizes] if aligned else []
    attrs = {(args.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": chosen.num_warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with open(f"{folder}/{key}.cubin", "wb") as file:
        file.write(done.asm["cubin"])
    sizes = {"block": chosen.block, "threads": 32 * chosen.num_warps}
    results[key] = {"ptx": done.asm["ptx"], "shared": done.metadata.shared, **sizes}
json.dump({"results": results, "names": names}, sys.stdout)
"""


def _key(config: str, dtype: str, arch: int) -> str:
    return f"{config}-{dtype}-{arch}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the output of `PROGRAM`, with the machine code of each case."""
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").is_dir():
        pytest.skip("needs a build of triton that can compile for NVIDIA GPUs")
    folder = tmp_path_factory.mktemp("triton")
    cases = [(_key(*case), CONFIGURATIONS[case[0]], case[1], case[2], True) for case in CASES]
    cases += [(_key("randn", dtype, arch), None, dtype, arch, True) for dtype, arch in RANDN]
    cases.append(("unaligned", PLAIN, "fp32", 90, False))
    cases += [
        (_key(name, dtype, arch), constants, dtype, arch, True, own)
        for name, arch in MIXED_CASES
        for constants, dtype, own in [MIXED[name]]
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(ROOT / "kernels" / "triton"), str(folder), cases]),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return {**json.loads(answer.stdout), "folder": folder, "cuobjdump": shutil.which("cuobjdump", path=str(tools))}


def _opcodes(ptx: str) -> Counter[str]:
    """Return the count of each instruction in the PTX."""
    return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))


def _count(opcodes: Counter[str], pattern: str) -> int:
    """Count the elements processed by these instructions; those on pairs (``f32x2``) count twice."""
    return sum(n * (2 if "x2" in op else 1) for op, n in opcodes.items() if re.fullmatch(pattern, op))


def _tensors_read(config: dict[str, Any]) -> int:
    optional = config["HAS_UNCOND"] + config["HAS_NOISE"] + bool(config["VARIANCE"]) + config["MASKED"]
    return 2 + optional + config["HISTORY"].bit_count()


def _outputs(config: dict[str, Any]) -> int:
    return 3 if config["WRITE_HISTORY"] else 1 + config["KEEPS"]


def _transforms(config: dict[str, Any], elements: int) -> int:
    """Count the transforms of two words into two normal numbers per thread; channels-last memory uses one of them."""
    return {0: 0, 1: elements // 2, 2: elements}[config["DRAWS"]]


#: Of one transform: ln u takes 2 fma for the two forms of its argument, 6 for the polynomial and 3 for the sum; the
#: angle takes 1, sine and cosine 3 each.  The products that are rounded alone: −2·ln u, f², f²·f, −½·f², y², the
#: sine's last, and r times both.
FMA_A_TRANSFORM, PRODUCTS_A_TRANSFORM = 18, 8


@pytest.mark.parametrize(("config", "dtype", "arch"), CASES)
def test_triton_step_moves_16_bytes_per_access(compiled: dict[str, Any], config: str, dtype: str, arch: int) -> None:
    result = compiled["results"][_key(config, dtype, arch)]
    opcodes = _opcodes(result["ptx"])
    accesses = result["block"] // result["threads"] * DTYPES[dtype] // 16
    constants = CONFIGURATIONS[config]
    wide = r"\.global(\.\w+)*\.(v4\.[bfu]32|v2\.[bfu]64|b128)"
    stays = constants["ROWS"] > 0  # a sample that stays as it is is copied
    assert _count(opcodes, "ld" + wide) == accesses * (_tensors_read(constants) + stays)
    assert _count(opcodes, "st" + wide) == accesses * (_outputs(constants) + stays + constants["MODEL_INPUTS"])
    # What is left are scalars of the row: none is stored, none is wide.
    assert _count(opcodes, r"st\.global.*") == _count(opcodes, "st" + wide)


@pytest.mark.parametrize(("config", "dtype", "arch"), CASES)
def test_triton_step_is_neither_contracted_nor_reordered(
    compiled: dict[str, Any], config: str, dtype: str, arch: int
) -> None:
    result = compiled["results"][_key(config, dtype, arch)]
    opcodes = _opcodes(result["ptx"])
    # ptxas fuses a product and a sum only where neither names its rounding, and flushes subnormal numbers only if told.
    floats = [op for op in opcodes if re.match(r"(add|sub|mul|fma|mad|div|sqrt|rcp|ex2|lg2|rsqrt)\..*f(16|32|64)", op)]
    # Triton's exp of float32 is 2 to the power x·log2(e), by the hardware's approximation.
    approximate = {"ex2.approx.f32", "ex2.approx.ftz.f32"} if CONFIGURATIONS[config]["VARIANCE"] == 1 else set()
    assert [op for op in floats if not re.match(r"\w+\.rn\.f", op) and op not in approximate] == []
    # One by one where the rounded sample is read again, else in pairs.
    narrow = {"fp16": r"cvt\.rn\.f16(x2)?\.f32", "bf16": r"cvt\.rn\.bf16(x2)?\.f32"}
    elements = result["block"] // result["threads"]
    if dtype in narrow:
        rounded = _outputs(CONFIGURATIONS[config]) + bool(CONFIGURATIONS[config]["MODEL_INPUTS"])
        assert _count(opcodes, narrow[dtype]) == elements * rounded
        assert _count(opcodes, r"cvt\..*f16(x2)?\.f32") == _count(opcodes, narrow[dtype])


@pytest.mark.parametrize(("config", "dtype", "arch"), COUNTED)
def test_triton_step_fuses_only_explicit_products(compiled: dict[str, Any], config: str, dtype: str, arch: int) -> None:
    result = compiled["results"][_key(config, dtype, arch)]
    opcodes = _opcodes(result["ptx"])
    constants = CONFIGURATIONS[config]
    terms = 3 + constants["HISTORY"].bit_count() + (constants["HAS_NOISE"] or constants["DRAWS"] > 0)
    elements = result["block"] // result["threads"]
    # The guidance's and the prediction's, the exponent's and two of its reduction, one a term of an output or of what a
    # mask blends it with, and the blend's.
    fused = constants["HAS_UNCOND"] + 1 + 3 * (constants["VARIANCE"] == 1)
    fused += terms * (_outputs(constants) + constants["MASKED"]) + constants["MASKED"]
    transforms = _transforms(constants, elements)
    assert _count(opcodes, r"fma\.rn\..*") == elements * fused + transforms * FMA_A_TRANSFORM
    assert _count(opcodes, r"div\.rn\.f\d+") == elements * constants["HAS_THRESHOLD"]
    assert _count(opcodes, r"sqrt\.rn\.f\d+") == elements * (constants["VARIANCE"] == 2) + transforms
    # p·x; the noise's; and exp's: log2(e) twice, once to reduce, and the power of two; the model input's; the blend's.
    products = 1 + bool(constants["VARIANCE"]) + 3 * (constants["VARIANCE"] == 1) + bool(constants["MODEL_INPUTS"])
    products += constants["MASKED"]
    # In channels-last memory only one of the two numbers is multiplied by r.
    products_a_transform = PRODUCTS_A_TRANSFORM - (constants["DRAWS"] == 2)
    assert _count(opcodes, r"mul\.rn\..*") == elements * products + transforms * products_a_transform
    # Both words of a transform and the inverse of one become floats, unsigned and to the nearest.
    assert _count(opcodes, r"cvt\.rn\.f32\.u32") == 3 * transforms
    assert _count(opcodes, r"cvt\..*f32\.u32") == 3 * transforms


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_triton_step_is_not_fused_by_assembler(compiled: dict[str, Any], dtype: str) -> None:
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
def test_triton_step_uses_registers_without_spills(
    compiled: dict[str, Any], config: str, dtype: str, arch: int
) -> None:
    result = compiled["results"][_key(config, dtype, arch)]
    # Shared memory would mean that a tensor changes its layout between threads on the way. Noise alone may, a number an
    # element: a chunk is made by one thread, and its four numbers go to where the other tensors have those elements.
    if not CONFIGURATIONS[config]["DRAWS"]:
        assert result["shared"] == 0
    opcodes = _opcodes(result["ptx"])
    through = sum(n * int((re.search(r"\.v(\d)", op) or [0, "1"])[1]) for op, n in opcodes.items() if "ld.shared" in op)
    assert through in (0, result["block"] // result["threads"] if result["shared"] else 0)
    assert re.findall(r"\b(?:ld|st)\.local|\.local\b", result["ptx"]) == []
    usage = _cuobjdump(compiled, "--dump-resource-usage", _key(config, dtype, arch))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    assert (stack, local) == (0, 0)
    # Four blocks on a multiprocessor of 65536 registers, so that one's loads hide behind another's. A double takes two.
    assert registers <= 65536 // result["threads"] // (2 if dtype == "fp64" else 4)


def test_triton_step_without_known_alignment_still_compiles(compiled: dict[str, Any]) -> None:
    opcodes = _opcodes(compiled["results"]["unaligned"]["ptx"])
    assert _count(opcodes, r"(ld|st)\.global(\.\w+)*\.v\d.*") == 0


@pytest.mark.parametrize(("dtype", "arch"), RANDN)
def test_triton_randn_computes_each_chunk_once_and_stores_16_bytes(
    compiled: dict[str, Any], dtype: str, arch: int
) -> None:
    result = compiled["results"][_key("randn", dtype, arch)]
    opcodes = _opcodes(result["ptx"])
    elements = result["block"] // result["threads"]
    assert _count(opcodes, r"fma\.rn\.f32(x2)?") == elements // 2 * FMA_A_TRANSFORM
    assert _count(opcodes, r"mul\.rn\.f32(x2)?") == elements // 2 * PRODUCTS_A_TRANSFORM
    assert _count(opcodes, r"sqrt\.rn\.f32") == elements // 2
    assert _count(opcodes, r"cvt\.rn\.f32\.u32") == elements // 2 * 3
    floats = [op for op in opcodes if re.match(r"(add|sub|mul|fma|mad|div|sqrt|rcp)\..*f(16|32|64)", op)]
    assert [op for op in floats if not re.match(r"\w+\.rn\.f", op)] == []
    stores = _count(opcodes, r"st\.global(\.\w+)*\.(v4\.[bfu]32|v2\.[bfu]64|b128)")
    assert stores == _count(opcodes, r"st\.global.*") == elements * DTYPES[dtype] // 16
    usage = _cuobjdump(compiled, "--dump-resource-usage", _key("randn", dtype, arch))
    assert re.search(r"STACK:0 .*LOCAL:0", usage) is not None, usage


@pytest.mark.parametrize(("name", "arch"), MIXED_CASES)
def test_triton_step_on_mixed_tensors_keeps_wide_accesses_and_registers(
    compiled: dict[str, Any], name: str, arch: int
) -> None:
    constants, dtype, own = MIXED[name]
    key = _key(name, dtype, arch)
    result = compiled["results"][key]
    opcodes = _opcodes(result["ptx"])
    elements = result["block"] // result["threads"]
    read = ["sample_ptr", "model_output_ptr", "uncond_ptr"]
    read += [f"history_{j}_ptr" for j in range(4) if constants["HISTORY"] >> j & 1]
    read += ["noise_ptr"] * constants["HAS_NOISE"] + ["sample_ptr"] * (constants["ROWS"] > 0)
    written = ["prev_sample_ptr"] * (1 + (constants["ROWS"] > 0)) + ["keep_0_ptr"] * constants["KEEPS"]
    if constants["WRITE_HISTORY"]:  # a store for each register that a map may go to
        written += [f"history_{j}_ptr" for j in range(4) if constants["HISTORY"] >> j & 1] * 2

    def accesses(names: list[str], bytes_each: int) -> int:
        sizes = [elements * DTYPES[own.get(name, dtype)] for name in names]
        return sum(max(size // 16, 1) for size in sizes if min(size, 16) == bytes_each)

    wide = r"\.global(\.\w+)*\.(v4\.[bfu]32|v2\.[bfu]64|b128)"
    half_as_wide = r"\.global(\.\w+)*\.(v2\.[bfu]32|v4\.[bfu]16|[bfu]64)"
    assert _count(opcodes, "ld" + wide) == accesses(read, 16)
    assert _count(opcodes, "st" + wide) == accesses(written, 16)
    assert _count(opcodes, "st" + half_as_wide) == accesses(written, 8)
    assert _count(opcodes, r"st\.global.*") == accesses(written, 16) + accesses(written, 8)
    # Triton loads eight elements a thread where a half type is read and stores four of a float: of one of the two the
    # threads exchange their elements on the way, at most a block's at a time.
    assert result["shared"] <= result["block"] * max(DTYPES[own.get(name, dtype)] for name in written)
    # For sm_80 ptxas parks two words of what says which register a row names, among registers of different dtypes.
    usage = _cuobjdump(compiled, "--dump-resource-usage", key)
    stack = re.search(r"STACK:(\d+) .*LOCAL:0", usage)
    assert stack is not None, usage
    assert int(stack[1]) <= (8 if (name, arch) == ("registers", 80) else 0)
    narrowing = {op for op in opcodes if re.match(r"cvt\..*(f16|bf16)(x2)?\.f(32|64)|cvt\..*f32\.f64", op)}
    assert all(op.startswith("cvt.rn.") for op in narrowing), narrowing


# --- The source ------------------------------------------------------------------------------------------------------


def test_triton_step_takes_no_float_argument(compiled: dict[str, Any]) -> None:
    # A coefficient as an argument would be double precision under Inductor, cost a launch time, and be baked into a
    # captured graph. What is not a pointer or a compile-time choice is a count, an index, or the bits of a guidance
    # scale that the caller gave as a number.
    runtime = {n for n in compiled["names"] if not n.endswith("_ptr") and not n.isupper()}
    counts = {"row_index", "num_rows", "noise_step", "purpose", "channels", "parts"}
    assert runtime == counts | {"guidance_bits", "inner", "model_stride", "copy_stride", "blocks_per_sample"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_triton_kernels_compile_for_every_gpu(path: Path) -> None:
    # Nothing that only NVIDIA's compiler knows: no libdevice, no inline assembly, no intrinsics of one vendor.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert [name for name in imported if re.search(r"libdevice|extra|nvidia|cuda|amd|hip", name)] == []
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attributes & {"inline_asm_elementwise", "extern_elementwise", "extra", "libdevice"} == set()
