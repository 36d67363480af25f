// SPDX-License-Identifier: MIT
#include "current_stream.h"

namespace fastdiff::bindings {

void* current_stream(const at::Tensor& tensor) {
    if (!tensor.is_cuda()) return nullptr;
    // torch's own function: the headers of c10/cuda are not part of a torch without CUDA.
    static PyObject* const raw_stream = [] {
        PyObject* const module = PyImport_ImportModule("torch._C");
        if (module == nullptr) throw python_error();
        PyObject* const function = PyObject_GetAttrString(module, "_cuda_getCurrentRawStream");
        Py_DECREF(module);
        if (function == nullptr) throw python_error();
        return function;
    }();
    PyObject* const device = PyLong_FromLong(tensor.get_device());
    PyObject* const stream = device == nullptr ? nullptr : PyObject_CallOneArg(raw_stream, device);
    Py_XDECREF(device);
    if (stream == nullptr) throw python_error();
    void* const result = PyLong_AsVoidPtr(stream);
    Py_DECREF(stream);
    return result;
}

}  // namespace fastdiff::bindings
