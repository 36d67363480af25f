// SPDX-License-Identifier: MIT
// Launches of Triton's step kernel (kernels/triton/step.py) as Triton has compiled it for earlier calls.
//
// Triton's JIT compiles a kernel for the dtypes of the tensors, which addresses and sizes are multiples of 16, which
// integers are 1, and the compile-time constants. `StepLaunch` computes all of that from a call's StepArgs, as the JIT
// does from the arguments that `launch` of kernels/triton/step.py passes; tests/kernels/test_triton_launch.py compares
// the two.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../step_math.h"

namespace fastdiff::triton {

// Parameters of the kernel by position: tensors, then integers. Compile-time constants follow them and are not passed.
constexpr int kPointers = 20, kIntegers = 11, kConstants = 14;
constexpr int kParameters = kPointers + kIntegers;

// What a compiled kernel depends on beside its block and warps, which `clear_kernels` forgets.
struct KernelKey {
    std::array<uint8_t, 64> bytes{};
    bool operator==(const KernelKey& other) const { return bytes == other.bytes; }
};

struct StepKernel {
    void* function = nullptr;  // a CUfunction
    unsigned threads = 0;      // of a program
    unsigned shared_bytes = 0;
    // The form of each parameter: 'p' an address, 'i' 32 bits, 'l' 64 bits, '-' a constant, which is not passed.
    std::array<char, kParameters> layout{};
};

// One launch: the parameters of a call and the key of its kernel. All pointers of `args` are the device's.
class StepLaunch {
  public:
    // `block`: elements a program, which decides one of the integers.
    StepLaunch(const StepArgs& args, int device, int64_t block);

    const KernelKey& key() const { return key_; }
    // Launch on a stream. Return null, or an error message.
    const char* run(const StepKernel& kernel, void* stream) const;

  private:
    void set_tensors(const StepArgs& args);
    void set_integers(const StepArgs& args, int64_t block);
    void set_constants(const StepArgs& args);
    void set_key(int device);

    std::array<const void*, kPointers> pointers_;
    std::array<uint8_t, kPointers> dtypes_{};  // 1 + DType of tensors like the samples; 0 of the others
    std::array<int64_t, kIntegers> integers_;
    std::array<uint8_t, kConstants> constants_;
    uint8_t wide_ = 0;  // the compute dtype is float64
    int64_t programs_ = 0;
    KernelKey key_;
};

// The kernels by key, at most 4096; beyond that all are forgotten.
const StepKernel* find_kernel(const KernelKey& key);
void install_kernel(const KernelKey& key, const StepKernel& kernel);
void clear_kernels();

// Elements a program on a device, by the bytes of a sample's element and whether noise is drawn; 0 where not set.
int64_t block_of(int device, int64_t element_size, bool draws);
void set_block(int device, int64_t element_size, bool draws, int64_t block);

}  // namespace fastdiff::triton
