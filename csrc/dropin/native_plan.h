// SPDX-License-Identifier: MIT
// A plan (fastdiff/diffusers/compiler/plan.py) as the native executor reads it: where the tensors of a step come from,
// its row, and what becomes of the results.
#pragma once

#include <pybind11/pybind11.h>

#include <forward_list>
#include <utility>
#include <vector>

#include "device_table.h"
#include "guards.h"

namespace fastdiff::dropin {

// The most values of one step: inputs, draws and computed tensors.
constexpr size_t kMaxSlots = 24;
constexpr int kMaxHistory = 4;
constexpr int64_t kMaxStepOutputs = 3;

// Sources of noise; `NoiseSource` in fastdiff/diffusers/compiler/plan.py.
enum class NoiseSource : int { kTorch, kSeeds, kPath };

struct Draw {
    at::ScalarType type;
    NoiseSource source;
    int64_t purpose;  // of kSeeds: which draw of the step it is
    bool fused;       // the fused step draws it, and it has no slot
};

// A slot, or a constant.
struct SlotOrConstant {
    int slot = -1;
    py::object constant;
};

// Entries that are written to a list of the scheduler from `start` on; a new list where `start` is -1.
struct ListWrite {
    py::object name;
    Py_ssize_t start;
    std::vector<SlotOrConstant> entries;
};

struct NativePlan {
    explicit NativePlan(const py::handle& plan);

    // The row as a table on a device; copied there once.
    const at::Tensor& table(const at::Device& device) { return table_.on(device); }
    // The row whose model input is scaled for the next step. Null where the step cannot write that: its first result is
    // no output of its own, or no plan is known that scales it.
    DeviceTable* table_with_model_input();
    // The plan by which `scale_model_input` scales samples of a dtype after this step; null where none is known.
    NativePlan* scaling(at::ScalarType type) const;
    void set_scaling(NativePlan* scaling, double factor);

    PyObject* plan;  // the owner of this object
    // The native executor takes the step. Other plans are for the Python executor.
    bool native_eligible;
    std::vector<std::pair<py::object, Py_ssize_t>> attribute_inputs;  // name, index in a list or -1
    std::vector<py::object> argument_inputs;
    std::vector<int> history;
    std::vector<Draw> draws;
    int noise = -1;
    // There is one draw, in float32, that only the row reads: the sample may be written over it.
    bool noise_is_scratch = false;
    int64_t kept, variance_kind;
    std::vector<at::ScalarType> output_types;
    std::vector<std::pair<py::object, py::object>> constant_writes;
    std::vector<std::pair<py::object, int>> tensor_writes;
    std::vector<ListWrite> list_writes;
    std::vector<SlotOrConstant> results;
    int first_output;  // the slot of the previous sample
    py::object result_type;
    std::vector<py::object> result_names;
    // The plan of the same call one timestep later with nothing changed between, once one has followed. Timesteps only
    // go forward, so these links form no cycle.
    NativePlan* next_plan = nullptr;
    py::object next_plan_owner;

  private:
    struct Scaling {
        NativePlan* plan;
        py::object owner;
    };

    DeviceTable table_, table_with_model_input_;
    std::forward_list<Scaling> scalings_;  // one for each dtype at most
};

void define_native_plan(py::module_& m);

}  // namespace fastdiff::dropin
