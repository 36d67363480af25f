// SPDX-License-Identifier: MIT
#include "step_call.h"

#include <algorithm>

namespace fastdiff::bindings {

namespace {

enum Field : size_t {
#define FASTDIFF_FIELD(type, name, initial) k_##name,
    FASTDIFF_STEP_FIELDS(FASTDIFF_FIELD) FASTDIFF_LAUNCH_FIELDS(FASTDIFF_FIELD)
#undef FASTDIFF_FIELD
        kFields
};

constexpr std::array<const char*, kFields> kNames = {
#define FASTDIFF_NAME(type, name, initial) #name,
    FASTDIFF_STEP_FIELDS(FASTDIFF_NAME) FASTDIFF_LAUNCH_FIELDS(FASTDIFF_NAME)
#undef FASTDIFF_NAME
};

// The names as interned strings, kept for the life of the process.
const std::array<PyObject*, kFields>& interned_names() {
    static const std::array<PyObject*, kFields> names = [] {
        std::array<PyObject*, kFields> made{};
        for (size_t i = 0; i < kFields; ++i) made[i] = PyUnicode_InternFromString(kNames[i]);
        return made;
    }();
    return names;
}

// The field of a name; names mostly come in order, so the search begins at `expected`.
size_t field_of(PyObject* name, size_t expected) {
    const auto& names = interned_names();
    for (size_t i = expected; i < kFields; ++i)
        if (names[i] == name) return i;
    for (size_t i = 0; i < expected; ++i)
        if (names[i] == name) return i;
    for (size_t i = 0; i < kFields; ++i)  // a string put together at run time is not interned
        if (PyUnicode_CompareWithASCIIString(name, kNames[i]) == 0) return i;
    return kFields;
}

bool read(PyObject* object, MaybeTensor* to) {
    if (object == Py_None) return true;
    if (!THPVariable_Check(object)) return false;
    *to = &THPVariable_Unpack(object);
    return true;
}

// An int, of an enumeration too; a bool in an int's place is a mistake.
bool read(PyObject* object, int64_t* to) {
    if (!PyLong_Check(object) || PyBool_Check(object)) return false;
    int overflow = 0;
    *to = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0;
}

bool read(PyObject* object, bool* to) {
    *to = object == Py_True;
    return PyBool_Check(object);
}

bool read(PyObject* object, Counter* to) {
    if (!PyLong_CheckExact(object)) return object != Py_None && read(object, &to->tensor);
    return read(object, &to->value);
}

bool read(PyObject* object, Scale* to) {
    if (object == Py_None) return true;
    to->given = true;
    if (!PyFloat_Check(object) && !PyLong_CheckExact(object)) return read(object, &to->tensor);
    to->value = PyFloat_AsDouble(object);
    if (to->value != -1.0 || PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();  // an int beyond doubles
    return false;
}

// The items of a list or tuple of up to `most`; -1 for None and -2 for anything else.
Py_ssize_t items_of(PyObject* object, size_t most, PyObject* const** items) {
    if (object == Py_None) return -1;
    if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return -2;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
    *items = PySequence_Fast_ITEMS(object);
    return size <= static_cast<Py_ssize_t>(most) ? size : -2;
}

bool read(PyObject* object, HistorySlots* to) {
    PyObject* const* items = nullptr;
    const Py_ssize_t size = items_of(object, to->size(), &items);
    for (Py_ssize_t i = 0; i < size; ++i)
        if (!read(items[i], &(*to)[static_cast<size_t>(i)])) return false;
    return size != -2;
}

bool read(PyObject* object, Targets* to) {
    PyObject* const* items = nullptr;
    const Py_ssize_t size = items_of(object, to->tensors.size(), &items);
    to->given = size >= 0;
    to->count = size;
    for (Py_ssize_t i = 0; i < size; ++i) {
        const auto o = static_cast<size_t>(i);
        if (THPDtype_Check(items[i]))
            to->dtypes[o] = scalar_type_of(items[i]);
        else if (!read(items[i], &to->tensors[o]))
            return false;
    }
    return size != -2;
}

}  // namespace

bool read_step_call(PyObject* const* values, Py_ssize_t positional, PyObject* names, StepCall* call) {
    TORCH_CHECK_TYPE(positional == 0, "step: got ", positional, " positional arguments, expected keywords");
    const Py_ssize_t count = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    std::array<PyObject*, kFields> given{};
    size_t expected = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
        const size_t field = field_of(PyTuple_GET_ITEM(names, i), expected);
        TORCH_CHECK_TYPE(field < kFields, "step: got an unknown keyword '",
                         PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i)), "', expected a field of StepCall");
        given[field] = values[i];
        expected = field + 1;
    }
    bool good = true;
#define FASTDIFF_READ(type, name, initial) \
    if (given[k_##name] != nullptr) good = read(given[k_##name], &call->name) && good;
    FASTDIFF_STEP_FIELDS(FASTDIFF_READ)
    FASTDIFF_LAUNCH_FIELDS(FASTDIFF_READ)
#undef FASTDIFF_READ
    return good;
}

bool read_scale(PyObject* object, Scale* to) { return read(object, to); }

PyObject* step_field_names() {
    const auto& names = interned_names();
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(names.size()));
    if (tuple == nullptr) throw python_error();
    for (size_t i = 0; i < names.size(); ++i) PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), Py_NewRef(names[i]));
    return tuple;
}

}  // namespace fastdiff::bindings
