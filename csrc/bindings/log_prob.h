// SPDX-License-Identifier: MIT
// The entry of a step with its log-probability. Light: see tensors.h.
#pragma once

#include "step.h"

namespace fastdiff::bindings {

// `fastdiff._C.log_prob(replay, mean, **fields)`: the log-probabilities `[B]`, followed by the step's outputs unless it
// is a replay, in which `noise` is the previous sample; or, with nothing written, the reason as a string. The fields
// are those of `step`. METH_FASTCALL | METH_KEYWORDS.
PyObject* log_prob(PyObject* module, PyObject* const* values, Py_ssize_t positional, PyObject* names);

}  // namespace fastdiff::bindings
