// SPDX-License-Identifier: MIT
// The training loss and its gradient: read the tensors into LossArgs, and launch. As in step.cpp, a call that the loops
// cannot take as it is is declined, and fastdiff/ops/loss_kernels.py checks it and makes it canonical.
#include "diffusion_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

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
    std::optional<py::gil_scoped_release> release;
    if (PyGILState_Check() == 1) release.emplace();  // autograd's engine has released it
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

// Write the losses `[batch]`, or, from factors `[batch]`, the gradients.
Decline run(const StepCall& call, Loss loss, double c, const void* factor, Result* result) {
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
    if (factor != nullptr && builder.good()) gradients(call, &builder, result);
    builder.finalize_dtypes();
    if (!builder.good()) return builder.declined;
    if (factor != nullptr) {
        for (const MaybeTensor written : call.out.tensors)
            if (written != nullptr) bump_version(*written);
        args.factor = factor;
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

// Return whether a tensor holds numbers from 0 to end - 1 that can be read here, one for all samples or one each.
bool are_indices(const at::Tensor& tensor, int64_t batch, int64_t end) {
    if (!tensor.is_cpu() || !in_memory(tensor) || tensor.scalar_type() != at::kLong || tensor.dim() != 1) return false;
    const int64_t count = tensor.numel();
    if ((count != 1 && count != batch) || !tensor.is_contiguous() || !storage_covers(tensor, count)) return false;
    const int64_t* indices = tensor.const_data_ptr<int64_t>();
    return std::all_of(indices, indices + count, [end](int64_t index) { return index >= 0 && index < end; });
}

// Return whether a tensor holds one number a sample in the table's dtype.
bool one_per_sample(const at::Tensor& tensor, const StepCall& call) {
    return call.sample != nullptr && call.table != nullptr && call.sample->dim() > 0 && is_plain_eager(tensor) &&
           tensor.is_contiguous() && tensor.dim() == 1 && tensor.numel() == call.sample->size(0) &&
           tensor.device() == call.sample->device() && tensor.scalar_type() == call.table->scalar_type() &&
           storage_covers(tensor);
}

// --- The loss as one node of autograd's graph, on the CPU -----------------------------------------------------------

// In the order of `REDUCTIONS` in fastdiff/ops/diffusion_loss.py.
enum class Reduction : int64_t { kMean = 0, kSum = 1, kNone = 2 };

// What the loss and its gradient share.
struct LossCall {
    StepCall step;
    Loss loss;
    double c;
    Reduction reduction;
    MaybeTensor weights;  // [batch], or [T], one a timestep, float32 or float64

    // Return whether the weights are for timesteps. The table has a row for each, and a last one of NaN.
    bool weighs_timesteps() const { return weights->numel() == step.table->size(0) - 1; }
};

template <typename C>
C weight_of(const LossCall& call, int64_t b) {
    const Counter& row = call.step.row_index;
    if (call.weighs_timesteps())
        b = row.tensor == nullptr ? row.value : row.tensor->const_data_ptr<int64_t>()[row.tensor->numel() == 1 ? 0 : b];
    return call.weights->scalar_type() == at::kDouble ? static_cast<C>(call.weights->const_data_ptr<double>()[b])
                                                      : static_cast<C>(call.weights->const_data_ptr<float>()[b]);
}

// Weigh and reduce the samples' losses with the roundings of torch's operations, which the other backends call.
template <typename C>
at::Tensor reduced(const LossCall& call, at::Tensor each) {
    const int64_t batch = each.numel();
    C* values = each.data_ptr<C>();
    for (int64_t b = 0; call.weights != nullptr && b < batch; ++b) values[b] *= weight_of<C>(call, b);
    if (call.reduction == Reduction::kNone) return each;
    at::Tensor total = each.sum();
    if (call.reduction == Reduction::kMean)
        *total.data_ptr<C>() /= static_cast<C>(batch);
    else
        *total.data_ptr<C>() *= static_cast<C>(call.step.sample->numel() / batch);
    return total;
}

// Return the gradient of each sample's loss, over its elements and for l2 twice, from that of the reduced loss; its
// roundings are those of torch's operations, too.
template <typename C>
std::unique_ptr<C[]> factors(const LossCall& call, const at::Tensor& grad) {
    const int64_t batch = call.step.sample->size(0), inner = call.step.sample->numel() / batch;
    const C* of_loss = grad.const_data_ptr<C>();
    const int64_t stride = call.reduction == Reduction::kNone ? grad.stride(0) : 0;
    const C of_each =
        call.reduction == Reduction::kMean ? *of_loss / static_cast<C>(batch) : *of_loss * static_cast<C>(inner);
    const C scale = static_cast<C>((call.loss == Loss::kL2 ? 2.0 : 1.0) / static_cast<double>(inner));
    std::unique_ptr<C[]> made(new C[static_cast<size_t>(batch)]);
    for (int64_t b = 0; b < batch; ++b) {
        C factor = call.reduction == Reduction::kNone ? of_loss[b * stride] : of_each;
        if (call.weights != nullptr) factor *= weight_of<C>(call, b);
        made[static_cast<size_t>(b)] = factor * scale;
    }
    return made;
}

// Return whether the call's timesteps and weights are what `weight_of` reads: timesteps are rows of the table before
// its last, and weights for samples and for timesteps differ in number.
bool fits(const LossCall& call) {
    const StepCall& step = call.step;
    if (step.sample == nullptr || step.table == nullptr || !step.sample->is_cpu() || !in_memory(*step.sample) ||
        step.sample->dim() == 0 || step.sample->numel() == 0 || step.table->dim() != 2)
        return false;
    const int64_t batch = step.sample->size(0), timesteps = step.table->size(0) - 1;
    const bool in_range = step.row_index.tensor == nullptr
                              ? step.row_index.value >= 0 && step.row_index.value < timesteps
                              : are_indices(*step.row_index.tensor, batch, timesteps);
    if (call.weights == nullptr || !in_range) return in_range;
    return is_plain_eager(*call.weights) && call.weights->is_contiguous() && call.weights->dim() == 1 &&
           (call.weights->numel() == batch) != call.weighs_timesteps() && call.weights->is_cpu() &&
           (call.weights->scalar_type() == at::kFloat || call.weights->scalar_type() == at::kDouble) &&
           storage_covers(*call.weights);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RecordedLoss : torch::autograd::Function<RecordedLoss> {
    // `value` is the loss. The tensors before it are those that may want a gradient.
    static at::Tensor forward(AutogradContext* context, const at::Tensor& output, const at::Tensor& x0,
                              const std::optional<at::Tensor>& noise, const LossCall* call, at::Tensor* value) {
        const auto saved = [](MaybeTensor tensor) { return tensor == nullptr ? at::Tensor() : *tensor; };
        const StepCall& step = call->step;
        context->save_for_backward({output, x0, noise.value_or(at::Tensor()), *step.table, saved(step.seeds),
                                    saved(step.row_index.tensor), saved(step.noise_step.tensor), saved(call->weights)});
        int64_t bits_of_c = 0;
        memcpy(&bits_of_c, &call->c, sizeof bits_of_c);
        context->saved_data["call"] = std::vector<int64_t>{static_cast<int64_t>(call->loss),
                                                           static_cast<int64_t>(call->reduction),
                                                           step.row_index.value,
                                                           step.noise_step.value,
                                                           step.purpose,
                                                           bits_of_c};
        return std::move(*value);
    }

    static variable_list backward(AutogradContext* context, const variable_list& grads) {
        const at::Tensor& grad = grads[0];
        TORCH_CHECK(in_memory(grad) && grad.is_cpu(),
                    "diffusion_loss: its gradient is a wrapper of torch.func, expected a tensor in memory; take the "
                    "gradients one by one, without is_grads_batched");
        variable_list saved = context->get_saved_variables();
        const auto given = [&saved](size_t i) { return saved[i].defined() ? &saved[i] : nullptr; };
        const std::vector<int64_t> numbers = context->saved_data["call"].toIntVector();
        LossCall call{};
        call.loss = static_cast<Loss>(numbers[0]);
        call.reduction = static_cast<Reduction>(numbers[1]);
        memcpy(&call.c, &numbers[5], sizeof call.c);
        call.weights = given(7);
        StepCall& step = call.step;
        step.model_output = given(0);
        step.sample = given(1);
        step.noise = given(2);
        step.table = given(3);
        step.seeds = given(4);
        step.row_index = {numbers[2], given(5)};
        step.noise_step = {numbers[3], given(6)};
        step.purpose = numbers[4];
        step.in_operator = true;
        step.out.given = true;
        step.out.count = kMaxOutputs;
        const size_t inputs = step.noise == nullptr ? 2 : 3;
        for (size_t i = 0; i < inputs; ++i)
            if (context->needs_input_grad(i)) step.out.dtypes[i] = saved[i].scalar_type();

        const bool recorded = at::GradMode::is_enabled();  // as with create_graph
        Result made;
        {
            const at::NoGradGuard no_grad;
            Decline declined = run_gradients(call, grad, &made);
            if (declined != Decline::kNone) {
                // A part of a larger output, or tensors that a hook has kept in another layout.
                for (size_t i = 0; i < inputs; ++i) saved[i] = saved[i].contiguous();
                made = {};
                declined = run_gradients(call, grad, &made);
            }
            TORCH_CHECK(declined == Decline::kNone, "diffusion_loss: the tensors of the forward pass have changed (",
                        decline_name(declined), "), expected them as they were; keep them until the backward pass");
        }
        variable_list found(5);
        size_t next = 0;
        for (size_t i = 0; i < inputs; ++i)
            if (step.out.dtypes[i] != at::ScalarType::Undefined) found[i] = std::move(made.tensors[next++]);
        if (!recorded) return found;
        // A gradient without a graph would be a constant in a second derivative, and that silently wrong.
        for (at::Tensor& gradient : found)
            if (gradient.defined()) gradient.set_requires_grad(true);
        return torch::autograd::DelayedError(
                   "diffusion_loss: trying to differentiate twice, expected once; "
                   "take fastdiff.training.l2_loss of the output and the target of noise_and_target",
                   5)
            .apply(std::move(found));
    }

    // A hook may have given back anything for a saved tensor, so what `factors` reads is checked again.
    static Decline run_gradients(const LossCall& call, const at::Tensor& grad, Result* made) {
        if (!fits(call) || (call.reduction == Reduction::kNone && grad.numel() != call.step.sample->size(0)))
            return Decline::kShape;
        if (grad.scalar_type() == at::kDouble)
            return run(call.step, call.loss, call.c, factors<double>(call, grad).get(), made);
        return run(call.step, call.loss, call.c, factors<float>(call, grad).get(), made);
    }
};

// Return the place of a string among others; -1 where it is none of them.
int place_of(PyObject* object, std::initializer_list<const char*> names) {
    int place = 0;
    for (const char* name : names) {
        if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, name) == 0) return place;
        ++place;
    }
    return -1;
}

// The least c of the pseudo-Huber loss: its square is a float32.
constexpr double kLeastC = 1e-18;

Loss read_loss(PyObject* loss, PyObject* c, double* number) {
    const long kind = PyLong_AsLong(loss);
    *number = PyFloat_AsDouble(c);
    if (PyErr_Occurred() != nullptr) throw python_error();
    TORCH_CHECK_VALUE(kind >= 0 && kind <= 2, "diffusion_loss: loss is ", kind, ", expected 0, 1 or 2");
    return static_cast<Loss>(kind);
}

PyObject* declined_with(Decline reason) { return PyUnicode_InternFromString(decline_name(reason)); }

}  // namespace

PyObject* diffusion_loss(PyObject* /*module*/, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(positional == 3, "diffusion_loss: got ", positional, " positional arguments, expected 3");
    double c = 0.0;
    const Loss loss = read_loss(values[0], values[1], &c);
    const bool gradient = values[2] != Py_None;
    StepCall call;
    if ((gradient && !THPVariable_Check(values[2])) || !read_step_call(values + 3, 0, names, &call))
        return declined_with(Decline::kArgument);
    const void* factor = nullptr;
    if (gradient) {
        const at::Tensor& given = THPVariable_Unpack(values[2]);
        if (!one_per_sample(given, call)) return declined_with(Decline::kArgument);
        factor = given.const_data_ptr();
    }
    Result made;
    const Decline declined = run(call, loss, c, factor, &made);
    if (declined != Decline::kNone) return declined_with(declined);
    PyObject* result = PyTuple_New(made.count);
    if (result == nullptr) throw python_error();
    for (int i = 0; i < made.count; ++i)
        PyTuple_SET_ITEM(result, i, THPVariable_Wrap(std::move(made.tensors[static_cast<size_t>(i)])));
    return result;
    END_HANDLE_TH_ERRORS
}

PyObject* recorded_diffusion_loss(PyObject* /*module*/, PyObject* const* values, Py_ssize_t positional,
                                  PyObject* names) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(positional == 4, "recorded_diffusion_loss: got ", positional, " positional arguments, expected 4");
    LossCall call{};
    const int loss = place_of(values[0], {"l2", "l1", "huber"}),
              reduction = place_of(values[2], {"mean", "sum", "none"});
    if (loss < 0 || reduction < 0 || !PyFloat_Check(values[1])) return declined_with(Decline::kArgument);
    call.loss = static_cast<Loss>(loss);
    call.reduction = static_cast<Reduction>(reduction);
    call.c = PyFloat_AS_DOUBLE(values[1]);
    if (!(call.c >= kLeastC && call.c <= std::numeric_limits<double>::max())) return declined_with(Decline::kValue);
    StepCall& step = call.step;
    if (!read_step_call(values + 4, 0, names, &step) || step.model_output == nullptr)
        return declined_with(Decline::kArgument);
    if (values[3] != Py_None) {
        if (!THPVariable_Check(values[3])) return declined_with(Decline::kArgument);
        call.weights = &THPVariable_Unpack(values[3]);
    }
    if (!fits(call)) return declined_with(Decline::kShape);
    const auto wants_gradient = [](MaybeTensor tensor) { return tensor != nullptr && tensor->requires_grad(); };
    at::Tensor value;
    {
        const at::NoGradGuard no_grad;
        Result made;
        const Decline declined = run(step, call.loss, call.c, nullptr, &made);
        if (declined != Decline::kNone) return declined_with(declined);
        at::Tensor& each = made.tensors[0];
        value = each.scalar_type() == at::kDouble ? reduced<double>(call, std::move(each))
                                                  : reduced<float>(call, std::move(each));
    }
    if (at::GradMode::is_enabled() &&
        (wants_gradient(step.model_output) || wants_gradient(step.sample) || wants_gradient(step.noise))) {
        const auto noise = step.noise == nullptr ? std::nullopt : std::optional<at::Tensor>(*step.noise);
        value = RecordedLoss::apply(*step.model_output, *step.sample, noise, &call, &value);
    }
    return THPVariable_Wrap(std::move(value));
    END_HANDLE_TH_ERRORS
}

PyObject* indices_in_range(PyObject* /*module*/, PyObject* const* values, Py_ssize_t positional) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(positional == 3, "indices_in_range: got ", positional, " arguments, expected 3");
    const int64_t batch = PyLong_AsLongLong(values[1]), end = PyLong_AsLongLong(values[2]);
    if (PyErr_Occurred() != nullptr) throw python_error();
    return PyBool_FromLong(THPVariable_Check(values[0]) && are_indices(THPVariable_Unpack(values[0]), batch, end));
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
