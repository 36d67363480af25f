// SPDX-License-Identifier: MIT
// The loops on the CPU: one build per instruction set, and the choice among the builds.
#pragma once

#include <vector>

#include "../diffusion_loss_math.h"
#include "../log_prob_math.h"
#include "../reduce_math.h"
#include "../step_math.h"

namespace fastdiff {

struct CpuBuild {
    const char* name;
    // Step elements [begin, end) of batch × inner.
    void (*step_range)(const StepArgs& args, int64_t begin, int64_t end);
    // Fill elements [begin, end) of batch × inner with normal numbers.
    void (*randn_range)(const RandnArgs& args, int64_t begin, int64_t end);
    // Copy bytes, with nontemporal or ordinary stores; for benchmarks.
    void (*copy_range)(const void* source, void* target, int64_t bytes, bool nontemporal);
    // Sums: the partial results of blocks [begin, end) of batch × blocks, then the values of samples [begin, end).
    void (*sum_blocks)(const SumArgs& args, int64_t begin, int64_t end);
    void (*finish_samples)(const SumArgs& args, int64_t begin, int64_t end);
    // The same for a Gram matrix, for the log-probability of a step, whose blocks take the step, and for the training
    // loss, whose blocks write the gradient where that is asked for.
    void (*gram_blocks)(const GramArgs& args, int64_t begin, int64_t end);
    void (*finish_gram)(const GramArgs& args, int64_t begin, int64_t end);
    void (*log_prob_blocks)(const LogProbArgs& args, int64_t begin, int64_t end);
    void (*finish_log_prob)(const LogProbArgs& args, int64_t begin, int64_t end);
    void (*loss_blocks)(const LossArgs& args, int64_t begin, int64_t end);
    void (*finish_loss)(const LossArgs& args, int64_t begin, int64_t end);
    // Selection. Add the first digits of `count` (below 2^32) elements to counts[kDigits]; return true if one is NaN.
    bool (*count_keys)(DType dtype, bool absolute, const void* from, int64_t count, int64_t* counts);
    // Find the digits of the elements of rank *low and *low + next; *low becomes the rank among those with the first
    // digit.
    void (*find_rank)(const int64_t* counts, int64_t* low, int next, int* first, int* last);
    // Copy the keys with first digits `first` to `last`; return their number.
    int64_t (*gather_keys)(DType dtype, bool absolute, const void* from, int64_t count, int first, int last,
                           void* keys);
    // Write the value at a rank among these keys; reorders them.
    void (*finish_keys)(const SelectArgs& args, void* keys, int64_t count, int64_t rank, void* out);
    // torch's normal numbers (csrc/torch_bits); null where the build has no loop for them. mt19937's words are stored
    // in float memory: `twist` makes the next 624 from the 624 before, `words_to_normals` turns groups of 16 words into
    // normal numbers in place. `add_scaled`: sum += weight·numbers.
    void (*twist)(const float* state, float* next);
    void (*words_to_normals)(float* memory, int64_t groups);
    void (*add_scaled)(float* sum, const float* numbers, float weight, int64_t count);
};

namespace generic {
extern const CpuBuild build;
}
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDIFF_X86_BUILDS 1
namespace avx2 {
extern const CpuBuild build;
}
namespace avx512 {
extern const CpuBuild build;
}
#endif

// Steps that move more bytes than this store new outputs past the caches: half of the last-level cache. Measured with
// 32 MiB, over loops of 3 to 8 tensors a step: ordinary and nontemporal stores take equally long at 12 to 16 MiB;
// below, the next step finds the outputs in the cache.
extern int64_t nontemporal_above;

// Return the build named `wanted` ("generic", "avx2", "avx512"), or the widest that the processor supports if null or
// empty. Its name is null if the wanted build is unknown or not supported.
CpuBuild select_cpu_build(const char* wanted);

// One run of the affine loop, recorded for tools/affine_forms.py and its test.
struct AffineTrace {
    uint32_t terms;  // `form_key` of affine_loop.inc
    int outputs;
    bool guided;
    bool prediction_given;  // thresholded: the prediction is an input
    bool compiled;          // a loop of affine_forms.inc ran
};

// Whether runs are recorded; switched by `record_affine_traces` alone.
extern bool affine_traced;
void trace_affine(const AffineTrace& trace);
// Switch recording on or off; return the distinct runs recorded before, and drop them.
std::vector<AffineTrace> record_affine_traces(bool on);

}  // namespace fastdiff
