// SPDX-License-Identifier: MIT
// The type `Stepping`: a method of a drop-in scheduler that takes a step. It goes on in the scheduler's `Loop`
// where it can, and calls a Python function with the same arguments where it cannot.
#pragma once

#include "loop.h"

namespace fastdiff::bindings {

struct Stepping {
    PyObject_HEAD vectorcallfunc vectorcall;
    PyObject* attributes;  // as a function has them: a name, a docstring, a signature
    PyObject* name;        // of the method that takes the step
    PyObject* otherwise;
    PyObject* arguments;  // the names of those that may be passed by place, a tuple
};

// Reads a call (self, *positional, **named).
inline bool read_call(PyObject* arguments, PyObject* const* objects, Py_ssize_t positional, PyObject* names,
                      MethodCall* call) {
    static PyObject* const uncond = PyUnicode_InternFromString("model_output_uncond");
    const bool guided = PyTuple_GET_SIZE(arguments) > 0 && PyTuple_GET_ITEM(arguments, 0) == uncond;
    if (positional - 1 > PyTuple_GET_SIZE(arguments)) return false;
    for (Py_ssize_t i = 1; i < positional; ++i)
        if (!put_argument(PyTuple_GET_ITEM(arguments, i - 1), objects[i], guided, call)) return false;
    const Py_ssize_t count = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* name = PyTuple_GET_ITEM(names, i);
        // Names are compared by identity, which says nothing of one that a program put together.
        if (!PyUnicode_CHECK_INTERNED(name)) return false;
        // Passed by place and by name: for Python to say so.
        for (Py_ssize_t j = 0; j < positional - 1; ++j)
            if (PyTuple_GET_ITEM(arguments, j) == name) return false;
        if (!put_argument(name, objects[positional + i], guided, call)) return false;
    }
    if ((call->uncond == Py_None) != (call->guidance == Py_None)) return false;
    return call->output() != nullptr && call->timestep() != nullptr && call->sample() != nullptr;
}

inline PyObject* stepping_call(PyObject* self, PyObject* const* objects, size_t flagged, PyObject* names) {
    HANDLE_TH_ERRORS
    static PyObject* const fused = PyUnicode_InternFromString("_fused");
    const auto* method = reinterpret_cast<Stepping*>(self);
    const Py_ssize_t positional = PyVectorcall_NARGS(flagged);
    MethodCall call;
    if (positional > 0) {
        const py::object attributes = made(PyObject_GenericGetDict(objects[0], nullptr));
        PyObject* found = PyDict_GetItemWithError(attributes.ptr(), fused);
        if (found != nullptr && PyObject_TypeCheck(found, loop_type)) {
            const py::object loop = py::reinterpret_borrow<py::object>(found);
            loop_of(found)->undisturbed_at = -1;
            if (read_call(method->arguments, objects, positional, names, &call)) {
                py::object result = loop_of(found)->advance(objects[0], attributes.ptr(), method->name, call);
                if (result.ptr() != nullptr) return result.release().ptr();
            }
        }
    }
    return PyObject_Vectorcall(method->otherwise, objects, flagged, names);
    END_HANDLE_TH_ERRORS
}

inline PyObject* stepping_new(PyTypeObject* type, PyObject* args, PyObject* /*kwargs*/) {
    PyObject *name = nullptr, *otherwise = nullptr, *arguments = nullptr;
    if (PyArg_ParseTuple(args, "UOO!:Stepping", &name, &otherwise, &PyTuple_Type, &arguments) == 0) return nullptr;
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    auto* method = reinterpret_cast<Stepping*>(self);
    method->vectorcall = &stepping_call;
    method->name = Py_NewRef(name);
    PyUnicode_InternInPlace(&method->name);
    method->otherwise = Py_NewRef(otherwise);
    method->arguments = Py_NewRef(arguments);
    return self;
}

inline int stepping_traverse(PyObject* self, visitproc visit, void* arg) {
    const auto* method = reinterpret_cast<Stepping*>(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(method->attributes);
    Py_VISIT(method->otherwise);
    return 0;
}

inline int stepping_clear(PyObject* self) {
    auto* method = reinterpret_cast<Stepping*>(self);
    Py_CLEAR(method->attributes);
    Py_CLEAR(method->otherwise);
    return 0;
}

inline void stepping_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(reinterpret_cast<Stepping*>(self)->name);
    Py_XDECREF(reinterpret_cast<Stepping*>(self)->arguments);
    stepping_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

inline void define_stepping(py::module_& m) {
    static PyMemberDef members[] = {
        {"__dictoffset__", T_PYSSIZET, offsetof(Stepping, attributes), READONLY, nullptr},
        {"__vectorcalloffset__", T_PYSSIZET, offsetof(Stepping, vectorcall), READONLY, nullptr},
        {nullptr, 0, 0, 0, nullptr},
    };
    static PyGetSetDef properties[] = {
        {"__dict__", &PyObject_GenericGetDict, &PyObject_GenericSetDict, nullptr, nullptr},
        {nullptr, nullptr, nullptr, nullptr, nullptr},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(&stepping_new)},
        {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
        {Py_tp_traverse, reinterpret_cast<void*>(&stepping_traverse)},
        {Py_tp_clear, reinterpret_cast<void*>(&stepping_clear)},
        {Py_tp_dealloc, reinterpret_cast<void*>(&stepping_dealloc)},
        {Py_tp_getset, properties},
        {Py_tp_members, members},
        {0, nullptr},
    };
    static PyType_Spec spec = {"fastdiff._C.Stepping", sizeof(Stepping), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, slots};
    m.attr("Stepping") = made(PyType_FromSpec(&spec));
    m.def(
        "as_method", [](const py::object& callable) { return made(PyInstanceMethod_New(callable.ptr())); },
        "A callable that a class binds to its objects, as it binds functions.");
}

}  // namespace fastdiff::bindings
