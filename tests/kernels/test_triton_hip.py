# SPDX-License-Identifier: MIT
"""Triton's code for AMD GPUs, compiled ahead of time on any machine; it has not run on an AMD GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_log_prob_compile import _cases as _cases_of_log_prob
from test_reductions_compile import _cases
from test_triton_compile import CONFIGURATIONS, _tensors_read

from support.child_environment import child_environment

CHIP = "gfx942"
DTYPES = ("fp16", "bf16", "fp32", "fp64")
#: Threads of a warp on this chip.
WARP = 64

PROGRAM = r"""
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastdiff.kernels import config, diffusion_loss, gram, log_prob, philox, reduce, select, step

chip, warp, cases = json.load(sys.stdin)
results = {}
for key, module, name, types, constants, kind, size in cases:
    modules = {"step": step, "philox": philox, "reduce": reduce, "select": select, "gram": gram, "log_prob": log_prob,
               "diffusion_loss": diffusion_loss}
    kernel = getattr(modules[module], name)
    chosen = config.lookup(chip, kind, size)
    if "BLOCK" in kernel.arg_names:
        constants = {**constants, "BLOCK": chosen.block}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names
             if n.endswith("_ptr") or n in ("inner", "model_stride", "copy_stride")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": chosen.num_warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("hip", chip, warp), options=options)
    results[key] = {"code": done.asm["amdgcn"], "elements": chosen.block // (warp * chosen.num_warps)}
json.dump(results, sys.stdout)
"""

#: Scalar registers that a variant may spill: rows a sample in float64 take the most arguments.
SCALAR_SPILLS = {"rows-fp64": 2}
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


def _all_cases() -> list[list[Any]]:
    cases: list[list[Any]] = []
    for dtype in DTYPES:
        compute = "fp64" if dtype == "fp64" else "fp32"
        tensors = {
            f"{n}_ptr": f"*{dtype}" for n in ("sample", "model_output", "uncond", "variance", "noise", "mask", "out")
        }
        tensors |= {f"history_{j}_ptr": f"*{dtype}" for j in range(4)}
        tensors |= {f"{n}_ptr": f"*{dtype}" for n in ("prev_sample", "keep_0", "keep_1", "model_input")}
        tensors |= {f"{n}_ptr": f"*{compute}" for n in ("table", "guidance_scale", "threshold")}
        tensors |= {f"{n}_ptr": "*i64" for n in ("row_indices", "seeds", "noise_steps", "steps")}
        for name, constants in CONFIGURATIONS.items():
            kind = "draw" if constants["DRAWS"] else "step"
            cases.append([f"{name}-{dtype}", "step", "_step_kernel", tensors, constants, kind, SIZES[dtype]])
        cases.append([f"randn-{dtype}", "philox", "_randn_kernel", tensors, {"STEPS": 2}, "randn", SIZES[dtype]])
    for key, module, name, types, constants, arch, _ in _cases():
        if arch == 90:
            cases.append([key, module, name, types, constants, "sum", 4])
    cases += [[*case[:5], "sum", 4] for case in _cases_of_log_prob()]
    return cases


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "amd").is_dir():
        pytest.skip("needs a build of triton that can compile for AMD GPUs")
    environ = {name: value for name, value in child_environment().items() if not name.startswith("TRITON_")}
    environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton_hip"))
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps([CHIP, WARP, _all_cases()]), env=environ,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def _opcodes(code: str) -> Counter[str]:
    return Counter(re.findall(r"^\t([a-z]\w+)\s", code, re.MULTILINE))


def test_every_kernel_compiles_for_amd_without_spills(compiled: dict[str, Any]) -> None:
    assert compiled.keys() == {case[0] for case in _all_cases()}
    for key, result in compiled.items():
        for what in (r"\.private_segment_fixed_size", r"\.vgpr_spill_count", r"\.sgpr_spill_count"):
            found = re.findall(rf"{what}:\s+(\d+)", result["code"])
            assert found, (key, what)
            # Scalars that spill go to lanes of vector registers, not to memory, which the private segment shows.
            spills = SCALAR_SPILLS.get(key, 0) if "sgpr" in what else 0
            assert all(int(number) <= spills for number in found), (key, what)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_step_for_amd_fuses_only_explicit_products(compiled: dict[str, Any], dtype: str) -> None:
    result = compiled[f"plain-{dtype}"]
    opcodes = _opcodes(result["code"])
    # The packed forms treat two elements; mixed ones read or write halves, and are fused in float32.
    fused = sum(
        n * (2 if "pk" in op else 1)
        for op, n in opcodes.items()
        if re.fullmatch(r"v_(pk_)?fma[ac]?[ck]?_f32(_e\d+)?|v_fma_mix(lo|hi)?_f(32|16)(_e\d+)?", op)
    )
    # The guidance's and the prediction's, and one a term.
    assert fused == result["elements"] * (2 + 3), opcodes
    assert [op for op in opcodes if re.match(r"v_(pk_)?(mad|mac)_(legacy_)?f", op)] == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
def test_step_for_amd_moves_at_least_8_bytes_per_access(compiled: dict[str, Any], dtype: str) -> None:
    result = compiled[f"plain-{dtype}"]
    opcodes = _opcodes(result["code"])
    wide = sum(
        n * (2 if "x4" in op else 1) for op, n in opcodes.items() if re.match(r"(global|buffer)_load_dwordx[24]", op)
    )
    assert wide * 8 == result["elements"] * SIZES[dtype] * _tensors_read(CONFIGURATIONS["plain"])
