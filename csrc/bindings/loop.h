// SPDX-License-Identifier: MIT
// The type `Loop`: what a drop-in scheduler knows from one step to the next, so that a call that is the last one again,
// one timestep on and with nothing changed between, is taken without a look at anything but identities.
//
// fastdiff.diffusers.scheduler.Fused derives from it and has what needs Python: the methods `draw`, `launch`, `run` and
// `seeds_for`.
#pragma once

#include <structmember.h>

#include "beginning.h"
#include "simple_step.h"
#include "watch.h"

namespace fastdiff::bindings {

// What an argument of the last call has to be in the next one.
struct Known {
    enum Kind : int { kSame, kLike, kMoving };  // the object; a tensor of the kind; the view of the next timestep
    Known(PyObject* name, PyObject* value, Kind kind) : name(py::reinterpret_borrow<py::object>(name)), kind(kind) {
        if (kind == kSame) {
            same = py::reinterpret_borrow<py::object>(value);
            return;
        }
        const at::Tensor& tensor = THPVariable_Unpack(value);
        type = tensor.scalar_type();
        sizes = tensor.sizes().vec();
        pointer = kind == kMoving ? reinterpret_cast<int64_t>(tensor.const_data_ptr()) : 0;
    }

    bool fits(PyObject* value) const {
        if (kind == kSame) return equal_plain(same.ptr(), value);
        const MaybeTensor tensor = tensor_in(value);
        if (tensor == nullptr || tensor->scalar_type() != type || tensor->sizes() != sizes) return false;
        if (kind == kLike) return true;
        const bool one = tensor->numel() == 1 || (tensor->dim() == 1 && tensor->stride(0) == 0);
        return one && in_memory(*tensor) && reinterpret_cast<int64_t>(tensor->const_data_ptr()) == pointer;
    }

    py::object name;
    Kind kind;
    py::object same;
    at::ScalarType type = at::kFloat;
    std::vector<int64_t> sizes;
    int64_t pointer = 0;  // of what is moving, where the next one lies
};

struct LoopState {
    py::object choice;  // the context variable that names the forced backend, or None
    py::object plan;    // of the last step; null where there is none to go on from
    Program* program = nullptr;
    Watch watch;
    // The last call: which method, and what its arguments were, the three that all have first.
    py::object name;
    bool guided = false;
    std::vector<Known> known;
    // How far apart timesteps lie.
    int64_t step_bytes = 1;
    // What steps of the scheduler's class have read, a dictionary with their names; and when it was looked at.
    py::object reads;
    int64_t epoch = 0;
    // The version of the scheduler's class.
    unsigned int version = 0;

    void look(PyObject* attributes, PyObject* owner) {
        watch.look(attributes, owner, reads.ptr());
        epoch = reads_epoch;
    }
    // Counted at the beginning and at the end of every step: a step that two others stand between has met another
    // thread's, and nothing is to be learned from the state that it leaves.
    long long moves = 0;
    // The first steps of earlier loops, the latest first.
    std::vector<Beginning> beginnings;
};

// How many first steps are kept: those of a few sizes, numbers of steps and methods in turn.
constexpr size_t kMostBeginnings = 16;

struct Loop {
    PyObject_HEAD  // ends its line: what it stands for has a semicolon
        LoopState* state;
    long long steps_taken;
    // The count of moves at which the last call lacked a follower and nothing else; else -1.
    long long undisturbed_at;

    PyObject* self() { return reinterpret_cast<PyObject*>(this); }

    // Whether a call is the last one again, one timestep on, with nothing changed between.
    bool is_next(PyObject* scheduler, PyObject* attributes, PyObject* name, const StepCall& call) {
        const LoopState& s = *state;
        if (s.version == 0 || class_version(Py_TYPE(scheduler)) != s.version || s.epoch != reads_epoch) return false;
        if (s.program == nullptr || name != s.name.ptr() || (call.uncond != Py_None) != s.guided) return false;
        if (s.known.size() != call.arguments.size() + call.count) return false;
        const Known* known = s.known.data();
        for (PyObject* argument : call.arguments)
            if (!known++->fits(argument)) return false;
        for (size_t i = 0; i < call.count; ++i, ++known)
            if (call.more[i].first != known->name.ptr() || !known->fits(call.more[i].second)) return false;
        return s.watch.unchanged(attributes, self());
    }

    // Takes a step that is the next one and has a program; null, having done nothing, for any other.
    py::object advance(PyObject* scheduler, PyObject* attributes, PyObject* name, const StepCall& call) {
        LoopState& s = *state;
        undisturbed_at = -1;
        if (!is_next(scheduler, attributes, name, call)) return py::object();
        Program* next = s.program->follower;
        if (next == nullptr) {
            undisturbed_at = s.moves;
            return py::object();
        }
        const long long begun = ++s.moves;
        py::object plan = s.program->follower_plan;
        bool watched = false;
        py::object result = take(plan.ptr(), *next, attributes, call, &watched);
        ++steps_taken;
        if (++s.moves != begun + 1) {
            forget();
            return result;
        }
        if (!watched) s.look(attributes, self());
        move_on(std::move(plan), next);
        return result;
    }

    // Takes a step that an earlier loop began with in the same state; null, having done nothing, for any other. What
    // only scales the model's input is no step to count or to go on from.
    py::object begin(PyObject* scheduler, PyObject* name, bool scales, bool seeded, const StepCall& call) {
        LoopState& s = *state;
        if (steps_taken != 0 || s.beginnings.empty()) return py::object();
        if (!nothing_forced(s.choice.ptr())) return py::object();
        const py::object attributes = made(PyObject_GenericGetDict(scheduler, nullptr));
        const auto fits = [&](const Beginning& b) {
            return b.fits(scheduler, attributes.ptr(), self(), name, seeded, call);
        };
        const auto found = std::find_if(s.beginnings.begin(), s.beginnings.end(), fits);
        if (found == s.beginnings.end()) return py::object();
        // Another thread may drop it while the step is taken.
        py::object plan = found->plan;
        Program* program = found->program;
        const int64_t step_bytes = found->step_bytes;
        py::object reads = found->reads;
        std::vector<Known> known = known_of(*found, call);
        auto versions = found->versions(attributes.ptr());
        static PyObject* const schedule_name = PyUnicode_InternFromString("schedule");
        const py::object schedule = found->schedule;
        if (PyObject_SetAttr(self(), schedule_name, schedule.ptr()) != 0) throw python_error();
        const long long begun = ++s.moves;
        bool watched = false;  // never all of it: the watch knows another loop
        py::object result = take(plan.ptr(), *program, attributes.ptr(), call, &watched);
        const bool alone = ++s.moves == begun + 1;
        if (scales) return result;
        ++steps_taken;
        if (!alone) {
            forget();
            return result;
        }
        std::swap(s.known, known);
        s.name = py::reinterpret_borrow<py::object>(name);
        s.guided = call.uncond != Py_None;
        s.step_bytes = step_bytes;
        std::swap(s.reads, reads);
        s.version = class_version(Py_TYPE(scheduler));
        s.watch.versions(std::move(versions));
        s.look(attributes.ptr(), self());
        move_on(std::move(plan), program);
        return result;
    }

    // Goes on from a step that has been taken by a program.
    void move_on(py::object plan, Program* program) {
        LoopState& s = *state;
        for (Known& known : s.known)
            if (known.kind == Known::kMoving) known.pointer += s.step_bytes;
        s.program = program;
        const py::object before = std::exchange(s.plan, std::move(plan));  // dies when all is in order
    }

    void forget() {
        LoopState& s = *state;
        s.program = nullptr;
        const py::object plan = std::exchange(s.plan, py::object());
        const auto known = std::exchange(s.known, {});
        s.watch.clear();
    }

  private:
    static std::vector<Known> known_of(const Beginning& beginning, const StepCall& call) {
        std::vector<Known> known;
        known.reserve(beginning.arguments.size());
        for (size_t i = 0; i < beginning.arguments.size(); ++i) {
            const KeptArgument& kept = beginning.arguments[i];
            Known::Kind kind = Known::kSame;
            if (kept.how == KeptArgument::kLike) kind = Known::kLike;
            if (kept.how == KeptArgument::kMoving) kind = Known::kMoving;
            PyObject* value =
                i < call.arguments.size() ? call.arguments[i] : call.more[i - call.arguments.size()].second;
            known.emplace_back(kept.name.ptr(), value, kind);
        }
        return known;
    }

    // `watched` becomes whether the watch knows already what the step has written.
    py::object take(PyObject* plan, const Program& program, PyObject* attributes, const StepCall& call, bool* watched) {
        // An output with a learned variance has twice the channels, in a last step that does not ask for it as well.
        const bool alike = THPVariable_Unpack(call.output()).sizes() == THPVariable_Unpack(call.sample()).sizes();
        try {
            if (!program.simple || !alike) return run(plan, attributes, call);
            SimpleStep step(self(), state->choice.ptr(), program, attributes, call, &state->watch);
            py::object result = step.take(steps_taken);
            *watched = step.watched();
            return result;
        } catch (...) {
            forget();  // what is watched may be half of a step further than the program
            throw;
        }
    }

    py::object run(PyObject* plan, PyObject* attributes, const StepCall& call) {
        static const std::array<PyObject*, 3> names{PyUnicode_InternFromString("model_output"),
                                                    PyUnicode_InternFromString("timestep"),
                                                    PyUnicode_InternFromString("sample")};
        const py::object given = made(PyDict_New());
        const auto set = [&given](PyObject* name, PyObject* value) {
            if (PyDict_SetItem(given.ptr(), name, value) != 0) throw python_error();
        };
        for (size_t i = 0; i < names.size(); ++i) set(names[i], call.arguments[i]);
        for (size_t i = 0; i < call.count; ++i) set(call.more[i].first, call.more[i].second);
        return call_method(self(), "run", plan, attributes, given.ptr(), call.uncond, call.guidance);
    }
};

// The type, once the module has it.
inline PyTypeObject* loop_type = nullptr;

inline Loop* loop_of(PyObject* self) { return reinterpret_cast<Loop*>(self); }

inline PyObject* loop_remember(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(
        count == 9 && PyDict_Check(objects[1]) && PyList_Check(objects[4]) && PyDict_Check(objects[7]) &&
            PyType_Check(objects[8]),
        "remember: expected (plan, attributes, name, guided, arguments, step_bytes, tensors, reads, class)");
    LoopState& s = *loop_of(self)->state;
    py::object plan = py::reinterpret_borrow<py::object>(objects[0]);
    auto* program = plan.attr("native").cast<Program*>();
    std::vector<Known> known;
    for (const py::handle item : py::handle(objects[4])) {
        const auto triple = item.cast<py::tuple>();
        known.emplace_back(triple[0].ptr(), triple[1].ptr(), static_cast<Known::Kind>(triple[2].cast<int>()));
    }
    std::swap(s.known, known);
    s.name = py::reinterpret_borrow<py::object>(objects[2]);
    s.guided = objects[3] == Py_True;
    s.step_bytes = py::cast<int64_t>(objects[5]);
    s.watch.versions(objects[6]);
    const py::object reads_before = std::exchange(s.reads, py::reinterpret_borrow<py::object>(objects[7]));
    s.version = class_version(reinterpret_cast<PyTypeObject*>(objects[8]));
    s.look(objects[1], self);
    loop_of(self)->move_on(std::move(plan), program);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_begin(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 7 && PyDict_Check(objects[4]),
                     "begin: expected (scheduler, name, scales, seeded, given, uncond, guidance)");
    if ((objects[5] == Py_None) != (objects[6] == Py_None)) Py_RETURN_NONE;
    StepCall call;
    call.uncond = objects[5];
    call.guidance = objects[6];
    Py_ssize_t at = 0;
    PyObject *name = nullptr, *value = nullptr;
    while (PyDict_Next(objects[4], &at, &name, &value) != 0)
        if (!put_argument(name, value, false, &call)) Py_RETURN_NONE;
    const bool scales = objects[2] == Py_True;
    if (scales) {
        if (call.output() != nullptr) Py_RETURN_NONE;
        call.arguments[0] = call.sample();
    }
    if (call.output() == nullptr || call.timestep() == nullptr || call.sample() == nullptr) Py_RETURN_NONE;
    py::object result = loop_of(self)->begin(objects[0], objects[1], scales, objects[3] == Py_True, call);
    return result.ptr() == nullptr ? Py_NewRef(Py_None) : result.release().ptr();
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_keep_beginning(PyObject* self, PyObject* found) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(PyTuple_Check(found) && PyTuple_GET_SIZE(found) == 10, "keep_beginning: expected ten things");
    std::vector<Beginning>& kept = loop_of(self)->state->beginnings;
    Beginning beginning(py::reinterpret_borrow<py::tuple>(found));
    std::vector<Beginning> before;  // dies when all is in order
    std::swap(before, kept);
    kept.reserve(kMostBeginnings);
    kept.push_back(std::move(beginning));
    for (Beginning& each : before)
        if (kept.size() < kMostBeginnings) kept.push_back(std::move(each));
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_adopt(PyObject* self, PyObject* other) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(PyObject_TypeCheck(other, loop_type), "adopt: expected a Loop");
    std::vector<Beginning> beginnings = loop_of(other)->state->beginnings;
    std::swap(loop_of(self)->state->beginnings, beginnings);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_forget(PyObject* self, PyObject* /*unused*/) {
    loop_of(self)->forget();
    Py_RETURN_NONE;
}

inline PyObject* loop_unchanged(PyObject* self, PyObject* scheduler) {
    HANDLE_TH_ERRORS
    const py::object attributes = made(PyObject_GenericGetDict(scheduler, nullptr));
    const LoopState& s = *loop_of(self)->state;
    const bool known = s.program != nullptr && s.version != 0 && s.version == class_version(Py_TYPE(scheduler)) &&
                       s.epoch == reads_epoch;
    return PyBool_FromLong(known && s.watch.unchanged(attributes.ptr(), self) ? 1 : 0);
    END_HANDLE_TH_ERRORS
}

inline PyObject* loop_plan(PyObject* self, void* /*unused*/) {
    PyObject* plan = loop_of(self)->state->plan.ptr();
    return Py_NewRef(plan == nullptr ? Py_None : plan);
}

inline PyObject* loop_move(PyObject* self, PyObject* /*unused*/) {
    return PyLong_FromLongLong(++loop_of(self)->state->moves);
}

inline PyObject* loop_new(PyTypeObject* type, PyObject* /*args*/, PyObject* /*kwargs*/) {
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    loop_of(self)->state = new LoopState;
    loop_of(self)->undisturbed_at = -1;
    return self;
}

inline int loop_init(PyObject* self, PyObject* args, PyObject* /*kwargs*/) {
    PyObject* choice = nullptr;
    if (PyArg_ParseTuple(args, "O!:Loop", &PyContextVar_Type, &choice) == 0) return -1;
    loop_of(self)->state->choice = py::reinterpret_borrow<py::object>(choice);
    return 0;
}

inline int loop_traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const LoopState* s = loop_of(self)->state;
    if (s == nullptr) return 0;
    Py_VISIT(s->choice.ptr());
    Py_VISIT(s->plan.ptr());
    Py_VISIT(s->reads.ptr());
    for (const Known& known : s->known) Py_VISIT(known.same.ptr());
    for (const Beginning& beginning : s->beginnings)
        if (const int stop = beginning.traverse(visit, arg); stop != 0) return stop;
    return s->watch.traverse(visit, arg);
}

inline int loop_clear(PyObject* self) {
    if (loop_of(self)->state == nullptr) return 0;
    loop_of(self)->forget();
    const auto beginnings = std::exchange(loop_of(self)->state->beginnings, {});
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
        {"remember", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&loop_remember)), METH_FASTCALL,
         "remember(plan, attributes, name, guided, arguments, step_bytes, tensors, reads, class): go on from a step "
         "that "
         "was taken the longer way; arguments are triples (name, value, kind), the three that all calls have first."},
        {"begin", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&loop_begin)), METH_FASTCALL,
         "begin(scheduler, name, scales, seeded, given, uncond, guidance): the result of a step that an earlier loop "
         "began with; None, having done nothing, for any other."},
        {"keep_beginning", &loop_keep_beginning, METH_O,
         "keep_beginning((plan, class, name, guided, seeded, attributes, arguments, schedule, step_bytes, reads)): "
         "what a "
         "loop may begin with again; see csrc/bindings/beginning.h."},
        {"adopt", &loop_adopt, METH_O, "adopt(other): begin as another's loops do."},
        {"forget", &loop_forget, METH_NOARGS, "forget(): there is no step to go on from."},
        {"move", &loop_move, METH_NOARGS, "move(): count the beginning or the end of a step."},
        {"unchanged", &loop_unchanged, METH_O, "unchanged(scheduler): whether it is as the last step left it."},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyGetSetDef properties[] = {
        {"plan", &loop_plan, nullptr, "The plan of the last step, or None.", nullptr},
        {nullptr, nullptr, nullptr, nullptr, nullptr},
    };
    static PyMemberDef members[] = {
        {"steps_taken", T_LONGLONG, offsetof(Loop, steps_taken), 0, "Steps since the seeds or the timesteps were set."},
        {"undisturbed_at", T_LONGLONG, offsetof(Loop, undisturbed_at), READONLY,
         "The count of moves at which the last call lacked a plan and nothing else; else -1."},
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
    const py::object type = made(PyType_FromSpec(&spec));
    loop_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    m.attr("Loop") = type;
    m.def(
        "class_version",
        [](const py::type& type) {
            auto* object = reinterpret_cast<PyTypeObject*>(type.ptr());
            if (class_version(object) == 0) (void)py::hasattr(type, "step");  // a look-up gives it one
            return class_version(object);
        },
        py::arg("type"),
        "A number that changes when an attribute of a class or of a base is replaced; 0 where Python has none.");
    m.def(
        "advance_epoch", [] { ++reads_epoch; },
        "Say that a step has read an attribute that no step had read before: no scheduler goes on without a look.");
}

}  // namespace fastdiff::bindings
