// SPDX-License-Identifier: MIT
#include "executor.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>

#include <optional>

#include "../bindings/current_stream.h"
#include "../bindings/output_allocator.h"
#include "../bindings/randn.h"
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

// Standard normal noise for a tensor on `device`, drawn by one generator or by torch's default one on the generator's
// device; undefined, with nothing drawn, where Python has to draw it.
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
    return noise;
}

// Standard normal noise by a list of generators, one a sample; a list of one draws for all.
at::Tensor draw_by_list(const at::Tensor& like, at::ScalarType type, PyObject* list) {
    // A copy: another thread may change the list while a draw runs without the GIL.
    const py::object held = own(PySequence_Tuple(list));
    const Py_ssize_t count = PyTuple_GET_SIZE(held.ptr());
    const auto item = [&held](Py_ssize_t i) { return PyTuple_GET_ITEM(held.ptr(), i); };
    if (count == 1) return draw_normal(like.sizes(), like.numel(), type, like.device(), item(0));
    if (like.dim() == 0 || like.size(0) == 0 || count < like.size(0)) return at::Tensor();
    const auto device_of = [&item](Py_ssize_t i) {
        return reinterpret_cast<THPGenerator*>(item(i))->cdata.device().type();
    };
    for (Py_ssize_t i = 0; i < like.size(0); ++i)
        if (!is_generator(item(i)) || device_of(i) != device_of(0)) return at::Tensor();
    std::vector<int64_t> one = like.sizes().vec();
    one[0] = 1;
    std::vector<at::Tensor> parts;
    for (Py_ssize_t i = 0; i < like.size(0); ++i) {
        parts.push_back(draw_normal(one, like.numel() / like.size(0), type, like.device(), item(i)));
        TORCH_INTERNAL_ASSERT(parts.back().defined());
    }
    return at::cat(parts);
}

// Standard normal noise like `sample` from its samples' seeds; undefined where Python has to draw it.
at::Tensor draw_from_seeds(const at::Tensor& sample, const Draw& draw, const at::Tensor& seeds, int64_t step) {
    if (!seeds.defined() || seeds.device() != sample.device() || !bindings::on_served_device(sample) ||
        sample.dim() == 0 || sample.numel() == 0 || seeds.numel() != sample.size(0))
        return at::Tensor();
    at::Tensor noise = at::empty(sample.sizes(), sample.options().dtype(draw.type));
    bindings::randn(noise, seeds, std::nullopt, step, draw.purpose,
                    reinterpret_cast<int64_t>(bindings::current_stream(sample)));
    return noise;
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
    if (!read_model_outputs()) return py::object();
    gather();
    if (!draw() || !run()) return py::object();
    write();
    return result();
}

// Find the model's outputs; one with twice the sample's channels has a learned variance in its second half.
bool NativeExecutor::read_model_outputs() {
    const at::Tensor& sample = *as_tensor(call_.sample());
    model_output_ = as_tensor(call_.model_output());
    uncond_ = as_tensor(call_.uncond);
    if (model_output_->sizes() == sample.sizes()) return true;
    std::vector<int64_t> doubled = sample.sizes().vec();
    if (doubled.size() < 2) return false;
    doubled[1] *= 2;
    if (model_output_->sizes() != doubled || (uncond_ != nullptr && uncond_->sizes() != doubled) || !called_plainly())
        return false;
    halves_[0] = model_output_->narrow(1, 0, sample.size(1));
    halves_[1] = model_output_->narrow(1, sample.size(1), sample.size(1));
    if (uncond_ != nullptr) halves_[2] = uncond_->narrow(1, 0, sample.size(1));
    model_output_ = &halves_[0];
    variance_ = &halves_[1];
    if (uncond_ != nullptr) uncond_ = &halves_[2];
    return true;
}

py::object NativeExecutor::drawn() const {
    if (draws_.empty()) return py::none();
    py::list list;
    for (const at::Tensor& each : draws_) list.append(own(THPVariable_Wrap(each)));
    return list;
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
    const at::Tensor &output = *model_output_, &sample = *as_tensor(call_.sample());
    for (const Draw& each : plan_.draws) {
        at::Tensor noise;
        if (each.source == NoiseSource::kSeeds)
            noise = forced_in_context(state_->forced_backend.ptr()) == Forced::kNone
                        ? draw_from_seeds(output, each, state_->seeds, noise_step_)
                        : at::Tensor();
        else if (PyList_CheckExact(generator))
            noise = draw_by_list(output, each.type, generator);
        else
            noise = draw_normal(output.sizes(), output.numel(), each.type, output.device(), generator);
        if (noise.defined() && noise.device().type() != output.device().type())
            noise = copy_to_device(noise, output.device());
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
    step.model_output = model_output_;
    step.table = &plan_.table(step.sample->device());
    step.uncond = uncond_;
    step.variance = plan_.variance_kind == 0 ? nullptr : variance_;
    step.variance_kind = plan_.variance_kind;
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
    if (wants_model_input_) set_model_input(&step);
    bindings::Outcome outcome = bindings::run_step(step);
    if (outcome.declined == bindings::Decline::kLayout && convert_layouts(&step)) outcome = bindings::run_step(step);
    if (outcome.declined != bindings::Decline::kNone) return false;
    if (plan_.table_with_model_input() != nullptr) prev_sample_ = outcome.outputs[0];
    for (int64_t o = 0; o <= plan_.kept; ++o) slots_.add(own(THPVariable_Wrap(std::move(outcome.outputs[o]))));
    return true;
}

// Have the step write the scaled sample into a new tensor, where memory is one run of elements a sample.
void NativeExecutor::set_model_input(bindings::StepCall* step) {
    const at::Tensor& sample = *step->sample;
    DeviceTable* table = plan_.table_with_model_input();
    if (table == nullptr || sample.dim() == 0 || sample.numel() == 0) return;
    if (sample.size(0) > 1 && sample.stride(0) * sample.size(0) < sample.numel()) return;
    model_input_ = bindings::new_output(sample, plan_.output_types[0]);
    step->model_input = &model_input_;
    step->table = &table->on(sample.device());
}

// Copy the inputs that have other strides than the sample: a transformer's outputs are often views in another order of
// dimensions. False where nothing has to be copied, or autograd has to see the copy.
bool NativeExecutor::convert_layouts(bindings::StepCall* step) {
    const at::Tensor& sample = *step->sample;
    if (!sample.is_non_overlapping_and_dense()) return false;
    bool converted = false;
    converted_.reserve(4 + plan_.history.size());  // pointers to its items are handed out
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
    convert(&step->variance);
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
