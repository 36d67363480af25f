// SPDX-License-Identifier: MIT
// The executor of drop-in steps as one translation unit: torch's headers take most of the time of each.
#include "cached_step_method.cpp"
#include "device_table.cpp"
#include "executor.cpp"
#include "first_steps.cpp"
#include "guards.cpp"
#include "native_plan.cpp"
#include "next_model_input.cpp"
#include "scheduler_call.cpp"
#include "step_cache.cpp"
