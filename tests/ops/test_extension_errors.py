# SPDX-License-Identifier: MIT
"""Every way to an error in the compiled extension, each taken once in a process of its own: a Python error, no crash.

Errors start as C++ exceptions, as exceptions of torch, or as Python's; a build whose compiler is not torch's may lose
one on its way out of the extension. In a build with CUDA the paths of its kernels' configurations are taken too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from fastdiff.ops import backends
from support.child_environment import child_environment

pytestmark = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")

#: What raises, the error's type, and a part of its message.
ERRORS: dict[str, tuple[str, str]] = {
    # C++ exceptions of the arguments' checks.
    "c.step(1)": ("TypeError", "step: got 1 positional arguments, expected keywords"),
    "c.step(nothing=1)": ("TypeError", "step: got an unknown keyword 'nothing'"),
    "c.torch_randn()": ("TypeError", "torch_randn: expected 2 arguments, got 0"),
    "c.torch_randn_(1)": ("TypeError", "torch_randn_: expected 2 arguments, got 1"),
    "c.spawned_seeds(1, [(0, 0)], 1)": ("ValueError", "spawned_seeds: pool_size is 1"),
    "c.seeded_sum(x, [x], [], [], [])": ("ValueError", "seeded_sum: got "),
    "c._copy_kernel(x, x[:1], False)": ("ValueError", ""),
    "c._copy_kernel(x.t(), x.t(), False)": ("ValueError", ""),
    "c.randn(x, seeds.int(), None, 0, 0, 0)": ("RuntimeError", "randn"),
    "c.randn(x.int(), seeds, None, 0, 0, 0)": ("RuntimeError", "randn"),
    "c.randn(x, torch.arange(3), None, 0, 0, 0)": ("RuntimeError", "randn"),
    "c.StepCache(forced, None, c.FirstSteps()).install(1)": ("TypeError", "install: expected (plan, attributes"),
    "c.StepCache(forced, None, 3)": ("TypeError", ""),
    "c.install_triton_kernel(b'', 1, 1, 0, '')": ("ValueError", "install_triton_kernel: got a key of 0 bytes"),
    # Python errors that are set below a binding.
    "c.StepCache(forced, None, c.FirstSteps()).set_host_copies(3)": ("TypeError", "iterable"),
    "c.StepCache(forced, None, c.FirstSteps()).unchanged(1)": ("AttributeError", ""),
    "c.enable_triton([()])": ("IndexError", ""),
    "c.check_guard((), 1, None)": ("IndexError", ""),
    "c.NativePlan(object())": ("AttributeError", ""),
    # pybind11's own, of arguments that do not convert.
    "c.randn(1)": ("TypeError", "incompatible function arguments"),
    "c.spawned_seeds('a', [], 4)": ("TypeError", "incompatible function arguments"),
    "c.limit_kept_memory(-1)": ("TypeError", "incompatible function arguments"),
    "c.FirstSteps().add()": ("TypeError", "incompatible function arguments"),
}
CUDA_ERRORS: dict[str, tuple[str, str]] = {
    "c._set_cuda_config([33, 32, 32, 32, 1])": ("ValueError", "_set_cuda_config: sizes are 33, 32, 32, 32 and 1"),
    "c._set_cuda_config([32, 32])": ("TypeError", "_set_cuda_config: expected five sizes"),
    "c._set_cuda_config([32, 32, 32, 32, 2**40])": ("OverflowError", ""),
    "c._set_cuda_config(7)": ("TypeError", "iterable"),
    "c._cuda_config('a')": ("TypeError", ""),
}

# A fork for each path: starting an interpreter with torch takes seconds. The parent touches no device.
PROGRAM = r"""
import json, os, sys
import torch
from fastdiff.ops.backends import extension as c, forced

x, seeds = torch.zeros(2, 8), torch.arange(2)
outcomes = {}
for call in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            eval(call)
            answer = ["", ""]
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        os.write(write, json.dumps(answer).encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    outcomes[call] = json.loads(answer) if status == 0 else [f"ended with {os.waitstatus_to_exitcode(status)}", ""]
json.dump(outcomes, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    calls = [*ERRORS, *(CUDA_ERRORS if getattr(backends.extension, "cuda", False) else ())]
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(calls), env=child_environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


@pytest.mark.parametrize("call", ERRORS)
def test_errors_of_the_extension_reach_python(outcomes: dict[str, Any], call: str) -> None:
    kind, message = outcomes[call]
    assert kind == ERRORS[call][0], (kind, message)
    assert ERRORS[call][1] in message


@pytest.mark.skipif(not getattr(backends.extension, "cuda", False), reason="the extension was built without CUDA")
@pytest.mark.parametrize("call", CUDA_ERRORS)
def test_errors_of_cuda_configurations_reach_python(outcomes: dict[str, Any], call: str) -> None:
    kind, message = outcomes[call]
    assert kind == CUDA_ERRORS[call][0], (kind, message)
    assert CUDA_ERRORS[call][1] in message
