// SPDX-License-Identifier: MIT
// The per-scheduler cache of steps: it takes the next step of a loop, and the first step of a loop like an earlier one,
// without looking up a plan. fastdiff/diffusers/runtime/step_cache.py has the same class in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <vector>

#include "executor.h"
#include "guards.h"
#include "native_plan.h"
#include "scheduler_call.h"

namespace fastdiff::dropin {

// The number of times that a step has read an attribute that no step of its class had read before. Guards and snapshots
// made before lack that attribute.
int64_t& read_epoch();

using Guards = std::shared_ptr<const std::vector<Guard>>;

// The first step of a loop: its plan, and the guards of the scheduler and the call under which it is the plan again.
struct FirstStepEntry {
    explicit FirstStepEntry(const py::handle& record);  // a `FirstStep` of fastdiff/diffusers/runtime/guards.py

    // Whether the guards hold. `timestep` becomes the address of the timestep that is due.
    bool check(PyObject* scheduler, PyObject* attributes, PyObject* method, bool seeded, const SchedulerCall& call,
               const HostCopies& copies, const void** timestep) const;
    TensorVersions versions(PyObject* attributes) const;

    py::object plan;
    NativePlan* native;
    py::object scheduler_class, method;
    bool guided, seeded;
    std::vector<Guard> attributes;
    Guards arguments;
    Py_ssize_t place;  // of the timestep in the schedule
    int64_t step_bytes;
    py::object plan_cache, reads;
    unsigned int version;
    int64_t epoch;
};

// The first steps of all schedulers of one diffusers class, the latest first.
class FirstSteps {
  public:
    std::shared_ptr<const FirstStepEntry> find(PyObject* scheduler, PyObject* attributes, PyObject* method, bool seeded,
                                               const SchedulerCall& call, const HostCopies& copies,
                                               const void** timestep);
    void add(const py::handle& record);
    void clear();
    size_t size() const { return entries_.size(); }

    // Entries kept: those of a few configurations, sizes, numbers of steps and methods in turn.
    static constexpr size_t kMost = 32;

  private:
    std::vector<std::shared_ptr<const FirstStepEntry>> entries_;
};

// The sample that the last step returned, and the model input for the next step if that step wrote it in its own pass.
//
// A step writes it once a sample was scaled as the step before had returned it, and no more once it was not asked for.
class NextModelInput {
  public:
    // Record the step that has been taken; `sample` is undefined where its result cannot be told from another tensor.
    void record(const at::Tensor& sample, at::Tensor scaled);
    // Whether a tensor is the step's sample, not written since.
    bool is_of(const at::Tensor& tensor) const;
    // Return the model input and keep no reference to it; undefined where there is none.
    at::Tensor take() { return std::exchange(scaled_, at::Tensor()); }
    // Begin a step: drop what was not asked for, and return whether to write the next model input.
    bool begin_step();
    void expect_again() { wanted_ = true; }
    void clear();

  private:
    // Compared by identity; the sample's memory is not kept.
    std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> sample_;
    int64_t version_ = 0;
    at::Tensor scaled_;
    bool wanted_ = false;
};

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
