// SPDX-License-Identifier: MIT
// torch's current CUDA stream. Light: see tensors.h.
#pragma once

#include "tensors.h"

namespace fastdiff::bindings {

// Return the current stream of a tensor's device (a cudaStream_t); null, the default stream, for other devices.
void* current_stream(const at::Tensor& tensor);

}  // namespace fastdiff::bindings
