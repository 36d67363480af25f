// SPDX-License-Identifier: MIT
// One call of the step, read from its tensors: which of them are plain, and the StepArgs that follow.
#pragma once

#include <array>
#include <utility>

#include "common.h"

namespace fastdiff::bindings {

// Looks at one call's tensors and fills its StepArgs; `plain` turns false at the first that needs the slow path.
// Members are called in the order in which they stand here.
class Call {
  public:
    Call(const at::Tensor& sample, const at::Tensor& table) : sample_(sample) {
        const auto dtype = dtype_of(sample.scalar_type());
        plain = dtype.has_value() && ordinary(sample) && sample.is_non_overlapping_and_dense() && sample.numel() > 0 &&
                backed(sample, sample.numel());
        if (!plain) return;
        // The table is in the compute dtype; `settle` holds the tensors to it.
        compute_type_ = table.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        args.dtype = args.types.sample = *dtype;
        seen_ = 1U << static_cast<unsigned>(*dtype);
        args.sample = sample.const_data_ptr();
        plain = scalars(table) && table.dim() == 2 && table.size(1) == kRowWidth;
        if (!plain) return;
        args.table = table.const_data_ptr();
        args.num_rows = table.size(0);
        const bool blocks = sample.dim() > 0 && sample.stride(0) * sample.size(0) >= sample.numel();
        args.batch = blocks ? sample.size(0) : 1;
        args.inner = sample.numel() / args.batch;
        args.model_stride = args.inner;
        args.draw.channels = 1;
    }

    // The row of all samples, or a tensor with one for all or one a sample.
    void row(PyObject* row) {
        if (!plain) return;
        if (PyLong_CheckExact(row)) {
            args.row = small_integer(row);
            plain = plain && args.row >= 0 && args.row < args.num_rows;
            return;
        }
        args.rows = counters(row, &args.rows_stride);
        if (!plain || !sample_.is_cpu()) return;
        for (int64_t b = 0; b < rows_given(); ++b) plain = plain && args.rows[b] < args.num_rows;
    }

    // The guidance scale: a number, which the CPU reads from here, or a tensor with one for all or one a sample.
    void guidance(PyObject* scale) {
        if (scale == Py_None || !plain) return;
        if ((PyFloat_Check(scale) || PyLong_CheckExact(scale)) && sample_.is_cpu()) {
            scale64_ = PyFloat_AsDouble(scale);
            if (scale64_ == -1.0 && PyErr_Occurred() != nullptr) PyErr_Clear(), plain = false;  // an int beyond doubles
            scale32_ = static_cast<float>(scale64_);
            args.guidance = compute_type_ == at::kDouble ? static_cast<const void*>(&scale64_) : &scale32_;
            return;
        }
        plain = THPVariable_Check(scale);
        if (!plain) return;
        const at::Tensor& tensor = THPVariable_Unpack(scale);
        args.guidance_stride = tensor.numel() == 1 ? 0 : 1;
        args.guidance = scalars_a_sample(tensor, args.guidance_stride == 0);
    }

    void threshold(MaybeTensor tensor) {
        if (tensor != nullptr && plain) args.threshold = scalars_a_sample(*tensor, false);
    }

    // Noise from the samples' seeds, at one step of the loop for all or at each sample's own.
    void draw(MaybeTensor seeds, PyObject* step, int64_t purpose) {
        if (seeds == nullptr || !plain) return;
        plain = integers(*seeds) && seeds->dim() == 1 && seeds->numel() == args.batch && blocks_are_samples() &&
                purpose >= 0 && purpose <= UINT32_MAX;
        if (!plain) return;
        args.draw.seeds = seeds->const_data_ptr<int64_t>();
        args.draw.purpose = static_cast<uint32_t>(purpose);
        args.draw.channels = channels_of_layout();
        plain = args.draw.channels > 0;
        if (!plain) return;
        if (PyLong_CheckExact(step)) {
            const int64_t value = small_integer(step);
            plain = plain && value >= 0 && value <= UINT32_MAX;
            args.draw.step = static_cast<uint32_t>(value);
            return;
        }
        args.draw.steps = counters(step, &args.draw.steps_stride);
    }

    // A tensor in the samples' own layout; null where it is absent or not plain. `type` becomes how it is stored.
    void* like_sample(MaybeTensor tensor, DType* type) {
        if (tensor == nullptr || !plain) return nullptr;
        plain = same_kind(*tensor, type) && tensor->sizes() == sample_.sizes() &&
                tensor->strides() == sample_.strides() && backed(*tensor, sample_.numel());
        return plain ? const_cast<void*>(tensor->const_data_ptr()) : nullptr;
    }

    // The model's tensors may have a stride of their own from sample to sample: halves of a tensor of twice the
    // channels (a learned variance) are read where they lie. All of them share it.
    const void* like_model(MaybeTensor tensor, DType* type) {
        if (tensor == nullptr || !plain) return nullptr;
        plain = same_kind(*tensor, type) && tensor->sizes() == sample_.sizes();
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

    // The kept tensors go where each sample's row says: to registers, which must be there.
    void scatter() {
        plain = plain && args.rows != nullptr;
        if (!plain) return;
        args.scatter = true;
        if (!sample_.is_cpu()) return;
        for (int64_t b = 0; b < rows_given(); ++b) {
            const int64_t row = args.rows[b];
            for (int store = kStore0; row >= 0 && store <= kStore1; ++store) {
                const double slot = table_entry(row, store);
                const bool named = slot >= 0;
                plain = plain && (!named || (slot < kRegisters && args.history[static_cast<int>(slot)] != nullptr));
            }
        }
    }

    void output(const at::Tensor& tensor) {
        if (!plain) return;
        plain = same_kind(tensor, &args.types.outputs[args.num_outputs]) && tensor.sizes() == sample_.sizes() &&
                tensor.strides() == sample_.strides() && backed(tensor, sample_.numel());
        if (!plain) return;
        args.outputs[args.num_outputs++] = tensor.data_ptr();
    }

    // After the last tensor like the samples: whether they have dtypes of their own, and whether the table is right.
    void settle() {
        args.mixed = (seen_ & (seen_ - 1)) != 0;
        args.wide = (seen_ & (1U << static_cast<unsigned>(DType::kFloat64))) != 0;
        plain = plain && args.wide == (compute_type_ == at::kDouble);
    }

    // The next model input: of any dtype, in the samples' layout, once or twice along the batch.
    void model_input(MaybeTensor tensor) {
        if (tensor == nullptr || !plain) return;
        const auto dtype = dtype_of(tensor->scalar_type());
        plain = dtype.has_value() && ordinary(*tensor) && tensor->device() == sample_.device() && sample_.dim() > 0 &&
                blocks_are_samples() && tensor->dim() == sample_.dim() &&
                (tensor->size(0) == sample_.size(0) || tensor->size(0) == 2 * sample_.size(0));
        for (int64_t i = 0; plain && i < sample_.dim(); ++i)
            plain = (i == 0 || tensor->size(i) == sample_.size(i)) &&
                    (tensor->size(i) == 1 || tensor->stride(i) == (i == 0 ? args.inner : sample_.stride(i)));
        plain = plain && backed(*tensor, tensor->numel());
        if (!plain) return;
        args.model_input = tensor->data_ptr();
        args.model_input_dtype = *dtype;
        args.model_input_copies = tensor->size(0) == sample_.size(0) ? 1 : 2;
        model_input_bytes_ = tensor->numel() * static_cast<int64_t>(tensor->element_size());
    }

    // Outputs may be inputs of their own dtype, or lie apart from them and from each other; a partial overlap is
    // declined. The model's next input lies apart from everything.
    bool overlaps_badly() const {
        const StreamTypes& types = args.types;
        const int64_t count = sample_.numel(), model_count = (args.batch - 1) * args.model_stride + args.inner;
        std::array<Stretch, 2 + kRegisters> state{
            {{args.sample, types.sample, count}, {args.noise, types.noise, count}}};
        for (int j = 0; j < kRegisters; ++j) state[2 + j] = {args.history[j], types.history[j], count};
        const std::array<Stretch, 3> model{{{args.model_output, types.model_output, model_count},
                                            {args.uncond, types.uncond, model_count},
                                            {args.variance, types.variance, model_count}}};
        // Scalars of a sample are read again after elements have been written.
        const auto width = static_cast<int64_t>(at::elementSize(compute_type_)), word = int64_t{sizeof(int64_t)};
        const auto extent = [&](int64_t stride) { return (args.batch - 1) * stride + 1; };
        const std::array<std::pair<const void*, int64_t>, 6> scalars{{
            {args.table, args.num_rows * kRowWidth * width},
            {args.guidance, extent(args.guidance_stride) * width},
            {args.threshold, args.batch * width},
            {args.rows, extent(args.rows_stride) * word},
            {args.draw.seeds, args.batch * word},
            {args.draw.steps, extent(args.draw.steps_stride) * word},
        }};
        // Where registers are written they are outputs that lie on themselves.
        std::array<Stretch, kMaxOutputs + kRegisters> written{};
        size_t writes = 0;
        for (int o = 0; o < args.num_outputs; ++o) written[writes++] = {args.outputs[o], types.outputs[o], count};
        for (int j = 0; args.scatter && j < kRegisters; ++j)
            if (args.history[j] != nullptr) written[writes++] = state[2 + j];
        for (size_t o = 0; o < writes; ++o) {
            const Stretch& output = written[o];
            const int64_t bytes = output.bytes();
            const auto lies_on = [&](const Stretch& input) {
                return input.at == output.at && input.type == output.type;
            };
            if (meet(args.model_input, model_input_bytes_, output.at, bytes)) return true;
            for (const auto& [values, size] : scalars)
                if (meet(output.at, bytes, values, size)) return true;
            for (size_t other = 0; other < o; ++other)
                if (meet(output.at, bytes, written[other].at, written[other].bytes())) return true;
            for (const Stretch& input : state)
                if (!lies_on(input) && meet(output.at, bytes, input.at, input.bytes())) return true;
            for (const Stretch& input : model)
                if (meet(output.at, bytes, input.at, input.bytes()) &&
                    (!lies_on(input) || args.model_stride != args.inner))
                    return true;
        }
        for (const auto& [values, size] : scalars)
            if (meet(args.model_input, model_input_bytes_, values, size)) return true;
        for (const Stretch& input : state)
            if (meet(args.model_input, model_input_bytes_, input.at, input.bytes())) return true;
        for (const Stretch& input : model)
            if (meet(args.model_input, model_input_bytes_, input.at, input.bytes())) return true;
        return false;
    }

    // Where nothing differs from sample to sample, all elements are one run.
    void join_samples() {
        if (args.threshold != nullptr || args.guidance_stride != 0 || args.model_stride != args.inner) return;
        if (args.rows_stride != 0 || args.draw.seeds != nullptr) return;
        args.inner *= args.batch;
        args.model_stride = args.inner;
        args.batch = 1;
    }

    StepArgs args{};
    bool plain = true;

  private:
    // Elements that are stored one after another.
    struct Stretch {
        const void* at;
        DType type;
        int64_t elements;
        int64_t bytes() const { return elements * item_size(type); }
    };

    bool same_kind(const at::Tensor& tensor, DType* type) {
        const auto dtype = dtype_of(tensor.scalar_type());
        if (!dtype.has_value() || !ordinary(tensor) || tensor.device() != sample_.device()) return false;
        *type = *dtype;
        seen_ |= 1U << static_cast<unsigned>(*dtype);
        return true;
    }
    bool scalars(const at::Tensor& tensor) const {
        return ordinary(tensor) && tensor.scalar_type() == compute_type_ && tensor.device() == sample_.device() &&
               tensor.is_contiguous() && backed(tensor, tensor.numel());
    }
    bool integers(const at::Tensor& tensor) const {
        return ordinary(tensor) && tensor.scalar_type() == at::kLong && tensor.device() == sample_.device() &&
               tensor.is_contiguous() && backed(tensor, tensor.numel());
    }
    bool blocks_are_samples() const { return sample_.dim() == 0 || args.batch == sample_.size(0); }
    int64_t rows_given() const { return args.rows_stride == 0 ? 1 : args.batch; }

    double table_entry(int64_t row, int column) const {
        const int64_t at = row * kRowWidth + column;
        return compute_type_ == at::kDouble ? static_cast<const double*>(args.table)[at]
                                            : static_cast<double>(static_cast<const float*>(args.table)[at]);
    }

    static bool meet(const void* a, int64_t bytes_a, const void* b, int64_t bytes_b) {
        const auto *p = static_cast<const char*>(a), *q = static_cast<const char*>(b);
        return a != nullptr && b != nullptr && p < q + bytes_b && q < p + bytes_a;
    }

    int64_t small_integer(PyObject* object) {
        int overflow = 0;
        const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
        plain = plain && overflow == 0;
        return value;
    }

    // A tensor of integers, one for all samples or one each.
    const int64_t* counters(PyObject* object, int64_t* stride) {
        plain = plain && THPVariable_Check(object);
        if (!plain) return nullptr;
        const at::Tensor& tensor = THPVariable_Unpack(object);
        *stride = tensor.numel() == 1 ? 0 : 1;
        plain = integers(tensor) && tensor.dim() <= 1 &&
                (*stride == 0 || (blocks_are_samples() && tensor.numel() == args.batch));
        return plain ? tensor.const_data_ptr<int64_t>() : nullptr;
    }

    const void* scalars_a_sample(const at::Tensor& tensor, bool one_for_all) {
        plain = scalars(tensor) && tensor.dim() <= 1 &&
                (one_for_all || (blocks_are_samples() && tensor.numel() == args.batch));
        return plain ? tensor.const_data_ptr() : nullptr;
    }

    // 1 where memory is in row-major order within a sample, the channels where it is channels-last, 0 elsewhere.
    int64_t channels_of_layout() const {
        if (is_packed(1, 1)) return 1;
        const bool channels_last = sample_.dim() > 2 && sample_.stride(1) == 1 && is_packed(2, sample_.size(1));
        return channels_last ? sample_.size(1) : 0;
    }

    // Whether the dimensions from `first` on lie in row-major order, `step` elements apart in the last.
    bool is_packed(int64_t first, int64_t step) const {
        for (int64_t i = sample_.dim() - 1; i >= first; --i) {
            if (sample_.size(i) != 1 && sample_.stride(i) != step) return false;
            step *= sample_.size(i);
        }
        return true;
    }

    const at::Tensor& sample_;
    at::ScalarType compute_type_ = at::kFloat;
    bool model_seen_ = false;
    unsigned seen_ = 0;  // one bit a dtype
    float scale32_ = 0.0F;
    double scale64_ = 0.0;
    int64_t model_input_bytes_ = 0;
};

}  // namespace fastdiff::bindings
