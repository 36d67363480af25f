// SPDX-License-Identifier: MIT
// Guards: the conditions on a scheduler's attributes and on a call's arguments under which a plan is the right one.
// fastdiff/diffusers/runtime/guards.py defines the same kinds; a test holds the two together.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <utility>
#include <vector>

#include "scheduler_call.h"

namespace fastdiff::dropin {

namespace py = pybind11;

// Return a new reference, or throw the error that was set.
py::object own(PyObject* object);
// Intern a string, so that it can be compared by identity.
py::object interned(const py::handle& name);

enum class GuardKind : int {
    kAny,       // nothing is compared
    kId,        // the object itself
    kEquals,    // a plain value of the same type: None, bool, int, float, str, or a list, tuple or dict of such
    kTensor,    // a tensor of this dtype and shape
    kArray,     // a tensor or a NumPy array that holds these bytes; of a tensor on a device, by a copy on the host
    kTimestep,  // a view of a timestep of the schedule, once or expanded, so many bytes from the one that is due
};

// The version tag of a class: another one whenever an attribute of the class or of a base is replaced. 0: unknown.
unsigned int class_version(PyTypeObject* type);

// Compare two plain values; `...` in an expected list matches any tensor. Runs no Python code, so no other thread can
// come in between.
bool equal_plain(PyObject* expected, PyObject* value);

// An array on a device, and its bytes after so many writes (`Tensor._version`) as they were copied to the host.
struct HostCopy {
    at::Tensor tensor;
    int64_t version;
    py::object bytes;
};
using HostCopies = std::vector<HostCopy>;

// `copies` are records of the class HostCopy of guards.py.
HostCopies read_host_copies(const py::handle& copies);

class Guard {
  public:
    // `record` is a `Guard` of guards.py: (name, kind, expected).
    explicit Guard(const py::handle& record);

    // `timestep`: the address of the timestep that is due; null where none is. `copies`: of arrays on devices.
    bool check(PyObject* value, const void* timestep, const HostCopies& copies = {}) const;
    int traverse(visitproc visit, void* arg) const;

    py::object name;  // interned
    GuardKind kind;

  private:
    bool check_array(PyObject* value, const HostCopies& copies) const;

    py::object expected_;  // of kId and kEquals; of kArray the bytes
    at::ScalarType type_ = at::kFloat;
    std::vector<int64_t> sizes_;
    std::ptrdiff_t offset_ = 0;  // of kTimestep
    std::string format_;         // of a NumPy array
    py::object array_type_;      // the class of a NumPy array
};

// Guards of a call's arguments, in the call's order: the three that every step has, then the others.
bool check_arguments(const std::vector<Guard>& guards, const SchedulerCall& call, const void* timestep);
// Guards of a scheduler's attributes, in the order of its dictionary; the entry of the cache itself is skipped.
bool check_attributes(const std::vector<Guard>& guards, PyObject* attributes, const HostCopies& copies);

std::vector<Guard> read_guards(const py::handle& records);

// Tensors and how often each had been written (`Tensor._version`).
using TensorVersions = std::vector<std::pair<at::Tensor, int64_t>>;

// References to drop once all is in order: dropping one may run Python code.
using DeferredDecrefs = c10::SmallVector<py::object, 16>;

// The attributes of a scheduler after a step, by identity: while it is `unchanged`, every attribute guard that held
// then still holds.
class AttributeSnapshot {
  public:
    // Record the attributes that steps of the class read (the keys of the dictionary `reads`) and the items of the
    // lists among them.
    void take(PyObject* attributes, PyObject* reads);
    // Record one attribute anew, or the items of a list; false where a full `take` is needed.
    bool update(PyObject* key, PyObject* value, DeferredDecrefs* dropped);
    bool update_list(PyObject* list, DeferredDecrefs* dropped);
    void set_versions(TensorVersions versions) { std::swap(versions_, versions); }

    bool unchanged(PyObject* attributes) const;
    void clear();
    int traverse(visitproc visit, void* arg) const;

  private:
    // Stands for the value of an attribute that no step reads.
    static inline PyObject* const kNotRead = Py_Ellipsis;
    // The list itself is one of `values_` and held there.
    using List = std::pair<PyObject*, std::vector<py::object>>;

    static void replace(py::object* slot, PyObject* object, DeferredDecrefs* dropped);
    static void record_items(PyObject* value, List* list, DeferredDecrefs* dropped);

    std::vector<py::object> keys_, values_;
    std::vector<List> lists_;
    TensorVersions versions_;
};

}  // namespace fastdiff::dropin
