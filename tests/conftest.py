# SPDX-License-Identifier: MIT
"""What every test runs under: threads, Triton's interpreter, hypothesis' profile, and the skip of GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from support.cuda_host import Kernel

HAS_CUDA = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it has to be set before anything imports one. Without a GPU the
# interpreter is the only way to run a kernel.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of most tests are small: more threads only wait for each other. Workers of pytest-xdist share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, os.cpu_count() or 1))

# No deadline: the first example of a test may compile something. By default examples are random, so that every run
# looks at new ones, and a failure prints what repeats it; "ci" takes the same ones each time, so that a change passes
# or fails by what it is; "thorough" is for `make fuzz`.
hypothesis.settings.register_profile("fresh", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("fresh"), derandomize=True)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("fresh"), max_examples=2000)
# Instrumented code is several times slower, and a report needs one example that gets there, not many.
hypothesis.settings.register_profile("sanitize", hypothesis.settings.get_profile("ci"), max_examples=30)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fresh"))


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The CUDA kernels, compiled for the host; see support/cuda_host.py."""
    from support.cuda_host import build  # it imports fastdiff, whose kernels need the environment above

    return build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold a test that is marked ``answers`` to the backend that it names; see support/backend_used.py."""
    if item.get_closest_marker("answers") is None:
        return (yield)
    from support.backend_used import answered  # it imports fastdiff, whose kernels need the environment above

    with answered() as record:
        result = yield  # a test that fails or is skipped raises here
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "backend" in parameters:
        record.check(parameters["backend"])
    return result


def pytest_report_header() -> str:
    """Say in the first lines what the run can reach."""
    gpu = torch.cuda.get_device_name() if HAS_CUDA else "none"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} threads, GPU: {gpu}, Triton interpreted: {interpreted}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is no CUDA device."""
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        # Not item.keywords: those hold the names of folders too, and a checkout may lie in one called gpu.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
