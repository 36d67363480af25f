// SPDX-License-Identifier: MIT
// The entries of the training loss and its gradient. Light: see tensors.h.
#pragma once

#include "step.h"

namespace fastdiff::bindings {

// `fastdiff._C.diffusion_loss(loss, c, factor, **fields)`: with factor None the losses `[B]` alone; else, from factors
// `[B]`, the gradients of output, x0 and noise for which `out` has a tensor to write or the dtype of a new one; or,
// with nothing written, the reason as a string. The fields are those of `step`, of which the sample is x0 and the
// model output the output. METH_FASTCALL | METH_KEYWORDS.
PyObject* diffusion_loss(PyObject* module, PyObject* const* values, Py_ssize_t positional, PyObject* names);

// `fastdiff._C.recorded_diffusion_loss(loss, c, reduction, weights, **fields)`: on the CPU, the samples' losses, times
// weights `[B]` or, one a timestep, `[T]` if not None, reduced, as one tensor whose gradient autograd takes by one
// node; or the reason as a string. The row index is the timestep of a table of `forward_rows`, whose last row is none.
// Loss and reduction are names. METH_FASTCALL | METH_KEYWORDS.
PyObject* recorded_diffusion_loss(PyObject* module, PyObject* const* values, Py_ssize_t positional, PyObject* names);

// `fastdiff._C.indices_in_range(indices, batch, end)`: true for an int64 tensor in the CPU's memory, `[1]` or
// `[batch]`, whose numbers are 0 to end - 1. METH_FASTCALL.
PyObject* indices_in_range(PyObject* module, PyObject* const* values, Py_ssize_t positional);

}  // namespace fastdiff::bindings
