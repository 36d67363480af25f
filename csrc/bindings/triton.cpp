// SPDX-License-Identifier: MIT
#include "triton.h"

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../triton/driver.h"

namespace fastdiff::bindings {

namespace py = pybind11;

namespace {

// An attribute that has to be the same object as when launches were enabled; a list has to be empty too.
struct AttributeGuard {
    py::object owner, name, expected;

    bool holds() const {
        PyObject* const value = PyObject_GetAttr(owner.ptr(), name.ptr());
        if (value == nullptr) {
            PyErr_Clear();
            return false;
        }
        Py_DECREF(value);  // the owner keeps it
        return value == expected.ptr() && (!PyList_CheckExact(value) || PyList_GET_SIZE(value) == 0);
    }
};

struct TritonState {
    bool enabled = false;
    bool host_memory = false;  // the driver takes host memory: tests launch CPU tensors
    std::vector<AttributeGuard> guards;
};

// Never destroyed: it holds Python objects, and the interpreter ends first.
TritonState& state() {
    static auto* const made = new TritonState;
    return *made;
}

}  // namespace

std::string enable_triton(const py::list& guards, const std::optional<std::string>& driver, bool host_memory) {
    const std::string problem = triton::load_driver(driver.has_value() ? driver->c_str() : nullptr);
    TritonState next;
    for (const py::handle entry : guards) {
        const auto guard = py::reinterpret_borrow<py::tuple>(entry);
        next.guards.push_back({guard[0], guard[1], guard[2]});
    }
    next.enabled = problem.empty();
    next.host_memory = host_memory;
    state() = std::move(next);
    return problem;
}

void install_triton_kernel(const py::bytes& key, uintptr_t function, unsigned threads, unsigned shared_bytes,
                           const std::string& layout) {
    const std::string bytes = key;
    triton::KernelKey found;
    TORCH_CHECK_VALUE(bytes.size() == found.bytes.size() && layout.size() == size_t{triton::kParameters},
                      "install_triton_kernel: got a key of ", bytes.size(), " bytes and a layout of ", layout.size(),
                      " parameters, expected ", found.bytes.size(), " and ", triton::kParameters,
                      "; pass the key that step() returned");
    std::memcpy(found.bytes.data(), bytes.data(), bytes.size());
    triton::StepKernel kernel;
    kernel.function = reinterpret_cast<void*>(function);
    kernel.threads = threads;
    kernel.shared_bytes = shared_bytes;
    std::memcpy(kernel.layout.data(), layout.data(), layout.size());
    triton::install_kernel(found, kernel);
}

void disable_triton() { state() = TritonState(); }

bool triton_serves(const at::Tensor& sample) {
    const TritonState& now = state();
    if (!now.enabled || !(sample.is_cuda() || (now.host_memory && sample.is_cpu()))) return false;
    for (const AttributeGuard& guard : now.guards)
        if (!guard.holds()) return false;
    // Kernels are loaded into one device's context.
    return sample.is_cpu() || triton::current_device() == sample.get_device();
}

}  // namespace fastdiff::bindings
