// SPDX-License-Identifier: MIT
// Launches of the step by the dtype of all its tensors, each compiled in a file of its own.
#pragma once

#include "../step_math.h"

namespace fastdiff {

class Launches;

void launch_step_f16(const StepArgs& args, Launches& launches);
void launch_step_bf16(const StepArgs& args, Launches& launches);
void launch_step_f32(const StepArgs& args, Launches& launches);
void launch_step_f64(const StepArgs& args, Launches& launches);

}  // namespace fastdiff
