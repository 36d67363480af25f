// SPDX-License-Identifier: MIT
#include "form_launch.h"
#include "step_general.h"
#include "step_launches.h"

namespace fastdiff {

void launch_step_f32(const StepArgs& args, Launches& launches) {
    if (!launch_form<float, float>(args, launches)) launch_general<float, float>(args, launches);
}

}  // namespace fastdiff
