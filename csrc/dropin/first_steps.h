// SPDX-License-Identifier: MIT
// First steps of loops, kept for later loops of the same class of scheduler in the same state.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

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

}  // namespace fastdiff::dropin
