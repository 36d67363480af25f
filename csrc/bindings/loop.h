// SPDX-License-Identifier: MIT
// The type `Loop`: what a drop-in scheduler knows from one step to the next, so that a call that is the last one again,
// one timestep on and with nothing changed between, is taken without a look at anything but identities.
//
// fastdiff.diffusers.scheduler.Fused derives from it and has what needs Python: the methods `draw`, `launch`, `run` and
// `seeds_for`. Every other call it declines by returning None, having done nothing.
#pragma once

#include <structmember.h>

#include "program.h"
#include "step.h"
#include "watch.h"

namespace fastdiff::bindings {

// `fastdiff.Purpose.STEP`.
constexpr int64_t kStepPurpose = 1;
// Slots of one step: what it reads, draws and makes.
constexpr size_t kSlots = 24;

struct LoopState {
    py::object choice;  // the dictionary in which `forced` names a backend, or is None
    py::object plan;    // of the last step; null where there is none to go on from
    Program* program = nullptr;
    Watch watch;
    // The last call: which method, what kind of tensors, and what else was passed.
    py::object name;
    bool guided = false;
    at::ScalarType output_type = at::kFloat, timestep_type = at::kFloat, sample_type = at::kFloat;
    std::vector<int64_t> sizes;
    std::vector<std::pair<py::object, py::object>> keywords;
    // Where the next timestep lies, and how far apart they are.
    int64_t pointer = 0, step_bytes = 1;
    // Whether the last call that was declined lacked a follower and nothing else.
    bool undisturbed = false;
};

struct Loop {
    PyObject_HEAD
    LoopState* state;
    long long steps_taken;

    // Whether a call is the last one again, one timestep on, with nothing changed between.
    bool is_next(PyObject* attributes, PyObject* name, PyObject* args, PyObject* kwargs, bool guided) {
        const LoopState& s = *state;
        if (s.program == nullptr || name != s.name.ptr() || guided != s.guided) return false;
        if (PyTuple_GET_SIZE(args) != 3 || static_cast<size_t>(PyDict_GET_SIZE(kwargs)) != s.keywords.size())
            return false;
        for (Py_ssize_t i = 0; i < 3; ++i)
            if (!THPVariable_Check(PyTuple_GET_ITEM(args, i))) return false;
        const at::Tensor& output = THPVariable_Unpack(PyTuple_GET_ITEM(args, 0));
        const at::Tensor& timestep = THPVariable_Unpack(PyTuple_GET_ITEM(args, 1));
        const at::Tensor& sample = THPVariable_Unpack(PyTuple_GET_ITEM(args, 2));
        if (timestep.dim() != 0 || !timestep.has_storage() || timestep.scalar_type() != s.timestep_type ||
            reinterpret_cast<int64_t>(timestep.const_data_ptr()) != s.pointer)
            return false;
        if (output.scalar_type() != s.output_type || sample.scalar_type() != s.sample_type ||
            sample.sizes() != s.sizes || output.sizes() != sample.sizes())
            return false;
        size_t count = 0;
        Py_ssize_t at = 0;
        PyObject *key = nullptr, *value = nullptr;
        while (PyDict_Next(kwargs, &at, &key, &value) != 0) {
            const auto& [known_key, known_value] = s.keywords[count++];
            if (key != known_key.ptr() || value != known_value.ptr()) return false;
        }
        return s.watch.unchanged(attributes, reinterpret_cast<PyObject*>(this));
    }
};

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
    SimpleStep(Loop* loop, const Program& program, PyObject* attributes, PyObject* args, PyObject* kwargs)
        : loop_(reinterpret_cast<PyObject*>(loop)), state_(*loop->state), program_(program), attributes_(attributes),
          args_(args), kwargs_(kwargs) {}

    py::object take(PyObject* uncond, PyObject* guidance, int64_t steps_taken) {
        gather();
        draw();
        make(uncond, guidance, steps_taken);
        write();
        return result();
    }

  private:
    void gather() {
        for (const auto& [name, index] : program_.from_attributes) {
            PyObject* value = PyDict_GetItemWithError(attributes_, name.ptr());
            if (value != nullptr && index >= 0)
                value = PyList_Check(value) && index < PyList_GET_SIZE(value) ? PyList_GET_ITEM(value, index) : nullptr;
            TORCH_INTERNAL_ASSERT(value != nullptr, "a plan's attribute is gone");
            slots_.add(value);
        }
        for (const int place : program_.from_arguments) slots_.add(PyTuple_GET_ITEM(args_, place));
        for (const py::object& name : program_.from_keywords) {
            PyObject* value = PyDict_GetItemWithError(kwargs_, name.ptr());
            TORCH_INTERNAL_ASSERT(value != nullptr, "a plan's argument is gone");
            slots_.add(value);
        }
    }

    void draw() {
        if (program_.draws.empty()) return;
        static PyObject* const generator_name = PyUnicode_InternFromString("generator");
        PyObject* generator = PyDict_GetItemWithError(kwargs_, generator_name);
        if (generator == nullptr) generator = Py_None;
        for (const py::object& dtype : program_.draws)
            slots_.add(call_method(loop_, "draw", PyTuple_GET_ITEM(args_, 0), generator, dtype.ptr()));
    }

    void make(PyObject* uncond, PyObject* guidance, int64_t steps_taken) {
        PyObject* sample = PyTuple_GET_ITEM(args_, 2);
        py::object seeds = py::none();
        const py::object noise_step = made(PyLong_FromLongLong(steps_taken));
        if (program_.draws_inside) seeds = call_method(loop_, "seeds_for", sample);
        PyObject* noise = program_.noise < 0 ? Py_None : slots_.of(program_.noise);
        if (directly(sample, uncond, guidance, noise, seeds.ptr(), noise_step.ptr())) return;
        const py::object history = made(PyList_New(static_cast<Py_ssize_t>(program_.registers.size())));
        for (size_t j = 0; j < program_.registers.size(); ++j)
            PyList_SET_ITEM(history.ptr(), static_cast<Py_ssize_t>(j), Py_NewRef(slots_.of(program_.registers[j])));
        const py::object made_elsewhere =
            call_method(loop_, "launch", program_.plan, sample, PyTuple_GET_ITEM(args_, 0), uncond, guidance,
                        history.ptr(), noise, seeds.ptr(), noise_step.ptr());
        TORCH_INTERNAL_ASSERT(PyTuple_Check(made_elsewhere.ptr()) &&
                              PyTuple_GET_SIZE(made_elsewhere.ptr()) == program_.keeps + 1);
        for (int64_t o = 0; o <= program_.keeps; ++o) slots_.add(PyTuple_GET_ITEM(made_elsewhere.ptr(), o));
    }

    // By the loops of this extension, where nothing forces another backend and all is plain.
    bool directly(PyObject* sample, PyObject* uncond, PyObject* guidance, PyObject* noise, PyObject* seeds,
                  PyObject* noise_step) {
        static PyObject* const forced = PyUnicode_InternFromString("forced");
        static PyObject* const first_row = PyLong_FromLong(0);
        StepRequest request;
        request.sample = tensor_in(sample);
        if (!request.sample->is_cpu() || PyDict_GetItemWithError(state_.choice.ptr(), forced) != Py_None) return false;
        request.model_output = tensor_in(PyTuple_GET_ITEM(args_, 0));
        request.table = &program_.table;
        request.row = first_row;
        request.uncond = tensor_in(uncond);
        if (request.uncond == nullptr && uncond != Py_None) return false;  // for Python to say what it is
        request.guidance = guidance;
        for (size_t j = 0; j < program_.registers.size(); ++j) {
            request.history[j] = tensor_in(slots_.of(program_.registers[j]));
            if (request.history[j] == nullptr) return false;
        }
        request.noise = tensor_in(noise);
        request.seeds = tensor_in(seeds);
        request.noise_step = noise_step;
        request.purpose = kStepPurpose;
        request.keeps = program_.keeps;
        Outputs outputs;
        if (!take_step(request, &outputs)) return false;
        for (int64_t o = 0; o <= program_.keeps; ++o) slots_.add(made(THPVariable_Wrap(std::move(outputs[o]))));
        return true;
    }

    void write() {
        for (const auto& [name, value] : program_.constants) set(name, value.ptr());
        for (const auto& [name, slot] : program_.variables) set(name, slots_.of(slot));
        for (const Program::List& list : program_.lists) {
            const py::object items = made(PyList_New(static_cast<Py_ssize_t>(list.entries.size())));
            for (size_t i = 0; i < list.entries.size(); ++i)
                PyList_SET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(slots_.of(list.entries[i])));
            if (!list.same) {
                set(list.name, items.ptr());
                continue;
            }
            PyObject* before = PyDict_GetItemWithError(attributes_, list.name.ptr());
            TORCH_INTERNAL_ASSERT(before != nullptr && PyList_Check(before), "a plan's list is gone");
            if (PyList_SetSlice(before, 0, PyList_GET_SIZE(before), items.ptr()) != 0) throw python_error();
        }
    }

    void set(const py::object& name, PyObject* value) {
        if (PyDict_SetItem(attributes_, name.ptr(), value) != 0) throw python_error();
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

    PyObject* loop_;
    const LoopState& state_;
    const Program& program_;
    PyObject *attributes_, *args_, *kwargs_;
    Slots slots_;
};

inline Loop* loop_of(PyObject* self) { return reinterpret_cast<Loop*>(self); }

// Goes on from a step that has been taken by a program.
inline void look(Loop* loop, py::object plan, Program* program, PyObject* attributes) {
    LoopState& s = *loop->state;
    s.watch.look(attributes, reinterpret_cast<PyObject*>(loop));
    s.pointer += s.step_bytes;
    s.program = program;
    const py::object before = std::exchange(s.plan, std::move(plan));  // dies when all is in order
}

inline PyObject* loop_advance(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 6 && PyDict_Check(objects[0]) && PyTuple_Check(objects[2]) && PyDict_Check(objects[3]),
                     "advance: expected (attributes, name, args, kwargs, uncond, guidance)");
    Loop* loop = loop_of(self);
    LoopState& s = *loop->state;
    PyObject *attributes = objects[0], *args = objects[2], *kwargs = objects[3], *uncond = objects[4];
    s.undisturbed = loop->is_next(attributes, objects[1], args, kwargs, uncond != Py_None);
    Program* next = s.undisturbed ? s.program->follower : nullptr;
    if (next == nullptr) Py_RETURN_NONE;
    py::object plan = s.program->follower_plan;
    py::object result;
    if (next->simple)
        result = SimpleStep(loop, *next, attributes, args, kwargs).take(uncond, objects[5], loop->steps_taken);
    else
        result = call_method(self, "run", plan.ptr(), attributes, args, kwargs, uncond, objects[5]);
    ++loop->steps_taken;
    look(loop, std::move(plan), next, attributes);
    return result.release().ptr();
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_remember(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 9 && PyDict_Check(objects[1]) && PyTuple_Check(objects[4]) && PyDict_Check(objects[5]),
                     "remember: expected (plan, attributes, name, guided, args, kwargs, pointer, step_bytes, tensors)");
    LoopState& s = *loop_of(self)->state;
    py::object plan = py::reinterpret_borrow<py::object>(objects[0]);
    auto* program = plan.attr("program").cast<Program*>();
    s.name = py::reinterpret_borrow<py::object>(objects[2]);
    s.guided = objects[3] == Py_True;
    const at::Tensor& output = THPVariable_Unpack(PyTuple_GET_ITEM(objects[4], 0));
    const at::Tensor& timestep = THPVariable_Unpack(PyTuple_GET_ITEM(objects[4], 1));
    const at::Tensor& sample = THPVariable_Unpack(PyTuple_GET_ITEM(objects[4], 2));
    s.output_type = output.scalar_type();
    s.timestep_type = timestep.scalar_type();
    s.sample_type = sample.scalar_type();
    s.sizes = sample.sizes().vec();
    s.keywords.clear();
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(objects[5], &at, &key, &value) != 0)
        s.keywords.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    s.pointer = py::cast<int64_t>(objects[6]);
    s.step_bytes = py::cast<int64_t>(objects[7]);
    s.watch.versions(objects[8]);
    look(loop_of(self), std::move(plan), program, objects[1]);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_forget(PyObject* self, PyObject* /*unused*/) {
    LoopState& s = *loop_of(self)->state;
    s.program = nullptr;
    s.watch.clear();
    s.keywords.clear();
    const py::object before = std::exchange(s.plan, py::object());
    Py_RETURN_NONE;
}

inline PyObject* loop_unchanged(PyObject* self, PyObject* attributes) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(PyDict_Check(attributes), "unchanged: expected a dict");
    const LoopState& s = *loop_of(self)->state;
    return PyBool_FromLong(s.program != nullptr && s.watch.unchanged(attributes, self) ? 1 : 0);
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_plan(PyObject* self, void* /*unused*/) {
    PyObject* plan = loop_of(self)->state->plan.ptr();
    return Py_NewRef(plan == nullptr ? Py_None : plan);
}

inline PyObject* loop_undisturbed(PyObject* self, void* /*unused*/) {
    return PyBool_FromLong(loop_of(self)->state->undisturbed ? 1 : 0);
}

inline PyObject* loop_new(PyTypeObject* type, PyObject* /*args*/, PyObject* /*kwargs*/) {
    PyObject* self = type->tp_alloc(type, 0);
    if (self != nullptr) loop_of(self)->state = new LoopState;
    return self;
}

inline int loop_init(PyObject* self, PyObject* args, PyObject* /*kwargs*/) {
    PyObject* choice = nullptr;
    if (PyArg_ParseTuple(args, "O!:Loop", &PyDict_Type, &choice) == 0) return -1;
    loop_of(self)->state->choice = py::reinterpret_borrow<py::object>(choice);
    return 0;
}

inline int loop_traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const LoopState* s = loop_of(self)->state;
    if (s == nullptr) return 0;
    Py_VISIT(s->choice.ptr());
    Py_VISIT(s->plan.ptr());
    for (const auto& keyword : s->keywords) Py_VISIT(keyword.second.ptr());
    return s->watch.traverse(visit, arg);
}

inline int loop_clear(PyObject* self) {
    if (loop_of(self)->state != nullptr) Py_XDECREF(loop_forget(self, nullptr));
    return 0;
}

inline void loop_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    delete std::exchange(loop_of(self)->state, nullptr);
    type->tp_free(self);
    Py_DECREF(type);
}

inline void define_loop(py::module_& m) {
    static PyMethodDef methods[] = {
        {"advance", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&loop_advance)), METH_FASTCALL,
         "advance(attributes, name, args, kwargs, uncond, guidance): the step, or None where it is not the next one."},
        {"remember", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&loop_remember)), METH_FASTCALL,
         "remember(plan, attributes, name, guided, args, kwargs, pointer, step_bytes, tensors): go on from a step that "
         "was taken the longer way."},
        {"forget", &loop_forget, METH_NOARGS, "forget(): there is no step to go on from."},
        {"unchanged", &loop_unchanged, METH_O, "unchanged(attributes): whether they are as the last step left them."},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyGetSetDef properties[] = {
        {"plan", &loop_plan, nullptr, "The plan of the last step, or None.", nullptr},
        {"undisturbed", &loop_undisturbed, nullptr, "Whether the last call that was declined lacked a plan only.",
         nullptr},
        {nullptr, nullptr, nullptr, nullptr, nullptr},
    };
    static PyMemberDef members[] = {
        {"steps_taken", T_LONGLONG, offsetof(Loop, steps_taken), 0, "Steps since the seeds or the timesteps were set."},
        {nullptr, 0, 0, 0, nullptr},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(&loop_new)},
        {Py_tp_init, reinterpret_cast<void*>(&loop_init)},
        {Py_tp_traverse, reinterpret_cast<void*>(&loop_traverse)},
        {Py_tp_clear, reinterpret_cast<void*>(&loop_clear)},
        {Py_tp_dealloc, reinterpret_cast<void*>(&loop_dealloc)},
        {Py_tp_methods, methods},
        {Py_tp_getset, properties},
        {Py_tp_members, members},
        {0, nullptr},
    };
    static PyType_Spec spec = {"fastdiff._C.Loop", sizeof(Loop), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
    m.attr("Loop") = made(PyType_FromSpec(&spec));
}

}  // namespace fastdiff::bindings
