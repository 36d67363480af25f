// SPDX-License-Identifier: MIT
#include "scheduler_call.h"

namespace fastdiff::dropin {

namespace {

struct Names {
    PyObject* model_output = PyUnicode_InternFromString("model_output");
    PyObject* timestep = PyUnicode_InternFromString("timestep");
    PyObject* sample = PyUnicode_InternFromString("sample");
    PyObject* uncond = PyUnicode_InternFromString("model_output_uncond");
    PyObject* cond = PyUnicode_InternFromString("model_output_cond");
    PyObject* guidance_scale = PyUnicode_InternFromString("guidance_scale");
    PyObject* guidance_rescale = PyUnicode_InternFromString("guidance_rescale");
};

const Names& names() {
    static const Names interned;
    return interned;
}

}  // namespace

PyObject* SchedulerCall::argument(PyObject* name) const {
    for (size_t i = 0; i < num_extra; ++i)
        if (extra[i].first == name) return extra[i].second;
    const Names& n = names();
    if (name == n.model_output) return required[0];
    if (name == n.timestep) return required[1];
    return name == n.sample ? required[2] : nullptr;
}

bool SchedulerCall::store(PyObject* name, PyObject* value, bool guided_method) {
    const Names& n = names();
    if (name == n.model_output || (guided_method && name == n.cond)) {
        required[0] = value;
    } else if (name == n.timestep) {
        required[1] = value;
    } else if (name == n.sample) {
        required[2] = value;
    } else if (guided_method && name == n.uncond) {
        uncond = value;
        return value != Py_None;
    } else if (guided_method && name == n.guidance_scale) {
        guidance_scale = value;
        return value != Py_None;
    } else if (guided_method && name == n.guidance_rescale) {
        return PyFloat_CheckExact(value) && PyFloat_AS_DOUBLE(value) == 0.0;
    } else {
        if (num_extra == kMaxExtra) return false;
        extra[num_extra++] = {name, value};
    }
    return true;
}

bool SchedulerCall::read(PyObject* positional_names, PyObject* const* objects, Py_ssize_t positional,
                         PyObject* keywords) {
    const Py_ssize_t known = PyTuple_GET_SIZE(positional_names);
    const bool guided_method = known > 0 && PyTuple_GET_ITEM(positional_names, 0) == names().uncond;
    if (positional - 1 > known) return false;
    for (Py_ssize_t i = 1; i < positional; ++i)
        if (!store(PyTuple_GET_ITEM(positional_names, i - 1), objects[i], guided_method)) return false;
    const Py_ssize_t count = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* name = PyTuple_GET_ITEM(keywords, i);
        // Names are compared by identity, which says nothing about one that was put together at run time.
        if (!PyUnicode_CHECK_INTERNED(name)) return false;
        // Passed both ways: Python raises the error.
        for (Py_ssize_t j = 0; j < positional - 1; ++j)
            if (PyTuple_GET_ITEM(positional_names, j) == name) return false;
        if (!store(name, objects[positional + i], guided_method)) return false;
    }
    return complete();
}

}  // namespace fastdiff::dropin
