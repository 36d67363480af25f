// SPDX-License-Identifier: MIT
#include "guards.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "../bindings/tensors.h"

namespace fastdiff::dropin {

using bindings::in_memory;
using bindings::is_plain_eager;
using bindings::scalar_type_of;
using bindings::storage_covers;

namespace {

// A buffer in C order; not `valid` for any other object.
struct Buffer {
    explicit Buffer(PyObject* array) : valid(PyObject_GetBuffer(array, &view, PyBUF_ND | PyBUF_FORMAT) == 0) {
        if (!valid) PyErr_Clear();
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (valid) PyBuffer_Release(&view);
    }

    Py_buffer view{};
    bool valid;
};

bool equal_items(PyObject* expected, PyObject* value) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(expected);
    if (PySequence_Fast_GET_SIZE(value) != size) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject *a = PySequence_Fast_GET_ITEM(expected, i), *b = PySequence_Fast_GET_ITEM(value, i);
        if (a == Py_Ellipsis ? !THPVariable_Check(b) : !equal_plain(a, b)) return false;
    }
    return true;
}

bool equal_dicts(PyObject* expected, PyObject* value) {
    if (PyDict_GET_SIZE(expected) != PyDict_GET_SIZE(value)) return false;
    Py_ssize_t at = 0, other_at = 0;
    PyObject *key = nullptr, *item = nullptr, *other_key = nullptr, *other = nullptr;
    while (PyDict_Next(expected, &at, &key, &item) != 0)
        if (PyDict_Next(value, &other_at, &other_key, &other) == 0 || !equal_plain(key, other_key) ||
            !equal_plain(item, other))
            return false;
    return true;
}

// The tensor in an object, a `torch.Tensor` or a `Parameter`; null for any other. A subclass may answer for its sizes
// by code of its own.
const at::Tensor* as_plain_tensor(PyObject* object) {
    if (!THPVariable_CheckExact(object)) return nullptr;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    const bool plain = !impl->has_symbolic_sizes_strides() && !impl->is_python_dispatch() && !tensor.is_nested();
    return plain ? &tensor : nullptr;
}

std::vector<int64_t> sizes_of(const py::handle& shape) {
    std::vector<int64_t> sizes;
    for (const py::handle size : shape) sizes.push_back(size.cast<int64_t>());
    return sizes;
}

}  // namespace

py::object own(PyObject* object) {
    if (object == nullptr) throw python_error();
    return py::reinterpret_steal<py::object>(object);
}

py::object interned(const py::handle& name) {
    PyObject* string = Py_NewRef(name.ptr());
    PyUnicode_InternInPlace(&string);
    return py::reinterpret_steal<py::object>(string);
}

unsigned int class_version(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030D0000
    if ((type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG) == 0) return 0;
#endif
    return type->tp_version_tag;
}

bool equal_plain(PyObject* expected, PyObject* value) {
    if (expected == value) return true;
    if (Py_TYPE(expected) != Py_TYPE(value)) return false;
    if (PyFloat_Check(expected)) return PyFloat_AS_DOUBLE(expected) == PyFloat_AS_DOUBLE(value);
    if (PyLong_CheckExact(expected) || PyUnicode_CheckExact(expected))
        return PyObject_RichCompareBool(expected, value, Py_EQ) == 1;
    if (PyList_CheckExact(expected) || PyTuple_Check(expected)) return equal_items(expected, value);
    return PyDict_Check(expected) && equal_dicts(expected, value);
}

Guard::Guard(const py::handle& record) {
    const auto fields = py::cast<py::tuple>(record);
    name = interned(fields[0]);
    kind = static_cast<GuardKind>(fields[1].cast<int>());
    const py::object expected = fields[2];
    switch (kind) {
        case GuardKind::kAny:
            break;
        case GuardKind::kId:
        case GuardKind::kEquals:
            expected_ = expected;
            break;
        case GuardKind::kTensor:
        case GuardKind::kTimestep: {
            const auto tensor = py::cast<py::tuple>(expected);
            type_ = scalar_type_of(py::object(tensor[0]).ptr());
            sizes_ = sizes_of(tensor[1]);
            if (kind == GuardKind::kTimestep) offset_ = tensor[2].cast<std::ptrdiff_t>();
            break;
        }
        case GuardKind::kArray: {
            // (the class, a torch.dtype or a buffer format, shape, bytes)
            const auto array = py::cast<py::tuple>(expected);
            const py::object format = array[1];
            if (PyUnicode_Check(format.ptr())) {
                array_type_ = array[0];
                format_ = format.cast<std::string>();
            } else {
                type_ = scalar_type_of(format.ptr());
            }
            sizes_ = sizes_of(array[2]);
            expected_ = array[3];
            break;
        }
    }
}

HostCopies read_host_copies(const py::handle& copies) {
    HostCopies found;
    for (const py::handle copy : copies)
        found.push_back({THPVariable_Unpack(copy.attr("tensor").ptr()), copy.attr("version").cast<int64_t>(),
                         py::object(copy.attr("record"))[py::int_(3)]});
    return found;
}

bool Guard::check(PyObject* value, const void* timestep, const HostCopies& copies) const {
    switch (kind) {
        case GuardKind::kAny:
            return true;
        case GuardKind::kId:
            return value == expected_.ptr();
        case GuardKind::kEquals:
            return equal_plain(expected_.ptr(), value);
        case GuardKind::kArray:
            return check_array(value, copies);
        case GuardKind::kTensor:
        case GuardKind::kTimestep: {
            const at::Tensor* tensor = as_plain_tensor(value);
            if (tensor == nullptr || tensor->scalar_type() != type_ || tensor->sizes() != sizes_) return false;
            if (kind == GuardKind::kTensor) return true;
            const bool one = tensor->numel() == 1 || (tensor->dim() == 1 && tensor->stride(0) == 0);
            return one && timestep != nullptr && in_memory(*tensor) &&
                   tensor->const_data_ptr() == static_cast<const char*>(timestep) + offset_;
        }
    }
    return false;
}

bool Guard::check_array(PyObject* value, const HostCopies& copies) const {
    const auto expected = static_cast<size_t>(PyBytes_GET_SIZE(expected_.ptr()));
    const auto holds = [&](const void* memory, size_t bytes) {
        return bytes == expected && (bytes == 0 || std::memcmp(memory, PyBytes_AS_STRING(expected_.ptr()), bytes) == 0);
    };
    if (array_type_.ptr() == nullptr) {
        const at::Tensor* tensor = as_plain_tensor(value);
        if (tensor == nullptr || tensor->scalar_type() != type_ || tensor->sizes() != sizes_ || tensor->is_conj() ||
            !is_plain_eager(*tensor) || !tensor->is_contiguous())
            return false;
        if (tensor->is_cpu())
            return (tensor->numel() == 0 || storage_covers(*tensor, tensor->numel())) &&
                   holds(tensor->const_data_ptr(), tensor->nbytes());
        const auto copy = std::find_if(copies.begin(), copies.end(), [&](const HostCopy& each) {
            return each.tensor.is_same(*tensor) && each.version == tensor->_version();
        });
        return copy != copies.end() &&
               holds(PyBytes_AS_STRING(copy->bytes.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(copy->bytes.ptr())));
    }
    if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != array_type_.ptr()) return false;
    const Buffer buffer(value);
    const Py_buffer& view = buffer.view;
    if (!buffer.valid || format_ != view.format || static_cast<size_t>(view.ndim) != sizes_.size()) return false;
    return std::equal(sizes_.begin(), sizes_.end(), view.shape) && holds(view.buf, static_cast<size_t>(view.len));
}

int Guard::traverse(visitproc visit, void* arg) const {
    Py_VISIT(expected_.ptr());
    Py_VISIT(array_type_.ptr());
    return 0;
}

std::vector<Guard> read_guards(const py::handle& records) {
    std::vector<Guard> guards;
    for (const py::handle record : records) guards.emplace_back(record);
    return guards;
}

bool check_arguments(const std::vector<Guard>& guards, const SchedulerCall& call, const void* timestep) {
    if (guards.size() != call.required.size() + call.num_extra) return false;
    const Guard* guard = guards.data();
    for (PyObject* value : call.required)
        if (!guard++->check(value, timestep)) return false;
    for (size_t i = 0; i < call.num_extra; ++i, ++guard)
        if (call.extra[i].first != guard->name.ptr() || !guard->check(call.extra[i].second, timestep)) return false;
    return true;
}

bool check_attributes(const std::vector<Guard>& guards, PyObject* attributes, const HostCopies& copies) {
    static PyObject* const cache = PyUnicode_InternFromString("_fused");
    size_t count = 0;
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(attributes, &at, &key, &value) != 0) {
        if (key == cache) continue;
        if (count == guards.size()) return false;
        const Guard& guard = guards[count++];
        if (key != guard.name.ptr() || !guard.check(value, nullptr, copies)) return false;
    }
    return count == guards.size();
}

void AttributeSnapshot::take(PyObject* attributes, PyObject* reads) {
    DeferredDecrefs dropped;
    size_t count = 0, lists = 0;
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    const auto size = static_cast<size_t>(PyDict_GET_SIZE(attributes));
    for (size_t i = size; i < values_.size(); ++i) {
        replace(&values_[i], nullptr, &dropped);
        replace(&keys_[i], nullptr, &dropped);
    }
    values_.resize(size);
    keys_.resize(size);
    while (PyDict_Next(attributes, &at, &key, &value) != 0) {
        replace(&keys_[count], key, &dropped);
        const bool read = PyDict_Contains(reads, key) == 1;
        replace(&values_[count++], read ? value : kNotRead, &dropped);
        if (!read || !PyList_Check(value)) continue;
        if (lists == lists_.size()) lists_.emplace_back();
        record_items(value, &lists_[lists++], &dropped);
    }
    for (size_t j = lists; j < lists_.size(); ++j)
        for (py::object& item : lists_[j].second) replace(&item, nullptr, &dropped);
    lists_.resize(lists);
}

bool AttributeSnapshot::update(PyObject* key, PyObject* value, DeferredDecrefs* dropped) {
    for (size_t i = 0; i < keys_.size(); ++i) {
        if (keys_[i].ptr() != key) continue;
        const py::object& before = values_[i];
        if (before.ptr() == kNotRead) return true;
        if (PyList_Check(value) || before.ptr() == nullptr || PyList_Check(before.ptr())) return false;
        replace(&values_[i], value, dropped);
        return true;
    }
    return false;
}

bool AttributeSnapshot::update_list(PyObject* list, DeferredDecrefs* dropped) {
    for (List& each : lists_)
        if (each.first == list) return record_items(list, &each, dropped), true;
    return false;
}

bool AttributeSnapshot::unchanged(PyObject* attributes) const {
    if (static_cast<size_t>(PyDict_GET_SIZE(attributes)) != values_.size()) return false;
    size_t count = 0;
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(attributes, &at, &key, &value) != 0) {
        PyObject* recorded = values_[count].ptr();
        if (keys_[count++].ptr() != key || (recorded != value && recorded != kNotRead)) return false;
    }
    for (const auto& [list, items] : lists_) {
        if (static_cast<size_t>(PyList_GET_SIZE(list)) != items.size()) return false;
        for (size_t i = 0; i < items.size(); ++i)
            if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)) != items[i].ptr()) return false;
    }
    return std::all_of(versions_.begin(), versions_.end(),
                       [](const auto& each) { return each.first._version() == each.second; });
}

void AttributeSnapshot::clear() {
    // Dropping a reference may run code; nothing is recorded here by then.
    const auto values = std::exchange(values_, {});
    const auto keys = std::exchange(keys_, {});
    const auto lists = std::exchange(lists_, {});
    versions_.clear();
}

int AttributeSnapshot::traverse(visitproc visit, void* arg) const {
    for (const py::object& value : values_) Py_VISIT(value.ptr());
    for (const auto& [list, items] : lists_)
        for (const py::object& item : items) Py_VISIT(item.ptr());
    return 0;
}

void AttributeSnapshot::replace(py::object* slot, PyObject* object, DeferredDecrefs* dropped) {
    if (slot->ptr() == object) return;
    dropped->push_back(std::exchange(*slot, py::reinterpret_borrow<py::object>(object)));
}

void AttributeSnapshot::record_items(PyObject* value, List* list, DeferredDecrefs* dropped) {
    auto& [recorded, items] = *list;
    recorded = value;
    const auto size = static_cast<size_t>(PyList_GET_SIZE(value));
    for (size_t i = size; i < items.size(); ++i) replace(&items[i], nullptr, dropped);
    items.resize(size);
    for (size_t i = 0; i < size; ++i) replace(&items[i], PyList_GET_ITEM(value, static_cast<Py_ssize_t>(i)), dropped);
}

}  // namespace fastdiff::dropin
