// SPDX-License-Identifier: MIT
// The arguments of one fused step, `StepCall`, and their reader from Python's keywords.
//
// Light: see tensors.h.
#pragma once

#include <array>

#include "tensors.h"

namespace fastdiff::bindings {

// A number for all samples, or an int64 tensor: [1] for all, [B], or [B, T].
struct Counter {
    int64_t value = 0;
    MaybeTensor tensor = nullptr;
};

// A real number for all samples, or a tensor in the compute dtype: [1] for all, [B], or [B, T].
struct Scale {
    bool given = false;
    double value = 0.0;
    MaybeTensor tensor = nullptr;
};

using HistorySlots = std::array<MaybeTensor, kRegisters>;

// Destination of each output: a tensor to write, or a new tensor of a dtype, the sample's where it is `Undefined`.
struct Targets {
    bool given = false;  // `count` targets; all of them new tensors like the sample otherwise
    int64_t count = 0;
    std::array<MaybeTensor, kMaxOutputs> tensors{};
    std::array<at::ScalarType, kMaxOutputs> dtypes = {at::ScalarType::Undefined, at::ScalarType::Undefined,
                                                      at::ScalarType::Undefined};
};

// The fields of fastdiff.ops.call.StepCall, by type, name and default, in its order (a test compares the two); their
// shapes and dtypes stand there. Python is fastest when it passes keywords in this order.
#define FASTDIFF_STEP_FIELDS(FIELD)           \
    FIELD(MaybeTensor, sample, nullptr)       \
    FIELD(MaybeTensor, model_output, nullptr) \
    FIELD(MaybeTensor, table, nullptr)        \
    FIELD(Counter, row_index, {})             \
    FIELD(MaybeTensor, uncond, nullptr)       \
    FIELD(Scale, guidance_scale, {})          \
    FIELD(HistorySlots, history, {})          \
    FIELD(MaybeTensor, noise, nullptr)        \
    FIELD(MaybeTensor, variance, nullptr)     \
    FIELD(MaybeTensor, mask, nullptr)         \
    FIELD(MaybeTensor, threshold, nullptr)    \
    FIELD(int64_t, variance_kind, 0)          \
    FIELD(int64_t, keeps, 0)                  \
    FIELD(MaybeTensor, seeds, nullptr)        \
    FIELD(Counter, noise_step, {})            \
    FIELD(int64_t, purpose, 1) /* STEP */     \
    FIELD(int64_t, parts, 1)                  \
    FIELD(MaybeTensor, model_input, nullptr)  \
    FIELD(bool, write_history, false)         \
    FIELD(Targets, out, {})

// Launch options: whether Triton's kernel is launched where the C++ one could be, and whether dispatch modes need not
// see the call, as inside a registered operator.
#define FASTDIFF_LAUNCH_FIELDS(FIELD) \
    FIELD(bool, triton, false)        \
    FIELD(bool, in_operator, false)

// Pointers are borrowed: whoever fills the structure keeps the tensors alive until `run_step` returns. Counters other
// than `row_index` are read only beside `seeds`.
struct StepCall {
#define FASTDIFF_MEMBER(type, name, initial) type name = initial;
    FASTDIFF_STEP_FIELDS(FASTDIFF_MEMBER)
    FASTDIFF_LAUNCH_FIELDS(FASTDIFF_MEMBER)
#undef FASTDIFF_MEMBER
};

// Read keywords, as the vectorcall protocol passes them, into a call.
//
// Returns false where a value has a type that no fast path takes; fastdiff/ops/checks.py names it. Throws TypeError for
// a positional argument or an unknown keyword: a mistake of fastdiff's own.
bool read_step_call(PyObject* const* values, Py_ssize_t positional, PyObject* names, StepCall* call);

// Read a guidance scale; false where it is no real number and no tensor.
bool read_scale(PyObject* object, Scale* to);

// The names of all fields in order, as a new tuple.
PyObject* step_field_names();

}  // namespace fastdiff::bindings
