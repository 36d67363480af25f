// SPDX-License-Identifier: MIT
// The bindings of the Gram matrix. Like those of the reductions they run calls whose samples are blocks of memory and
// return None for any other, which fastdiff/ops/gram.py checks and copies.
#pragma once

#include <array>

#include "current_stream.h"
#include "reduce.h"

namespace fastdiff::bindings {

// The tensors of a call, held while the GIL is released, and its arguments without results.
struct GramCall {
    std::array<at::Tensor, kMostGram> tensors;
    GramArgs args{};

    int64_t blocks() const { return blocks_of(args.inner); }
    int64_t partials() const { return args.batch * blocks() * gram_parts(args.count, args.sums); }
    int64_t columns() const { return args.count + (args.sums ? 1 : 0); }
};

// Read a list or tuple of tensors into a call; false where it is for fastdiff/ops/gram.py to check and copy.
inline bool read_gram(py::handle tensors, bool sums, GramCall& call) {
    if (!PyList_CheckExact(tensors.ptr()) && !PyTuple_CheckExact(tensors.ptr())) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(tensors.ptr());
    if (count < 2 || count > kMostGram) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* const item = PySequence_Fast_GET_ITEM(tensors.ptr(), i);
        if (!THPVariable_Check(item)) return false;
        call.tensors[static_cast<size_t>(i)] = THPVariable_Unpack(item);
    }
    const at::Tensor& x = call.tensors[0];
    if (!samples_are_blocks(x)) return false;
    call.args.dtype = *dtype_of(x.scalar_type());
    call.args.batch = x.size(0);
    call.args.inner = x.numel() / call.args.batch;
    call.args.count = static_cast<int>(count);
    call.args.sums = sums;
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
        const at::Tensor& y = call.tensors[i];
        if (!is_plain_eager(y) || y.scalar_type() != x.scalar_type() || y.device() != x.device() ||
            y.sizes() != x.sizes() || y.strides() != x.strides() || !storage_covers(y))
            return false;
        call.args.x[i] = y.const_data_ptr();
    }
    return true;
}

// Run a call on the CPU into `args.out`.
inline void run_gram_on_cpu(GramCall& call) {
    GramArgs& args = call.args;
    const int64_t blocks = call.blocks();
    const CpuPartials partials(call.partials());
    args.partials = partials.get();
    const auto run = [&] {
        share(args.batch * blocks, std::min<int64_t>(args.inner, kBlock) * args.count,
              [&](int64_t begin, int64_t end) { cpu_build.gram_blocks(args, begin, end); });
        share(args.batch, blocks * gram_parts(args.count, args.sums),
              [&](int64_t begin, int64_t end) { cpu_build.finish_gram(args, begin, end); });
    };
    if (args.batch * args.inner * args.count <= kReduceGrain) return run();
    py::gil_scoped_release release;
    run();
}

// Return the matrix [B, K, K], or with `sums` the joined tensor [B, K, K + 1], whose last column holds the sums; with
// `split` its two views (G, s) in place of it, since slices that Python takes cost as much as a small reduction.
inline py::object gram(py::handle tensors, bool sums, bool split) {
    GramCall call;
    if (!read_gram(tensors, sums, call)) return py::none();
    const at::Tensor& x = call.tensors[0];
    const auto compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor out = at::empty({call.args.batch, call.args.count, call.columns()}, x.options().dtype(compute));
    call.args.out = out.data_ptr();
    const auto result = [&]() -> py::object {
        if (!sums || !split) return py::cast(out);
        const at::AutoDispatchBelowADInplaceOrView guard;  // autograd need not track views of a new tensor
        return py::make_tuple(out.narrow(2, 0, call.args.count), out.select(2, call.args.count));
    };
    if (x.is_cpu()) {
        run_gram_on_cpu(call);
        return result();
    }
#ifdef FASTDIFF_CUDA
    const at::Tensor partials = at::empty({call.partials()}, out.options());
    call.args.partials = partials.data_ptr();
    const char* error = launch_gram(call.args, x.get_device(), current_stream(x));
    if (error != nullptr) throw std::runtime_error(std::string("gram: the CUDA launch failed: ") + error);
    return result();
#else
    return py::none();
#endif
}

template <typename C>
py::list nested(const C* numbers, int64_t batch, int64_t count) {
    py::list found(batch);
    for (int64_t b = 0; b < batch; ++b) {
        py::list matrix(count);
        for (int64_t i = 0; i < count; ++i) {
            py::list row(count);
            for (int64_t j = 0; j < count; ++j) row[j] = static_cast<double>(*numbers++);
            matrix[i] = row;
        }
        found[b] = matrix;
    }
    return found;
}

// Return the matrices of tensors on the CPU as a list of K lists a sample: formulas of a few scalars run on floats.
inline py::object host_gram(py::handle tensors) {
    GramCall call;
    if (!read_gram(tensors, false, call) || !call.tensors[0].is_cpu()) return py::none();
    const CpuPartials out(call.args.batch * call.args.count * call.args.count);
    call.args.out = out.get();
    run_gram_on_cpu(call);
    if (call.args.dtype == DType::kFloat64)
        return nested(static_cast<const double*>(out.get()), call.args.batch, call.args.count);
    return nested(static_cast<const float*>(out.get()), call.args.batch, call.args.count);
}

inline void define_gram(py::module_& m) {
    m.def("gram", torch::wrap_pybind_function(gram),
          "All scalar products of a few tensors a sample; None where samples are no blocks of memory.");
    m.def("host_gram", torch::wrap_pybind_function(host_gram),
          "The same of tensors on the CPU, as nested lists; None for others too.");
}

}  // namespace fastdiff::bindings
