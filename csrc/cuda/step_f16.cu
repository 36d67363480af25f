// SPDX-License-Identifier: MIT
#include "form_launch.h"
#include "step_general.h"
#include "step_launches.h"

namespace fastdiff {

void launch_step_f16(const StepArgs& args, Launches& launches) {
    if (!launch_form<__half, float>(args, launches)) launch_general<__half, float>(args, launches);
}

}  // namespace fastdiff
