# SPDX-License-Identifier: MIT
"""Every Triton kernel compiles for integer arguments of 1, which Triton's JIT makes compile-time constants.

A constant is a Python number, without `.to` and `.dtype`. A sample of one element, a batch of one program a sample
and the like are such calls, and neither the interpreter nor a signature without constants shows what they break.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_triton_hip import _all_cases

ROOT = Path(__file__).resolve().parents[2]

# The compiler's front end alone for each integer in turn, where a kernel's source meets the constant; all of them at
# once go on to machine code. Small blocks: what is compiled does not depend on them.
PROGRAM = r"""
import inspect, json, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction
from fastdiff.kernels import philox, reduce, select, step
from benchmarks.gpu import copy_kernel

modules = {"step": step, "philox": philox, "reduce": reduce, "select": select, "copy_kernel": copy_kernel}
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


def compiled(kernel, types, constants, whole):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
    try:
        triton.compile(source, target=target, options=options) if whole else front_end(source)
    except Exception as error:
        return str(error)
    return ""


results, kernels = {}, {}
for name, module in modules.items():
    for found, value in vars(module).items():
        if isinstance(value, JITFunction) and found.endswith("_kernel") and value.__module__ == module.__name__:
            kernels[found] = [p.name for p in value.params if not p.is_constexpr and not p.name.endswith("_ptr")]
whole = set()
for key, module, name, types, constants in json.load(sys.stdin):
    kernel = getattr(modules[module], name)
    constants = {**constants, **{n: small[n] for n in small if n in kernel.arg_names}}
    # The JIT specialises on the others.
    integers = [p.name for p in kernel.params
                if p.name in kernels[name] and not p.do_not_specialize]
    for ones in [[], *([n] for n in integers), integers]:
        at_once = ones == integers and name not in whole
        if at_once:
            whole.add(name)
        error = compiled(kernel, types, {**constants, **dict.fromkeys(ones, 1)}, at_once)
        results[f"{key}: {' '.join(ones)}"] = error
json.dump({"results": results, "kernels": kernels}, sys.stdout)
"""


def _cases() -> list[list[Any]]:
    """Return every variant of every kernel, with one dtype if the dtype does not affect the integer code."""
    chosen = [c[:5] for c in _all_cases() if not (c[2] in ("_step_kernel", "_sum_kernel") and "fp32" not in c[0])]
    copy = {"src_ptr": "*fp32", "dst_ptr": "*fp32"}
    return [*chosen, ["copy", "copy_kernel", "_copy_kernel", copy, {}]]


def test_triton_kernels_compile_for_integer_arguments_of_one(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").is_dir():
        pytest.skip("needs a build of triton that can compile for NVIDIA GPUs")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(_cases()), env=environ, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout)
    assert set(found["kernels"]) == {case[2] for case in _cases()}, "a kernel has no case here"
    assert {key: error[-300:] for key, error in found["results"].items() if error} == {}
    # One without constants, one for each integer that Triton may specialise on, and one for all.
    ones = {key.partition(": ")[2] for key in found["results"]}
    assert {
        "inner",
        "blocks",
        "model_stride",
        "copy_stride",
        "blocks_per_sample",
        "programs_per_sample",
        "size",
    } <= ones
    assert {"inner blocks", "inner model_stride copy_stride blocks_per_sample", "inner programs_per_sample"} <= ones
