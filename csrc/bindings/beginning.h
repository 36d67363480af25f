// SPDX-License-Identifier: MIT
// How a scheduler stood, by value, before the first step of a loop, and what that step was called with: `set_timesteps`
// makes new tensors each time, but mostly of the same numbers, and then the plan is the one that it was.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "simple_step.h"
#include "watch.h"

namespace fastdiff::bindings {

// Whether two plain values (None, bool, int, float, str, or a list or tuple of such) are equal and of one type; in a
// list, `...` stands for any tensor. Nobody's code is run, so no other thread comes between.
inline bool equal_plain(PyObject* a, PyObject* b) {
    if (a == b) return true;
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyFloat_Check(a)) return PyFloat_AS_DOUBLE(a) == PyFloat_AS_DOUBLE(b);
    if (PyLong_CheckExact(a) || PyUnicode_CheckExact(a)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
    if (!PyList_CheckExact(a) && !PyTuple_Check(a)) return false;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(a);
    if (PySequence_Fast_GET_SIZE(b) != size) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject *kept = PySequence_Fast_GET_ITEM(a, i), *now = PySequence_Fast_GET_ITEM(b, i);
        if (kept == Py_Ellipsis ? !THPVariable_Check(now) : !equal_plain(kept, now)) return false;
    }
    return true;
}

// Whether a tensor's sizes are numbers that lie in it, and no questions to somebody's code.
inline bool sized(const at::Tensor& tensor) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    return !impl->has_symbolic_sizes_strides() && !impl->is_python_dispatch() && !tensor.is_nested();
}

inline bool same_kind(MaybeTensor tensor, at::ScalarType type, const std::vector<int64_t>& sizes) {
    return tensor != nullptr && tensor->scalar_type() == type && sized(*tensor) && tensor->sizes() == sizes;
}

inline py::object interned(const py::handle& name) {
    PyObject* string = Py_NewRef(name.ptr());
    PyUnicode_InternInPlace(&string);
    return py::reinterpret_steal<py::object>(string);
}

// An array that lies in order; not `good` for any other.
struct Buffer {
    explicit Buffer(PyObject* array) : good(PyObject_GetBuffer(array, &view, PyBUF_ND | PyBUF_FORMAT) == 0) {
        if (!good) PyErr_Clear();
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (good) PyBuffer_Release(&view);
    }

    Py_buffer view{};
    bool good;
};

// An attribute as it was (`Kept` in fastdiff/diffusers/schedule.py).
class KeptAttribute {
  public:
    enum How : int { kOwner, kSame, kEqual, kTensor, kArray, kLike, kNotRead };

    // `item` is a tuple (name, how, value, version, contents).
    explicit KeptAttribute(const py::tuple& item)
        : name(interned(item[0])), value(item[2]), how(static_cast<How>(item[1].cast<int>())) {
        if (how < kTensor || how == kNotRead) return;
        version_ = item[3].cast<int64_t>();
        contents_ = item[4].cast<py::bytes>();
        if (how != kArray) {
            const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
            type_ = tensor.scalar_type();
            sizes_ = tensor.sizes().vec();
            if (how == kLike) value = py::none();  // a tensor of one loop is not kept for the next
        } else if (const Buffer buffer(value.ptr()); buffer.good) {
            format_ = buffer.view.format;
            sizes_.assign(buffer.view.shape, buffer.view.shape + buffer.view.ndim);
        }
    }

    bool fits(PyObject* now, PyObject* owner) const {
        switch (how) {
            case kOwner:
                return now == owner;
            case kSame:
                return now == value.ptr();
            case kEqual:
                return equal_plain(value.ptr(), now);
            case kTensor:
                return fits_tensor(now);
            case kArray:
                return fits_array(now);
            case kLike:
                return same_kind(tensor_in(now), type_, sizes_);
            case kNotRead:
                return true;
        }
        return false;
    }

    py::object name, value;
    How how;

  private:
    bool fits_tensor(PyObject* now) const {
        const MaybeTensor tensor = tensor_in(now);
        if (tensor == nullptr) return false;
        // On the CPU the numbers are compared, for there are ways to write them that nobody counts.
        if (now == value.ptr() && !tensor->is_cpu() && !tensor->is_inference() && tensor->_version() == version_)
            return true;
        if (!same_kind(tensor, type_, sizes_) || !tensor->is_cpu()) return false;
        if (!ordinary(*tensor) || !tensor->is_contiguous() || !backed(*tensor, tensor->numel())) return false;
        return holds(tensor->const_data_ptr(), tensor->nbytes());
    }

    bool fits_array(PyObject* now) const {
        if (format_.empty() || Py_TYPE(now) != Py_TYPE(value.ptr())) return false;
        const Buffer buffer(now);
        const Py_buffer& view = buffer.view;
        if (!buffer.good || format_ != view.format || static_cast<size_t>(view.ndim) != sizes_.size()) return false;
        return std::equal(sizes_.begin(), sizes_.end(), view.shape) && holds(view.buf, static_cast<size_t>(view.len));
    }

    // Whether so many bytes are the contents.
    bool holds(const void* memory, size_t bytes) const {
        if (bytes != static_cast<size_t>(PyBytes_GET_SIZE(contents_.ptr()))) return false;
        return bytes == 0 || std::memcmp(memory, PyBytes_AS_STRING(contents_.ptr()), bytes) == 0;
    }

    int64_t version_ = 0;
    py::object contents_;
    std::string format_;
    at::ScalarType type_ = at::kFloat;
    std::vector<int64_t> sizes_;
};

// An argument as it was.
class KeptArgument {
  public:
    enum How : int { kEqual, kLike, kMoving, kAny };

    // `item` is a tuple (name, how, value, place).
    explicit KeptArgument(const py::tuple& item) : name(interned(item[0])), how(static_cast<How>(item[1].cast<int>())) {
        if (how == kEqual) value = item[2];
        if (how != kLike && how != kMoving) return;
        const at::Tensor& tensor = THPVariable_Unpack(py::object(item[2]).ptr());
        type_ = tensor.scalar_type();
        sizes_ = tensor.sizes().vec();
        if (how == kMoving) place_ = item[3].cast<int64_t>();
    }

    // `first` is where the timesteps lie, `step_bytes` how far apart.
    bool fits(PyObject* now, const char* first, int64_t step_bytes) const {
        if (how == kAny) return true;
        if (how == kEqual) return equal_plain(value.ptr(), now);
        const MaybeTensor tensor = tensor_in(now);
        if (!same_kind(tensor, type_, sizes_)) return false;
        if (how == kLike) return true;
        const bool one = tensor->numel() == 1 || (tensor->dim() == 1 && tensor->stride(0) == 0);
        return one && ordinary(*tensor) && tensor->const_data_ptr() == first + place_ * step_bytes;
    }

    py::object name;
    How how;
    py::object value;

  private:
    at::ScalarType type_ = at::kFloat;
    std::vector<int64_t> sizes_;
    int64_t place_ = 0;
};

class Beginning {
  public:
    // `found` is a tuple (plan, the scheduler's class, method, guided, seeded, attributes, arguments, schedule,
    // step_bytes, reads); of the attributes one is `timesteps`, a tensor.
    explicit Beginning(const py::tuple& found)
        : plan(found[0]),
          program(plan.attr("native").cast<Program*>()),
          schedule(found[7]),
          step_bytes(found[8].cast<int64_t>()),
          reads(found[9]),
          type_(found[1]),
          method_(interned(found[2])),
          guided_(found[3].cast<bool>()),
          seeded_(found[4].cast<bool>()) {
        for (const py::handle item : found[5]) attributes_.emplace_back(item.cast<py::tuple>());
        for (const py::handle item : found[6]) arguments.emplace_back(item.cast<py::tuple>());
        version_ = class_version(reinterpret_cast<PyTypeObject*>(type_.ptr()));
    }

    // Whether a scheduler stands as it did then, and is called as it was.
    bool fits(PyObject* scheduler, PyObject* now, PyObject* owner, PyObject* name, bool seeded,
              const StepCall& call) const {
        static PyObject* const timesteps_name = PyUnicode_InternFromString("timesteps");
        if (reinterpret_cast<PyObject*>(Py_TYPE(scheduler)) != type_.ptr() || name != method_.ptr()) return false;
        if (version_ == 0 || class_version(Py_TYPE(scheduler)) != version_ || epoch_ != reads_epoch) return false;
        if (seeded != seeded_ || (call.uncond != Py_None) != guided_) return false;
        if (static_cast<size_t>(PyDict_GET_SIZE(now)) != attributes_.size()) return false;
        if (arguments.size() != call.arguments.size() + call.count) return false;
        const char* first = nullptr;
        size_t count = 0;
        Py_ssize_t at = 0;
        PyObject *key = nullptr, *value = nullptr;
        while (PyDict_Next(now, &at, &key, &value) != 0) {
            const KeptAttribute& kept = attributes_[count++];
            if (key != kept.name.ptr() || !kept.fits(value, owner)) return false;
            if (key == timesteps_name && kept.how == KeptAttribute::kTensor)
                first = static_cast<const char*>(THPVariable_Unpack(value).const_data_ptr());
        }
        const KeptArgument* argument = arguments.data();
        for (PyObject* given : call.arguments)
            if (!argument++->fits(given, first, step_bytes)) return false;
        for (size_t i = 0; i < call.count; ++i, ++argument)
            if (call.more[i].first != argument->name.ptr() || !argument->fits(call.more[i].second, first, step_bytes))
                return false;
        return true;
    }

    // Of a scheduler that fits, its tensors of scalars and how often each has been written.
    std::vector<std::pair<at::Tensor, int64_t>> versions(PyObject* now) const {
        std::vector<std::pair<at::Tensor, int64_t>> found;
        size_t count = 0;
        Py_ssize_t at = 0;
        PyObject *key = nullptr, *value = nullptr;
        while (PyDict_Next(now, &at, &key, &value) != 0) {
            if (attributes_[count++].how != KeptAttribute::kTensor) continue;
            const at::Tensor& tensor = THPVariable_Unpack(value);
            if (!tensor.is_inference()) found.emplace_back(tensor, tensor._version());
        }
        return found;
    }

    // What the garbage collector has to see.
    int traverse(visitproc visit, void* arg) const {
        Py_VISIT(plan.ptr());
        Py_VISIT(schedule.ptr());
        Py_VISIT(type_.ptr());
        Py_VISIT(reads.ptr());
        for (const KeptAttribute& attribute : attributes_) Py_VISIT(attribute.value.ptr());
        for (const KeptArgument& argument : arguments) Py_VISIT(argument.value.ptr());
        return 0;
    }

    py::object plan;
    Program* program;  // the plan's own
    py::object schedule;
    int64_t step_bytes;
    py::object reads;
    std::vector<KeptArgument> arguments;

  private:
    py::object type_, method_;
    bool guided_, seeded_;
    unsigned int version_ = 0;
    int64_t epoch_ = reads_epoch;
    std::vector<KeptAttribute> attributes_;
};

}  // namespace fastdiff::bindings
