// SPDX-License-Identifier: MIT
// Predicates of tensors that every binding shares.
//
// Light: no torch/extension.h. This file and the others here that say so are what csrc/dropin/ may include,
// beside headers of ATen/core, ATen/ops, c10 and torch/csrc/{Dtype,Exceptions,Generator}.h and
// torch/csrc/autograd/python_variable.h. Everything that these headers define is inline.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "../cpu/cpu.h"

namespace fastdiff::bindings {

// Null where the caller gave None.
using MaybeTensor = const at::Tensor*;

// Elements up to which one thread works alone. Measured (DDIM with guidance, float32, a 2-core EPYC): 65536 elements
// take 9 µs on one thread, 98304 take 16 on one and 9 on two.
constexpr int64_t kGrain = 65536;
// The same where noise is drawn: at a nanosecond for two of them, waking another costs as much.
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

// Return the scalar type of a torch.dtype.
inline at::ScalarType scalar_type_of(PyObject* dtype) { return reinterpret_cast<THPDtype*>(dtype)->scalar_type; }

// Return whether a tensor is strided memory that may be read as it is: no wrapper of a tracer or of torch.func.
inline bool in_memory(const at::Tensor& tensor) {
    constexpr c10::DispatchKeySet kSpecial(
        {c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor,
         c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    return !impl->key_set().has_any(kSpecial) && impl->layout() == at::kStrided;
}

// Return whether autograd records what reads a tensor, in reverse or in forward mode.
inline bool recorded_by_autograd(const at::Tensor& tensor) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (impl->autograd_meta() == nullptr) return false;  // the usual case
    return (impl->requires_grad() && at::GradMode::is_enabled()) || tensor._fw_grad(0).defined();
}

// Return whether a kernel may read the tensor's memory without anything of torch missing it.
inline bool is_plain_eager(const at::Tensor& tensor) { return in_memory(tensor) && !recorded_by_autograd(tensor); }

// Return whether the storage holds `count` elements from the tensor's first on. Storage may have been freed or resized
// behind the tensor's back, and under functionalization there is a storage of the right size without memory. A tensor
// without storage of its own raises when its data is asked for.
inline bool storage_covers(const at::Tensor& tensor, int64_t count) {
    const at::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
    if (!storage) return true;
    const size_t needed = static_cast<size_t>(tensor.storage_offset() + count) * tensor.element_size();
    return needed <= storage.nbytes() && storage.data() != nullptr;
}

// Return whether the storage reaches the tensor's last element, whatever its strides.
inline bool storage_covers(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return true;
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    return storage_covers(tensor, last + 1);
}

// Record a write in place, so that autograd finds a changed tensor that it has saved. Inference tensors have no
// counter.
inline void bump_version(const at::Tensor& tensor) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// Return whether this build has C++ kernels for the tensor's device.
inline bool on_served_device(const at::Tensor& tensor) {
#ifdef FASTDIFF_CUDA
    return tensor.is_cpu() || tensor.is_cuda();
#else
    return tensor.is_cpu();
#endif
}

}  // namespace fastdiff::bindings
