// SPDX-License-Identifier: MIT
// The per-scheduler cache of steps: it takes the next step of a loop, and the first step of a loop like an earlier one,
// without looking up a plan. fastdiff/diffusers/runtime/step_cache.py has the same class in Python.
#pragma once

#include <pybind11/pybind11.h>

#include "executor.h"
#include "first_steps.h"
#include "guards.h"
#include "native_plan.h"
#include "next_model_input.h"
#include "scheduler_call.h"

namespace fastdiff::dropin {

struct StepCacheState {
    ExecutorState executor;
    NextModelInput next_model_input;
    py::object execute;  // the Python executor, for plans and calls that the native one does not take
    py::object first_steps_owner;
    FirstSteps* first_steps = nullptr;
    HostCopies host_copies;  // of the scheduler's arrays on devices
    py::object plan_cache;   // fastdiff.diffusers.runtime.plan_cache.PlanCache, or None
    // The last step: its plan (null where no step may follow from it) and its call.
    py::object plan;
    NativePlan* native = nullptr;
    py::object method;
    bool guided = false;
    Guards arguments;
    const char* timestep = nullptr;  // the address of its timestep
    int64_t step_bytes = 1;
    // The scheduler as the step left it.
    AttributeSnapshot snapshot;
    py::object reads;  // a dict with the names of the attributes that steps of the class read
    int64_t read_epoch = 0;
    unsigned int class_version = 0;
    // Counted at the beginning and at the end of every step. If it advanced by more than a step's own begin and end,
    // another thread stepped meanwhile, and the state that the step left is not to be relied on.
    long long epoch = 0;
};

struct StepCache {
    PyObject_HEAD  // the macro ends with a semicolon
        StepCacheState* state;
    long long steps_taken;      // since the seeds were given or the timesteps set
    long long last_miss_epoch;  // the epoch at which the last call lacked a next plan and nothing else; else -1
    char seeded;                // noise comes from the samples' own seeds

    PyObject* object() { return reinterpret_cast<PyObject*>(this); }

    // Take the step that follows the last one; null, with nothing done, where this call is not it.
    py::object try_next_step(PyObject* scheduler, PyObject* attributes, PyObject* method, const SchedulerCall& call);
    // Take a step with which an earlier loop began; null, with nothing done, where there is none. `scales`: the method
    // scales the model's input, which is no step to count or to go on from.
    py::object try_first_step(PyObject* scheduler, PyObject* attributes, PyObject* method, bool scales,
                              const SchedulerCall& call);
    // Scale the model's input: hand out what the last step wrote, or take one pass; null, with nothing done, where the
    // plan has to be looked up.
    py::object try_scaling(PyObject* scheduler, PyObject* attributes, PyObject* method, const SchedulerCall& call);
    // Whether the scheduler is as the last step left it.
    bool unchanged(PyObject* scheduler, PyObject* attributes) const;
    // Forget the last step.
    void forget();
    // Record a step that has been taken by `plan`.
    void advance_to(py::object plan, NativePlan* native);

  private:
    // Record the sample and the model inputs (a list or None) of a step that the Python executor has taken.
    void record_python_step(const py::object& plan, const py::object& result, const py::object& model_inputs);
    // `scales`: as for `try_first_step`.
    py::object execute(const py::object& plan, NativePlan* native, PyObject* attributes, const SchedulerCall& call,
                       bool scales, bool* snapshot_is_complete);
};

StepCache* step_cache_of(PyObject* object);  // null where the object is none
void define_step_cache(py::module_& m);

}  // namespace fastdiff::dropin
