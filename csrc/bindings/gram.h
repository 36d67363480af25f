// SPDX-License-Identifier: MIT
// The binding of the Gram matrix. Like those of the reductions it runs calls whose samples are blocks of memory and
// returns None for any other, which fastdiff/ops/gram.py checks and copies.
#pragma once

#include "reduce.h"

namespace fastdiff::bindings {

inline py::object gram(const py::list& tensors, bool sums, int64_t stream) {
    const size_t count = tensors.size();
    if (count < 2 || count > kMostGram) return py::none();
    std::vector<at::Tensor> held;  // without the GIL another thread may empty the list
    for (const py::handle& item : tensors) {
        if (!THPVariable_Check(item.ptr())) return py::none();
        held.push_back(THPVariable_Unpack(item.ptr()));
    }
    const at::Tensor& x = held[0];
    if (!samples_are_blocks(x)) return py::none();
    GramArgs args{};
    args.dtype = *dtype_of(x.scalar_type());
    args.batch = x.size(0);
    args.inner = x.numel() / args.batch;
    args.count = static_cast<int>(count);
    args.sums = sums;
    for (size_t i = 0; i < count; ++i) {
        const at::Tensor& y = held[i];
        if (!is_plain_eager(y) || y.scalar_type() != x.scalar_type() || y.device() != x.device() ||
            y.sizes() != x.sizes() || y.strides() != x.strides() || !storage_covers(y))
            return py::none();
        args.x[i] = y.const_data_ptr();
    }
    const auto compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor out = at::empty({args.batch, args.count, args.count + (sums ? 1 : 0)}, x.options().dtype(compute));
    args.out = out.data_ptr();
    const int64_t blocks = blocks_of(args.inner), parts = args.batch * blocks * gram_parts(args.count, sums);
    if (x.is_cpu()) {
        const CpuPartials partials(parts);
        args.partials = partials.get();
        const auto run = [&] {
            share(args.batch * blocks, std::min<int64_t>(args.inner, kBlock) * args.count,
                  [&](int64_t begin, int64_t end) { cpu_build.gram_blocks(args, begin, end); });
            share(args.batch, blocks * gram_parts(args.count, sums),
                  [&](int64_t begin, int64_t end) { cpu_build.finish_gram(args, begin, end); });
        };
        if (x.numel() * args.count <= kReduceGrain) {
            run();
        } else {
            py::gil_scoped_release release;
            run();
        }
        return py::cast(out);
    }
#ifdef FASTDIFF_CUDA
    const at::Tensor partials = at::empty({parts}, out.options());
    args.partials = partials.data_ptr();
    const char* error = launch_gram(args, x.get_device(), reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("gram: the CUDA launch failed: ") + error);
    return py::cast(out);
#else
    (void)stream;
    return py::none();
#endif
}

inline void define_gram(py::module_& m) {
    m.def("gram", torch::wrap_pybind_function(gram),
          "All scalar products of a few tensors a sample; None where samples are no blocks of memory.");
}

}  // namespace fastdiff::bindings
