# SPDX-License-Identifier: MIT
"""Triton's code for the reductions on NVIDIA GPUs, compiled ahead of time on any machine.

The interpreter rounds a fused product twice and adds in numpy's order; these tests check the PTX for the roundings and
the number of additions that ``csrc/reduce_math.h`` specifies.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.child_environment import child_environment

ARCHITECTURES = (80, 90, 100)
HOPPER = 90
DTYPES = ("fp16", "bf16", "fp32", "fp64")
KINDS = {"mean": 0, "std": 1, "norm": 2, "dot": 3}
INTEGERS = {16: "i16", 32: "i32", 64: "i64"}

PROGRAM = r"""
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from fastdiff.kernels import config, reduce, select

folder, cases = json.load(sys.stdin)
results = {}
for key, module, kernel, types, constants, arch, warps in cases:
    kernel = getattr({"reduce": reduce, "select": select}[module], kernel)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr") or n == "inner"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with open(f"{folder}/{key}.cubin", "wb") as file:
        file.write(done.asm["cubin"])
    results[key] = done.asm["ptx"]
table = {chip: [[kind, size, [c.block, c.num_warps, c.tiles]] for (kind, size), c in entries.items()]
         for chip, entries in config.MEASURED.items()}
sums, selection = config.DEFAULT["sum"], config.DEFAULT["select"]
default = [sums.block, sums.num_warps, selection.block, selection.num_warps, selection.tiles, config.FEW_WARPS]
json.dump({"ptx": results, "default": default, "measured": table}, sys.stdout)
"""


def _sums(arch: int) -> list[tuple[str, str]]:
    """Return the kinds of sums and the dtypes: every pair for Hopper, each kind and each dtype for the others.

    Fused products are counted for every pair of one architecture; what another one adds is in the dtype or the kind.
    """
    every = list(itertools.product(KINDS, DTYPES))
    return every if arch == HOPPER else list(zip(KINDS, DTYPES, strict=True)) + [("dot", "bf16"), ("norm", "fp16")]


def _cases() -> list[list[Any]]:
    cases: list[list[Any]] = []
    for arch in ARCHITECTURES:
        for kind, dtype in _sums(arch):
            compute = "fp64" if dtype == "fp64" else "fp32"
            types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "partials_ptr": f"*{compute}"}
            constants = {"KIND": KINDS[kind], "BLOCKS": 4}
            cases.append([f"sum-{kind}-{dtype}-{arch}", "reduce", "_sum_kernel", types, constants, arch, 4])
        for compute in ("fp32", "fp64"):
            types = {"partials_ptr": f"*{compute}", "out_ptr": f"*{compute}", "correction_bits": "i64"}
            for kind, number in KINDS.items():
                if arch == HOPPER or (compute == "fp64") == (kind == "std"):
                    constants = {"KIND": number}
                    key = f"finish-{kind}-{compute}-{arch}"
                    cases.append([key, "reduce", "_finish_kernel", types, constants, arch, 4])
        # Selections compute with integers alone, but for the last of their kernels: one width for the others.
        for width, integers in INTEGERS.items() if arch == HOPPER else [(64, "i64")]:
            types = {"bits_ptr": f"*{integers}", "counts_ptr": "*i64", "state_ptr": "*i64", "weight_bits": "i64"}
            types["out_ptr"] = "*fp64" if width == 64 else "*fp32"
            shape = {"ABSOLUTE": False, "WIDTH": width, "TILE": 2048, "TILES": 8}
            for first in (True, False):
                known = width if first else width - 11
                levels = {"FIRST": first, "KNOWN": known, "SHIFT": max(known - 11, 0), "INFINITY": 0x7C00}
                key = f"count-{first}-{width}-{arch}"
                cases.append([key, "select", "_count_kernel", types, {**shape, **levels}, arch, 8])
            cases.append([f"next-{width}-{arch}", "select", "_next_kernel", types, shape, arch, 8])
            last = {"FIRST": False, "BITS": 10, "LAST": True}
            cases.append([f"pick-{width}-{arch}", "select", "_pick_kernel", types, last, arch, 4])
            end = {"NEXT": True, "ABSOLUTE": False, "WIDTH": width, "BFLOAT": False}
            cases.append([f"interpolate-{width}-{arch}", "select", "_interpolate_kernel", types, end, arch, 4])
    return cases


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").is_dir():
        pytest.skip("needs a build of triton that can compile for NVIDIA GPUs")
    folder = tmp_path_factory.mktemp("triton_reductions")
    # A process of its own: with TRITON_INTERPRET=1 `triton.jit` makes no function that could be compiled.
    environ = {name: value for name, value in child_environment().items() if not name.startswith("TRITON_")}
    environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(folder), _cases()]),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def _opcodes(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))


def _count(opcodes: Counter[str], pattern: str) -> int:
    """Count the elements processed by these instructions; those on pairs (``f32x2``) count twice."""
    return sum(n * (2 if "x2" in op else 1) for op, n in opcodes.items() if re.fullmatch(pattern, op))


def test_triton_reductions_compile_for_every_architecture(compiled: dict[str, Any]) -> None:
    assert compiled["ptx"].keys() == {case[0] for case in _cases()}
    assert compiled["default"] == [4, 4, 2048, 8, 8, 4]  # what _cases says
    # An entry of these kinds needs a case of its own here.
    assert [e for entries in compiled["measured"].values() for e in entries if e[0] in ("sum", "select")] == []


def test_triton_reductions_use_registers_without_spills(compiled: dict[str, Any]) -> None:
    spilled = [key for key, ptx in compiled["ptx"].items() if re.search(r"\b(?:ld|st)\.local|\.local\b", ptx)]
    assert spilled == []


def test_triton_reductions_are_neither_contracted_nor_reordered(compiled: dict[str, Any]) -> None:
    # Without a rounding in its name a sum or product may be fused by the assembler; approximate ones would be `approx`.
    for key, ptx in compiled["ptx"].items():
        floats = [op for op in _opcodes(ptx) if re.match(r"(add|sub|mul|fma|mad|div|sqrt|rcp)\..*f(16|32|64)", op)]
        assert [op for op in floats if not re.match(r"\w+\.rn\.f", op)] == [], key


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_sums_fuse_each_product_once(compiled: dict[str, Any], arch: int) -> None:
    # Sixteen rounds of 4·64 lanes on 128 threads: two elements a thread and round.
    elements = 16 * 2
    for kind, dtype in _sums(arch):
        fused = 0 if kind == "mean" else elements
        opcodes = _opcodes(compiled["ptx"][f"sum-{kind}-{dtype}-{arch}"])
        wide = "f64" if dtype == "fp64" else "f32"
        # Blackwell multiplies halves as they are and adds in float32: their product is exact there too.
        assert _count(opcodes, rf"fma\.rn\.{wide}(x2|\.b?f16)?") == fused, (kind, dtype)
        assert _count(opcodes, rf"mul\.rn\.{wide}(x2)?") == 0, (kind, dtype)
