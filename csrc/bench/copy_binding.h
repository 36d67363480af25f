// SPDX-License-Identifier: MIT
// Binding of the copy that benchmarks measure bandwidth with; the library does not call it.
#pragma once

#include <ATen/Parallel.h>

#include "../bindings/common.h"

namespace fastdiff::bindings {

// Bytes up to which one thread copies alone: the step's bound in float32, so that the two compare.
constexpr int64_t kCopyGrain = 262144;
constexpr int64_t kCacheLine = 64;

// Copy 2-D tensors row by row, or a 1-D tensor as one row, each row shared among torch's threads. Rows may be the same
// memory (an expanded tensor): one call then repeats the copy, and the cost of the call counts little.
inline void copy_kernel(const at::Tensor& src, const at::Tensor& dst, bool nontemporal) {
    const auto rows_of_bytes = [](const at::Tensor& tensor) {
        return tensor.is_cpu() && is_plain_eager(tensor) && storage_covers(tensor) &&
               (tensor.dim() == 1 || tensor.dim() == 2) && (tensor.size(-1) <= 1 || tensor.stride(-1) == 1);
    };
    TORCH_CHECK_VALUE(
        rows_of_bytes(src) && rows_of_bytes(dst),
        "_copy_kernel: src or dst is laid out otherwise, expected 1-D or 2-D CPU tensors with dense rows; "
        "pass contiguous ones");
    TORCH_CHECK_VALUE(src.sizes() == dst.sizes() && src.scalar_type() == dst.scalar_type(),
                      "_copy_kernel: dst has shape ", dst.sizes(), " and ", dst.scalar_type(), ", expected ",
                      src.sizes(), " and ", src.scalar_type(), " like src; make it with torch.empty_like");
    const auto copy_range = cpu_build.copy_range;
    const bool many = src.dim() == 2;
    const int64_t rows = many ? src.size(0) : 1;
    const int64_t item = static_cast<int64_t>(src.element_size());
    const int64_t bytes = src.size(-1) * item;
    if (bytes == 0) return;  // what is empty may have no address
    const char* from = static_cast<const char*>(src.const_data_ptr());
    char* to = static_cast<char*>(dst.data_ptr());
    const int64_t from_stride = many ? src.stride(0) * item : 0, to_stride = many ? dst.stride(0) * item : 0;

    py::gil_scoped_release release;
    for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
        if (bytes <= kCopyGrain) {
            copy_range(from, to, bytes, nontemporal);
            continue;
        }
        // In whole cache lines, so that threads share none.
        const int64_t lines = (bytes + kCacheLine - 1) / kCacheLine;
        at::parallel_for(0, lines, kCopyGrain / kCacheLine, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * kCacheLine, last = std::min(end * kCacheLine, bytes);
            copy_range(from + first, to + first, last - first, nontemporal);
        });
    }
}

}  // namespace fastdiff::bindings
