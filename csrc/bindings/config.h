// SPDX-License-Identifier: MIT
// The binding of the CUDA kernels' configurations, for the benchmark that sweeps them. Nothing of the library calls it.
#pragma once

#ifdef FASTDIFF_CUDA

#include <string>

#include "../cuda/config.h"
#include "common.h"

namespace fastdiff::bindings {

inline py::dict as_dict(const CudaConfig& config) {
    py::dict fields;
    fields["step"] = config.step;
    fields["draw"] = config.draw;
    fields["randn"] = config.randn;
    fields["sum"] = config.sum;
    fields["select"] = config.select;
    return fields;
}

// None puts the table's choice back.
inline void take_cuda_config(const std::optional<std::array<int, 5>>& sizes) {
    if (!sizes.has_value()) {
        (void)set_cuda_config(nullptr);
        return;
    }
    const CudaConfig config{(*sizes)[0], (*sizes)[1], (*sizes)[2], (*sizes)[3], (*sizes)[4]};
    TORCH_CHECK_VALUE(set_cuda_config(&config), "_set_cuda_config: sizes are ", config.step, ", ", config.draw, ", ",
                      config.randn, ", ", config.sum, " and ", config.select,
                      ", expected threads of step, draw, randn and sum, each a power of two from 32 to ", kMostThreads,
                      ", and elements a thread of select, one from 1 to 1024; choose such");
}

inline void define_config(py::module_& m) {
    m.def(
        "_cuda_config", [](int device) { return as_dict(cuda_config(device)); }, py::arg("device"),
        "The sizes of the kernels' blocks on a device; see csrc/cuda/config.h.");
    m.def("_set_cuda_config", &take_cuda_config, py::arg("sizes"),
          "Replaces them on every device: step, draw, randn, sum, select; None puts the table's choice back.");
}

}  // namespace fastdiff::bindings

#endif
