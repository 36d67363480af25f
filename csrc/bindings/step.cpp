// SPDX-License-Identifier: MIT
// One call of the fused step: read its tensors into StepArgs, and launch.
//
// It runs a call whose tensors the loops can take as they are, and declines any other with the reason found first:
// fastdiff/ops/ then checks the call, names what is wrong, or makes it canonical and calls again. So checks are written
// once, and this file never reads what it should not.
#include "step.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>
#include <string>
#include <utility>

#include "current_stream.h"
#include "output_allocator.h"
#include "step_args_builder.h"
#include "triton.h"
#ifdef FASTDIFF_CUDA
#include "../cuda/step_cuda.h"
#endif

namespace fastdiff::bindings {

namespace {

// Return whether what has to be there is, and only what may be together.
bool complete(const StepCall& call) {
    return call.sample != nullptr && call.model_output != nullptr && call.table != nullptr &&
           (call.uncond != nullptr) == call.guidance_scale.given &&
           (call.variance != nullptr) == (call.variance_kind != 0) && call.variance_kind >= 0 &&
           call.variance_kind <= 2 && call.keeps >= 0 && call.keeps < kMaxOutputs &&
           (!call.out.given || call.out.count == call.keeps + 1) && (call.noise == nullptr || call.seeds == nullptr) &&
           (call.keeps == 0 || !call.write_history) && (call.mask == nullptr || call.keeps < kMaxOutputs - 1);
}

enum class Launcher { kNone, kCpu, kCuda, kTriton };

// Return what takes a step on the sample's device.
Launcher launcher_of(const StepCall& call) {
    const at::Tensor& sample = *call.sample;
    if (sample.is_cpu() && !call.triton) return Launcher::kCpu;
#ifdef FASTDIFF_CUDA
    if (sample.is_cuda() && !call.triton) return Launcher::kCuda;
#endif
    return triton_serves(sample) ? Launcher::kTriton : Launcher::kNone;
}

void run_on_cpu(const StepCall& call, const StepArgs& args) {
    const int64_t total = args.batch * args.inner;
    const auto step_range = cpu_build.step_range;
    const int64_t grain = args.draw.seeds == nullptr ? kGrain : kDrawGrain;
    if (total <= grain) {
        step_range(args, 0, total);
        return;
    }
    // The caller holds its arguments and the outcome what is written. A list of history slots is the caller's: without
    // the GIL another thread may empty it, and with it go tensors that nobody else holds.
    std::array<at::Tensor, kRegisters> held;
    for (size_t j = 0; j < held.size(); ++j)
        if (call.history[j] != nullptr) held[j] = *call.history[j];
    const py::gil_scoped_release release;
    at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { step_range(args, begin, end); });
}

void check_launched(const char* launcher, const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("step: the ") + launcher + " launch failed: " + error);
}

// A launch of Triton's kernel, once that has been found.
struct TritonStep {
    triton::StepLaunch launch;
    const triton::StepKernel* kernel;
};

// Return the launch of a call; none where no block is set for its device and dtype.
std::optional<TritonStep> triton_step(const StepArgs& args, const at::Tensor& sample) {
    const int device = sample.get_device();
    const int64_t block = triton::block_of(device, sample.element_size(), args.draw.seeds != nullptr);
    if (block == 0) return std::nullopt;
    const triton::StepLaunch launch(args, device, block);
    return TritonStep{launch, triton::find_kernel(launch.key())};
}

}  // namespace

const char* decline_name(Decline reason) {
    constexpr std::array<const char*, 13> kReasons = {"",      "argument", "modes", "wrapper", "autograd",
                                                      "dtype", "device",   "shape", "layout",  "storage",
                                                      "value", "overlap",  "kernel"};
    return kReasons[static_cast<size_t>(reason)];
}

Outcome run_step(const StepCall& call) {
    Outcome outcome;
    const auto decline = [&outcome](Decline reason) {
        outcome.declined = reason;
        return std::move(outcome);
    };
    if (!complete(call)) return decline(Decline::kArgument);
    const Launcher launcher = launcher_of(call);
    if (launcher == Launcher::kNone) return decline(Decline::kDevice);
    if (!call.in_operator && c10::impl::TorchDispatchModeTLS::any_modes_set()) return decline(Decline::kModes);
    const at::Tensor& sample = *call.sample;
    StepArgsBuilder builder(sample, *call.table, launcher == Launcher::kCpu);
    StepArgs& args = builder.args;
    args.variance_kind = static_cast<Variance>(call.variance_kind);
    builder.parts(call.parts, {call.row_index.tensor, call.guidance_scale.tensor, call.threshold,
                               call.seeds == nullptr ? nullptr : call.noise_step.tensor});
    builder.row_index(call.row_index);
    builder.guidance_scale(call.guidance_scale);
    builder.threshold(call.threshold);
    builder.draw(call.seeds, call.noise_step, call.purpose);
    StreamTypes& types = args.types;
    args.model_output = builder.like_model(call.model_output, &types.model_output);
    args.uncond = builder.like_model(call.uncond, &types.uncond);
    args.variance = builder.like_model(call.variance, &types.variance);
    args.noise = builder.like_sample(call.noise, &types.noise);
    args.mask = builder.like_sample(call.mask, &types.mask);
    for (size_t j = 0; j < kRegisters; ++j) args.history[j] = builder.like_sample(call.history[j], &types.history[j]);
    if (call.write_history) builder.write_history();
    // A skipped sample's kept outputs are not written, so new ones would hold anything: where a sample may be skipped,
    // Python makes them.
    bool written_given = call.write_history || call.model_input != nullptr;
    for (int64_t o = 0; o <= call.keeps; ++o) {
        const auto slot = static_cast<size_t>(o);
        const at::ScalarType type = call.out.dtypes[slot];
        written_given = written_given || call.out.tensors[slot] != nullptr;
        builder.require(o == 0 || args.rows == nullptr || call.out.tensors[slot] != nullptr || builder.takes_all(),
                        Decline::kArgument);
        builder.require(type == at::ScalarType::Undefined || dtype_of(type).has_value(), Decline::kDtype);
    }
    if (!builder.good()) return decline(builder.declined);

    for (int64_t o = 0; o <= call.keeps; ++o) {
        const auto slot = static_cast<size_t>(o);
        const MaybeTensor given = call.out.tensors[slot];
        const at::ScalarType type = call.out.dtypes[slot];
        outcome.outputs[slot] =
            given != nullptr ? *given
                             : new_output(sample, type == at::ScalarType::Undefined ? sample.scalar_type() : type);
        builder.output(outcome.outputs[slot]);
    }
    builder.finalize_dtypes();
    builder.model_input(call.model_input);
    if (builder.good() && written_given) builder.require(!builder.overlaps_partially(), Decline::kOverlap);
    if (!builder.good()) return decline(builder.declined);
    builder.collapse_batch();
    std::optional<TritonStep> triton_launch;
    if (launcher == Launcher::kTriton) {
        triton_launch = triton_step(args, sample);
        if (!triton_launch.has_value()) return decline(Decline::kKernel);
        if (triton_launch->kernel == nullptr) {
            outcome.missing_kernel = triton_launch->launch.key();
            return decline(Decline::kKernel);
        }
    }
    for (const MaybeTensor written : call.out.tensors)
        if (written != nullptr) bump_version(*written);
    for (const MaybeTensor kept : call.history)
        if (call.write_history && kept != nullptr) bump_version(*kept);
    if (call.model_input != nullptr) bump_version(*call.model_input);
    switch (launcher) {
        case Launcher::kNone:
        case Launcher::kCpu:
            run_on_cpu(call, args);
            break;
        case Launcher::kCuda:
#ifdef FASTDIFF_CUDA
            check_launched("CUDA", launch_step(args, sample.get_device(), current_stream(sample)));
#endif
            break;
        case Launcher::kTriton:
            check_launched("Triton", triton_launch->launch.run(*triton_launch->kernel, current_stream(sample)));
            break;
    }
    return outcome;
}

PyObject* step(PyObject* /*module*/, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    HANDLE_TH_ERRORS
    StepCall call;
    if (!read_step_call(values, positional, names, &call))
        return PyUnicode_InternFromString(decline_name(Decline::kArgument));
    Outcome outcome = run_step(call);
    if (outcome.missing_kernel.has_value()) {
        const auto& bytes = outcome.missing_kernel->bytes;
        return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    }
    if (outcome.declined != Decline::kNone) return PyUnicode_InternFromString(decline_name(outcome.declined));
    PyObject* result = PyTuple_New(call.keeps + 1);
    if (result == nullptr) throw python_error();
    for (int64_t o = 0; o <= call.keeps; ++o)
        PyTuple_SET_ITEM(result, o, THPVariable_Wrap(std::move(outcome.outputs[static_cast<size_t>(o)])));
    return result;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
