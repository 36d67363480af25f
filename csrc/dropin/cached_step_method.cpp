// SPDX-License-Identifier: MIT
#include "cached_step_method.h"

#include <structmember.h>
#include <torch/csrc/Exceptions.h>

#include "step_cache.h"

namespace fastdiff::dropin {

namespace {

struct CachedStepMethod {
    PyObject_HEAD vectorcallfunc vectorcall;
    PyObject* attributes;  // those of a function: a name, a docstring, a signature
    PyObject* name;
    PyObject* fallback;
    PyObject* arguments;   // the names of the positional arguments, a tuple
    PyObject* make_cache;  // gives a scheduler its cache; returns None for an object that is no such scheduler
    int scales;            // the method scales the model's input, with the arguments sample and timestep
};

CachedStepMethod* as_method(PyObject* self) { return reinterpret_cast<CachedStepMethod*>(self); }

PyObject* call(PyObject* self, PyObject* const* objects, size_t flagged, PyObject* keywords) {
    HANDLE_TH_ERRORS
    static PyObject* const cache_name = PyUnicode_InternFromString("_fused");
    const CachedStepMethod* method = as_method(self);
    const Py_ssize_t positional = PyVectorcall_NARGS(flagged);
    SchedulerCall call;
    if (positional > 0) {
        const py::object attributes = own(PyObject_GenericGetDict(objects[0], nullptr));
        py::object held = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(attributes.ptr(), cache_name));
        StepCache* cache = step_cache_of(held.ptr());
        if (cache != nullptr) cache->last_miss_epoch = -1;
        bool known = false;
        if (method->scales == 0) {
            known = call.read(method->arguments, objects, positional, keywords);
        } else if (positional == 3 && keywords == nullptr) {
            call.required = {objects[1], objects[2], objects[1]};
            known = true;
        }
        if (known) {
            if (cache == nullptr) {
                held = own(PyObject_CallOneArg(method->make_cache, objects[0]));
                cache = step_cache_of(held.ptr());
            }
            py::object result;
            if (cache != nullptr && method->scales != 0)
                result = cache->try_scaling(objects[0], attributes.ptr(), method->name, call);
            else if (cache != nullptr)
                result = cache->try_next_step(objects[0], attributes.ptr(), method->name, call);
            if (cache != nullptr && method->scales == 0 && result.ptr() == nullptr)
                result = cache->try_first_step(objects[0], attributes.ptr(), method->name, /*scales=*/false, call);
            if (result.ptr() != nullptr) return result.release().ptr();
        }
    }
    return PyObject_Vectorcall(method->fallback, objects, flagged, keywords);
    END_HANDLE_TH_ERRORS
}

PyObject* new_method(PyTypeObject* type, PyObject* args, PyObject* /*kwargs*/) {
    PyObject *name = nullptr, *fallback = nullptr, *arguments = nullptr, *make_cache = nullptr;
    int scales = 0;
    if (PyArg_ParseTuple(args, "UOO!O|p:CachedStepMethod", &name, &fallback, &PyTuple_Type, &arguments, &make_cache,
                         &scales) == 0)
        return nullptr;
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    CachedStepMethod* method = as_method(self);
    method->vectorcall = &call;
    method->name = Py_NewRef(name);
    PyUnicode_InternInPlace(&method->name);
    method->fallback = Py_NewRef(fallback);
    method->arguments = Py_NewRef(arguments);
    method->make_cache = Py_NewRef(make_cache);
    method->scales = scales;
    return self;
}

int traverse_method(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(as_method(self)->attributes);
    Py_VISIT(as_method(self)->fallback);
    Py_VISIT(as_method(self)->make_cache);
    return 0;
}

int clear_method(PyObject* self) {
    Py_CLEAR(as_method(self)->attributes);
    Py_CLEAR(as_method(self)->fallback);
    Py_CLEAR(as_method(self)->make_cache);
    return 0;
}

void dealloc_method(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(as_method(self)->name);
    Py_XDECREF(as_method(self)->arguments);
    clear_method(self);
    type->tp_free(self);
    Py_DECREF(type);
}

}  // namespace

void define_cached_step_method(py::module_& m) {
    static PyMemberDef members[] = {
        {"__dictoffset__", T_PYSSIZET, offsetof(CachedStepMethod, attributes), READONLY, nullptr},
        {"__vectorcalloffset__", T_PYSSIZET, offsetof(CachedStepMethod, vectorcall), READONLY, nullptr},
        {nullptr, 0, 0, 0, nullptr},
    };
    static PyGetSetDef properties[] = {
        {"__dict__", &PyObject_GenericGetDict, &PyObject_GenericSetDict, nullptr, nullptr},
        {nullptr, nullptr, nullptr, nullptr, nullptr},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(&new_method)},
        {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
        {Py_tp_traverse, reinterpret_cast<void*>(&traverse_method)},
        {Py_tp_clear, reinterpret_cast<void*>(&clear_method)},
        {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc_method)},
        {Py_tp_getset, properties},
        {Py_tp_members, members},
        {0, nullptr},
    };
    static PyType_Spec spec = {"fastdiff._C.CachedStepMethod", sizeof(CachedStepMethod), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, slots};
    m.attr("CachedStepMethod") = own(PyType_FromSpec(&spec));
}

}  // namespace fastdiff::dropin
