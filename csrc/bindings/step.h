// SPDX-License-Identifier: MIT
// The fused step's entry: from C++ `run_step`, from Python `step`.
//
// Light: see tensors.h.
#pragma once

#include "../triton/step_kernels.h"
#include "step_call.h"

namespace fastdiff::bindings {

// Reasons for which a call was not run, with nothing written; `decline_name` gives the string that Python sees.
enum class Decline : int {
    kNone,
    kArgument,  // a type, a missing or a superfluous argument, a count
    kModes,     // a dispatch mode is active and has to see an operator
    kWrapper,   // a tensor of a tracer, of torch.func or of a subclass, or a negated view
    kAutograd,  // autograd has to record the step
    kDtype,     // no dtype of a step, or not the one that the table's dtype asks for
    kDevice,    // a device without a kernel in this build, or tensors on several
    kShape,
    kLayout,   // strides that the loops do not take: `canonicalize` copies
    kStorage,  // storage that was freed or resized, or has no memory
    kValue,    // a number out of range
    kOverlap,  // what is written shares memory with what is read, other than element by element
    kKernel,   // Triton has not compiled the kernel yet, or its block is not set
};

// The name of a reason, such as "layout".
const char* decline_name(Decline reason);

// Result of a call: the tensors written, 1 + keeps of them, unless it was declined.
struct Outcome {
    Decline declined = Decline::kNone;
    std::array<at::Tensor, kMaxOutputs> outputs;
    // The kernel that is missing, where `declined` is kKernel; for `install_triton_kernel`.
    std::optional<triton::KernelKey> missing_kernel;
};

// Run a call whose tensors the loops can take as they are: each of a floating-point dtype, on one device, of one shape
// and dense layout. Any other is declined with the reason found first, before anything is written. Throws where a CUDA
// launch fails or memory runs out. Needs the GIL, and releases it while several threads work.
Outcome run_step(const StepCall& call);

// `fastdiff._C.step(**fields)`: a tuple of 1 + keeps tensors, the reason as a string, or the key of the missing kernel
// as bytes. METH_FASTCALL | METH_KEYWORDS.
PyObject* step(PyObject* module, PyObject* const* values, Py_ssize_t positional, PyObject* names);

}  // namespace fastdiff::bindings
