// SPDX-License-Identifier: MIT
// What the bindings share: which tensors the loops take as they are, and the Python objects of one call.
#pragma once

#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <array>
#include <optional>

#include "../cpu/cpu.h"

namespace fastdiff::bindings {

namespace py = pybind11;

// Null where the caller gave None.
using MaybeTensor = const at::Tensor*;

// Elements up to which one thread works alone where noise is drawn: at a nanosecond for two of them, waking another
// costs as much.
constexpr int64_t kDrawGrain = 16384;

// The build of the CPU loops that runs, chosen when the module loads.
inline CpuBuild cpu_build;

inline std::optional<DType> dtype_of(at::ScalarType type) {
    switch (type) {
        case at::kHalf:
            return DType::kFloat16;
        case at::kBFloat16:
            return DType::kBFloat16;
        case at::kFloat:
            return DType::kFloat32;
        case at::kDouble:
            return DType::kFloat64;
        default:
            return std::nullopt;
    }
}

// Of a torch.dtype.
inline at::ScalarType scalar_type_of(PyObject* dtype) { return reinterpret_cast<THPDtype*>(dtype)->scalar_type; }

// Whether a tensor is strided memory that may be read as it lies: no wrapper of a tracer or of torch.func.
inline bool in_memory(const at::Tensor& tensor) {
    constexpr c10::DispatchKeySet kSpecial(
        {c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor,
         c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    return !impl->key_set().has_any(kSpecial) && impl->layout() == at::kStrided;
}

// And nothing that autograd would have to see, in reverse or in forward mode.
inline bool ordinary(const at::Tensor& tensor) {
    if (!in_memory(tensor)) return false;
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (impl->autograd_meta() == nullptr) return true;  // the usual case
    return !(impl->requires_grad() && at::GradMode::is_enabled()) && !tensor._fw_grad(0).defined();
}

// Whether the storage holds `count` elements from the tensor's first on: it may have been freed or cut short behind the
// tensor's back, and under functionalization there is a storage of the right size without memory. What has no storage
// of its own says so itself when its data is asked for.
inline bool backed(const at::Tensor& tensor, int64_t count) {
    const at::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
    if (!storage) return true;
    const size_t needed = static_cast<size_t>(tensor.storage_offset() + count) * tensor.element_size();
    return needed <= storage.nbytes() && storage.data() != nullptr;
}

// Whether the storage reaches the tensor's last element, whatever its strides.
inline bool reached(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return true;
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    return backed(tensor, last + 1);
}

// Says that a tensor has been written in place. Inference tensors are not counted, and no graph saves them.
inline void count_change(const at::Tensor& tensor) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

inline bool served(const at::Tensor& sample) {
#ifdef FASTDIFF_CUDA
    return sample.is_cpu() || sample.is_cuda();
#else
    return sample.is_cpu();
#endif
}

// Whether nothing forces a backend in the context of this thread. `choice` is `fastdiff.ops.backends.forced`, a context
// variable that names the backend or holds None.
inline bool nothing_forced(PyObject* choice) {
    PyObject* name = nullptr;
    if (PyContextVar_Get(choice, nullptr, &name) != 0) throw python_error();
    const py::object held = py::reinterpret_steal<py::object>(name);
    return name == Py_None;
}

// The Python objects of one call, read in order. `good` turns false at the first of an unexpected type.
class Arguments {
  public:
    explicit Arguments(PyObject* const* objects) : next_(objects) {}

    PyObject* object() { return *next_++; }

    MaybeTensor tensor() { return tensor_of(object()); }

    // An int, of an enumeration too; a bool in an int's place is a mistake, for Python to name.
    int64_t integer() {
        PyObject* object = this->object();
        good = good && PyLong_Check(object) && !PyBool_Check(object);
        if (!good) return 0;
        int overflow = 0;
        const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
        good = overflow == 0;
        return value;
    }

    bool flag() {
        PyObject* object = this->object();
        good = good && PyBool_Check(object);
        return object == Py_True;
    }

    // Up to N tensors or None of a list or tuple; -1 for None in its place. With `types` also dtypes.
    template <size_t N>
    int64_t tensors(std::array<MaybeTensor, N>* to, std::array<at::ScalarType, N>* types = nullptr) {
        PyObject* object = this->object();
        if (object == Py_None) return -1;
        const bool list = PyList_CheckExact(object);
        good = good && (list || PyTuple_CheckExact(object));
        const Py_ssize_t size = good ? Py_SIZE(object) : 0;
        good = good && size <= static_cast<Py_ssize_t>(N);
        for (Py_ssize_t i = 0; good && i < size; ++i) {
            PyObject* item = list ? PyList_GET_ITEM(object, i) : PyTuple_GET_ITEM(object, i);
            if (types != nullptr && THPDtype_Check(item))
                (*types)[i] = scalar_type_of(item);
            else
                (*to)[i] = tensor_of(item);
        }
        return size;
    }

    bool good = true;

  private:
    MaybeTensor tensor_of(PyObject* object) {
        if (object == Py_None) return nullptr;
        good = good && THPVariable_Check(object);
        return good ? &THPVariable_Unpack(object) : nullptr;
    }

    PyObject* const* next_;
};

}  // namespace fastdiff::bindings
