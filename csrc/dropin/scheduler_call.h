// SPDX-License-Identifier: MIT
// The arguments of one call of a scheduler's step method.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstddef>
#include <utility>

namespace fastdiff::dropin {

// Null where the object is no tensor.
inline const at::Tensor* as_tensor(PyObject* object) {
    return object != nullptr && THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

// Arguments beside the three that every step method has.
constexpr size_t kMaxExtra = 8;

// All references are the caller's.
struct SchedulerCall {
    std::array<PyObject*, 3> required{};  // model_output (the conditional one under guidance), timestep, sample
    PyObject *uncond = Py_None, *guidance_scale = Py_None;
    std::array<std::pair<PyObject*, PyObject*>, kMaxExtra> extra{};  // (name, value), in the call's order
    size_t num_extra = 0;

    PyObject* model_output() const { return required[0]; }
    PyObject* timestep() const { return required[1]; }
    PyObject* sample() const { return required[2]; }
    bool guided() const { return uncond != Py_None; }
    bool complete() const {
        return (uncond == Py_None) == (guidance_scale == Py_None) && model_output() != nullptr &&
               timestep() != nullptr && sample() != nullptr;
    }

    // An argument by its interned name; null where the call lacks it.
    PyObject* argument(PyObject* name) const;

    // Store one argument. False for a call that the fast path does not take: too many arguments, a guidance rescale.
    // `guided_method`: the method is `guided_step`; only then do the names of guidance mean guidance.
    bool store(PyObject* name, PyObject* value, bool guided_method);

    // Read a vectorcall (self, *positional, **named); `names` are those of the positional arguments. False where the
    // fast path does not take the call.
    bool read(PyObject* names, PyObject* const* objects, Py_ssize_t positional, PyObject* keywords);
};

}  // namespace fastdiff::dropin
