// SPDX-License-Identifier: MIT
#include "step_kernels.h"

#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>

#include "driver.h"

namespace fastdiff::triton {

namespace {

// Integers by position. Triton does not specialise on the first seven; of the others it compiles 1 and multiples of 16
// apart.
enum Integer : int {
    kRow,
    kNumRows,
    kNoiseStep,
    kPurpose,
    kChannels,
    kParts,
    kGuidanceBits,
    kUnspecialized,
    kInner = kUnspecialized,
    kModelStride,
    kCopyStride,
    kBlocksPerSample,
};
static_assert(kBlocksPerSample + 1 == kIntegers);

// The limit of a grid.
constexpr int64_t kMostPrograms = INT32_MAX;
constexpr size_t kMostKernels = 4096;

struct KeyHash {
    size_t operator()(const KernelKey& key) const {
        uint64_t hash = 0x9E3779B97F4A7C15ULL;
        for (size_t i = 0; i < key.bytes.size(); i += sizeof hash) {
            uint64_t word = 0;
            std::memcpy(&word, key.bytes.data() + i, sizeof word);
            hash = (hash ^ word) * 0xBF58476D1CE4E5B9ULL;
            hash ^= hash >> 29;
        }
        return hash;
    }
};

// Read and written under the GIL.
std::unordered_map<KernelKey, StepKernel, KeyHash> kernels;
std::map<std::tuple<int, int64_t, bool>, int64_t> blocks;

// 0: a number; 1: one in memory for all samples; 2: one a sample.
uint8_t how_many(const void* in_memory, int64_t stride) {
    return in_memory == nullptr ? 0 : static_cast<uint8_t>(1 + stride);
}

// The bits of a number in the compute dtype.
int64_t bits_in(double value, bool wide) {
    if (wide) {
        int64_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        return bits;
    }
    const auto narrow = static_cast<float>(value);
    int32_t bits = 0;
    std::memcpy(&bits, &narrow, sizeof bits);
    return bits;
}

}  // namespace

StepLaunch::StepLaunch(const StepArgs& args, int device, int64_t block) {
    set_tensors(args);
    set_integers(args, block);
    set_constants(args);
    set_key(device);
}

void StepLaunch::set_tensors(const StepArgs& args) {
    const auto dtype = [](DType type) { return static_cast<uint8_t>(1 + static_cast<int>(type)); };
    wide_ = args.wide ? 1 : 0;
    int at = 0;
    // The sample stands for what is absent.
    const auto like_sample = [&](const void* pointer, DType type) {
        pointers_[at] = pointer == nullptr ? args.sample : pointer;
        dtypes_[at++] = dtype(pointer == nullptr ? args.dtype : type);
    };
    const auto other = [&](const void* pointer) {
        pointers_[at] = pointer == nullptr ? args.sample : pointer;
        dtypes_[at++] = pointer == nullptr ? dtype(args.dtype) : uint8_t{0};
    };
    like_sample(args.sample, args.dtype);
    like_sample(args.model_output, args.types.model_output);
    other(args.table);
    other(args.rows);
    like_sample(args.uncond, args.types.uncond);
    other(args.guidance);
    for (int j = 0; j < kRegisters; ++j) like_sample(args.history[j], args.types.history[j]);
    like_sample(args.noise, args.types.noise);
    like_sample(args.variance, args.types.variance);
    like_sample(args.mask, args.types.mask);
    other(args.threshold);
    other(args.draw.seeds);
    other(args.draw.steps);
    for (int o = 0; o < kMaxOutputs; ++o) like_sample(args.outputs[o], args.types.outputs[o]);
    like_sample(args.model_input, args.model_input_dtype);
    static_assert(kPointers == 13 + kRegisters + kMaxOutputs);
}

void StepLaunch::set_integers(const StepArgs& args, int64_t block) {
    const bool draws = args.draw.seeds != nullptr;
    const bool number = args.uncond != nullptr && args.guidance == nullptr;
    integers_[kRow] = args.rows == nullptr ? args.row : 0;
    integers_[kNumRows] = args.num_rows;
    // Words as the int32 of the same bits: from 2³¹ on they would be 64-bit arguments, and another kernel.
    integers_[kNoiseStep] = draws && args.draw.steps == nullptr ? static_cast<int32_t>(args.draw.step) : 0;
    integers_[kPurpose] = draws ? static_cast<int32_t>(args.draw.purpose) : 0;
    integers_[kChannels] = draws ? args.draw.channels : 0;
    integers_[kParts] = draws ? args.draw.parts : 0;
    integers_[kGuidanceBits] = number ? bits_in(args.guidance_value, args.wide) : 0;
    integers_[kInner] = args.inner;
    integers_[kModelStride] = args.model_stride;
    integers_[kCopyStride] = args.batch * args.inner;
    integers_[kBlocksPerSample] = (args.inner + block - 1) / block;
    programs_ = args.batch * integers_[kBlocksPerSample];
}

void StepLaunch::set_constants(const StepArgs& args) {
    const bool draws = args.draw.seeds != nullptr;
    // Each part begins with a chunk of noise, and memory has its order.
    const bool chunks_are_whole = args.draw.channels == 1 && (args.draw.parts == 1 || args.inner % 4 == 0);
    uint8_t history = 0;
    bool mixed_history = false;
    for (int j = 0; j < kRegisters; ++j) {
        history |= static_cast<uint8_t>((args.history[j] != nullptr) << j);
        mixed_history = mixed_history || (args.scatter && dtypes_[6 + j] != dtypes_[6]);
    }
    constants_ = {
        args.uncond != nullptr,
        how_many(args.guidance, args.guidance_stride),
        history,
        args.noise != nullptr,
        args.mask != nullptr,
        args.threshold != nullptr,
        // Without noise nothing is scaled, and the variance is not read.
        static_cast<uint8_t>(draws || args.noise != nullptr ? static_cast<int>(args.variance_kind) : 0),
        static_cast<uint8_t>(args.num_outputs - 1),
        how_many(args.rows, args.rows_stride),
        args.scatter,
        mixed_history,
        static_cast<uint8_t>(!draws             ? 0
                             : chunks_are_whole ? 1
                                                : 2),
        how_many(args.draw.steps, args.draw.steps_stride),
        static_cast<uint8_t>(args.model_input == nullptr ? 0 : args.model_input_copies),
    };
}

void StepLaunch::set_key(int device) {
    size_t at = 0;
    const auto add = [&](int value) { key_.bytes[at++] = static_cast<uint8_t>(value); };
    add(device);
    add(wide_);
    for (const uint8_t constant : constants_) add(constant);
    for (const uint8_t dtype : dtypes_) add(dtype);
    for (int i = 0; i < kPointers; i += 8) {
        int aligned = 0;
        for (int j = i; j < i + 8 && j < kPointers; ++j)
            aligned |= (reinterpret_cast<uintptr_t>(pointers_[j]) % 16 == 0) << (j - i);
        add(aligned);
    }
    for (int i = 0; i < kIntegers; ++i) {
        const int64_t value = integers_[i];
        const int long_form = value < INT32_MIN || value > INT32_MAX;
        add(i < kUnspecialized ? long_form : value == 1 ? 2 : 4 * (value % 16 == 0) + long_form);
    }
    static_assert(2 + kConstants + kPointers + (kPointers + 7) / 8 + kIntegers <= sizeof key_.bytes);
}

const char* StepLaunch::run(const StepKernel& kernel, void* stream) const {
    if (programs_ > kMostPrograms) return "the samples need more programs than one launch may have";
    const void* none = nullptr;
    // Room for two addresses of scratch memory and, for the tests' driver, a null at the end.
    std::array<void*, kParameters + 3> parameters{};
    size_t count = 0;
    const auto pass = [&](const void* value) { parameters[count++] = const_cast<void*>(value); };
    for (int i = 0; i < kPointers; ++i)
        if (kernel.layout[i] != '-') pass(&pointers_[i]);
    // A 32-bit parameter is the low half of its number, which is stored first.
    for (int i = 0; i < kIntegers; ++i)
        if (kernel.layout[kPointers + i] != '-') pass(&integers_[i]);
    // Two addresses of memory that only instrumented kernels use.
    pass(&none);
    pass(&none);
    return launch_function(kernel.function, static_cast<unsigned>(programs_), kernel.threads, kernel.shared_bytes,
                           stream, parameters.data());
}

const StepKernel* find_kernel(const KernelKey& key) {
    const auto found = kernels.find(key);
    return found == kernels.end() ? nullptr : &found->second;
}

void install_kernel(const KernelKey& key, const StepKernel& kernel) {
    if (kernels.size() >= kMostKernels) kernels.clear();
    kernels[key] = kernel;
}

void clear_kernels() {
    kernels.clear();
    blocks.clear();
}

int64_t block_of(int device, int64_t element_size, bool draws) {
    const auto found = blocks.find({device, element_size, draws});
    return found == blocks.end() ? 0 : found->second;
}

void set_block(int device, int64_t element_size, bool draws, int64_t block) {
    blocks[{device, element_size, draws}] = block;
}

}  // namespace fastdiff::triton
