// SPDX-License-Identifier: MIT
// The binding of the step.
//
// It runs a call whose tensors it finds plain: same dtype, device, shape and dense strides, nothing to convert.
// Anything else it declines by returning None, without a message: fastdiff/ops/ then checks the call, says what is
// wrong or makes it plain, and calls again. So checks are written once, and this file never reads what it should not.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <string>

#include "blocks.h"
#include "call.h"
#ifdef FASTDIFF_CUDA
#include "../cuda/step_cuda.h"
#endif

namespace fastdiff::bindings {

// Elements up to which one thread works alone. Measured (DDIM with guidance, float32, a 2-core EPYC): 65536 elements
// take 9 µs on one thread, 98304 take 16 on one and 9 on two.
constexpr int64_t kGrain = 65536;

inline void launch(const at::Tensor& sample, const std::array<MaybeTensor, kRegisters>& history, const StepArgs& args,
                   int64_t stream) {
    const int64_t total = args.batch * args.inner;
    if (sample.is_cpu()) {
        const auto step_range = cpu_build.step_range;
        const int64_t grain = args.draw.seeds == nullptr ? kGrain : kDrawGrain;
        if (total <= grain) {
            step_range(args, 0, total);
            return;
        }
        // The call holds its arguments and `outputs` what is written. A list of registers is the caller's: without the
        // GIL another thread may empty it, and with it go the tensors that nobody else holds.
        std::array<at::Tensor, kRegisters> held;
        for (size_t j = 0; j < history.size(); ++j)
            if (history[j] != nullptr) held[j] = *history[j];
        const py::gil_scoped_release release;
        at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { step_range(args, begin, end); });
        return;
    }
#ifdef FASTDIFF_CUDA
    const char* error = launch_step(args, sample.get_device(), reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("step: the CUDA launch failed: ") + error);
#else
    (void)stream;
#endif
}

// What one step is asked for. Tensors may be null, and objects None; see `step` below.
struct StepRequest {
    MaybeTensor sample = nullptr, model_output = nullptr, table = nullptr;
    PyObject* row = nullptr;
    MaybeTensor uncond = nullptr;
    PyObject* guidance = Py_None;
    std::array<MaybeTensor, kRegisters> history{};
    MaybeTensor noise = nullptr, variance = nullptr, threshold = nullptr;
    int64_t variance_kind = 0, keeps = 0;
    bool outs_given = false;
    std::array<MaybeTensor, kMaxOutputs> outs{};
    // Of new outputs; `Undefined` for the samples' own.
    std::array<at::ScalarType, kMaxOutputs> made = {at::ScalarType::Undefined, at::ScalarType::Undefined,
                                                    at::ScalarType::Undefined};
    int64_t stream = 0;
    MaybeTensor seeds = nullptr;
    PyObject* noise_step = nullptr;  // an integer or a tensor of them
    int64_t purpose = 0;
    MaybeTensor model_input = nullptr;
    bool scatter = false;

    // Of a new output.
    at::ScalarType type_of(int64_t o) const {
        return made[o] == at::ScalarType::Undefined ? sample->scalar_type() : made[o];
    }

    // Whether what has to be there is, and only what may be together.
    bool complete() const {
        for (const at::ScalarType type : made)
            if (type != at::ScalarType::Undefined && !dtype_of(type).has_value()) return false;
        return sample != nullptr && model_output != nullptr && table != nullptr &&
               (uncond != nullptr) == (guidance != Py_None) && (variance != nullptr) == (variance_kind != 0) &&
               keeps >= 0 && keeps < kMaxOutputs && variance_kind >= 0 && variance_kind <= 2 &&
               (noise == nullptr || seeds == nullptr) && (keeps == 0 || !scatter) && served(*sample);
    }
};

using Outputs = std::array<at::Tensor, kMaxOutputs>;

// Takes a step into `outputs`; false, with nothing done, where the call is not plain.
inline bool take_step(const StepRequest& request, Outputs* outputs) {
    // A dispatch mode, a tracer's for one, has to see an operator.
    if (!request.complete() || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
    const at::Tensor& sample = *request.sample;
    Call call(sample, *request.table);
    StepArgs& args = call.args;
    args.variance_kind = static_cast<Variance>(request.variance_kind);
    call.row(request.row);
    call.guidance(request.guidance);
    call.threshold(request.threshold);
    call.draw(request.seeds, request.noise_step, request.purpose);
    StreamTypes& types = args.types;
    args.model_output = call.like_model(request.model_output, &types.model_output);
    args.uncond = call.like_model(request.uncond, &types.uncond);
    args.variance = call.like_model(request.variance, &types.variance);
    args.noise = call.like_sample(request.noise, &types.noise);
    for (size_t j = 0; j < kRegisters; ++j) args.history[j] = call.like_sample(request.history[j], &types.history[j]);
    if (request.scatter) call.scatter();
    // A skipped sample's kept tensors are not written, so new ones would hold anything: Python makes them.
    for (int64_t o = 1; o <= request.keeps && args.rows != nullptr; ++o)
        call.plain = call.plain && request.outs[o] != nullptr;
    if (!call.plain) return false;

    for (int64_t o = 0; o <= request.keeps; ++o) {
        const MaybeTensor given = request.outs[o];
        (*outputs)[o] = given != nullptr ? *given : new_output(sample, request.type_of(o));
        call.output((*outputs)[o]);
    }
    call.settle();
    call.model_input(request.model_input);
    const bool may_overlap = request.outs_given || request.scatter || request.model_input != nullptr;
    if (!call.plain || (may_overlap && call.overlaps_badly())) return false;
    // As every operation that writes in place: so that autograd finds a tensor changed that it has saved.
    for (const MaybeTensor& written : request.outs)
        if (written != nullptr) count_change(*written);
    for (const MaybeTensor& kept : request.history)
        if (request.scatter && kept != nullptr) count_change(*kept);
    if (request.model_input != nullptr) count_change(*request.model_input);
    call.join_samples();
    launch(sample, request.history, args, request.stream);
    return true;
}

constexpr Py_ssize_t kArguments = 19;

// step(sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind, keeps,
// out, stream, seeds, noise_step, purpose, model_input, scatter); see the top of this file. `row` and `noise_step` are
// integers or tensors of them; `history` holds up to four tensors or None; `out` the outputs to write, None for a new
// one like the samples and a dtype for a new one of it; `scatter` says that kept tensors go to the registers in
// `history` that the rows name. Taken by CPython's fast calling convention: unpacking by signature would cost as much
// as the call.
inline PyObject* step(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == kArguments, "step: expected ", kArguments, " arguments, got ", count);
    Arguments given(objects);
    StepRequest request;
    request.sample = given.tensor();
    request.model_output = given.tensor();
    request.table = given.tensor();
    request.row = given.object();
    request.uncond = given.tensor();
    request.guidance = given.object();
    given.tensors(&request.history);
    request.noise = given.tensor();
    request.variance = given.tensor();
    request.threshold = given.tensor();
    request.variance_kind = given.integer();
    request.keeps = given.integer();
    const int64_t outs = given.tensors(&request.outs, &request.made);
    request.outs_given = outs != -1;
    request.stream = given.integer();
    request.seeds = given.tensor();
    request.noise_step = given.object();
    request.purpose = given.integer();
    request.model_input = given.tensor();
    request.scatter = given.flag();
    Outputs outputs;
    if (!given.good || (outs != -1 && outs != request.keeps + 1) || !take_step(request, &outputs)) Py_RETURN_NONE;

    PyObject* result = PyTuple_New(request.keeps + 1);
    if (result == nullptr) throw python_error();
    for (int64_t o = 0; o <= request.keeps; ++o) PyTuple_SET_ITEM(result, o, THPVariable_Wrap(std::move(outputs[o])));
    return result;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
