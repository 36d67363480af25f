// SPDX-License-Identifier: MIT
// The binding of the CUDA kernels' configurations, for the benchmark that sweeps them. The library does not call it.
//
// It uses Python's C API alone: errors are set directly, without C++ exceptions, which pybind11's handlers translate;
// those are shared with every other extension of the process (a process ended there where g++ was not the one of
// torch's build).
#pragma once

#include <Python.h>

#include "../cuda/config.h"

namespace fastdiff::bindings {

inline PyObject* cuda_config_as_dict(PyObject*, PyObject* device) {
    const long index = PyLong_AsLong(device);
    if (index == -1 && PyErr_Occurred() != nullptr) return nullptr;
    const CudaConfig config = cuda_config(static_cast<int>(index));
    return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i}", "step", config.step, "draw", config.draw, "randn", config.randn,
                         "sum", config.sum, "select", config.select);
}

// None restores the table's choice.
inline PyObject* take_cuda_config(PyObject*, PyObject* sizes) {
    if (sizes == Py_None) {
        (void)set_cuda_config(nullptr);
        Py_RETURN_NONE;
    }
    PyObject* const five = PySequence_Tuple(sizes);
    if (five == nullptr) return nullptr;
    CudaConfig config;
    const bool read =
        PyArg_ParseTuple(five, "iiiii;_set_cuda_config: expected five sizes: step, draw, randn, sum, select",
                         &config.step, &config.draw, &config.randn, &config.sum, &config.select) != 0;
    Py_DECREF(five);
    if (!read) return nullptr;
    if (!set_cuda_config(&config))
        return PyErr_Format(PyExc_ValueError,
                            "_set_cuda_config: sizes are %d, %d, %d, %d and %d, expected threads of step, draw, randn "
                            "and sum, each a power of two from 32 to %d, and elements a thread of select, one from 1 "
                            "to 1024; choose such",
                            config.step, config.draw, config.randn, config.sum, config.select, kMostThreads);
    Py_RETURN_NONE;
}

// Returns false, with a Python error set, where the functions could not be added.
inline bool define_config(PyObject* module) {
    static PyMethodDef methods[] = {
        {"_cuda_config", &cuda_config_as_dict, METH_O,
         "The sizes of the kernels' blocks on a device; see csrc/cuda/config.h."},
        {"_set_cuda_config", &take_cuda_config, METH_O,
         "Replaces them on every device: step, draw, randn, sum, select; None puts the table's choice back."},
        {nullptr, nullptr, 0, nullptr},
    };
    return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace fastdiff::bindings
