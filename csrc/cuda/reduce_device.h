// SPDX-License-Identifier: MIT
// What the kernels of the reductions share: conversions, 16-byte accesses, and launches whose errors are kept.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "reduce.h"

namespace fastdiff {
namespace {

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

// Consecutive elements that are 16 bytes together.
template <typename T>
struct alignas(16) Pack {
    static constexpr int kSize = 16 / sizeof(T);
    T values[kSize];
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A run of launches on one device and stream; after the first that fails there is none.
class Launches {
  public:
    Launches(int device, void* stream) : stream_(static_cast<cudaStream_t>(stream)), before_(device) {
        error_ = cudaGetDevice(&before_);
        changed_ = error_ == cudaSuccess && before_ != device;
        if (changed_) error_ = cudaSetDevice(device);
    }

    template <typename Kernel, typename... Arguments>
    void run(Kernel kernel, int64_t blocks, int threads, const Arguments&... arguments) {
        if (error_ != cudaSuccess) return;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.stream = stream_;
        error_ = cudaLaunchKernelEx(&config, kernel, arguments...);
        if (error_ != cudaSuccess) (void)cudaGetLastError();  // taken: the next launch is not blamed for it
    }

    const char* finish() {
        if (changed_) {
            const cudaError_t restored = cudaSetDevice(before_);
            if (error_ == cudaSuccess) error_ = restored;
        }
        return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_);
    }

  private:
    cudaStream_t stream_;
    int before_;
    bool changed_ = false;
    cudaError_t error_ = cudaSuccess;
};

}  // namespace
}  // namespace fastdiff
