// SPDX-License-Identifier: MIT
#include "form_launch.h"
#include "step_general.h"
#include "step_launches.h"

namespace fastdiff {

void launch_step_bf16(const StepArgs& args, Launches& launches) {
    if (!launch_form<__nv_bfloat16, float>(args, launches)) launch_general<__nv_bfloat16, float>(args, launches);
}

}  // namespace fastdiff
