// SPDX-License-Identifier: MIT
// The binding of the step.
//
// It runs a call whose tensors it finds plain: same dtype, device, shape and dense strides, nothing to convert.
// Anything else it declines by returning None, without a message: fastdiff/ops/ then checks the call, says what is
// wrong or makes it plain, and calls again. So checks are written once, and this file never reads what it should not.
#pragma once

#include <ATen/Parallel.h>

#include <string>
#include <utility>

#include "common.h"
#ifdef FASTDIFF_CUDA
#include "../cuda/step_cuda.h"
#endif

namespace fastdiff::bindings {

// Elements up to which one thread works alone. Measured (DDIM with guidance, float32, a 2-core EPYC): 65536 elements
// take 9 µs on one thread, 98304 take 16 on one and 9 on two.
constexpr int64_t kGrain = 65536;

// Looks at one call's tensors and fills its StepArgs; `plain` turns false at the first that needs the slow path.
class Call {
  public:
    Call(const at::Tensor& sample, const at::Tensor& table, int64_t row) : sample_(sample) {
        const auto dtype = dtype_of(sample.scalar_type());
        plain = dtype.has_value() && ordinary(sample) && sample.is_non_overlapping_and_dense() && sample.numel() > 0 &&
                backed(sample, sample.numel());
        if (!plain) return;
        compute_type_ = sample.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        args.dtype = *dtype;
        args.sample = sample.const_data_ptr();
        plain = scalars(table) && table.dim() == 2 && table.size(1) == kRowWidth && row >= 0 && row < table.size(0);
        if (!plain) return;
        args.row = static_cast<const char*>(table.const_data_ptr()) + row * kRowWidth * table.element_size();
        const bool blocks = sample.dim() > 0 && sample.stride(0) * sample.size(0) >= sample.numel();
        args.batch = blocks ? sample.size(0) : 1;
        args.inner = sample.numel() / args.batch;
        args.model_stride = args.inner;
    }

    const void* like_sample(MaybeTensor tensor) {
        if (tensor == nullptr || !plain) return nullptr;
        plain = same_kind(*tensor) && tensor->sizes() == sample_.sizes() && tensor->strides() == sample_.strides() &&
                backed(*tensor, sample_.numel());
        return plain ? tensor->const_data_ptr() : nullptr;
    }

    // The model's tensors may have a stride of their own from sample to sample: halves of a tensor of twice the
    // channels (a learned variance) are read where they lie. All of them share it.
    const void* like_model(MaybeTensor tensor) {
        if (tensor == nullptr || !plain) return nullptr;
        plain = same_kind(*tensor) && tensor->sizes() == sample_.sizes();
        for (int64_t i = args.batch > 1 ? 1 : 0; plain && i < sample_.dim(); ++i)
            plain = tensor->stride(i) == sample_.stride(i) || sample_.size(i) == 1;
        if (!plain) return nullptr;
        const int64_t stride = args.batch > 1 ? tensor->stride(0) : args.inner;
        plain = stride >= args.inner && (!model_seen_ || stride == args.model_stride) &&
                backed(*tensor, (args.batch - 1) * stride + args.inner);
        args.model_stride = stride;
        model_seen_ = true;
        return tensor->const_data_ptr();
    }

    // The guidance scale: a number, which the CPU reads from here, or a tensor with one for all or one a sample.
    const void* guidance(PyObject* scale) {
        if (scale == Py_None || !plain) return nullptr;
        if ((PyFloat_Check(scale) || PyLong_CheckExact(scale)) && sample_.is_cpu()) {
            scale64_ = PyFloat_AsDouble(scale);
            if (scale64_ == -1.0 && PyErr_Occurred() != nullptr) PyErr_Clear(), plain = false;  // an int beyond doubles
            scale32_ = static_cast<float>(scale64_);
            return compute_type_ == at::kDouble ? static_cast<const void*>(&scale64_) : &scale32_;
        }
        plain = THPVariable_Check(scale);
        if (!plain) return nullptr;
        const at::Tensor& tensor = THPVariable_Unpack(scale);
        args.guidance_stride = tensor.numel() == 1 ? 0 : 1;
        return scalars_a_sample(tensor, args.guidance_stride == 0);
    }

    const void* threshold(MaybeTensor tensor) {
        return tensor != nullptr && plain ? scalars_a_sample(*tensor, false) : nullptr;
    }

    // Where nothing differs from sample to sample, all elements are one run.
    void join_samples() {
        if (args.threshold != nullptr || args.guidance_stride != 0 || args.model_stride != args.inner) return;
        args.inner *= args.batch;
        args.model_stride = args.inner;
        args.batch = 1;
    }

    // Outputs may be inputs, or lie apart from them; a partial overlap is declined.
    void output(const at::Tensor& tensor) {
        plain = plain && same_kind(tensor) && tensor.sizes() == sample_.sizes() &&
                tensor.strides() == sample_.strides() && backed(tensor, sample_.numel());
        if (!plain) return;
        args.outputs[args.num_outputs++] = tensor.data_ptr();
    }

    bool overlaps_badly() const {
        const int64_t bytes = sample_.numel() * static_cast<int64_t>(sample_.element_size());
        const auto apart = [&](const void* a, const void* b, int64_t bytes_b) {
            const auto *p = static_cast<const char*>(a), *q = static_cast<const char*>(b);
            return p + bytes <= q || q + bytes_b <= p;
        };
        const int64_t model_bytes =
            ((args.batch - 1) * args.model_stride + args.inner) * static_cast<int64_t>(sample_.element_size());
        // The row and the scalars of a sample are read again after elements have been written.
        const auto width = static_cast<int64_t>(at::elementSize(compute_type_));
        const std::pair<const void*, int64_t> scalars[] = {
            {args.row, kRowWidth * width},
            {args.guidance, ((args.batch - 1) * args.guidance_stride + 1) * width},
            {args.threshold, args.batch * width},
        };
        for (int o = 0; o < args.num_outputs; ++o) {
            for (const auto& [values, size] : scalars)
                if (values != nullptr && !apart(args.outputs[o], values, size)) return true;
            for (int other = 0; other < o; ++other)
                if (!apart(args.outputs[o], args.outputs[other], bytes)) return true;
            for (const void* input :
                 {args.sample, args.noise, args.history[0], args.history[1], args.history[2], args.history[3]})
                if (input != nullptr && input != args.outputs[o] && !apart(args.outputs[o], input, bytes)) return true;
            for (const void* input : {args.model_output, args.uncond, args.variance}) {
                if (input == nullptr || apart(args.outputs[o], input, model_bytes)) continue;
                if (input != args.outputs[o] || args.model_stride != args.inner) return true;
            }
        }
        return false;
    }

    StepArgs args{};
    bool plain = true;

  private:
    bool same_kind(const at::Tensor& tensor) const {
        return ordinary(tensor) && tensor.scalar_type() == sample_.scalar_type() && tensor.device() == sample_.device();
    }
    bool scalars(const at::Tensor& tensor) const {
        return ordinary(tensor) && tensor.scalar_type() == compute_type_ && tensor.device() == sample_.device() &&
               tensor.is_contiguous() && backed(tensor, tensor.numel());
    }

    const void* scalars_a_sample(const at::Tensor& tensor, bool one_for_all) {
        plain =
            scalars(tensor) && tensor.dim() <= 1 &&
            (one_for_all || ((sample_.dim() == 0 || args.batch == sample_.size(0)) && tensor.numel() == args.batch));
        return plain ? tensor.const_data_ptr() : nullptr;
    }

    const at::Tensor& sample_;
    at::ScalarType compute_type_ = at::kFloat;
    bool model_seen_ = false;
    float scale32_ = 0.0F;
    double scale64_ = 0.0;
};

inline void launch(const at::Tensor& sample, const StepArgs& args, int64_t stream) {
    const int64_t total = args.batch * args.inner;
    if (sample.is_cpu()) {
        const auto step_range = cpu_build.step_range;
        if (total <= kGrain) {
            step_range(args, 0, total);
            return;
        }
        py::gil_scoped_release release;
        at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) { step_range(args, begin, end); });
        return;
    }
#ifdef FASTDIFF_CUDA
    const char* error = launch_step(args, sample.get_device(), reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("step: the CUDA launch failed: ") + error);
#else
    (void)stream;
#endif
}

constexpr Py_ssize_t kArguments = 14;

// step(sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind, keeps,
// out, stream); see the top of this file. `history` holds up to four tensors or None; `out` the outputs to write, None
// for a new one. Taken by CPython's fast calling convention: unpacking by signature would cost as much as the call.
inline PyObject* step(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == kArguments, "step: expected ", kArguments, " arguments, got ", count);
    Arguments given(objects);
    const MaybeTensor sample = given.tensor(), model_output = given.tensor(), table = given.tensor();
    const int64_t row = given.integer();
    const MaybeTensor uncond = given.tensor();
    PyObject* guidance = given.object();
    std::array<MaybeTensor, kRegisters> history{};
    given.tensors(&history);
    const MaybeTensor noise = given.tensor(), variance = given.tensor(), threshold = given.tensor();
    const int64_t variance_kind = given.integer(), keeps = given.integer();
    std::array<MaybeTensor, kMaxOutputs> out{};
    const int64_t outs = given.tensors(&out);
    const int64_t stream = given.integer();
    const bool complete = given.good && sample != nullptr && model_output != nullptr && table != nullptr &&
                          (uncond != nullptr) == (guidance != Py_None) &&
                          (variance != nullptr) == (variance_kind != 0) && keeps >= 0 && keeps < kMaxOutputs &&
                          variance_kind >= 0 && variance_kind <= 2 && (outs == -1 || outs == keeps + 1) &&
                          served(*sample);
    if (!complete) Py_RETURN_NONE;

    Call call(*sample, *table, row);
    StepArgs& args = call.args;
    args.variance_kind = static_cast<Variance>(variance_kind);
    args.threshold = call.threshold(threshold);
    args.guidance = call.guidance(guidance);
    args.model_output = call.like_model(model_output);
    args.uncond = call.like_model(uncond);
    args.variance = call.like_model(variance);
    args.noise = call.like_sample(noise);
    for (size_t j = 0; j < history.size(); ++j) args.history[j] = call.like_sample(history[j]);
    if (!call.plain) Py_RETURN_NONE;

    std::array<at::Tensor, kMaxOutputs> outputs;
    for (int64_t o = 0; o <= keeps; ++o) {
        outputs[o] =
            out[o] != nullptr ? *out[o] : at::empty_strided(sample->sizes(), sample->strides(), sample->options());
        call.output(outputs[o]);
    }
    if (!call.plain || (outs != -1 && call.overlaps_badly())) Py_RETURN_NONE;
    // As every operation that writes in place: so that autograd finds a tensor changed that it has saved. Inference
    // tensors are not counted, and no graph saves them.
    for (int64_t o = 0; outs != -1 && o <= keeps; ++o)
        if (out[o] != nullptr && !out[o]->is_inference()) out[o]->unsafeGetTensorImpl()->bump_version();
    call.join_samples();
    launch(*sample, args, stream);

    PyObject* result = PyTuple_New(keeps + 1);
    if (result == nullptr) throw python_error();
    for (int64_t o = 0; o <= keeps; ++o) PyTuple_SET_ITEM(result, o, THPVariable_Wrap(std::move(outputs[o])));
    return result;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
