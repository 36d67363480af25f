# SPDX-License-Identifier: MIT
"""Settings of all tests: threads, seeds, Triton's interpreter, hypothesis' profile, and the skip of GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from support.seeds import TEST_SEED, VARIABLE, seed_test

if TYPE_CHECKING:
    from support.cuda_host import Kernel

HAS_CUDA = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it has to be set before the first import of one. Without a GPU the
# interpreter is the only way to run a kernel.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Most tests use small tensors, for which more threads are slower. Workers of pytest-xdist share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, os.cpu_count() or 1))

# No deadline: the first example of a test may compile something. By default examples are random in every run, and a
# failure prints how to reproduce it; "ci" uses fixed examples, so that the result depends on the change alone, and half
# as many; "thorough" is for `make fuzz`.
hypothesis.settings.register_profile("fresh", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("fresh"), derandomize=True, max_examples=50)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("fresh"), max_examples=2000)
# Instrumented code is several times slower, and one example of a fault is enough for a report.
hypothesis.settings.register_profile("sanitize", hypothesis.settings.get_profile("ci"), max_examples=30)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fresh"))


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """Return the CUDA kernels compiled for the host; see support/cuda_host.py.

    Workers of pytest-xdist share the library that the first of them compiles.
    """
    from support.cuda_host import Kernel, build  # imports fastdiff, whose kernels need the environment above

    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build(tmp_path_factory.mktemp("cuda_on_host"))
    import fcntl  # which Windows lacks

    folder = tmp_path_factory.getbasetemp().parent / "cuda_on_host"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built, done = folder / "step.so", folder / "done"
        if done.exists():
            return Kernel(built)
        kernel = build(folder)
        done.touch()
        return kernel


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the generators, so that a test draws the same numbers alone and in any order."""
    seed_test(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Check the backend used by a test with the marker ``checks_backend``; see support/backend_used.py."""
    if item.get_closest_marker("checks_backend") is None:
        return (yield)
    from support.backend_used import record_backends  # imports fastdiff, whose kernels need the environment above

    with record_backends() as record:
        result = yield  # a test that fails or is skipped raises here
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "backend" in parameters:
        record.check(parameters["backend"])
    return result


def pytest_report_header() -> str:
    """Return a header line with torch, threads, GPU, Triton's mode and the seed."""
    gpu = torch.cuda.get_device_name() if HAS_CUDA else "none"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    threads = torch.get_num_threads()
    return (
        f"torch {torch.__version__}, {threads} threads, GPU: {gpu}, Triton interpreted: {interpreted}, "
        f"{VARIABLE}={TEST_SEED}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests with the marker ``gpu`` if there is no CUDA device."""
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        # Not item.keywords, which contain the names of folders too: a checkout may be in a folder called gpu.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
