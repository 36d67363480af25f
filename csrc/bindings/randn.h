// SPDX-License-Identifier: MIT
// The binding of seeded normal numbers. Light: see tensors.h.
#pragma once

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <string>

#include "tensors.h"
#ifdef FASTDIFF_CUDA
#include "../cuda/randn_cuda.h"
#endif

namespace fastdiff::bindings {

// Fill a contiguous tensor [batch, ...]; fastdiff/ops/random.py has checked the arguments.
inline void randn(const at::Tensor& out, const at::Tensor& seeds, const std::optional<at::Tensor>& steps, int64_t step,
                  int64_t purpose, int64_t stream) {
    const int64_t batch = seeds.numel();
    TORCH_CHECK(dtype_of(out.scalar_type()).has_value() && on_served_device(out) && is_plain_eager(out) &&
                    out.is_contiguous() && storage_covers(out),
                "randn: out has to be a contiguous floating-point tensor on a device that the extension serves");
    for (const at::Tensor* tensor : {&seeds, steps.has_value() ? &*steps : &seeds})
        TORCH_CHECK(is_plain_eager(*tensor) && tensor->scalar_type() == at::kLong && tensor->is_contiguous() &&
                        storage_covers(*tensor) && tensor->device() == out.device(),
                    "randn: seeds and steps have to be contiguous int64 tensors on the device of out");
    const int64_t steps_given = steps.has_value() ? steps->numel() : 1;
    TORCH_CHECK(batch > 0 && out.numel() > 0 && out.numel() % batch == 0 && (steps_given == 1 || steps_given == batch),
                "randn: one seed a sample, and one step for all or one a sample, of at least one element");
    RandnArgs args{};
    args.batch = batch;
    args.inner = out.numel() / batch;
    args.draw = {seeds.const_data_ptr<int64_t>(),
                 steps.has_value() ? steps->const_data_ptr<int64_t>() : nullptr,
                 steps_given == 1 ? 0 : 1,
                 static_cast<uint32_t>(step),
                 static_cast<uint32_t>(purpose),
                 1,
                 1};
    args.out = out.data_ptr();
    args.dtype = *dtype_of(out.scalar_type());
    if (out.is_cpu()) {
        const pybind11::gil_scoped_release release;
        at::parallel_for(0, out.numel(), kDrawGrain,
                         [&](int64_t begin, int64_t end) { cpu_build.randn_range(args, begin, end); });
        return;
    }
#ifdef FASTDIFF_CUDA
    const char* error = launch_randn(args, out.get_device(), reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("randn: the CUDA launch failed: ") + error);
#else
    (void)stream;
#endif
}

}  // namespace fastdiff::bindings
