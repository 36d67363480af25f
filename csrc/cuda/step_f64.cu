// SPDX-License-Identifier: MIT
// The general kernel alone: at 8 bytes an element it is bound by memory (docs/performance.md).
#include "step_general.h"
#include "step_launches.h"

namespace fastdiff {

void launch_step_f64(const StepArgs& args, Launches& launches) { launch_general<double, double>(args, launches); }

}  // namespace fastdiff
