// SPDX-License-Identifier: MIT
// The bindings as one translation unit: torch's headers take most of the time of each.
#include "current_stream.cpp"
#include "diffusion_loss.cpp"
#include "log_prob.cpp"
#include "step.cpp"
#include "step_call.cpp"
#include "triton.cpp"
