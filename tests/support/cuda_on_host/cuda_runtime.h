// SPDX-License-Identifier: MIT
// As much of the CUDA runtime as csrc/cuda uses, for a C++ compiler and a machine without CUDA. A launch runs every
// thread of every block, one after another, before it returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

namespace cuda_on_host {

constexpr int kDevices = 2;
constexpr unsigned kMostThreads = 1024;  // of a block, on every GPU so far

// What the tests set and look at.
struct State {
    int device = 0;
    cudaError_t last_error = cudaSuccess;
    cudaError_t next_launch = cudaSuccess;  // what the next launch fails with
    bool backwards = false;                 // the last thread of the last block runs first
    int launches = 0;
    int launched_on = -1;
    cudaStream_t stream = nullptr;
    unsigned threads = 0, blocks = 0;  // of the last launch
    dim3 grid = {0, 0, 0};
    void (*kernel)() = nullptr;
    int attributes = 0;  // how often a device was asked for one
};
inline State state;

#ifdef CUDA_ON_HOST_BLOCKS
void run_block(unsigned threads, bool backwards, std::function<void()> body);  // in blocks.h
#endif

}  // namespace cuda_on_host

inline cudaError_t cudaGetDevice(int* device) {
    *device = cuda_on_host::state.device;
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cuda_on_host::kDevices) return cudaErrorInvalidDevice;
    cuda_on_host::state.device = device;
    return cudaSuccess;
}

// Device 0 is a 9.0, device 1 a 9.1.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= cuda_on_host::kDevices) return cudaErrorInvalidDevice;
    ++cuda_on_host::state.attributes;
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : device;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = cuda_on_host::state.last_error;
    cuda_on_host::state.last_error = cudaSuccess;
    return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
    }
    return "unrecognized error code";
}

// The kernel's arguments are copied, as a launch does.
template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
    auto& state = cuda_on_host::state;
    cudaError_t error = state.next_launch;
    state.next_launch = cudaSuccess;
    const dim3 grid = config->gridDim;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = config->blockDim.x;
    const bool fits = grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535;
    const bool flat = config->blockDim.y == 1 && config->blockDim.z == 1;
    if (!fits || !flat || blocks == 0 || threads == 0 || threads > cuda_on_host::kMostThreads)
        error = cudaErrorInvalidConfiguration;
    if (error != cudaSuccess) return state.last_error = error;
    ++state.launches;
    state.launched_on = state.device;
    state.stream = config->stream;
    state.threads = static_cast<unsigned>(threads);
    state.blocks = static_cast<unsigned>(blocks);
    state.grid = grid;
    state.kernel = reinterpret_cast<void (*)()>(kernel);
    const auto enter_block = [&](uint64_t block) {
        blockIdx.x = static_cast<unsigned>(block % grid.x);
        blockIdx.y = static_cast<unsigned>(block / grid.x % grid.y);
        blockIdx.z = static_cast<unsigned>(block / grid.x / grid.y);
    };
    gridDim = grid;
    blockDim = config->blockDim;
#ifdef CUDA_ON_HOST_BLOCKS
    for (uint64_t i = 0; i < blocks; ++i) {
        enter_block(state.backwards ? blocks - 1 - i : i);
        cuda_on_host::run_block(static_cast<unsigned>(threads), state.backwards,
                                [&] { kernel(static_cast<Expected>(given)...); });
    }
    return cudaSuccess;
#endif
    for (uint64_t i = 0; i < blocks * threads; ++i) {
        const uint64_t thread = state.backwards ? blocks * threads - 1 - i : i;
        enter_block(thread / threads);
        threadIdx.x = static_cast<unsigned>(thread % threads);
        kernel(static_cast<Expected>(given)...);
    }
    return cudaSuccess;
}
