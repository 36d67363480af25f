// SPDX-License-Identifier: MIT
// Sizes of thread blocks by compute capability. They do not change the results' bits.
//
// Includes no CUDA header, so that the binding can set configurations for the benchmark that measures them.
#pragma once

#include <cstdint>

namespace fastdiff {

struct CudaConfig {
    // Threads per block.
    int step;   // a step without drawn noise and model input
    int draw;   // a step with either
    int randn;  // normal numbers alone
    int sum;    // mean, std, norm, dot
    // Elements per thread of a selection before another block is launched.
    int select;
};

constexpr CudaConfig kDefaultConfig = {256, 256, 256, 128, 16};

struct MeasuredConfig {
    int capability;  // 90 for 9.0
    CudaConfig config;
};

// No configuration has been measured on a GPU yet. An entry is one line, printed by `python -m benchmarks.gpu_configs`
// on that chip, such as {90, {512, 256, 256, 128, 16}}; capability 0 matches no device.
constexpr MeasuredConfig kMeasuredConfigs[] = {{0, kDefaultConfig}};

// Threads of the largest block: the bound for which registers are allotted.
constexpr int kMostThreads = 512;

constexpr bool is_power_of_two(int value) { return value > 0 && (value & (value - 1)) == 0; }

constexpr bool threads_allowed(int threads) {
    return is_power_of_two(threads) && threads >= 32 && threads <= kMostThreads;
}

constexpr bool allowed(const CudaConfig& config) {
    return threads_allowed(config.step) && threads_allowed(config.draw) && threads_allowed(config.randn) &&
           threads_allowed(config.sum) && is_power_of_two(config.select) && config.select <= 1024;
}

constexpr CudaConfig config_of_capability(int capability) {
    for (const MeasuredConfig& entry : kMeasuredConfigs)
        if (entry.capability == capability) return entry.config;
    return kDefaultConfig;
}

constexpr bool all_allowed() {
    for (const MeasuredConfig& entry : kMeasuredConfigs)
        if (!allowed(entry.config)) return false;
    return allowed(kDefaultConfig);
}
static_assert(all_allowed(), "an entry of the table is no configuration that the kernels take");

// Return the configuration of launches on a device.
CudaConfig cuda_config(int device);

// Replace the table's entry on every device; null restores the table. Return false, with nothing changed, if the
// kernels do not support the sizes. For benchmarks and tests; not while another thread launches.
bool set_cuda_config(const CudaConfig* config);

}  // namespace fastdiff
