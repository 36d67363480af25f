// SPDX-License-Identifier: MIT
// The entry of the training loss and its gradient. Light: see tensors.h.
#pragma once

#include "step.h"

namespace fastdiff::bindings {

// `fastdiff._C.diffusion_loss(loss, c, factor, **fields)`: with factor None the losses `[B]` alone; else, from factors
// `[B]`, the gradients of output, x0 and noise for which `out` has a tensor to write or the dtype of a new one; or,
// with nothing written, the reason as a string. The fields are those of `step`, of which the sample is x0 and the
// model output the output. METH_FASTCALL | METH_KEYWORDS.
PyObject* diffusion_loss(PyObject* module, PyObject* const* values, Py_ssize_t positional, PyObject* names);

}  // namespace fastdiff::bindings
