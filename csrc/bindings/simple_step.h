// SPDX-License-Identifier: MIT
// A drop-in scheduler's step by a `simple` program: gather, draw, one fused step, write the state, hand out.
#pragma once

#include "program.h"
#include "step.h"
#include "../torch_bits/torch_normal.h"
#include "watch.h"

namespace fastdiff::bindings {

// Arguments that a call may have beside the three that all have.
constexpr size_t kMore = 8;

// What a step is called with; all references are the caller's.
struct StepCall {
    std::array<PyObject*, 3> arguments{};  // model_output (of guidance, the conditional one), timestep, sample
    PyObject *uncond = Py_None, *guidance = Py_None;
    std::array<std::pair<PyObject*, PyObject*>, kMore> more{};  // by name, in the call's order
    size_t count = 0;

    PyObject* output() const { return arguments[0]; }
    PyObject* timestep() const { return arguments[1]; }
    PyObject* sample() const { return arguments[2]; }
    // By an interned name.
    PyObject* argument(PyObject* name) const {
        for (size_t i = 0; i < count; ++i)
            if (more[i].first == name) return more[i].second;
        return nullptr;
    }
};

// Puts one argument where it belongs; false where a step with it has to be looked at. The names that only `guided_step`
// has belong nowhere in a call of another method.
inline bool put_argument(PyObject* name, PyObject* value, bool guided, StepCall* call) {
    static PyObject* const output = PyUnicode_InternFromString("model_output");
    static PyObject* const timestep = PyUnicode_InternFromString("timestep");
    static PyObject* const sample = PyUnicode_InternFromString("sample");
    static PyObject* const uncond = PyUnicode_InternFromString("model_output_uncond");
    static PyObject* const cond = PyUnicode_InternFromString("model_output_cond");
    static PyObject* const scale = PyUnicode_InternFromString("guidance_scale");
    static PyObject* const rescale = PyUnicode_InternFromString("guidance_rescale");
    if (name == output || (guided && name == cond)) {
        call->arguments[0] = value;
    } else if (name == timestep) {
        call->arguments[1] = value;
    } else if (name == sample) {
        call->arguments[2] = value;
    } else if (guided && name == uncond) {
        call->uncond = value;
        return value != Py_None;
    } else if (guided && name == scale) {
        call->guidance = value;
        return value != Py_None;
    } else if (guided && name == rescale) {
        return PyFloat_CheckExact(value) && PyFloat_AS_DOUBLE(value) == 0.0;
    } else {
        if (call->count == kMore) return false;
        call->more[call->count++] = {name, value};
    }
    return true;
}

// The values of one step by slot.
class Slots {
  public:
    void add(py::object value) { values_[count_++] = std::move(value); }
    void add(PyObject* borrowed) { add(py::reinterpret_borrow<py::object>(borrowed)); }
    PyObject* of(int slot) const { return values_[static_cast<size_t>(slot)].ptr(); }
    PyObject* of(const Entry& entry) const { return entry.slot < 0 ? entry.constant.ptr() : of(entry.slot); }

  private:
    std::array<py::object, kSlots> values_;
    size_t count_ = 0;
};

// A new reference that is there, or the error that was set.
inline py::object made(PyObject* object) {
    if (object == nullptr) throw python_error();
    return py::reinterpret_steal<py::object>(object);
}

template <typename... Objects>
py::object call_method(PyObject* self, const char* name, Objects... arguments) {
    const py::object method = made(PyUnicode_InternFromString(name));
    return made(PyObject_CallMethodObjArgs(self, method.ptr(), static_cast<PyObject*>(arguments)..., nullptr));
}

inline MaybeTensor tensor_in(PyObject* object) {
    return object != nullptr && THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

// One step of a `simple` program.
class SimpleStep {
  public:
    // `loop` has the methods of fastdiff.diffusers.scheduler.Fused; `choice` is the context variable that names the
    // forced backend, or None.
    SimpleStep(PyObject* loop, PyObject* choice, const Program& program, PyObject* attributes, const StepCall& call,
               Watch* watch)
        : loop_(loop), choice_(choice), program_(program), attributes_(attributes), call_(call), watch_(watch) {}

    py::object take(int64_t steps_taken) {
        gather();
        draw();
        make(steps_taken);
        write();
        return result();
    }

    // Whether the watch knows all that was written.
    bool watched() const { return watched_; }

  private:
    void gather() {
        for (const auto& [name, index] : program_.from_attributes) {
            PyObject* value = PyDict_GetItemWithError(attributes_, name.ptr());
            if (value != nullptr && index >= 0)
                value = PyList_Check(value) && index < PyList_GET_SIZE(value) ? PyList_GET_ITEM(value, index) : nullptr;
            TORCH_INTERNAL_ASSERT(value != nullptr, "a plan's attribute is gone");
            slots_.add(value);
        }
        for (const int place : program_.from_arguments) slots_.add(call_.arguments[static_cast<size_t>(place)]);
        for (const py::object& name : program_.from_keywords) {
            PyObject* value = call_.argument(name.ptr());
            TORCH_INTERNAL_ASSERT(value != nullptr, "a plan's argument is gone");
            slots_.add(value);
        }
    }

    void draw() {
        if (program_.draws.empty()) return;
        static PyObject* const generator_name = PyUnicode_InternFromString("generator");
        PyObject* generator = call_.argument(generator_name);
        if (generator == nullptr) generator = Py_None;
        const at::Tensor &output = *tensor_in(call_.output()), &sample = *tensor_in(call_.sample());
        const bool here = draws_as_torch && output.is_cpu();
        if (here && program_.consumes_noise && sample.scalar_type() == at::kFloat && sample.is_contiguous()) {
            consumed_ = torch_normal(output.sizes(), output.numel(), generator);
            if (consumed_.defined()) return slots_.add(py::none());
        }
        for (size_t k = 0; k < program_.draws.size(); ++k) {
            at::Tensor noise;
            if (here && program_.draw_types[k] == at::kFloat)
                noise = torch_normal(output.sizes(), output.numel(), generator);
            slots_.add(noise.defined()
                           ? made(THPVariable_Wrap(std::move(noise)))
                           : call_method(loop_, "draw", call_.output(), generator, program_.draws[k].ptr()));
        }
    }

    void make(int64_t steps_taken) {
        py::object seeds = py::none(), noise_step;
        if (program_.draws_inside) {
            seeds = call_method(loop_, "seeds_for", call_.sample());
            noise_step = made(PyLong_FromLongLong(steps_taken));
        }
        MaybeTensor noise = consumed_.defined()  ? &consumed_
                            : program_.noise < 0 ? nullptr
                                                 : tensor_in(slots_.of(program_.noise));
        if (directly(noise, seeds.ptr(), noise_step.ptr())) return;
        if (noise_step.ptr() == nullptr) noise_step = made(PyLong_FromLongLong(steps_taken));
        const py::object given = noise == nullptr ? py::none() : made(THPVariable_Wrap(*noise));
        const py::object history = made(PyList_New(static_cast<Py_ssize_t>(program_.registers.size())));
        for (size_t j = 0; j < program_.registers.size(); ++j)
            PyList_SET_ITEM(history.ptr(), static_cast<Py_ssize_t>(j), Py_NewRef(slots_.of(program_.registers[j])));
        const py::object made_elsewhere =
            call_method(loop_, "launch", program_.plan, call_.sample(), call_.output(), call_.uncond, call_.guidance,
                        history.ptr(), given.ptr(), seeds.ptr(), noise_step.ptr());
        TORCH_INTERNAL_ASSERT(PyTuple_Check(made_elsewhere.ptr()) &&
                              PyTuple_GET_SIZE(made_elsewhere.ptr()) == program_.keeps + 1);
        for (int64_t o = 0; o <= program_.keeps; ++o) slots_.add(PyTuple_GET_ITEM(made_elsewhere.ptr(), o));
    }

    // By the loops of this extension, where nothing forces another backend and all is plain.
    bool directly(MaybeTensor noise, PyObject* seeds, PyObject* noise_step) {
        static PyObject* const first_row = PyLong_FromLong(0);
        StepRequest request;
        request.sample = tensor_in(call_.sample());
        if (!request.sample->is_cpu() || !nothing_forced(choice_)) return false;
        request.model_output = tensor_in(call_.output());
        request.table = &program_.table;
        request.row = first_row;
        request.uncond = tensor_in(call_.uncond);
        if (request.uncond == nullptr && call_.uncond != Py_None) return false;  // for Python to say what it is
        request.guidance = call_.guidance;
        for (size_t j = 0; j < program_.registers.size(); ++j) {
            request.history[j] = tensor_in(slots_.of(program_.registers[j]));
            if (request.history[j] == nullptr) return false;
        }
        request.noise = noise;
        // The sample comes where the noise was, which is in the cache and wanted by nobody else.
        if (consumed_.defined()) request.outs[0] = &consumed_;
        request.seeds = tensor_in(seeds);
        request.noise_step = noise_step;
        request.purpose = program_.purpose;
        request.keeps = program_.keeps;
        for (size_t o = 0; o <= static_cast<size_t>(program_.keeps); ++o)
            if (program_.made_types[o] != request.sample->scalar_type()) request.made[o] = program_.made_types[o];
        Outputs outputs;
        if (!take_step(request, &outputs) && !(lay_out(&request) && take_step(request, &outputs))) return false;
        for (int64_t o = 0; o <= program_.keeps; ++o) slots_.add(made(THPVariable_Wrap(std::move(outputs[o]))));
        return true;
    }

    // Copies of the model's outputs in the samples' layout, where they have another: a transformer's are often views in
    // another order of dimensions. False where there is nothing to lay out, or something has to see the copy.
    bool lay_out(StepRequest* request) {
        const at::Tensor& sample = *request->sample;
        if (!sample.is_non_overlapping_and_dense() || !called_plainly()) return false;
        bool laid = false;
        const auto in_layout = [&](MaybeTensor tensor, at::Tensor* copy) {
            const bool other = tensor != nullptr && tensor->strides() != sample.strides();
            if (!other || !ordinary(*tensor) || !tensor->is_cpu() || tensor->sizes() != sample.sizes()) return tensor;
            *copy = new_output(sample, tensor->scalar_type());
            copy->copy_(*tensor);
            laid = true;
            return static_cast<MaybeTensor>(copy);
        };
        request->model_output = in_layout(request->model_output, &laid_out_[0]);
        request->uncond = in_layout(request->uncond, &laid_out_[1]);
        return laid;
    }

    // Each attribute that is written is watched as it is from now on; what somebody else writes meanwhile is not.
    void write() {
        for (const auto& [name, value] : program_.constants) set(name, value.ptr());
        for (const auto& [name, slot] : program_.variables) set(name, slots_.of(slot));
        for (const Program::List& list : program_.lists) {
            const py::object items = made(PyList_New(static_cast<Py_ssize_t>(list.entries.size())));
            for (size_t i = 0; i < list.entries.size(); ++i)
                PyList_SET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(slots_.of(list.entries[i])));
            if (list.stay < 0) {
                set(list.name, items.ptr());
                continue;
            }
            PyObject* before = PyDict_GetItemWithError(attributes_, list.name.ptr());
            TORCH_INTERNAL_ASSERT(before != nullptr && PyList_Check(before), "a plan's list is gone");
            if (PyList_SetSlice(before, list.stay, PyList_GET_SIZE(before), items.ptr()) != 0) throw python_error();
            watched_ = watched_ && watch_->look_into(before, &gone_);
        }
    }

    void set(const py::object& name, PyObject* value) {
        if (PyDict_SetItem(attributes_, name.ptr(), value) != 0) throw python_error();
        watched_ = watched_ && watch_->look_at(name.ptr(), value, &gone_);
    }

    py::object result() const {
        const std::vector<Entry>& results = program_.results;
        if (program_.in_tuple) {
            py::object tuple = made(PyTuple_New(static_cast<Py_ssize_t>(results.size())));
            for (size_t i = 0; i < results.size(); ++i)
                PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(slots_.of(results[i])));
            return tuple;
        }
        if (program_.kind.is_none()) return py::reinterpret_borrow<py::object>(slots_.of(results[0]));
        const py::object by_name = made(PyDict_New()), nothing = made(PyTuple_New(0));
        for (size_t i = 0; i < results.size(); ++i)
            if (PyDict_SetItem(by_name.ptr(), program_.names[i].ptr(), slots_.of(results[i])) != 0)
                throw python_error();
        return made(PyObject_Call(program_.kind.ptr(), nothing.ptr(), by_name.ptr()));
    }

    PyObject *loop_, *choice_;
    const Program& program_;
    PyObject* attributes_;
    const StepCall& call_;
    Watch* watch_;
    bool watched_ = true;
    Watch::Gone gone_;
    std::array<at::Tensor, 2> laid_out_;
    at::Tensor consumed_;  // noise that the step alone wants
    Slots slots_;
};

}  // namespace fastdiff::bindings
