// SPDX-License-Identifier: MIT
// Whether an object is as it was left: what a drop-in scheduler asks before each of its steps.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastdiff::bindings {

// Whether a list holds the very objects of a tuple, in order.
inline bool holds(PyObject* list, PyObject* items) {
    if (!PyList_Check(list) || !PyTuple_Check(items) || PyList_GET_SIZE(list) != PyTuple_GET_SIZE(items)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); ++i)
        if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(items, i)) return false;
    return true;
}

// unchanged(attributes, values, lists, versions): whether the dict holds the very objects of the tuple `values`, in
// order, each list of the pairs (list, tuple) in `lists` likewise, and each tensor of the pairs (tensor, version) in
// `versions` has not been written since. The tensors count their versions: inference tensors must not be among them.
inline PyObject* unchanged(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    const bool good = count == 4 && PyDict_Check(objects[0]) && PyTuple_Check(objects[1]) && PyList_Check(objects[2]) &&
                      PyList_Check(objects[3]);
    TORCH_CHECK_TYPE(good, "unchanged: expected a dict, a tuple and two lists of pairs");
    PyObject *key = nullptr, *value = nullptr, *values = objects[1];
    Py_ssize_t at = 0, i = 0;
    if (PyDict_GET_SIZE(objects[0]) != PyTuple_GET_SIZE(values)) Py_RETURN_FALSE;
    while (PyDict_Next(objects[0], &at, &key, &value) != 0)
        if (value != PyTuple_GET_ITEM(values, i++)) Py_RETURN_FALSE;
    for (int which = 2; which < 4; ++which) {
        for (i = 0; i < PyList_GET_SIZE(objects[which]); ++i) {
            PyObject* pair = PyList_GET_ITEM(objects[which], i);
            TORCH_CHECK_TYPE(PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2, "unchanged: expected pairs");
            PyObject *first = PyTuple_GET_ITEM(pair, 0), *second = PyTuple_GET_ITEM(pair, 1);
            if (which == 2) {
                if (!holds(first, second)) Py_RETURN_FALSE;
                continue;
            }
            TORCH_CHECK_TYPE(THPVariable_Check(first) && PyLong_Check(second), "unchanged: expected (tensor, version)");
            if (THPVariable_Unpack(first)._version() != PyLong_AsLongLong(second)) Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
