// SPDX-License-Identifier: MIT
// Exports of C++ constants that Python holds too, and of the affine loop's record, for tests and tools.
#pragma once

#include "common.h"

namespace fastdiff::bindings {

// Switch the record of the affine loop's runs on or off; return the distinct runs so far as (term masks of the outputs,
// guided, prediction given, compiled).
inline py::list record_affine_loop(bool on) {
    py::list runs;
    for (const AffineTrace& trace : record_affine_traces(on)) {
        py::tuple terms(trace.outputs);
        for (int o = 0; o < trace.outputs; ++o) terms[o] = trace.terms >> (o * kColumns) & ((1u << kColumns) - 1);
        runs.append(py::make_tuple(terms, trace.guided, trace.prediction_given, trace.compiled));
    }
    return runs;
}

inline void define_layout(py::module_& m) {
    m.def("_record_affine_loop", &record_affine_loop, py::arg("on"),
          "Switches the record of the affine loop's runs; returns the runs so far. For tests and tools.");
}

}  // namespace fastdiff::bindings
