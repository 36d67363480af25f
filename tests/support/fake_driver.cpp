// SPDX-License-Identifier: MIT
// Replacement for the CUDA driver's library: records each launch. Built by tests/support/fake_driver.py.
#include <stdint.h>

struct Config {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};

struct Launch {
    uint64_t function, stream;
    uint64_t grid[3], block[3];
    uint64_t shared_bytes, attribute_count;
    uint64_t parameter_count, parameters[40];
};

extern "C" {
// Set by the tests: the status that a launch returns, and the current device.
int status = 0;
int device = 0;
// Launches so far, and the last one.
int64_t launches = 0;
Launch last;

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void**) {
    ++launches;
    last.function = reinterpret_cast<uint64_t>(function);
    last.stream = reinterpret_cast<uint64_t>(config->stream);
    for (int i = 0; i < 3; ++i) {
        last.grid[i] = config->grid[i];
        last.block[i] = config->block[i];
    }
    last.shared_bytes = config->shared_bytes;
    last.attribute_count = config->attribute_count;
    // The extension's list of parameters has room for all, and ends with null.
    last.parameter_count = 0;
    for (int i = 0; i < 40 && parameters[i] != nullptr; ++i)
        last.parameters[last.parameter_count++] = *static_cast<const uint64_t*>(parameters[i]);
    return status;
}

int cuCtxGetDevice(int* current) {
    *current = device;
    return device < 0 ? 201 : 0;
}

int cuGetErrorString(int error, const char** text) {
    *text = error == 700 ? "an illegal memory access was encountered" : nullptr;
    return *text == nullptr;
}
}
