// SPDX-License-Identifier: MIT
#include "step_cache.h"

#include <structmember.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <utility>

#include "../torch_bits/torch_normal.h"

namespace fastdiff::dropin {

bool StepCache::unchanged(PyObject* scheduler, PyObject* attributes) const {
    const StepCacheState& s = *state;
    return s.native != nullptr && s.class_version != 0 && s.class_version == class_version(Py_TYPE(scheduler)) &&
           s.read_epoch == read_epoch() && s.snapshot.unchanged(attributes);
}

py::object StepCache::try_next_step(PyObject* scheduler, PyObject* attributes, PyObject* method,
                                    const SchedulerCall& call) {
    StepCacheState& s = *state;
    last_miss_epoch = -1;
    if (s.native == nullptr || method != s.method.ptr() || call.guided() != s.guided) return py::object();
    if (!check_arguments(*s.arguments, call, s.timestep + s.step_bytes)) return py::object();
    if (!unchanged(scheduler, attributes)) return py::object();
    NativePlan* next = s.native->next_plan;
    if (next == nullptr) {
        last_miss_epoch = s.epoch;
        return py::object();
    }
    const long long begun = ++s.epoch;
    py::object plan = s.native->next_plan_owner;
    bool snapshot_is_complete = false;
    py::object result = execute(plan, next, attributes, call, /*scales=*/false, &snapshot_is_complete);
    ++steps_taken;
    if (++s.epoch != begun + 1) {
        forget();
        return result;
    }
    if (!snapshot_is_complete) {
        s.snapshot.take(attributes, s.reads.ptr());
        s.read_epoch = read_epoch();
    }
    s.timestep += s.step_bytes;
    advance_to(std::move(plan), next);
    return result;
}

py::object StepCache::try_first_step(PyObject* scheduler, PyObject* attributes, PyObject* method, bool scales,
                                     const SchedulerCall& call) {
    StepCacheState& s = *state;
    if (steps_taken != 0 || s.first_steps->size() == 0) return py::object();
    const void* timestep = nullptr;
    const auto entry = s.first_steps->find(scheduler, attributes, method, seeded != 0, call, s.host_copies, &timestep);
    if (entry == nullptr) return py::object();
    auto versions = entry->versions(attributes);
    const py::object plan_cache_before = std::exchange(s.plan_cache, entry->plan_cache);
    const long long begun = ++s.epoch;
    bool snapshot_is_complete = false;  // the snapshot is another loop's
    py::object result = execute(entry->plan, entry->native, attributes, call, scales, &snapshot_is_complete);
    const bool alone = ++s.epoch == begun + 1;
    if (scales) return result;
    ++steps_taken;
    if (!alone) {
        forget();
        return result;
    }
    const Guards arguments_before = std::exchange(s.arguments, entry->arguments);
    s.timestep = static_cast<const char*>(timestep);
    s.step_bytes = entry->step_bytes;
    s.method = entry->method;
    s.guided = entry->guided;
    const py::object reads_before = std::exchange(s.reads, entry->reads);
    s.class_version = entry->version;
    s.snapshot.set_versions(std::move(versions));
    s.snapshot.take(attributes, s.reads.ptr());
    s.read_epoch = read_epoch();
    advance_to(entry->plan, entry->native);
    return result;
}

py::object StepCache::try_scaling(PyObject* scheduler, PyObject* attributes, PyObject* method,
                                  const SchedulerCall& call) {
    StepCacheState& s = *state;
    const at::Tensor* sample = as_tensor(call.sample());
    if (sample == nullptr) return py::object();
    NativePlan* scaling = s.native == nullptr ? nullptr : s.native->scaling(sample->scalar_type());
    if (scaling == nullptr || !unchanged(scheduler, attributes))
        return try_first_step(scheduler, attributes, method, /*scales=*/true, call);
    if (s.next_model_input.is_of(*sample) && bindings::called_plainly()) {
        s.next_model_input.expect_again();
        // The second guard of a call's arguments is the timestep's.
        if ((*s.arguments)[1].check(call.timestep(), s.timestep + s.step_bytes)) {
            at::Tensor scaled = s.next_model_input.take();
            if (scaled.defined()) return own(THPVariable_Wrap(std::move(scaled)));
        }
    }
    bool snapshot_is_complete = false;
    const py::object plan = py::reinterpret_borrow<py::object>(scaling->plan);
    return execute(plan, scaling, attributes, call, /*scales=*/true, &snapshot_is_complete);
}

void StepCache::advance_to(py::object plan, NativePlan* native) {
    state->native = native;
    const py::object before = std::exchange(state->plan, std::move(plan));  // dropped when all is in order
}

void StepCache::forget() {
    StepCacheState& s = *state;
    s.native = nullptr;
    const py::object plan = std::exchange(s.plan, py::object());
    const Guards arguments = std::exchange(s.arguments, nullptr);
    s.next_model_input.clear();
    s.snapshot.clear();
}

py::object StepCache::execute(const py::object& plan, NativePlan* native, PyObject* attributes,
                              const SchedulerCall& call, bool scales, bool* snapshot_is_complete) {
    static const std::array<PyObject*, 3> names{PyUnicode_InternFromString("model_output"),
                                                PyUnicode_InternFromString("timestep"),
                                                PyUnicode_InternFromString("sample")};
    try {
        NativeExecutor executor(*native, attributes, call, &state->executor, steps_taken, &state->snapshot);
        // Under a mode the step is an operator, whose model input would be copied into the tensor.
        const bool writes_model_input = !scales && state->next_model_input.begin_step() && bindings::called_plainly();
        if (writes_model_input) executor.ask_for_model_input();
        py::object result = executor.execute();
        if (result.ptr() != nullptr) {
            *snapshot_is_complete = executor.snapshot_is_complete();
            if (!scales) state->next_model_input.record(executor.prev_sample(), executor.take_model_input());
            return result;
        }
        const py::object arguments = own(PyDict_New());
        const auto set = [&arguments](PyObject* name, PyObject* value) {
            if (PyDict_SetItem(arguments.ptr(), name, value) != 0) throw python_error();
        };
        for (size_t i = 0; i < names.size(); ++i) set(names[i], call.required[i]);
        for (size_t i = 0; i < call.num_extra; ++i) set(call.extra[i].first, call.extra[i].second);
        const py::object drawn = executor.drawn();
        const py::object model_inputs = writes_model_input ? own(PyList_New(0)) : py::none();
        result = own(PyObject_CallFunctionObjArgs(state->execute.ptr(), plan.ptr(), attributes, arguments.ptr(),
                                                  call.uncond, call.guidance_scale, object(), drawn.ptr(), Py_None,
                                                  model_inputs.ptr(), nullptr));
        if (!scales) record_python_step(plan, result, model_inputs);
        return result;
    } catch (...) {
        forget();  // the snapshot may be half of a step ahead of the plan
        throw;
    }
}

void StepCache::record_python_step(const py::object& plan, const py::object& result, const py::object& model_inputs) {
    at::Tensor sample, scaled;
    if (!plan.attr("model_input_scale")().is_none()) {
        const py::object first = plan.attr("result_type").is_none() ? result : py::object(result[py::int_(0)]);
        sample = THPVariable_Unpack(first.ptr());
    }
    if (PyList_Check(model_inputs.ptr()) && PyList_GET_SIZE(model_inputs.ptr()) > 0)
        scaled = THPVariable_Unpack(PyList_GET_ITEM(model_inputs.ptr(), 0));
    state->next_model_input.record(sample, std::move(scaled));
}

namespace {

PyTypeObject* step_cache_type = nullptr;

StepCache* as_cache(PyObject* self) { return reinterpret_cast<StepCache*>(self); }

// install(plan, attributes, method, guided, arguments, timestep, step_bytes, tensors, reads, class)
PyObject* install(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 10 && PyDict_Check(objects[1]) && PyDict_Check(objects[8]) && PyType_Check(objects[9]),
                     "install: expected (plan, attributes, method, guided, arguments, timestep, step_bytes, tensors, "
                     "reads, class)");
    StepCacheState& s = *as_cache(self)->state;
    py::object plan = py::reinterpret_borrow<py::object>(objects[0]);
    auto* native = plan.attr("native").cast<NativePlan*>();
    Guards arguments = std::make_shared<const std::vector<Guard>>(read_guards(objects[4]));
    TensorVersions versions;
    for (const py::handle tensor : py::handle(objects[7])) {
        const at::Tensor& unpacked = THPVariable_Unpack(tensor.ptr());
        versions.emplace_back(unpacked, unpacked._version());
    }
    s.next_model_input.clear();
    std::swap(s.arguments, arguments);
    const py::object method_before = std::exchange(s.method, interned(objects[2]));
    s.guided = objects[3] == Py_True;
    s.timestep = static_cast<const char*>(THPVariable_Unpack(objects[5]).const_data_ptr());
    s.step_bytes = py::cast<int64_t>(objects[6]);
    s.snapshot.set_versions(std::move(versions));
    const py::object reads_before = std::exchange(s.reads, py::reinterpret_borrow<py::object>(objects[8]));
    s.class_version = class_version(reinterpret_cast<PyTypeObject*>(objects[9]));
    s.snapshot.take(objects[1], s.reads.ptr());
    s.read_epoch = read_epoch();
    as_cache(self)->advance_to(std::move(plan), native);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

PyObject* forget_method(PyObject* self, PyObject* /*unused*/) {
    as_cache(self)->forget();
    Py_RETURN_NONE;
}

PyObject* unchanged_method(PyObject* self, PyObject* scheduler) {
    HANDLE_TH_ERRORS
    const py::object attributes = own(PyObject_GenericGetDict(scheduler, nullptr));
    return PyBool_FromLong(as_cache(self)->unchanged(scheduler, attributes.ptr()) ? 1 : 0);
    END_HANDLE_TH_ERRORS
}

PyObject* advance_epoch(PyObject* self, PyObject* /*unused*/) {
    return PyLong_FromLongLong(++as_cache(self)->state->epoch);
}

PyObject* set_seeds(PyObject* self, PyObject* seeds) {
    HANDLE_TH_ERRORS
    const at::Tensor* tensor = as_tensor(seeds);
    as_cache(self)->state->executor.seeds = tensor == nullptr ? at::Tensor() : *tensor;
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

PyObject* set_host_copies(PyObject* self, PyObject* copies) {
    HANDLE_TH_ERRORS
    const HostCopies before = std::exchange(as_cache(self)->state->host_copies, read_host_copies(copies));
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

PyObject* get_plan(PyObject* self, void* /*unused*/) {
    PyObject* plan = as_cache(self)->state->plan.ptr();
    return Py_NewRef(plan == nullptr ? Py_None : plan);
}

PyObject* get_plan_cache(PyObject* self, void* /*unused*/) {
    return Py_NewRef(as_cache(self)->state->plan_cache.ptr());
}

int set_plan_cache(PyObject* self, PyObject* value, void* /*unused*/) {
    if (value == nullptr) value = Py_None;
    const py::object before =
        std::exchange(as_cache(self)->state->plan_cache, py::reinterpret_borrow<py::object>(value));
    return 0;
}

PyObject* new_cache(PyTypeObject* type, PyObject* /*args*/, PyObject* /*kwargs*/) {
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    as_cache(self)->state = new StepCacheState;
    as_cache(self)->state->plan_cache = py::none();
    as_cache(self)->last_miss_epoch = -1;
    return self;
}

int init_cache(PyObject* self, PyObject* args, PyObject* /*kwargs*/) {
    try {
        PyObject *forced = nullptr, *execute = nullptr, *first_steps = nullptr;
        if (PyArg_ParseTuple(args, "O!OO:StepCache", &PyContextVar_Type, &forced, &execute, &first_steps) == 0)
            return -1;
        StepCacheState& s = *as_cache(self)->state;
        s.first_steps = py::cast<FirstSteps*>(py::handle(first_steps));
        s.first_steps_owner = py::reinterpret_borrow<py::object>(first_steps);
        s.executor.forced_backend = py::reinterpret_borrow<py::object>(forced);
        s.execute = py::reinterpret_borrow<py::object>(execute);
        return 0;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
        return -1;
    }
}

int traverse_cache(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const StepCacheState* s = as_cache(self)->state;
    if (s == nullptr) return 0;
    Py_VISIT(s->executor.forced_backend.ptr());
    Py_VISIT(s->execute.ptr());
    Py_VISIT(s->first_steps_owner.ptr());
    Py_VISIT(s->plan_cache.ptr());
    Py_VISIT(s->plan.ptr());
    Py_VISIT(s->reads.ptr());
    // Guards of a first step belong to its entry too; only the cache's own references count here.
    if (s->arguments != nullptr && s->arguments.use_count() == 1)
        for (const Guard& guard : *s->arguments)
            if (const int stop = guard.traverse(visit, arg); stop != 0) return stop;
    return s->snapshot.traverse(visit, arg);
}

int clear_cache(PyObject* self) {
    if (as_cache(self)->state == nullptr) return 0;
    as_cache(self)->forget();
    const py::object plan_cache = std::exchange(as_cache(self)->state->plan_cache, py::none());
    return 0;
}

void dealloc_cache(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    delete std::exchange(as_cache(self)->state, nullptr);
    type->tp_free(self);
    Py_DECREF(type);
}

}  // namespace

StepCache* step_cache_of(PyObject* object) {
    return object != nullptr && PyObject_TypeCheck(object, step_cache_type) ? as_cache(object) : nullptr;
}

void define_step_cache(py::module_& m) {
    py::class_<FirstSteps>(m, "FirstSteps")
        .def(py::init<>())
        .def("add", &FirstSteps::add, py::arg("first_step"), "Keep a first step; the oldest is dropped.")
        .def("clear", &FirstSteps::clear, "Drop all of them.")
        .def("__len__", &FirstSteps::size);
    static PyMethodDef methods[] = {
        {"install", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&install)), METH_FASTCALL,
         "install(plan, attributes, method, guided, arguments, timestep, step_bytes, tensors, reads, class): record a "
         "step whose plan was looked up, so that the next one can follow from it."},
        {"forget", &forget_method, METH_NOARGS, "forget(): no step follows from the last one."},
        {"advance_epoch", &advance_epoch, METH_NOARGS, "advance_epoch(): count the beginning or the end of a step."},
        {"unchanged", &unchanged_method, METH_O, "unchanged(scheduler): whether it is as the last step left it."},
        {"set_seeds", &set_seeds, METH_O, "set_seeds(seeds): the seeds as a tensor on the samples' device, or None."},
        {"set_host_copies", &set_host_copies, METH_O,
         "set_host_copies(copies): the copies of the scheduler's arrays on devices, by which first steps are found."},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyGetSetDef properties[] = {
        {"plan", &get_plan, nullptr, "The plan of the last step, or None.", nullptr},
        {"plan_cache", &get_plan_cache, &set_plan_cache, "The scheduler's PlanCache, or None.", nullptr},
        {nullptr, nullptr, nullptr, nullptr, nullptr},
    };
    static PyMemberDef members[] = {
        {"steps_taken", T_LONGLONG, offsetof(StepCache, steps_taken), 0,
         "Steps since the seeds or the timesteps were set."},
        {"last_miss_epoch", T_LONGLONG, offsetof(StepCache, last_miss_epoch), READONLY,
         "The epoch at which the last call lacked a next plan and nothing else; else -1."},
        {"seeded", T_BOOL, offsetof(StepCache, seeded), 0, "Noise comes from the samples' own seeds."},
        {nullptr, 0, 0, 0, nullptr},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(&new_cache)},
        {Py_tp_init, reinterpret_cast<void*>(&init_cache)},
        {Py_tp_traverse, reinterpret_cast<void*>(&traverse_cache)},
        {Py_tp_clear, reinterpret_cast<void*>(&clear_cache)},
        {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc_cache)},
        {Py_tp_methods, methods},
        {Py_tp_getset, properties},
        {Py_tp_members, members},
        {0, nullptr},
    };
    static PyType_Spec spec = {"fastdiff._C.StepCache", sizeof(StepCache), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
    const py::object type = own(PyType_FromSpec(&spec));
    step_cache_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    m.attr("StepCache") = type;
    m.def(
        "class_version",
        [](const py::type& type) {
            auto* object = reinterpret_cast<PyTypeObject*>(type.ptr());
            if (class_version(object) == 0) (void)py::hasattr(type, "step");  // a look-up assigns one
            return class_version(object);
        },
        py::arg("type"),
        "The version tag of a class, which changes when an attribute of it or of a base is replaced; 0 where Python "
        "has none.");
    m.def(
        "advance_read_epoch", [] { ++read_epoch(); },
        "Say that a step has read an attribute that no step of its class had read before.");
    m.def(
        "check_guard",
        [](const py::object& record, const py::object& value, const py::object& timestep, const py::object& copies) {
            const void* due = timestep.is_none() ? nullptr : PyLong_AsVoidPtr(timestep.ptr());
            return Guard(record).check(value.ptr(), due, read_host_copies(copies));
        },
        py::arg("guard"), py::arg("value"), py::arg("timestep"), py::arg("copies") = py::tuple(),
        "Evaluate one guard, as the cache does. `timestep`: the address of the one that is due, or None; `copies`: of "
        "arrays on devices.");
}

}  // namespace fastdiff::dropin
