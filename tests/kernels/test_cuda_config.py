# SPDX-License-Identifier: MIT
"""The binding of the CUDA kernels' configurations, built here without CUDA and without torch."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from typing import Any

import pytest

from support.cuda_host import COMPILER, FLAGS, ROOT, SOURCES, needs_compiler

pytestmark = needs_compiler

#: csrc/bindings/config.h as a module of its own, over the configurations that the kernels' launches hold.
MODULE = """
#include "bindings/config.h"
#include "cuda/launches.h"
namespace fastdiff {
CudaConfig cuda_config(int device) { return config_of(device); }
bool set_cuda_config(const CudaConfig* config) { return override_config(config); }
}
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cuda_config", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                 nullptr};
PyMODINIT_FUNC PyInit_cuda_config() {
    PyObject* module = PyModule_Create(&definition);
    return module != nullptr && fastdiff::bindings::define_config(module) ? module : nullptr;
}
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cuda_config")
    (folder / "module.cpp").write_text(MODULE, encoding="utf-8")
    include = [f"-I{path}" for path in (SOURCES, ROOT / "csrc", sysconfig.get_path("include"))]
    # No exception may be thrown there at all: the compiler refuses to compile a `throw`.
    options = [*FLAGS, "-fno-exceptions", "-Wall", "-Wextra", "-Wno-cast-function-type", *include, "-shared"]
    path = folder / "cuda_config.so"
    command = [str(COMPILER), *options, str(folder / "module.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loader = importlib.machinery.ExtensionFileLoader("cuda_config", str(path))
    spec = importlib.util.spec_from_loader("cuda_config", loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


DEFAULT = {"step": 256, "draw": 256, "randn": 256, "sum": 128, "select": 16}


def test_cuda_config_is_replaced_and_put_back(module: Any) -> None:
    assert module._cuda_config(0) == DEFAULT
    module._set_cuda_config([512, 64, 32, 256, 4])
    assert list(module._cuda_config(3).values()) == [512, 64, 32, 256, 4]
    module._set_cuda_config(None)
    assert module._cuda_config(0) == DEFAULT


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (
            [33, 32, 32, 32, 1],
            ValueError,
            r"_set_cuda_config: sizes are 33, 32, 32, 32 and 1, expected threads of step",
        ),
        ((32, 1024, 32, 32, 1), ValueError, r"a power of two from 32 to 512, .*; choose such"),
        ([32, 32, 32, 32, 2048], ValueError, r"elements a thread of select, one from 1 to 1024"),
        ([32, 32, 32, 32], TypeError, r"_set_cuda_config: expected five sizes"),
        ([32, 32, 32, 32, 1, 1], TypeError, r"_set_cuda_config: expected five sizes"),
        ([32, 32, "32", 32, 1], TypeError, r"integer"),
        ([32, 32, 32, 32, 2**40], OverflowError, r"int"),
        (7, TypeError, r"iterable"),
    ],
    ids=str,
)
def test_refused_cuda_config_changes_nothing(module: Any, sizes: Any, error: type[Exception], message: str) -> None:
    module._set_cuda_config([64, 64, 64, 64, 2])
    try:
        with pytest.raises(error, match=message):
            module._set_cuda_config(sizes)
        assert list(module._cuda_config(0).values()) == [64, 64, 64, 64, 2]
    finally:
        module._set_cuda_config(None)


def test_kernel_sources_throw_nothing() -> None:
    # nvcc's objects may be compiled by another compiler than torch; what went wrong travels back as a message.
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        text = path.read_text(encoding="utf-8")
        assert "throw" not in text, path.name
        assert "TORCH_CHECK" not in text, path.name
