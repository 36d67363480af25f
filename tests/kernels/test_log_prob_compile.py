# SPDX-License-Identifier: MIT
"""Triton's code for the Gram matrix, the log-probability and the training loss on NVIDIA GPUs, compiled ahead
of time on any machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.child_environment import child_environment

DTYPES = ("fp16", "bf16", "fp32", "fp64")

PROGRAM = r"""
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from fastdiff.kernels import diffusion_loss, gram, log_prob

results = {}
for key, module, kernel, types, constants, arch in json.load(sys.stdin):
    kernel = getattr({"gram": gram, "log_prob": log_prob, "diffusion_loss": diffusion_loss}[module], kernel)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr") or n == "inner"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    results[key] = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
json.dump(results, sys.stdout)
"""


def _cases() -> list[list[Any]]:
    cases: list[list[Any]] = []
    for dtype, arch in zip(DTYPES, (80, 90, 100, 90), strict=True):
        compute = "fp64" if dtype == "fp64" else "fp32"
        types = {f"x{i}_ptr": f"*{dtype}" for i in range(6)} | {"partials_ptr": f"*{compute}", "out_ptr": f"*{compute}"}
        for count, sums in ((2, 0), (3, 1)) if dtype == "fp32" else ((2, 0),):
            shape = {"K": count, "SUMS": sums, "PARTS": count * (count + 1) // 2 + sums * count}
            constants = {**shape, "BLOCKS": 4}
            cases.append([f"gram-{count}-{dtype}", "gram", "_gram_kernel", types, constants, arch])
            cases.append([f"finish-{count}-{dtype}", "gram", "_finish_gram_kernel", types, shape, arch])
        names = ("sample", "model_output", "uncond", "noise", "prev_sample", "keep_0", "keep_1")
        tensors = {f"{name}_ptr": f"*{dtype}" for name in (*names, *(f"history_{j}" for j in range(4)))}
        tensors |= {
            f"{name}_ptr": f"*{compute}" for name in ("table", "guidance_scale", "threshold", "partials", "out")
        }
        tensors |= {f"{name}_ptr": "*i64" for name in ("row_indices", "seeds", "noise_steps")}
        form = {"HAS_UNCOND": True, "GUIDANCE_SCALES": 0, "HISTORY": 1, "HAS_THRESHOLD": False, "KEEPS": 1, "BLOCKS": 4}
        variants = {
            "draws": {"ROWS": 2, "DRAWS": 1, "NOISE_STEPS": 0, "REPLAY": False},
            "replay": {"ROWS": 0, "DRAWS": 0, "NOISE_STEPS": 0, "REPLAY": True},
        }
        for key, rest in variants.items() if dtype in ("bf16", "fp32") else ():
            cases.append([f"{key}-{dtype}", "log_prob", "_log_prob_kernel", tensors, {**form, **rest}, arch])
        tensors |= {f"{name}_ptr": f"*{dtype}" for name in ("output", "of_output", "of_sample", "of_noise")}
        tensors |= {"factor_ptr": f"*{compute}", "c_bits": "i64", "square_bits": "i64"}
        forms = {"l2": (0, 1, 0), "huber": (2, 0, 0), "slope": (2, 1, 3), "sign": (1, 2, 5)}
        for key, (loss, draws, gradients) in forms.items() if dtype in ("bf16", "fp64") else ():
            more = {"LOSS": loss, "ROWS": 2, "DRAWS": draws, "NOISE_STEPS": 0, "GRADIENTS": gradients, "BLOCKS": 4}
            cases.append([f"{key}-{dtype}", "diffusion_loss", "_diffusion_loss_kernel", tensors, more, arch])
        cases.append([f"mean-{dtype}", "diffusion_loss", "_finish_diffusion_loss_kernel", tensors, {}, arch])
        end = {"ROWS": 0, "MEAN": dtype == "fp16"}
        cases.append([f"end-{dtype}", "log_prob", "_finish_log_prob_kernel", tensors, end, arch])
    return cases


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    triton = pytest.importorskip("triton", reason="needs the triton package")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").is_dir():
        pytest.skip("needs a build of triton that can compile for NVIDIA GPUs")
    # A process of its own: with TRITON_INTERPRET=1 `triton.jit` makes no function that could be compiled.
    environ = {name: value for name, value in child_environment().items() if not name.startswith("TRITON_")}
    environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton_log_prob"))
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(_cases()), env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def test_kernels_compile_without_local_memory(compiled: dict[str, str]) -> None:
    assert compiled.keys() == {case[0] for case in _cases()}
    assert [key for key, ptx in compiled.items() if re.search(r"\b(?:ld|st)\.local|\.local\b", ptx)] == []


def test_arithmetic_is_neither_contracted_nor_reordered(compiled: dict[str, str]) -> None:
    for key, ptx in compiled.items():
        found = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt)\.[\w.]*f(?:16|32|64)\w*", ptx))
        # What the root of drawn noise begins with; see test_cuda_compile.py.
        assert [op for op in found - {"rsqrt.approx.ftz.f32"} if not re.match(r"\w+\.rn\.f", op)] == [], key


def test_every_product_is_fused_with_its_sum(compiled: dict[str, str]) -> None:
    # Sixteen rounds of 4·64 lanes on 128 threads: two elements a thread and round, and three products of two tensors.
    ptx = compiled["gram-2-fp32"]
    pairs = len(re.findall(r"\bfma\.rn\.f32x2\b", ptx))
    assert len(re.findall(r"\bfma\.rn\.f32\b", ptx)) + 2 * pairs == 3 * 16 * 2
    assert not re.search(r"\bmul\.rn\.f32", ptx)
