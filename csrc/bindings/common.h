// SPDX-License-Identifier: MIT
// Includes of the general bindings, which are one translation unit: torch's and pybind11's headers cost most of its
// compile time. csrc/dropin/ and csrc/bindings/*.cpp include tensors.h instead.
#pragma once

#include <torch/extension.h>

#include "tensors.h"

namespace fastdiff::bindings {

namespace py = pybind11;

// Return whether nothing forces a backend in the context of this thread. `choice` is `fastdiff.ops.backends.forced`, a
// context variable that holds the backend's name or None.
inline bool nothing_forced(PyObject* choice) {
    PyObject* name = nullptr;
    if (PyContextVar_Get(choice, nullptr, &name) != 0) throw python_error();
    const py::object held = py::reinterpret_steal<py::object>(name);
    return name == Py_None;
}

}  // namespace fastdiff::bindings
