// SPDX-License-Identifier: MIT
#include "triton.h"

#include <pybind11/stl.h>

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

// Launch compiled kernels from now on; returns why that cannot be, or an empty string.
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

void install(const py::bytes& key, uintptr_t function, unsigned threads, unsigned shared_bytes,
             const std::string& layout) {
    const std::string bytes = key;
    triton::KernelKey found;
    if (bytes.size() != found.bytes.size() || layout.size() != size_t{triton::kParameters})
        throw py::value_error("install_triton_kernel: got a key of " + std::to_string(bytes.size()) +
                              " bytes and a layout of " + std::to_string(layout.size()) + " parameters, expected " +
                              std::to_string(found.bytes.size()) + " and " + std::to_string(triton::kParameters) +
                              "; pass the key that step() returned");
    std::memcpy(found.bytes.data(), bytes.data(), bytes.size());
    triton::StepKernel kernel;
    kernel.function = reinterpret_cast<void*>(function);
    kernel.threads = threads;
    kernel.shared_bytes = shared_bytes;
    std::memcpy(kernel.layout.data(), layout.data(), layout.size());
    triton::install_kernel(found, kernel);
}

}  // namespace

bool triton_serves(const at::Tensor& sample) {
    const TritonState& now = state();
    if (!now.enabled || !(sample.is_cuda() || (now.host_memory && sample.is_cpu()))) return false;
    for (const AttributeGuard& guard : now.guards)
        if (!guard.holds()) return false;
    // Kernels are loaded into one device's context.
    return sample.is_cpu() || triton::current_device() == sample.get_device();
}

void define_triton(py::module_& module) {
    module.def("enable_triton", &enable_triton, py::arg("guards"), py::arg("driver") = py::none(),
               py::arg("host_memory") = false,
               "Launch Triton's compiled step kernels from C++ while each (owner, attribute, expected) of the guards "
               "holds; returns why that cannot be, or an empty string. `driver` and `host_memory`: for tests.");
    module.def("disable_triton", [] { state() = TritonState(); }, "Launch no kernel of Triton's from C++ any more.");
    module.def("set_triton_block", &triton::set_block, py::arg("device"), py::arg("element_size"), py::arg("draws"),
               py::arg("block"), "Set how many elements a program takes.");
    module.def("install_triton_kernel", &install, py::arg("key"), py::arg("function"), py::arg("threads"),
               py::arg("shared_bytes"), py::arg("layout"),
               "Keep a compiled kernel for calls of a key that step() returned; see csrc/triton/step_kernels.h.");
    module.def("clear_triton_kernels", &triton::clear_kernels, "Forget all kernels and blocks.");
}

}  // namespace fastdiff::bindings
