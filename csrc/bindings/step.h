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

constexpr Py_ssize_t kArguments = 19;

// step(sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind, keeps,
// out, stream, seeds, noise_step, purpose, model_input, scatter); see the top of this file. `row` and `noise_step` are
// integers or tensors of them; `history` holds up to four tensors or None; `out` the outputs to write, None for a new
// one; `scatter` says that kept tensors go to the registers in `history` that the rows name. Taken by CPython's fast
// calling convention: unpacking by signature would cost as much as the call.
inline PyObject* step(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == kArguments, "step: expected ", kArguments, " arguments, got ", count);
    Arguments given(objects);
    const MaybeTensor sample = given.tensor(), model_output = given.tensor(), table = given.tensor();
    PyObject* row = given.object();
    const MaybeTensor uncond = given.tensor();
    PyObject* guidance = given.object();
    std::array<MaybeTensor, kRegisters> history{};
    given.tensors(&history);
    const MaybeTensor noise = given.tensor(), variance = given.tensor(), threshold = given.tensor();
    const int64_t variance_kind = given.integer(), keeps = given.integer();
    std::array<MaybeTensor, kMaxOutputs> out{};
    const int64_t outs = given.tensors(&out);
    const int64_t stream = given.integer();
    const MaybeTensor seeds = given.tensor();
    PyObject* noise_step = given.object();
    const int64_t purpose = given.integer();
    const MaybeTensor model_input = given.tensor();
    const bool scatter = given.flag();
    const bool complete = given.good && sample != nullptr && model_output != nullptr && table != nullptr &&
                          (uncond != nullptr) == (guidance != Py_None) &&
                          (variance != nullptr) == (variance_kind != 0) && keeps >= 0 && keeps < kMaxOutputs &&
                          variance_kind >= 0 && variance_kind <= 2 && (outs == -1 || outs == keeps + 1) &&
                          (noise == nullptr || seeds == nullptr) && (keeps == 0 || !scatter) && served(*sample);
    // A dispatch mode, a tracer's for one, has to see an operator.
    if (!complete || c10::impl::TorchDispatchModeTLS::any_modes_set()) Py_RETURN_NONE;

    Call call(*sample, *table);
    StepArgs& args = call.args;
    args.variance_kind = static_cast<Variance>(variance_kind);
    call.row(row);
    call.guidance(guidance);
    call.threshold(threshold);
    call.draw(seeds, noise_step, purpose);
    args.model_output = call.like_model(model_output);
    args.uncond = call.like_model(uncond);
    args.variance = call.like_model(variance);
    args.noise = call.like_sample(noise);
    for (size_t j = 0; j < history.size(); ++j) args.history[j] = call.like_sample(history[j]);
    if (scatter) call.scatter();
    // A skipped sample's kept tensors are not written, so new ones would hold anything: Python makes them.
    for (int64_t o = 1; o <= keeps && args.rows != nullptr; ++o) call.plain = call.plain && out[o] != nullptr;
    if (!call.plain) Py_RETURN_NONE;

    std::array<at::Tensor, kMaxOutputs> outputs;
    for (int64_t o = 0; o <= keeps; ++o) {
        outputs[o] = out[o] != nullptr ? *out[o] : new_output(*sample);
        call.output(outputs[o]);
    }
    call.model_input(model_input);
    const bool may_overlap = outs != -1 || scatter || model_input != nullptr;
    if (!call.plain || (may_overlap && call.overlaps_badly())) Py_RETURN_NONE;
    // As every operation that writes in place: so that autograd finds a tensor changed that it has saved.
    for (int64_t o = 0; outs != -1 && o <= keeps; ++o)
        if (out[o] != nullptr) count_change(*out[o]);
    for (const MaybeTensor& kept : history)
        if (scatter && kept != nullptr) count_change(*kept);
    if (model_input != nullptr) count_change(*model_input);
    call.join_samples();
    launch(*sample, history, args, stream);

    PyObject* result = PyTuple_New(keeps + 1);
    if (result == nullptr) throw python_error();
    for (int64_t o = 0; o <= keeps; ++o) PyTuple_SET_ITEM(result, o, THPVariable_Wrap(std::move(outputs[o])));
    return result;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
