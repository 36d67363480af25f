// SPDX-License-Identifier: MIT
#include "first_steps.h"

#include <algorithm>
#include <utility>

#include "../bindings/tensors.h"

namespace fastdiff::dropin {

int64_t& read_epoch() {
    static int64_t epoch = 0;
    return epoch;
}

FirstStepEntry::FirstStepEntry(const py::handle& record)
    : plan(record.attr("plan")),
      native(plan.attr("native").cast<NativePlan*>()),
      scheduler_class(record.attr("scheduler_class")),
      method(interned(record.attr("method"))),
      guided(record.attr("guided").cast<bool>()),
      seeded(record.attr("seeded").cast<bool>()),
      attributes(read_guards(record.attr("attributes"))),
      arguments(std::make_shared<const std::vector<Guard>>(read_guards(record.attr("arguments")))),
      place(record.attr("place").cast<Py_ssize_t>()),
      step_bytes(record.attr("step_bytes").cast<int64_t>()),
      plan_cache(record.attr("plan_cache")),
      reads(record.attr("reads")),
      version(class_version(reinterpret_cast<PyTypeObject*>(scheduler_class.ptr()))),
      epoch(read_epoch()) {}

bool FirstStepEntry::check(PyObject* scheduler, PyObject* now, PyObject* name, bool with_seeds,
                           const SchedulerCall& call, const HostCopies& copies, const void** timestep) const {
    static PyObject* const timesteps_name = PyUnicode_InternFromString("timesteps");
    if (reinterpret_cast<PyObject*>(Py_TYPE(scheduler)) != scheduler_class.ptr() || name != method.ptr()) return false;
    if (version == 0 || class_version(Py_TYPE(scheduler)) != version || epoch != read_epoch()) return false;
    if (with_seeds != seeded || call.guided() != guided) return false;
    const at::Tensor* timesteps = as_tensor(PyDict_GetItemWithError(now, timesteps_name));
    if (timesteps == nullptr || !bindings::in_memory(*timesteps)) return false;
    // The arguments first: they are few, and tell calls apart.
    const void* due = static_cast<const char*>(timesteps->const_data_ptr()) + place * step_bytes;
    if (!check_arguments(*arguments, call, due) || !check_attributes(attributes, now, copies)) return false;
    *timestep = due;
    return true;
}

TensorVersions FirstStepEntry::versions(PyObject* now) const {
    TensorVersions found;
    for (const Guard& guard : attributes) {
        if (guard.kind != GuardKind::kArray) continue;
        const at::Tensor* tensor = as_tensor(PyDict_GetItemWithError(now, guard.name.ptr()));
        if (tensor != nullptr && !tensor->is_inference()) found.emplace_back(*tensor, tensor->_version());
    }
    return found;
}

std::shared_ptr<const FirstStepEntry> FirstSteps::find(PyObject* scheduler, PyObject* attributes, PyObject* method,
                                                       bool seeded, const SchedulerCall& call, const HostCopies& copies,
                                                       const void** timestep) {
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const auto& entry) {
        return entry->check(scheduler, attributes, method, seeded, call, copies, timestep);
    });
    if (found == entries_.end()) return nullptr;
    std::rotate(entries_.begin(), found, found + 1);
    return entries_.front();
}

void FirstSteps::add(const py::handle& record) {
    auto entry = std::make_shared<const FirstStepEntry>(record);
    // Dropping an entry may run code; the list is in order by then.
    std::shared_ptr<const FirstStepEntry> dropped;
    if (entries_.size() == kMost) {
        dropped = std::move(entries_.back());
        entries_.pop_back();
    }
    entries_.insert(entries_.begin(), std::move(entry));
}

void FirstSteps::clear() { const auto dropped = std::exchange(entries_, {}); }

}  // namespace fastdiff::dropin
