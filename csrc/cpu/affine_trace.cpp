// SPDX-License-Identifier: MIT
// Record of the affine loop's runs, off unless a test or tools/affine_forms.py asks for it.
#include <mutex>
#include <set>
#include <tuple>

#include "cpu.h"

namespace fastdiff {

namespace {

bool operator<(const AffineTrace& a, const AffineTrace& b) {
    return std::tie(a.terms, a.outputs, a.guided, a.prediction_given, a.compiled) <
           std::tie(b.terms, b.outputs, b.guided, b.prediction_given, b.compiled);
}

std::mutex mutex;
std::set<AffineTrace, bool (*)(const AffineTrace&, const AffineTrace&)> traces(operator<);

}  // namespace

bool affine_traced = false;

void trace_affine(const AffineTrace& trace) {
    const std::lock_guard<std::mutex> lock(mutex);
    traces.insert(trace);
}

std::vector<AffineTrace> record_affine_traces(bool on) {
    const std::lock_guard<std::mutex> lock(mutex);
    affine_traced = on;
    std::vector<AffineTrace> found(traces.begin(), traces.end());
    traces.clear();
    return found;
}

}  // namespace fastdiff
