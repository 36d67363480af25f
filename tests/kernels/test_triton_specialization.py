# SPDX-License-Identifier: MIT
"""Every Triton kernel compiles for every kind of integer argument and pointer that Triton's JIT specialises on.

An integer argument of 1 becomes a compile-time constant, a Python number without `.to` and `.dtype`; a multiple of 16
carries that divisibility; one of 2³¹ or more is an int64. An address is a multiple of 16 or not. A sample of one
element, a batch of one program a sample and a view at an odd offset are such calls, and neither the interpreter nor a
signature of one kind shows what they break.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_triton_hip import _all_cases

from support.child_environment import child_environment

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("1", "16", "int", "long")
#: One kind for all integers at once, with addresses that are multiples of 16 where the integers may be too.
AT_ONCE = ["all 1, aligned", "all 16, aligned", "all int", "all long"]

# The compiler's front end alone for each integer in turn, where a kernel's source meets the constant, in its first
# variant; all of them at once in every variant. Friendly calls (multiples of 16) and unfriendly ones (int64, addresses
# that are not aligned) go on to machine code, once a kernel. Small blocks: what is compiled does not depend on them.
PROGRAM = r"""
import inspect, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction
import triton
from fastdiff.kernels import diffusion_loss, gram, log_prob, philox, reduce, select, step
from benchmarks.gpu import copy_kernel

modules = {"step": step, "philox": philox, "reduce": reduce, "select": select, "gram": gram, "log_prob": log_prob,
           "diffusion_loss": diffusion_loss,
           "copy_kernel": copy_kernel}
target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
options = {"num_warps": 4, "enable_fp_fusion": False}
small = {"BLOCK": 256, "BLOCKS": 2, "TILE": 256, "TILES": 2}


def front_end(source):
    from triton._C.libtriton import ir
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(options)
    arguments = [target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context]
    source.make_ir(*arguments[: len(inspect.signature(source.make_ir).parameters)])


def error_of(kernel, types, constants, kinds, aligned, whole):
    names = kernel.arg_names
    specialised = {p.name for p in kernel.params if not p.do_not_specialize}
    constants = {**constants, **{n: 1 for n, kind in kinds.items() if kind == "1" and n in specialised}}
    width = {n: "i64" if kind == "long" else "i32" for n, kind in kinds.items()}
    signature = {n: "constexpr" if n in constants else types.get(n) or width[n] for n in names}
    divisible = [n for n in names if n not in constants and (
        aligned if n.endswith("_ptr") else kinds[n] == "16" and n in specialised)]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    try:
        triton.compile(source, target=target, options=options) if whole else front_end(source)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


kinds, cases = json.load(sys.stdin)
results, kernels = {}, {}
for name, module in modules.items():
    for found, value in vars(module).items():
        if isinstance(value, JITFunction) and found.endswith("_kernel") and value.__module__ == module.__name__:
            kernels[found] = [p.name for p in value.params if not p.is_constexpr and not p.name.endswith("_ptr")]
compiled = set()
for key, module, name, types, constants in cases:
    kernel = getattr(modules[module], name)
    constants = {**constants, **{n: small[n] for n in small if n in kernel.arg_names}}
    integers = kernels[name]
    for kind in kinds:
        # Machine code for the first variant of a kernel, as friendly calls and unfriendly ones have it.
        aligned = kind in ("1", "16")
        label = f"{key}: all {kind}{', aligned' if aligned else ''}"
        at_once = dict.fromkeys(integers, kind)
        whole = name not in compiled and kind in ("16", "long")
        results[label] = error_of(kernel, types, constants, at_once, aligned, whole)
        # One integer unlike the others, which are of the kind before.
        others = kinds[kinds.index(kind) - 1]
        for n in integers if len(integers) > 1 and name not in compiled else ():
            mixed = {**dict.fromkeys(integers, others), n: kind}
            results[f"{key}: {n} {kind}"] = error_of(kernel, types, constants, mixed, True, False)
    compiled.add(name)
json.dump({"results": results, "kernels": kernels}, sys.stdout)
"""


def _cases() -> list[list[Any]]:
    """Return every variant of every kernel, with one dtype if the dtype does not affect the integer code."""
    chosen = [c[:5] for c in _all_cases() if not (c[2] in ("_step_kernel", "_sum_kernel") and "fp32" not in c[0])]
    copy = {"src_ptr": "*fp32", "dst_ptr": "*fp32"}
    return [*chosen, ["copy", "copy_kernel", "_copy_kernel", copy, {}]]


def test_triton_kernels_compile_for_every_specialization(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").is_dir():
        pytest.skip("needs a build of triton that can compile for NVIDIA GPUs")
    # The checkout follows for its benchmarks, whose copy is a kernel too.
    environ = {name: value for name, value in child_environment().items() if not name.startswith("TRITON_")}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([environ["PYTHONPATH"], str(ROOT)])}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps([KINDS, _cases()]), env=environ, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout)
    assert set(found["kernels"]) == {case[2] for case in _cases()}, "a kernel has no case here"
    assert {key: error[-300:] for key, error in found["results"].items() if error} == {}
    # Every kind of every integer of every kernel, alone where there are several, and all at once.
    expected, seen = set(), set()
    for key, _, name, _, _ in _cases():
        expected |= {f"{key}: {at_once}" for at_once in AT_ONCE}
        integers = found["kernels"][name]
        if len(integers) > 1 and name not in seen:
            seen.add(name)
            expected |= {f"{key}: {n} {kind}" for n, kind in itertools.product(integers, KINDS)}
    assert found["results"].keys() == expected
    named = {n for integers in found["kernels"].values() for n in integers}
    assert {"inner", "blocks", "model_stride", "copy_stride", "blocks_per_sample", "size"} <= named
