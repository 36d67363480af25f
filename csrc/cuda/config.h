// SPDX-License-Identifier: MIT
// How large the blocks of threads are: a table by compute capability. Results are the same bits whatever it says.
//
// Includes nothing of CUDA: the binding sets configurations too, for the benchmark that measures them.
#pragma once

#include <cstdint>

namespace fastdiff {

struct CudaConfig {
    // Threads a block.
    int step;   // a step that draws no noise and writes no model input
    int draw;   // one that does
    int randn;  // normal numbers alone
    int sum;    // mean, std, norm, dot
    // Elements a thread of a selection looks at before another block is started for them.
    int select;
};

constexpr CudaConfig kDefaultConfig = {256, 256, 256, 128, 16};

struct MeasuredConfig {
    int capability;  // 90 for 9.0
    CudaConfig config;
};

// No configuration has been measured on a GPU yet. An entry is one line, printed by `python -m benchmarks.gpu_configs`
// on that chip, such as {90, {512, 256, 256, 128, 16}}; the first stands for none.
constexpr MeasuredConfig kMeasuredConfigs[] = {{0, kDefaultConfig}};

// Of a block, and so the bound that registers are allotted for.
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

// What launches on a device take now.
CudaConfig cuda_config(int device);

// Replaces the table's choice on every device, until it is called with null. False, and nothing is changed, where the
// kernels cannot take it. For benchmarks and tests: not while another thread launches.
bool set_cuda_config(const CudaConfig* config);

}  // namespace fastdiff
