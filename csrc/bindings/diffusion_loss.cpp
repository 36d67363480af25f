// SPDX-License-Identifier: MIT
// The training loss and its gradient: read the tensors into LossArgs, and launch. As in step.cpp, a call that the loops
// cannot take as it is is declined, and fastdiff/ops/loss_kernels.py checks it and makes it canonical.
#include "diffusion_loss.h"

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
#include "../cuda/diffusion_loss_cuda.h"
#endif

namespace fastdiff::bindings {

namespace py = pybind11;

namespace {

bool complete(const StepCall& call, bool gradient) {
    return call.sample != nullptr && call.model_output != nullptr && call.table != nullptr && call.uncond == nullptr &&
           !call.guidance_scale.given && call.variance == nullptr && call.variance_kind == 0 && !call.write_history &&
           !call.triton && call.model_input == nullptr && call.mask == nullptr && call.threshold == nullptr &&
           call.parts == 1 && call.keeps == 0 && (call.noise != nullptr) != (call.seeds != nullptr) &&
           call.out.given == gradient && (!gradient || call.out.count == kMaxOutputs);
}

void share_blocks(const LossArgs& args) {
    const StepArgs& step = args.step;
    const int64_t blocks = step.batch * blocks_of(step.inner);
    const int64_t grain = step.draw.seeds == nullptr ? kGrain : kDrawGrain;
    if (step.batch * step.inner <= grain) {
        cpu_build.loss_blocks(args, 0, blocks);
        return;
    }
    const py::gil_scoped_release release;
    const int64_t share = std::max<int64_t>(1, grain / std::min<int64_t>(step.inner, kBlock));
    at::parallel_for(0, blocks, share, [&](int64_t begin, int64_t end) { cpu_build.loss_blocks(args, begin, end); });
}

#ifdef FASTDIFF_CUDA
void launch_on_gpu(const LossArgs& args, const at::Tensor& sample) {
    const char* error = launch_diffusion_loss(args, sample.get_device(), current_stream(sample));
    if (error != nullptr) throw std::runtime_error(std::string("diffusion_loss: the CUDA launch failed: ") + error);
}
#endif

struct Result {
    std::array<at::Tensor, kMaxOutputs> tensors;
    int count = 0;
};

// Add the destinations of the gradients; their pointers go to the step's outputs.
void gradients(const StepCall& call, StepArgsBuilder* builder, Result* result) {
    StepArgs& step = builder->args;
    for (size_t i = 0; i < kMaxOutputs; ++i) {
        const at::ScalarType type = call.out.dtypes[i];
        MaybeTensor given = call.out.tensors[i];
        if (!builder->good() || (given == nullptr && type == at::ScalarType::Undefined)) continue;
        const MaybeTensor like = i == 0 ? call.model_output : i == 1 ? call.sample : call.noise;
        const at::ScalarType own = given == nullptr ? type : given->scalar_type();
        if (!builder->require(like != nullptr && own == like->scalar_type(), Decline::kDtype)) return;
        at::Tensor& made = result->tensors[static_cast<size_t>(result->count)];
        made = given == nullptr ? new_output(*call.sample, type) : *given;
        // A new gradient of an output that is half of a larger tensor would have another stride.
        builder->require(given != nullptr || i != 0 || step.model_stride == step.inner, Decline::kArgument);
        DType ignored{};
        step.outputs[i] =
            i == 0 ? const_cast<void*>(builder->like_model(&made, &ignored)) : builder->like_sample(&made, &ignored);
        ++result->count;
    }
}

Decline run(const StepCall& call, Loss loss, double c, MaybeTensor factor, Result* result) {
    if (!complete(call, factor != nullptr)) return Decline::kArgument;
    const at::Tensor& sample = *call.sample;
    if (!on_served_device(sample)) return Decline::kDevice;
    if (!call.in_operator && c10::impl::TorchDispatchModeTLS::any_modes_set()) return Decline::kModes;
    StepArgsBuilder builder(sample, *call.table, sample.is_cpu());
    LossArgs args{};
    args.loss = loss;
    args.c = c;
    StepArgs& step = builder.args;
    builder.row_index(call.row_index);
    builder.draw(call.seeds, call.noise_step, call.purpose);
    StreamTypes& types = step.types;
    step.model_output = builder.like_model(call.model_output, &types.model_output);
    step.noise = builder.like_sample(call.noise, &types.noise);
    builder.require(sample.dim() > 0 && (!builder.good() || step.batch == sample.size(0)), Decline::kLayout);
    if (factor != nullptr && builder.good()) {
        builder.require(is_plain_eager(*factor) && factor->is_contiguous() && factor->dim() == 1 &&
                            factor->numel() == step.batch && factor->device() == sample.device() &&
                            factor->scalar_type() == call.table->scalar_type() && storage_covers(*factor),
                        Decline::kArgument);
        gradients(call, &builder, result);
    }
    builder.finalize_dtypes();
    if (!builder.good()) return builder.declined;
    if (factor != nullptr) {
        for (const MaybeTensor written : call.out.tensors)
            if (written != nullptr) bump_version(*written);
        args.factor = factor->const_data_ptr();
        args.step = step;
        if (sample.is_cpu()) share_blocks(args);
#ifdef FASTDIFF_CUDA
        if (!sample.is_cpu()) launch_on_gpu(args, sample);
#endif
        return Decline::kNone;
    }
    result->count = 1;
    result->tensors[0] = at::empty({sample.size(0)}, sample.options().dtype(call.table->scalar_type()));
    args.out = result->tensors[0].data_ptr();
    args.step = step;
    const int64_t blocks = step.batch * blocks_of(step.inner);
    if (sample.is_cpu()) {
        const std::unique_ptr<double[]> partials(new double[static_cast<size_t>(blocks)]);
        args.partials = partials.get();
        share_blocks(args);
        cpu_build.finish_loss(args, 0, step.batch);
        return Decline::kNone;
    }
#ifdef FASTDIFF_CUDA
    const at::Tensor partials = at::empty({blocks}, result->tensors[0].options());
    args.partials = partials.data_ptr();
    launch_on_gpu(args, sample);
#endif
    return Decline::kNone;
}

}  // namespace

PyObject* diffusion_loss(PyObject* /*module*/, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(positional == 3, "diffusion_loss: got ", positional, " positional arguments, expected 3");
    const long kind = PyLong_AsLong(values[0]);
    const double c = PyFloat_AsDouble(values[1]);
    if (PyErr_Occurred() != nullptr) throw python_error();
    TORCH_CHECK_VALUE(kind >= 0 && kind <= 2, "diffusion_loss: loss is ", kind, ", expected 0, 1 or 2");
    const bool gradient = values[2] != Py_None;
    StepCall call;
    if ((gradient && !THPVariable_Check(values[2])) || !read_step_call(values + 3, 0, names, &call))
        return PyUnicode_InternFromString(decline_name(Decline::kArgument));
    Result made;
    const MaybeTensor factor = gradient ? &THPVariable_Unpack(values[2]) : nullptr;
    const Decline declined = run(call, static_cast<Loss>(kind), c, factor, &made);
    if (declined != Decline::kNone) return PyUnicode_InternFromString(decline_name(declined));
    PyObject* result = PyTuple_New(made.count);
    if (result == nullptr) throw python_error();
    for (int i = 0; i < made.count; ++i)
        PyTuple_SET_ITEM(result, i, THPVariable_Wrap(std::move(made.tensors[static_cast<size_t>(i)])));
    return result;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
