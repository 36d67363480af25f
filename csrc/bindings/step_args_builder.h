// SPDX-License-Identifier: MIT
// The StepArgs of one call, read from its tensors, or why the loops cannot take it. Light: see tensors.h.
#pragma once

#include <array>
#include <initializer_list>
#include <utility>

#include "step.h"

namespace fastdiff::bindings {

// Reads one call's tensors and fills its StepArgs. `declined` keeps the first reason why the loops cannot take the
// call; nothing is read after it. Members are called in the order in which they stand here.
class StepArgsBuilder {
  public:
    // `on_host`: the loops run here, so numbers in memory may be read and checked.
    StepArgsBuilder(const at::Tensor& sample, const at::Tensor& table, bool on_host)
        : sample_(sample), on_host_(on_host) {
        const auto dtype = dtype_of(sample.scalar_type());
        if (!require(dtype.has_value(), Decline::kDtype) || !plain_eager(sample) ||
            !require(sample.numel() > 0, Decline::kShape) ||
            !require(sample.is_non_overlapping_and_dense(), Decline::kLayout) ||
            !require(storage_covers(sample, sample.numel()), Decline::kStorage))
            return;
        // The table has the compute dtype; `finalize_dtypes` holds the tensors to it.
        compute_type_ = table.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        args.dtype = args.types.sample = *dtype;
        seen_ = 1U << static_cast<unsigned>(*dtype);
        args.sample = sample.const_data_ptr();
        if (!scalars(table) || !require(table.dim() == 2 && table.size(1) == kRowWidth, Decline::kShape)) return;
        args.table = table.const_data_ptr();
        args.num_rows = table.size(0);
        const bool blocks = sample.dim() > 0 && sample.stride(0) * sample.size(0) >= sample.numel();
        args.batch = blocks ? sample.size(0) : 1;
        args.inner = sample.numel() / args.batch;
        args.model_stride = args.inner;
        args.draw.channels = args.draw.parts = 1;
    }

    bool good() const { return declined == Decline::kNone; }

    // Record a reason unless there is one already; returns whether there is none.
    bool require(bool holds, Decline reason) {
        if (!holds && good()) declined = reason;
        return good();
    }

    // The parts of samples. Where a tensor of numbers is [B, T], samples [B, T, ...] are a batch of B·T; `given` is for
    // a call that is such a batch already.
    void parts(int64_t given, std::initializer_list<MaybeTensor> numbers) {
        if (!good()) return;
        for (const MaybeTensor tensor : numbers) per_part_ = per_part_ || (tensor != nullptr && tensor->dim() == 2);
        if (!per_part_) {
            args.draw.parts = given;
            require(given >= 1 && args.batch % given == 0, Decline::kArgument);
            return;
        }
        if (!require(given == 1, Decline::kArgument) || !require(sample_.dim() >= 2, Decline::kShape) ||
            !require(sample_.is_contiguous(), Decline::kLayout))
            return;
        args.draw.parts = sample_.size(1);
        args.batch = sample_.size(0) * sample_.size(1);
        args.inner = args.model_stride = sample_.numel() / args.batch;
    }

    void row_index(const Counter& row) {
        if (!good()) return;
        if (row.tensor == nullptr) {
            args.row = row.value;
            require(args.row >= 0 && args.row < args.num_rows, Decline::kValue);
            return;
        }
        args.rows = counters(*row.tensor, &args.rows_stride);
        if (!good() || !on_host_) return;
        for (int64_t b = 0; b < rows_given(); ++b) require(args.rows[b] < args.num_rows, Decline::kValue);
    }

    // Return whether the rows can be read here and skip no sample.
    bool takes_all() const {
        if (!good() || !on_host_) return false;
        for (int64_t b = 0; b < rows_given(); ++b)
            if (args.rows[b] < 0) return false;
        return true;
    }

    // A number is read by the CPU's loops from this object, and passed to a GPU's kernel by value.
    void guidance_scale(const Scale& scale) {
        if (!scale.given || !good()) return;
        if (scale.tensor == nullptr) {
            args.guidance_value = scale.value;
            if (!on_host_) return;
            scale64_ = scale.value;
            scale32_ = static_cast<float>(scale64_);
            args.guidance = compute_type_ == at::kDouble ? static_cast<const void*>(&scale64_) : &scale32_;
            return;
        }
        args.guidance_stride = scale.tensor->numel() == 1 ? 0 : 1;
        args.guidance = scalars_per_sample(*scale.tensor, args.guidance_stride == 0);
    }

    void threshold(MaybeTensor tensor) {
        if (tensor != nullptr && good()) args.threshold = scalars_per_sample(*tensor, false);
    }

    // Noise from the samples' seeds, at one step of the loop for all or at each sample's own.
    void draw(MaybeTensor seeds, const Counter& step, int64_t purpose) {
        if (seeds == nullptr || !good()) return;
        if (!integers(*seeds) ||
            !require(seeds->dim() == 1 && seeds->numel() * args.draw.parts == args.batch, Decline::kShape) ||
            !require(blocks_are_samples(), Decline::kLayout) ||
            !require(purpose >= 0 && purpose <= UINT32_MAX, Decline::kValue))
            return;
        args.draw.seeds = seeds->const_data_ptr<int64_t>();
        args.draw.purpose = static_cast<uint32_t>(purpose);
        args.draw.channels = channels_of_layout();
        if (!require(args.draw.channels > 0, Decline::kLayout)) return;
        if (step.tensor == nullptr) {
            require(step.value >= 0 && step.value <= UINT32_MAX, Decline::kValue);
            args.draw.step = static_cast<uint32_t>(step.value);
            return;
        }
        args.draw.steps = counters(*step.tensor, &args.draw.steps_stride);
    }

    // The data of a tensor in the samples' own layout; null where it is absent or declined. `type` becomes its dtype.
    void* like_sample(MaybeTensor tensor, DType* type) {
        if (tensor == nullptr || !good()) return nullptr;
        if (!same_kind(*tensor, type) || !require(tensor->strides() == sample_.strides(), Decline::kLayout) ||
            !require(storage_covers(*tensor, sample_.numel()), Decline::kStorage))
            return nullptr;
        return const_cast<void*>(tensor->const_data_ptr());
    }

    // The data of one of the model's tensors. They may have a stride of their own from sample to sample: halves of a
    // tensor of twice the channels (a learned variance) are read without a copy. All of them share it.
    const void* like_model(MaybeTensor tensor, DType* type) {
        if (tensor == nullptr || !good() || !same_kind(*tensor, type)) return nullptr;
        const bool apart = args.batch > 1 && !per_part_;
        for (int64_t i = apart ? 1 : 0; i < sample_.dim(); ++i)
            require(tensor->stride(i) == sample_.stride(i) || sample_.size(i) == 1, Decline::kLayout);
        if (!good()) return nullptr;
        const int64_t stride = apart ? tensor->stride(0) : args.inner;
        if (!require(stride >= args.inner && (!model_seen_ || stride == args.model_stride), Decline::kLayout) ||
            !require(storage_covers(*tensor, (args.batch - 1) * stride + args.inner), Decline::kStorage))
            return nullptr;
        args.model_stride = stride;
        model_seen_ = true;
        return tensor->const_data_ptr();
    }

    // Kept outputs go to the history slots that each sample's row names, which must be there.
    void write_history() {
        if (!require(args.rows != nullptr, Decline::kArgument)) return;
        args.scatter = true;
        if (!on_host_) return;
        for (int64_t b = 0; b < rows_given(); ++b) {
            const int64_t row = args.rows[b];
            for (int store = kStore0; row >= 0 && store <= kStore1; ++store) {
                const double slot = table_entry(row, store);
                const bool there = !(slot >= 0) ||  // NaN names no slot
                                   (slot < kRegisters && args.history[static_cast<int>(slot)] != nullptr);
                require(there && (args.mask == nullptr || store == kStore0 || !(slot >= 0)), Decline::kArgument);
            }
        }
    }

    void output(const at::Tensor& tensor) {
        if (!good() || !same_kind(tensor, &args.types.outputs[args.num_outputs]) ||
            !require(tensor.strides() == sample_.strides(), Decline::kLayout) ||
            !require(storage_covers(tensor, sample_.numel()), Decline::kStorage))
            return;
        args.outputs[args.num_outputs++] = tensor.data_ptr();
    }

    // After the last tensor like the samples: whether they have dtypes of their own, and whether the table has theirs.
    void finalize_dtypes() {
        args.mixed = (seen_ & (seen_ - 1)) != 0;
        args.wide = (seen_ & (1U << static_cast<unsigned>(DType::kFloat64))) != 0;
        require(args.wide == (compute_type_ == at::kDouble), Decline::kDtype);
    }

    // The next model input: of any dtype, in the samples' layout, once or twice along the batch.
    void model_input(MaybeTensor tensor) {
        if (tensor == nullptr || !good()) return;
        const auto dtype = dtype_of(tensor->scalar_type());
        if (!require(dtype.has_value(), Decline::kDtype) || !plain_eager(*tensor) ||
            !require(tensor->device() == sample_.device(), Decline::kDevice))
            return;
        bool fits = sample_.dim() > 0 && tensor->dim() == sample_.dim() &&
                    (tensor->size(0) == sample_.size(0) || tensor->size(0) == 2 * sample_.size(0));
        for (int64_t i = 1; fits && i < sample_.dim(); ++i) fits = tensor->size(i) == sample_.size(i);
        if (!require(fits, Decline::kShape) || !require(blocks_are_samples(), Decline::kLayout)) return;
        const int64_t whole = per_part_ ? args.inner * args.draw.parts : args.inner;
        for (int64_t i = 0; i < sample_.dim(); ++i)
            require(tensor->size(i) == 1 || tensor->stride(i) == (i == 0 ? whole : sample_.stride(i)),
                    Decline::kLayout);
        if (!good() || !require(storage_covers(*tensor, tensor->numel()), Decline::kStorage)) return;
        args.model_input = tensor->data_ptr();
        args.model_input_dtype = *dtype;
        args.model_input_copies = tensor->size(0) == sample_.size(0) ? 1 : 2;
        model_input_bytes_ = tensor->numel() * static_cast<int64_t>(tensor->element_size());
    }

    // Return whether what is written shares memory with other arguments in a way that the loops cannot take. Outputs
    // may be inputs of their own dtype, or lie apart from them and from each other; the model input lies apart from
    // everything.
    bool overlaps_partially() const {
        const StreamTypes& types = args.types;
        const int64_t count = sample_.numel(), model_count = (args.batch - 1) * args.model_stride + args.inner;
        std::array<MemorySpan, 2 + kRegisters> state{
            {{args.sample, types.sample, count}, {args.noise, types.noise, count}}};
        for (int j = 0; j < kRegisters; ++j) state[2 + j] = {args.history[j], types.history[j], count};
        const std::array<MemorySpan, 3> model{{{args.model_output, types.model_output, model_count},
                                               {args.uncond, types.uncond, model_count},
                                               {args.variance, types.variance, model_count}}};
        // Scalars of a sample are read again after elements have been written, and the mask may be.
        const auto width = static_cast<int64_t>(at::elementSize(compute_type_)), word = int64_t{sizeof(int64_t)};
        const auto extent = [&](int64_t stride) { return (args.batch - 1) * stride + 1; };
        const std::array<std::pair<const void*, int64_t>, 7> scalars{{
            {args.mask, count * item_size(types.mask)},
            {args.table, args.num_rows * kRowWidth * width},
            {args.guidance, extent(args.guidance_stride) * width},
            {args.threshold, args.batch * width},
            {args.rows, extent(args.rows_stride) * word},
            {args.draw.seeds, args.batch / args.draw.parts * word},
            {args.draw.steps, extent(args.draw.steps_stride) * word},
        }};
        // History slots that are written are outputs that lie on themselves.
        std::array<MemorySpan, kMaxOutputs + kRegisters> written{};
        size_t writes = 0;
        for (int o = 0; o < args.num_outputs; ++o) written[writes++] = {args.outputs[o], types.outputs[o], count};
        for (int j = 0; args.scatter && j < kRegisters; ++j)
            if (args.history[j] != nullptr) written[writes++] = state[2 + j];
        for (size_t o = 0; o < writes; ++o) {
            const MemorySpan& output = written[o];
            const int64_t bytes = output.bytes();
            const auto lies_on = [&](const MemorySpan& input) {
                return input.at == output.at && input.type == output.type;
            };
            if (overlaps(args.model_input, model_input_bytes_, output.at, bytes)) return true;
            for (const auto& [values, size] : scalars)
                if (overlaps(output.at, bytes, values, size)) return true;
            for (size_t other = 0; other < o; ++other)
                if (overlaps(output.at, bytes, written[other].at, written[other].bytes())) return true;
            for (const MemorySpan& input : state)
                if (!lies_on(input) && overlaps(output.at, bytes, input.at, input.bytes())) return true;
            for (const MemorySpan& input : model)
                if (overlaps(output.at, bytes, input.at, input.bytes()) &&
                    (!lies_on(input) || args.model_stride != args.inner))
                    return true;
        }
        for (const auto& [values, size] : scalars)
            if (overlaps(args.model_input, model_input_bytes_, values, size)) return true;
        for (const MemorySpan& input : state)
            if (overlaps(args.model_input, model_input_bytes_, input.at, input.bytes())) return true;
        for (const MemorySpan& input : model)
            if (overlaps(args.model_input, model_input_bytes_, input.at, input.bytes())) return true;
        return false;
    }

    // Treat all samples as one run of elements where nothing differs from sample to sample.
    void collapse_batch() {
        if (args.threshold != nullptr || args.guidance_stride != 0 || args.model_stride != args.inner) return;
        if (args.rows_stride != 0 || args.draw.seeds != nullptr) return;
        args.inner *= args.batch;
        args.model_stride = args.inner;
        args.batch = 1;
    }

    StepArgs args{};
    Decline declined = Decline::kNone;

  private:
    // Elements that are stored one after another.
    struct MemorySpan {
        const void* at;
        DType type;
        int64_t elements;
        int64_t bytes() const { return elements * item_size(type); }
    };

    bool plain_eager(const at::Tensor& tensor) {
        if (!in_memory(tensor))
            return require(false, tensor.layout() == at::kStrided ? Decline::kWrapper : Decline::kLayout);
        return require(!recorded_by_autograd(tensor), Decline::kAutograd);
    }
    bool same_kind(const at::Tensor& tensor, DType* type) {
        const auto dtype = dtype_of(tensor.scalar_type());
        if (!require(dtype.has_value(), Decline::kDtype) || !plain_eager(tensor) ||
            !require(tensor.device() == sample_.device(), Decline::kDevice) ||
            !require(tensor.sizes() == sample_.sizes(), Decline::kShape))
            return false;
        *type = *dtype;
        seen_ |= 1U << static_cast<unsigned>(*dtype);
        return true;
    }
    bool dense_of(const at::Tensor& tensor, at::ScalarType type) {
        return plain_eager(tensor) && require(tensor.scalar_type() == type, Decline::kDtype) &&
               require(tensor.device() == sample_.device(), Decline::kDevice) &&
               require(tensor.is_contiguous(), Decline::kLayout) &&
               require(storage_covers(tensor, tensor.numel()), Decline::kStorage);
    }
    bool scalars(const at::Tensor& tensor) { return dense_of(tensor, compute_type_); }
    bool integers(const at::Tensor& tensor) { return dense_of(tensor, at::kLong); }
    bool blocks_are_samples() const { return sample_.dim() == 0 || per_part_ || args.batch == sample_.size(0); }
    int64_t rows_given() const { return args.rows_stride == 0 ? 1 : args.batch; }

    double table_entry(int64_t row, int column) const {
        const int64_t at = row * kRowWidth + column;
        return compute_type_ == at::kDouble ? static_cast<const double*>(args.table)[at]
                                            : static_cast<double>(static_cast<const float*>(args.table)[at]);
    }

    static bool overlaps(const void* a, int64_t bytes_a, const void* b, int64_t bytes_b) {
        const auto *p = static_cast<const char*>(a), *q = static_cast<const char*>(b);
        return a != nullptr && b != nullptr && p < q + bytes_b && q < p + bytes_a;
    }

    // Return whether a tensor has one value for all samples where that is allowed, or one for each.
    bool one_per_sample(const at::Tensor& tensor, bool one_for_all) {
        if (tensor.dim() == 2)
            return require(per_part_ && tensor.size(0) == sample_.size(0) && tensor.size(1) == sample_.size(1),
                           Decline::kShape);
        return require(tensor.dim() <= 1, Decline::kShape) &&
               (one_for_all ||
                (require(blocks_are_samples() && (!per_part_ || args.draw.parts == 1), Decline::kLayout) &&
                 require(tensor.numel() == args.batch, Decline::kShape)));
    }

    const int64_t* counters(const at::Tensor& tensor, int64_t* stride) {
        *stride = tensor.numel() == 1 ? 0 : 1;
        return integers(tensor) && one_per_sample(tensor, *stride == 0) ? tensor.const_data_ptr<int64_t>() : nullptr;
    }

    const void* scalars_per_sample(const at::Tensor& tensor, bool one_for_all) {
        return scalars(tensor) && one_per_sample(tensor, one_for_all) ? tensor.const_data_ptr() : nullptr;
    }

    // 1 where memory is in row-major order within a sample, the channels where it is channels-last, 0 elsewhere.
    int64_t channels_of_layout() const {
        if (is_packed(1, 1)) return 1;
        const bool channels_last = sample_.dim() > 2 && sample_.stride(1) == 1 && is_packed(2, sample_.size(1));
        return channels_last ? sample_.size(1) : 0;
    }

    // Return whether the dimensions from `first` on are in row-major order, `step` elements apart in the last.
    bool is_packed(int64_t first, int64_t step) const {
        for (int64_t i = sample_.dim() - 1; i >= first; --i) {
            if (sample_.size(i) != 1 && sample_.stride(i) != step) return false;
            step *= sample_.size(i);
        }
        return true;
    }

    const at::Tensor& sample_;
    const bool on_host_;
    at::ScalarType compute_type_ = at::kFloat;
    bool model_seen_ = false;
    bool per_part_ = false;
    unsigned seen_ = 0;  // one bit a dtype
    float scale32_ = 0.0F;
    double scale64_ = 0.0;
    int64_t model_input_bytes_ = 0;
};

}  // namespace fastdiff::bindings
