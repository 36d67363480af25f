// SPDX-License-Identifier: MIT
#include "driver.h"

#include <dlfcn.h>

#include <utility>

namespace fastdiff::triton {

namespace {

// CUlaunchConfig of the driver's interface, which is stable since CUDA 11.8. tests/kernels/test_triton_driver.py
// compares the two where the toolkit is installed.
struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};

struct Driver {
    std::string path;
    int (*launch)(const LaunchConfig* config, void* function, void** parameters, void** extra) = nullptr;
    int (*device)(int* device) = nullptr;
    int (*error_text)(int error, const char** text) = nullptr;
};

Driver driver;

// Look a symbol up and store its address; false where the library has none.
template <typename Function>
bool find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
}

}  // namespace

std::string load_driver(const char* path) {
    const std::string name = path == nullptr ? "libcuda.so.1" : path;
    if (driver.launch != nullptr && driver.path == name) return "";
    void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return "the CUDA driver cannot be loaded: " + std::string(dlerror());
    Driver loaded;
    loaded.path = name;
    if (!find(library, "cuLaunchKernelEx", &loaded.launch) || !find(library, "cuCtxGetDevice", &loaded.device) ||
        !find(library, "cuGetErrorString", &loaded.error_text))
        return name + " has no cuLaunchKernelEx, as before CUDA 11.8";
    driver = std::move(loaded);  // never closed: kernels of it are kept
    return "";
}

bool driver_loaded() { return driver.launch != nullptr; }

int current_device() {
    int device = -1;
    return driver.device(&device) == 0 ? device : -1;
}

const char* launch_function(void* function, unsigned programs, unsigned threads, unsigned shared_bytes, void* stream,
                            void** parameters) {
    const LaunchConfig config = {programs, 1, 1, threads, 1, 1, shared_bytes, stream, nullptr, 0};
    const int error = driver.launch(&config, function, parameters, nullptr);
    if (error == 0) return nullptr;
    const char* text = nullptr;
    return driver.error_text(error, &text) == 0 && text != nullptr ? text : "an unknown error of the CUDA driver";
}

}  // namespace fastdiff::triton
