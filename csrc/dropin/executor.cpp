// SPDX-License-Identifier: MIT
#include "executor.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>

#include <optional>

#include "../bindings/output_allocator.h"
#include "../bindings/step.h"
#include "../torch_bits/torch_normal.h"

namespace fastdiff::dropin {

namespace {

using bindings::called_plainly;

PyObject* generator_name() {
    static PyObject* const name = PyUnicode_InternFromString("generator");
    return name;
}

bool is_generator(PyObject* object) {
    const int answer = THPGenerator_Check(object);
    if (answer < 0) PyErr_Clear();  // an object whose __class__ raises
    return answer == 1;
}

// The device on which `generator` draws for a tensor on `device`, as diffusers chooses it; none where diffusers refuses
// the two together, or the device is one that draws elsewhere.
std::optional<at::Device> drawing_device(const std::optional<at::Generator>& generator, const at::Device& device) {
    if (!device.is_cpu() && !device.is_cuda()) return std::nullopt;
    if (!generator.has_value() || generator->device().type() == device.type()) return device;
    if (generator->device().is_cpu()) return at::Device(at::kCPU);
    return std::nullopt;
}

// Standard normal noise like `output`, drawn by one generator or by torch's default one; undefined, with nothing drawn,
// where Python has to draw it.
at::Tensor draw_normal(at::IntArrayRef sizes, int64_t numel, at::ScalarType type, const at::Device& device,
                       PyObject* object) {
    std::optional<at::Generator> generator;
    if (object != Py_None) {
        if (!is_generator(object)) return at::Tensor();
        generator = reinterpret_cast<THPGenerator*>(object)->cdata;
        if (!generator->defined()) return at::Tensor();
    }
    const std::optional<at::Device> drawn_on = drawing_device(generator, device);
    if (!drawn_on.has_value()) return at::Tensor();
    at::Tensor noise;
    if (bindings::draws_as_torch && type == at::kFloat && drawn_on->is_cpu())
        noise = bindings::torch_normal(sizes, numel, object);
    if (!noise.defined()) {
        const py::gil_scoped_release release;
        noise = at::randn(sizes, std::move(generator), at::TensorOptions().dtype(type).device(*drawn_on));
    }
    return drawn_on->type() == device.type() ? noise : noise.to(device);
}

// Standard normal noise by a list of generators, one a sample; a list of one draws for all.
at::Tensor draw_by_list(const at::Tensor& like, at::ScalarType type, PyObject* list) {
    // A copy: another thread may change the list while a draw runs without the GIL.
    const py::object held = own(PySequence_Tuple(list));
    const Py_ssize_t count = PyTuple_GET_SIZE(held.ptr());
    const auto item = [&held](Py_ssize_t i) { return PyTuple_GET_ITEM(held.ptr(), i); };
    if (count == 1) return draw_normal(like.sizes(), like.numel(), type, like.device(), item(0));
    if (like.dim() == 0 || like.size(0) == 0 || count < like.size(0)) return at::Tensor();
    for (Py_ssize_t i = 0; i < like.size(0); ++i)
        if (!is_generator(item(i))) return at::Tensor();
    std::vector<int64_t> one = like.sizes().vec();
    one[0] = 1;
    std::vector<at::Tensor> parts;
    for (Py_ssize_t i = 0; i < like.size(0); ++i) {
        parts.push_back(draw_normal(one, like.numel() / like.size(0), type, like.device(), item(i)));
        TORCH_INTERNAL_ASSERT(parts.back().defined());
    }
    return at::cat(parts);
}

// The forced backend of the current context: none, Triton, or another, which the Python executor serves.
enum class Forced { kNone, kTriton, kOther };

Forced forced_in_context(PyObject* variable) {
    PyObject* name = nullptr;
    if (PyContextVar_Get(variable, nullptr, &name) != 0) throw python_error();
    const py::object held = own(name);
    if (held.is_none()) return Forced::kNone;
    return PyUnicode_CompareWithASCIIString(name, "triton") == 0 ? Forced::kTriton : Forced::kOther;
}

}  // namespace

py::object NativeExecutor::execute() {
    if (!plan_.native_eligible) return py::object();
    const at::Tensor &output = *as_tensor(call_.model_output()), &sample = *as_tensor(call_.sample());
    // A model's output with a learned variance has twice the channels.
    if (output.sizes() != sample.sizes()) return py::object();
    gather();
    if (!draw() || !run()) return py::object();
    write();
    return result();
}

py::object NativeExecutor::drawn() const {
    if (draws_.empty()) return py::none();
    py::list list;
    for (const at::Tensor& each : draws_) list.append(own(THPVariable_Wrap(each)));
    return std::move(list);
}

void NativeExecutor::gather() {
    for (const auto& [name, index] : plan_.attribute_inputs) {
        PyObject* value = PyDict_GetItemWithError(attributes_, name.ptr());
        if (value != nullptr && index >= 0)
            value = PyList_Check(value) && index < PyList_GET_SIZE(value) ? PyList_GET_ITEM(value, index) : nullptr;
        TORCH_INTERNAL_ASSERT(value != nullptr, "an attribute that the plan reads is missing");
        slots_.add(value);
    }
    for (const py::object& name : plan_.argument_inputs) {
        PyObject* value = call_.argument(name.ptr());
        TORCH_INTERNAL_ASSERT(value != nullptr, "an argument that the plan reads is missing");
        slots_.add(value);
    }
}

bool NativeExecutor::draw() {
    if (plan_.draws.empty() || plan_.draws[0].fused) return true;
    if (!called_plainly()) return false;  // a mode has to see torch's operator
    PyObject* generator = call_.argument(generator_name());
    if (generator == nullptr) generator = Py_None;
    const at::Tensor &output = *as_tensor(call_.model_output()), &sample = *as_tensor(call_.sample());
    for (const Draw& each : plan_.draws) {
        at::Tensor noise = PyList_CheckExact(generator)
                               ? draw_by_list(output, each.type, generator)
                               : draw_normal(output.sizes(), output.numel(), each.type, output.device(), generator);
        if (!noise.defined()) {
            TORCH_INTERNAL_ASSERT(draws_.empty(), "a later draw of a step was refused");
            return false;
        }
        draws_.push_back(std::move(noise));
    }
    noise_is_scratch_ =
        plan_.noise_is_scratch && sample.is_cpu() && sample.scalar_type() == at::kFloat && sample.is_contiguous();
    for (const at::Tensor& noise : draws_) slots_.add(noise_is_scratch_ ? py::none() : own(THPVariable_Wrap(noise)));
    return true;
}

bool NativeExecutor::run() {
    bindings::StepCall step;
    step.sample = as_tensor(call_.sample());
    const Forced forced = forced_in_context(state_->forced_backend.ptr());
    if (forced == Forced::kOther) return false;
    step.triton = forced == Forced::kTriton;
    step.model_output = as_tensor(call_.model_output());
    step.table = &plan_.table(step.sample->device());
    step.uncond = as_tensor(call_.uncond);
    if (step.uncond == nullptr && call_.guided()) return false;  // the Python executor raises the error
    if (!bindings::read_scale(call_.guidance_scale, &step.guidance_scale)) return false;
    for (size_t j = 0; j < plan_.history.size(); ++j) {
        step.history[j] = as_tensor(slots_[plan_.history[j]]);
        if (step.history[j] == nullptr) return false;
    }
    if (plan_.noise >= 0) step.noise = noise_is_scratch_ ? &draws_[0] : as_tensor(slots_[plan_.noise]);
    // The sample is written over the noise: its memory is in the cache, and nothing else reads it.
    if (noise_is_scratch_) step.out.tensors[0] = &draws_[0];
    if (!plan_.draws.empty() && plan_.draws[0].fused) {
        if (!state_->seeds.defined() || state_->seeds.device() != step.sample->device() ||
            state_->seeds.numel() != step.sample->size(0))
            return false;
        step.seeds = &state_->seeds;
        step.noise_step.value = noise_step_;
        step.purpose = plan_.draws[0].purpose;
    }
    step.keeps = plan_.kept;
    for (size_t o = 0; o <= static_cast<size_t>(plan_.kept); ++o)
        if (plan_.output_types[o] != step.sample->scalar_type()) step.out.dtypes[o] = plan_.output_types[o];
    bindings::Outcome outcome = bindings::run_step(step);
    if (outcome.declined == bindings::Decline::kLayout && convert_layouts(&step)) outcome = bindings::run_step(step);
    if (outcome.declined != bindings::Decline::kNone) return false;
    for (int64_t o = 0; o <= plan_.kept; ++o) slots_.add(own(THPVariable_Wrap(std::move(outcome.outputs[o]))));
    return true;
}

// Copy the inputs that have other strides than the sample: a transformer's outputs are often views in another order of
// dimensions. False where nothing has to be copied, or autograd has to see the copy.
bool NativeExecutor::convert_layouts(bindings::StepCall* step) {
    const at::Tensor& sample = *step->sample;
    if (!sample.is_non_overlapping_and_dense()) return false;
    bool converted = false;
    converted_.reserve(3 + plan_.history.size());  // pointers to its items are handed out
    const auto convert = [&](bindings::MaybeTensor* tensor) {
        if (*tensor == nullptr || (*tensor)->strides() == sample.strides()) return;
        if (!bindings::is_plain_eager(**tensor) || (*tensor)->sizes() != sample.sizes()) return;
        converted_.push_back(bindings::new_output(sample, (*tensor)->scalar_type()));
        converted_.back().copy_(**tensor);
        *tensor = &converted_.back();
        converted = true;
    };
    convert(&step->model_output);
    convert(&step->uncond);
    convert(&step->noise);
    for (size_t j = 0; j < plan_.history.size(); ++j) convert(&step->history[j]);
    return converted;
}

void NativeExecutor::write() {
    for (const auto& [name, value] : plan_.constant_writes) write_attribute(name, value.ptr());
    for (const auto& [name, slot] : plan_.tensor_writes) write_attribute(name, slots_[slot]);
    for (const ListWrite& list : plan_.list_writes) {
        const py::object items = own(PyList_New(static_cast<Py_ssize_t>(list.entries.size())));
        for (size_t i = 0; i < list.entries.size(); ++i)
            PyList_SET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(slots_[list.entries[i]]));
        if (list.start < 0) {
            write_attribute(list.name, items.ptr());
            continue;
        }
        PyObject* before = PyDict_GetItemWithError(attributes_, list.name.ptr());
        TORCH_INTERNAL_ASSERT(before != nullptr && PyList_Check(before), "a list that the plan extends is missing");
        if (PyList_SetSlice(before, list.start, PyList_GET_SIZE(before), items.ptr()) != 0) throw python_error();
        snapshot_is_complete_ = snapshot_is_complete_ && snapshot_->update_list(before, &dropped_);
    }
}

void NativeExecutor::write_attribute(const py::object& name, PyObject* value) {
    if (PyDict_SetItem(attributes_, name.ptr(), value) != 0) throw python_error();
    snapshot_is_complete_ = snapshot_is_complete_ && snapshot_->update(name.ptr(), value, &dropped_);
}

py::object NativeExecutor::result() const {
    const std::vector<SlotOrConstant>& results = plan_.results;
    if (plan_.result_type.ptr() == reinterpret_cast<PyObject*>(&PyTuple_Type)) {
        py::object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(results.size())));
        for (size_t i = 0; i < results.size(); ++i)
            PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(slots_[results[i]]));
        return tuple;
    }
    if (plan_.result_type.is_none()) return py::reinterpret_borrow<py::object>(slots_[results[0]]);
    const py::object by_name = own(PyDict_New()), no_arguments = own(PyTuple_New(0));
    for (size_t i = 0; i < results.size(); ++i)
        if (PyDict_SetItem(by_name.ptr(), plan_.result_names[i].ptr(), slots_[results[i]]) != 0) throw python_error();
    return own(PyObject_Call(plan_.result_type.ptr(), no_arguments.ptr(), by_name.ptr()));
}

}  // namespace fastdiff::dropin
