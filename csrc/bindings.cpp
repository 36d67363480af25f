// SPDX-License-Identifier: MIT
// The extension module and the general bindings, the only translation unit that includes torch/extension.h, whose
// headers cost most of its compile time.
#include <cstdlib>
#include <string>
#include <utility>

#include "bench/copy_binding.h"
#include "bindings/diffusion_loss.h"
#include "bindings/gram.h"
#include "bindings/layout.h"
#include "bindings/log_prob.h"
#include "bindings/output_allocator.h"
#include "bindings/randn.h"
#include "bindings/reduce.h"
#ifdef FASTDIFF_CUDA
#include "bindings/config.h"
#endif
#include "bindings/step.h"
#include "bindings/triton.h"
#include "dropin/dropin.h"
#include "torch_bits/seeded_sum.h"
#include "torch_bits/torch_normal.h"

namespace {

using namespace fastdiff::bindings;

PyMethodDef methods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&step)), METH_FASTCALL | METH_KEYWORDS,
     "step(**fields): the fused step's tensors, or the reason why it was declined (see csrc/bindings/step.h)."},
    {"log_prob", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&log_prob)), METH_FASTCALL | METH_KEYWORDS,
     "log_prob(replay, mean, **fields): a step with its log-probability, or the reason why it was declined (see "
     "csrc/bindings/log_prob.h)."},
    {"diffusion_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&diffusion_loss)),
     METH_FASTCALL | METH_KEYWORDS,
     "diffusion_loss(loss, c, factor, **fields): the training loss or its gradients, or the reason why it was declined "
     "(see csrc/bindings/diffusion_loss.h)."},
    {"recorded_diffusion_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&recorded_diffusion_loss)),
     METH_FASTCALL | METH_KEYWORDS,
     "recorded_diffusion_loss(loss, c, reduction, weights, **fields): the reduced loss for autograd, or the reason why "
     "it was declined (see csrc/bindings/diffusion_loss.h)."},
    {"indices_in_range", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&indices_in_range)), METH_FASTCALL,
     "indices_in_range(indices, batch, end): whether they can be read here and are 0 to end - 1."},
    {"torch_randn", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&torch_randn)), METH_FASTCALL,
     "torch's normal numbers as a new tensor; None where torch has to draw them (see csrc/torch_bits/torch_normal.h)."},
    {"torch_randn_", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&torch_randn_)), METH_FASTCALL,
     "torch's normal numbers into a tensor; False where torch has to draw them (see csrc/torch_bits/torch_normal.h)."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    const char* wanted = std::getenv("FASTDIFF_CPU");
    cpu_build = fastdiff::select_cpu_build(wanted);
    if (cpu_build.name == nullptr)
        throw py::import_error(std::string("fastdiff: FASTDIFF_CPU is '") + wanted +
                               "', expected generic, avx2 or avx512, and one that this processor has; unset it to let "
                               "fastdiff choose");
    m.attr("cpu_build") = cpu_build.name;
    m.attr("step_fields") = py::reinterpret_steal<py::tuple>(step_field_names());
#ifdef FASTDIFF_CUDA
    m.attr("cuda") = true;
    if (!define_config(m.ptr())) throw py::error_already_set();
#else
    m.attr("cuda") = false;
#endif
    // C++ errors become Python's in this module, not in pybind11's handlers, which all extensions of a process share.
    m.def("randn", torch::wrap_pybind_function(randn), py::arg("out"), py::arg("seeds"), py::arg("steps"),
          py::arg("step"), py::arg("purpose"), py::arg("stream"));
    m.def("_copy_kernel", torch::wrap_pybind_function(copy_kernel), py::arg("src"), py::arg("dst"),
          py::arg("nontemporal"), "Copies src to dst, for benchmarks; see csrc/bench/copy_binding.h.");
    m.def("held_memory", [] { return free_blocks().cached_bytes(); }, "Bytes that are cached for new outputs.");
    m.def("release_memory", [] { return free_blocks().release(); }, "Free the cached blocks; returns their bytes.");
    m.def("kept_memory_limit", [] { return free_blocks().limit(); }, "Bytes that may be cached.");
    m.def(
        "limit_kept_memory", [](size_t bytes) { free_blocks().set_limit(bytes); }, py::arg("bytes"),
        "Set how many bytes may be cached, and free the cached blocks.");
    m.def(
        "_nontemporal_above", [](int64_t bytes) { return std::exchange(fastdiff::nontemporal_above, bytes); },
        py::arg("bytes"),
        "Sets the bytes above which a step uses nontemporal stores, for tests; returns the previous value.");
    m.def(
        "trust_torch_randn", [](bool trusted) { return std::exchange(draws_as_torch, trusted); },
        py::arg("trusted") = true,
        "Say whether torch_randn draws what torch draws here, so that steps in C++ draw by it; returns what held "
        "before.");
    define_layout(m);
    define_reductions(m);
    define_gram(m);
    define_seeded_sum(m);
    m.def("enable_triton", torch::wrap_pybind_function(enable_triton), py::arg("guards"),
          py::arg("driver") = py::none(), py::arg("host_memory") = false,
          "Launch Triton's compiled step kernels from C++; see csrc/bindings/triton.h.");
    m.def("disable_triton", torch::wrap_pybind_function(disable_triton));
    m.def("set_triton_block", torch::wrap_pybind_function(fastdiff::triton::set_block), py::arg("device"),
          py::arg("element_size"), py::arg("draws"), py::arg("block"), "Set how many elements a program takes.");
    m.def("install_triton_kernel", torch::wrap_pybind_function(install_triton_kernel), py::arg("key"),
          py::arg("function"), py::arg("threads"), py::arg("shared_bytes"), py::arg("layout"),
          "Keep a compiled kernel for calls of a key that step() returned.");
    m.def("clear_triton_kernels", torch::wrap_pybind_function(fastdiff::triton::clear_kernels),
          "Forget all kernels and blocks.");
    fastdiff::dropin::define(m);
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}
