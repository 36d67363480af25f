// SPDX-License-Identifier: MIT
// Launches on a given stream and device with the device's configuration, with sticky errors.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "config.h"

namespace fastdiff {

struct Configurations {
    static constexpr int kDevices = 64;
    std::atomic<int> capabilities[kDevices] = {};  // 0: not read yet
    std::atomic<bool> overridden{false};
    CudaConfig override = kDefaultConfig;
};
inline Configurations configurations;

// Return the compute capability, read once per device, or 0 (the default configuration) where it cannot be read.
inline int capability_of(int device) {
    const bool kept = device >= 0 && device < Configurations::kDevices;
    int found = kept ? configurations.capabilities[device].load(std::memory_order_relaxed) : 0;
    if (found != 0) return found;
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        (void)cudaGetLastError();  // clear it, so that the launch does not report it
        return 0;
    }
    found = 10 * major + minor;
    if (kept) configurations.capabilities[device].store(found, std::memory_order_relaxed);
    return found;
}

inline CudaConfig config_of(int device) {
    if (configurations.overridden.load(std::memory_order_acquire)) return configurations.override;
    return config_of_capability(capability_of(device));
}

inline bool override_config(const CudaConfig* config) {
    if (config != nullptr && !allowed(*config)) return false;
    configurations.overridden.store(false, std::memory_order_release);
    if (config == nullptr) return true;
    configurations.override = *config;
    configurations.overridden.store(true, std::memory_order_release);
    return true;
}

// The most blocks of a grid in y and in z.
constexpr int kMostGridRows = 65535;

// A sequence of launches on one device and stream; after the first failure nothing is launched. `finish` restores the
// caller's current device.
class Launches {
  public:
    Launches(int device, void* stream)
        : config(config_of(device)), stream_(static_cast<cudaStream_t>(stream)), before_(device) {
        error_ = cudaGetDevice(&before_);
        changed_ = error_ == cudaSuccess && before_ != device;
        if (changed_) error_ = cudaSetDevice(device);
    }

    template <typename Kernel, typename... Arguments>
    void run(Kernel kernel, int64_t blocks, int threads, const Arguments&... arguments) {
        run_grid(kernel, blocks, 1, 1, threads, arguments...);
    }

    template <typename Kernel, typename... Arguments>
    void run_grid(Kernel kernel, int64_t x, int64_t y, int64_t z, int threads, const Arguments&... arguments) {
        if (error_ != cudaSuccess) return;
        // The limits of a grid. Truncated to 32 bits, a larger size would skip elements silently.
        if (x > INT32_MAX || y > kMostGridRows || z > kMostGridRows) {
            error_ = cudaErrorInvalidConfiguration;
            return;
        }
        cudaLaunchConfig_t launch = {};
        launch.gridDim = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
        launch.blockDim = dim3(static_cast<unsigned>(threads));
        launch.stream = stream_;
        error_ = cudaLaunchKernelEx(&launch, kernel, arguments...);
        if (error_ != cudaSuccess) (void)cudaGetLastError();  // clear it, so that the next launch does not report it
    }

    // Return null, or CUDA's error message.
    const char* finish() {
        if (changed_) {
            const cudaError_t restored = cudaSetDevice(before_);
            if (error_ == cudaSuccess) error_ = restored;
        }
        return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_);
    }

    const CudaConfig config;

  private:
    cudaStream_t stream_;
    int before_;
    bool changed_ = false;
    cudaError_t error_ = cudaSuccess;
};

inline int64_t blocks_of_threads(int64_t vecs, int threads) { return (vecs + threads - 1) / threads; }

}  // namespace fastdiff
