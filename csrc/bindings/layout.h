// SPDX-License-Identifier: MIT
// Constants that Python holds too, and the affine loop's record, for tests and tools.
#pragma once

#include <map>
#include <string>

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

// Layout and enumerations by the names that fastdiff/ has for them.
inline std::map<std::string, int> constants() {
    return {
        {"PREDICTION_SAMPLE", kPredictionSample},
        {"PREDICTION_OUTPUT", kPredictionOutput},
        {"CLIP", kClip},
        {"VARIANCE_OFFSET", kVarianceOffset},
        {"VARIANCE_SLOPE", kVarianceSlope},
        {"MODEL_INPUT_SCALE", kModelInputScale},
        {"STORE_0", kStore0},
        {"STORE_1", kStore1},
        {"PREV_SAMPLE", kPrevSample},
        {"KEEP_0", kKeep0},
        {"KEEP_1", kKeep1},
        {"ROW_WIDTH", kRowWidth},
        {"NUM_REGISTERS", kRegisters},
        {"COLUMNS", kColumns},
        {"column sample", kSample},
        {"column model_output", kModelOutput},
        {"column prediction", kPrediction},
        {"column history_0", kHistory0},
        {"column noise", kNoise},
        {"Variance.FIXED", static_cast<int>(Variance::kFixed)},
        {"Variance.LEARNED_RANGE", static_cast<int>(Variance::kLearnedRange)},
        {"Variance.LEARNED", static_cast<int>(Variance::kLearned)},
        {"sum MEAN", static_cast<int>(Sum::kMean)},
        {"sum STD", static_cast<int>(Sum::kStd)},
        {"sum NORM", static_cast<int>(Sum::kNorm)},
        {"sum DOT", static_cast<int>(Sum::kDot)},
        {"sum BLOCK", kBlock},
        {"sum LANES", kLanes},
    };
}

inline void define_layout(py::module_& m) {
    m.def("_record_affine_loop", &record_affine_loop, py::arg("on"),
          "Switches the record of the affine loop's runs; returns the runs so far. For tests and tools.");
    m.def("_constants", &constants, "Layout and enumerations, by the names that fastdiff has for them. For tests.");
}

}  // namespace fastdiff::bindings
