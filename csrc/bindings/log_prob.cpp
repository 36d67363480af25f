// SPDX-License-Identifier: MIT
// One step with its log-probability: read its tensors into LogProbArgs, and launch. As in step.cpp, a call that the
// loops cannot take as it is is declined, and fastdiff/ops/log_prob.py checks it and makes it canonical.
#include "log_prob.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "current_stream.h"
#include "output_allocator.h"
#include "step_args_builder.h"
#ifdef FASTDIFF_CUDA
#include "../cuda/log_prob_cuda.h"
#endif

namespace fastdiff::bindings {

namespace py = pybind11;

namespace {

// Elements up to which one thread works alone: a block steps twice, so half of a step's number.
constexpr int64_t kLogProbGrain = 32768;

bool log_prob_complete(const StepCall& call, bool replay) {
    const bool noisy = (call.noise != nullptr) != (call.seeds != nullptr);
    return call.sample != nullptr && call.model_output != nullptr && call.table != nullptr &&
           (call.uncond != nullptr) == call.guidance_scale.given && call.variance == nullptr &&
           call.variance_kind == 0 && call.keeps >= 0 && call.keeps < kMaxOutputs && !call.write_history &&
           !call.triton && call.model_input == nullptr && call.mask == nullptr && call.parts == 1 &&
           (!call.out.given || call.out.count == call.keeps + 1) && noisy &&
           !(replay && (call.noise == nullptr || call.keeps != 0));
}

// Return whether the one row of all samples adds noise, where that can be read here; Python names the mistake if not.
bool may_add_noise(const StepCall& call, const StepArgs& step) {
    if (call.row_index.tensor != nullptr || !call.sample->is_cpu()) return true;
    const int64_t at = step.row * kRowWidth + kPrevSample + kNoise;
    return call.table->scalar_type() == at::kDouble ? static_cast<const double*>(step.table)[at] != 0.0
                                                    : static_cast<const float*>(step.table)[at] != 0.0F;
}

struct LogProbResult {
    at::Tensor log_prob;
    std::array<at::Tensor, kMaxOutputs> outputs;
};

void run_on_cpu(LogProbArgs args) {
    const int64_t blocks = args.step.batch * blocks_of(args.step.inner);
    const std::unique_ptr<double[]> partials(new double[static_cast<size_t>(blocks)]);
    args.partials = partials.get();
    const int64_t grain = args.step.draw.seeds == nullptr ? kLogProbGrain : kDrawGrain;
    if (args.step.batch * args.step.inner <= grain) {
        cpu_build.log_prob_blocks(args, 0, blocks);
        cpu_build.finish_log_prob(args, 0, args.step.batch);
        return;
    }
    const py::gil_scoped_release release;
    const int64_t share = std::max<int64_t>(1, grain / std::min<int64_t>(args.step.inner, kBlock));
    at::parallel_for(0, blocks, share,
                     [&](int64_t begin, int64_t end) { cpu_build.log_prob_blocks(args, begin, end); });
    cpu_build.finish_log_prob(args, 0, args.step.batch);
}

Decline run_log_prob(const StepCall& call, bool replay, bool mean, LogProbResult* result) {
    if (!log_prob_complete(call, replay)) return Decline::kArgument;
    const at::Tensor& sample = *call.sample;
    if (!on_served_device(sample)) return Decline::kDevice;
    if (!call.in_operator && c10::impl::TorchDispatchModeTLS::any_modes_set()) return Decline::kModes;
    StepArgsBuilder builder(sample, *call.table, sample.is_cpu());
    LogProbArgs args{};
    args.replay = replay;
    args.mean = mean;
    StepArgs& step = builder.args;
    builder.row_index(call.row_index);
    builder.guidance_scale(call.guidance_scale);
    builder.threshold(call.threshold);
    builder.draw(call.seeds, call.noise_step, call.purpose);
    StreamTypes& types = step.types;
    step.model_output = builder.like_model(call.model_output, &types.model_output);
    step.uncond = builder.like_model(call.uncond, &types.uncond);
    step.noise = builder.like_sample(call.noise, &types.noise);
    for (size_t j = 0; j < kRegisters; ++j) step.history[j] = builder.like_sample(call.history[j], &types.history[j]);
    builder.require(sample.dim() > 0 && (!builder.good() || step.batch == sample.size(0)), Decline::kLayout);
    bool written_given = false;
    for (int64_t o = 0; !replay && o <= call.keeps; ++o) {
        const auto slot = static_cast<size_t>(o);
        const at::ScalarType type = call.out.dtypes[slot];
        written_given = written_given || call.out.tensors[slot] != nullptr;
        // A skipped sample's kept outputs are not written, so new ones would hold anything: Python makes them.
        builder.require(o == 0 || step.rows == nullptr || call.out.tensors[slot] != nullptr, Decline::kArgument);
        builder.require(type == at::ScalarType::Undefined || dtype_of(type).has_value(), Decline::kDtype);
    }
    if (!builder.good()) return builder.declined;
    if (!may_add_noise(call, step)) return Decline::kValue;
    for (int64_t o = 0; !replay && o <= call.keeps; ++o) {
        const auto slot = static_cast<size_t>(o);
        const MaybeTensor given = call.out.tensors[slot];
        const at::ScalarType type = call.out.dtypes[slot];
        result->outputs[slot] =
            given != nullptr ? *given
                             : new_output(sample, type == at::ScalarType::Undefined ? sample.scalar_type() : type);
        builder.output(result->outputs[slot]);
    }
    builder.finalize_dtypes();
    if (builder.good() && written_given) builder.require(!builder.overlaps_partially(), Decline::kOverlap);
    if (!builder.good()) return builder.declined;
    for (const MaybeTensor written : call.out.tensors)
        if (!replay && written != nullptr) bump_version(*written);
    const at::ScalarType compute = call.table->scalar_type();
    result->log_prob = at::empty({sample.size(0)}, sample.options().dtype(compute));
    args.step = step;
    args.out = result->log_prob.data_ptr();
    if (sample.is_cpu()) {
        // A list of history slots is the caller's: without the GIL another thread may empty it.
        std::array<at::Tensor, kRegisters> held;
        for (size_t j = 0; j < held.size(); ++j)
            if (call.history[j] != nullptr) held[j] = *call.history[j];
        run_on_cpu(args);
        return Decline::kNone;
    }
#ifdef FASTDIFF_CUDA
    const at::Tensor partials = at::empty({step.batch * blocks_of(step.inner)}, result->log_prob.options());
    args.partials = partials.data_ptr();
    const char* error = launch_log_prob(args, sample.get_device(), current_stream(sample));
    if (error != nullptr) throw std::runtime_error(std::string("step_log_prob: the CUDA launch failed: ") + error);
#endif
    return Decline::kNone;
}

}  // namespace

PyObject* log_prob(PyObject* /*module*/, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(positional == 2, "log_prob: got ", positional, " positional arguments, expected 2");
    const bool replay = values[0] == Py_True, mean = values[1] == Py_True;
    StepCall call;
    if (!read_step_call(values + 2, 0, names, &call))
        return PyUnicode_InternFromString(decline_name(Decline::kArgument));
    LogProbResult made;
    const Decline declined = run_log_prob(call, replay, mean, &made);
    if (declined != Decline::kNone) return PyUnicode_InternFromString(decline_name(declined));
    const Py_ssize_t outputs = replay ? 0 : call.keeps + 1;
    PyObject* result = PyTuple_New(1 + outputs);
    if (result == nullptr) throw python_error();
    PyTuple_SET_ITEM(result, 0, THPVariable_Wrap(std::move(made.log_prob)));
    for (Py_ssize_t o = 0; o < outputs; ++o)
        PyTuple_SET_ITEM(result, 1 + o, THPVariable_Wrap(std::move(made.outputs[static_cast<size_t>(o)])));
    return result;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
