// SPDX-License-Identifier: MIT
// The native executor of a scheduler's step: gather the inputs, draw, run the fused step, write the state, return the
// result. fastdiff/diffusers/runtime/execute.py is the Python executor, with the same contract and for every plan.
//
// It draws torch's noise through ATen on whichever device the noise belongs to, and runs the fused step on every device
// that the extension serves.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "../bindings/step_call.h"
#include "guards.h"
#include "native_plan.h"
#include "scheduler_call.h"

namespace fastdiff::dropin {

// The values of one step by slot.
class Slots {
  public:
    void add(py::object value) { values_[count_++] = std::move(value); }
    void add(PyObject* borrowed) { add(py::reinterpret_borrow<py::object>(borrowed)); }
    PyObject* operator[](int slot) const { return values_[static_cast<size_t>(slot)].ptr(); }
    PyObject* operator[](const SlotOrConstant& entry) const {
        return entry.slot < 0 ? entry.constant.ptr() : (*this)[entry.slot];
    }

  private:
    std::array<py::object, kMaxSlots> values_;
    size_t count_ = 0;
};

// What a scheduler's steps have in common.
struct ExecutorState {
    py::object forced_backend;  // the context variable `fastdiff.ops.backends.forced`
    at::Tensor seeds;           // one for each sample; undefined where noise is drawn by generators
};

class NativeExecutor {
  public:
    // `noise_step`: the number of steps taken with the seeds. `snapshot` is updated for every attribute that is
    // written.
    NativeExecutor(NativePlan& plan, PyObject* attributes, const SchedulerCall& call, ExecutorState* state,
                   int64_t noise_step, AttributeSnapshot* snapshot)
        : plan_(plan),
          attributes_(attributes),
          call_(call),
          state_(state),
          noise_step_(noise_step),
          snapshot_(snapshot) {}

    // Let the step write the model input for the next one too, if its plan and its sample allow that.
    void ask_for_model_input() { wants_model_input_ = true; }
    // Take the step and return its result; null, with no state changed, where the Python executor has to take it.
    py::object execute();
    // The step's draws, which the Python executor must not draw again: a list, or None where nothing has been drawn.
    py::object drawn() const;
    // Whether the snapshot has recorded everything that was written.
    bool snapshot_is_complete() const { return snapshot_is_complete_; }
    // The previous sample, where it is the first result, and the scaled one beside it, where the step has written it.
    const at::Tensor& prev_sample() const { return prev_sample_; }
    at::Tensor take_model_input() { return std::move(model_input_); }

  private:
    bool read_model_outputs();
    void gather();
    bool draw();
    bool run();
    void set_model_input(bindings::StepCall* step);
    bool convert_layouts(bindings::StepCall* step);
    void write();
    void write_attribute(const py::object& name, PyObject* value);
    py::object result() const;

    NativePlan& plan_;
    PyObject* attributes_;
    const SchedulerCall& call_;
    ExecutorState* state_;
    int64_t noise_step_;
    AttributeSnapshot* snapshot_;
    bool snapshot_is_complete_ = true;
    DeferredDecrefs dropped_;
    bindings::MaybeTensor model_output_ = nullptr, uncond_ = nullptr, variance_ = nullptr;
    std::array<at::Tensor, 3> halves_;           // of outputs with a learned variance: prediction, variance, uncond
    c10::SmallVector<at::Tensor, 2> converted_;  // inputs in the sample's layout
    c10::SmallVector<at::Tensor, 2> draws_;
    bool noise_is_scratch_ = false;  // the sample is written over the noise
    bool wants_model_input_ = false;
    at::Tensor prev_sample_, model_input_;
    Slots slots_;
};

}  // namespace fastdiff::dropin
