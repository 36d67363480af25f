// SPDX-License-Identifier: MIT
// The bindings of the reductions. They run calls whose samples are blocks of memory and return None for any other,
// which fastdiff/ops/reductions.py checks and copies.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common.h"
#ifdef FASTDIFF_CUDA
#include "../cuda/reduce.h"
#endif

namespace fastdiff::bindings {

// Elements up to which one thread works alone, and of one thread's share.
constexpr int64_t kReduceGrain = 65536;

// Return whether each sample of x is one block of memory, the samples one after another.
inline bool samples_are_blocks(const at::Tensor& x) {
    return is_plain_eager(x) && on_served_device(x) && x.dim() > 0 && x.numel() > 0 && storage_covers(x) &&
           x.is_non_overlapping_and_dense() && dtype_of(x.scalar_type()).has_value() &&
           (x.size(0) == 1 || x.stride(0) * x.size(0) >= x.numel());
}

inline at::Tensor one_per_sample(const at::Tensor& x) {
    return at::empty({x.size(0)}, x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

// Run `work(begin, end)` over `count` items of `elements` each: on this thread if there are few, else on torch's.
template <typename Work>
void share(int64_t count, int64_t elements, Work work) {
    if (count * elements <= kReduceGrain) return work(0, count);
    at::parallel_for(0, count, std::max<int64_t>(1, kReduceGrain / elements), work);
}

// Memory for partial results, on the stack for a small call.
class CpuPartials {
  public:
    explicit CpuPartials(int64_t count) {
        if (count > static_cast<int64_t>(few_.size())) many_.reset(new double[count]);
    }
    void* get() const { return many_ ? many_.get() : few_.data(); }

  private:
    mutable std::array<double, 192> few_;
    std::unique_ptr<double[]> many_;
};

inline py::object sum(int64_t kind, const at::Tensor& x, const std::optional<at::Tensor>& y, double correction,
                      int64_t stream) {
    if (!samples_are_blocks(x)) return py::none();
    if (kind < 0 || kind > static_cast<int64_t>(Sum::kDot) ||
        y.has_value() != (kind == static_cast<int64_t>(Sum::kDot)))
        return py::none();
    if (y.has_value() && (!is_plain_eager(*y) || !storage_covers(*y) || y->scalar_type() != x.scalar_type() ||
                          y->device() != x.device() || y->sizes() != x.sizes() || y->strides() != x.strides()))
        return py::none();
    SumArgs args{};
    args.kind = static_cast<Sum>(kind);
    args.dtype = *dtype_of(x.scalar_type());
    args.batch = x.size(0);
    args.inner = x.numel() / args.batch;
    args.x = x.const_data_ptr();
    args.y = y.has_value() ? y->const_data_ptr() : nullptr;
    args.correction = correction;
    const at::Tensor out = one_per_sample(x);
    args.out = out.data_ptr();
    const int64_t blocks = blocks_of(args.inner), parts = args.batch * blocks * parts_of(args.kind);
    if (x.is_cpu()) {
        const CpuPartials partials(parts);
        args.partials = partials.get();
        const auto run = [&] {
            share(args.batch * blocks, std::min<int64_t>(args.inner, kBlock),
                  [&](int64_t begin, int64_t end) { cpu_build.sum_blocks(args, begin, end); });
            share(args.batch, blocks, [&](int64_t begin, int64_t end) { cpu_build.finish_samples(args, begin, end); });
        };
        if (x.numel() <= kReduceGrain) {
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
    const char* error = launch_sum(args, x.get_device(), reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("reduction: the CUDA launch failed: ") + error);
    return py::cast(out);
#else
    (void)stream;
    return py::none();
#endif
}

// Select in one sample, in `chunks` runs of elements that threads count and copy out: counts are integers, so the
// result does not depend on the chunks.
inline void select_sample(const SelectArgs& args, const char* x, int64_t chunks, void* out) {
    const int64_t size = args.dtype == DType::kFloat64 ? 8 : args.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t length = (args.inner + chunks - 1) / chunks;
    const auto begin_of = [&](int64_t c) { return std::min(args.inner, c * length); };
    const auto each = [&](const auto& work) {
        if (chunks == 1) return work(0, 1);
        at::parallel_for(0, chunks, 1, work);
    };
    std::unique_ptr<int64_t[]> counts(new int64_t[chunks * kDigits]());
    std::vector<char> nan(chunks, 0);
    each([&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c)
            nan[c] = cpu_build.count_keys(args.dtype, args.absolute, x + begin_of(c) * size,
                                          begin_of(c + 1) - begin_of(c), &counts[c * kDigits]);
    });
    if (std::find(nan.begin(), nan.end(), 1) != nan.end()) {
        if (args.dtype == DType::kFloat64)
            *static_cast<double*>(out) = std::nan("");
        else
            *static_cast<float*>(out) = std::nanf("");
        return;
    }
    std::unique_ptr<int64_t[]> sums;
    const int64_t* total = counts.get();
    if (chunks > 1) {
        sums.reset(new int64_t[kDigits]());
        for (int64_t c = 0; c < chunks; ++c)
            for (int d = 0; d < kDigits; ++d) sums[d] += counts[c * kDigits + d];
        total = sums.get();
    }
    int first = 0, last = 0;
    int64_t rank = args.low;
    cpu_build.find_rank(total, &rank, args.weight > 0 ? 1 : 0, &first, &last);
    // Where each run's keys go; no key has a digit between the two.
    std::vector<int64_t> starts(chunks + 1, 0);
    for (int64_t c = 0; c < chunks; ++c) {
        starts[c + 1] = starts[c] + counts[c * kDigits + first];
        if (last != first) starts[c + 1] += counts[c * kDigits + last];
    }
    std::unique_ptr<char[]> keys(new char[starts[chunks] * size]);
    each([&](int64_t from, int64_t to) {
        for (int64_t c = from; c < to; ++c)
            cpu_build.gather_keys(args.dtype, args.absolute, x + begin_of(c) * size, begin_of(c + 1) - begin_of(c),
                                  first, last, keys.get() + starts[c] * size);
    });
    cpu_build.finish_keys(args, keys.get(), starts[chunks], rank, out);
}

// Return the element of rank `low` of each sample, and `weight` of the way to the next one.
inline py::object quantile(const at::Tensor& x, int64_t low, double weight, bool absolute, int64_t stream) {
    if (!samples_are_blocks(x)) return py::none();
    SelectArgs args{};
    args.batch = x.size(0);
    args.inner = x.numel() / args.batch;
    if (low < 0 || low >= args.inner - (weight > 0 ? 1 : 0)) return py::none();
    args.low = low;
    args.weight = weight;
    args.absolute = absolute;
    args.dtype = *dtype_of(x.scalar_type());
    args.x = x.const_data_ptr();
    const at::Tensor out = one_per_sample(x);
    args.out = out.data_ptr();
    if (x.is_cpu()) {
        const auto sample = [&](int64_t b, int64_t chunks) {
            select_sample(args, static_cast<const char*>(args.x) + b * args.inner * x.element_size(), chunks,
                          static_cast<char*>(args.out) + b * out.element_size());
        };
        // Chunks are counted in 32 bits.
        const int64_t least = (args.inner >> 31) + 1;
        if (x.numel() <= kReduceGrain) {
            for (int64_t b = 0; b < args.batch; ++b) sample(b, least);
            return py::cast(out);
        }
        py::gil_scoped_release release;
        if (args.batch >= at::get_num_threads()) {
            share(args.batch, args.inner, [&](int64_t begin, int64_t end) {
                for (int64_t b = begin; b < end; ++b) sample(b, least);
            });
        } else {
            const int64_t chunks = std::min<int64_t>(at::get_num_threads(), args.inner / kReduceGrain + 1);
            for (int64_t b = 0; b < args.batch; ++b) sample(b, std::max(least, chunks));
        }
    }
#ifdef FASTDIFF_CUDA
    else {
        const at::Tensor scratch = at::empty({select_scratch_bytes(args)}, x.options().dtype(at::kByte));
        const char* error = launch_select(args, scratch.data_ptr(), x.get_device(), reinterpret_cast<void*>(stream));
        if (error != nullptr) throw std::runtime_error(std::string("quantile: the CUDA launch failed: ") + error);
    }
#else
    (void)stream;
#endif
    return py::cast(out);
}

inline void define_reductions(py::module_& m) {
    m.def("sum", torch::wrap_pybind_function(sum),
          "mean (0), std (1), norm (2) and dot (3) a sample; None where samples are no blocks of memory.");
    m.def("quantile", torch::wrap_pybind_function(quantile),
          "An interpolated order statistic a sample; None where samples are no blocks of memory.");
}

}  // namespace fastdiff::bindings
