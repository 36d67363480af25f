// SPDX-License-Identifier: MIT
// The model input that a step writes in its own pass, for `scale_model_input` to hand out.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

namespace fastdiff::dropin {

// The sample that the last step returned, and the model input for the next step if that step wrote it in its own pass.
//
// A step writes it once a sample was scaled as the step before had returned it, and no more once it was not asked for.
class NextModelInput {
  public:
    // Record the step that has been taken; `sample` is undefined where its result cannot be told from another tensor.
    void record(const at::Tensor& sample, at::Tensor scaled);
    // Whether a tensor is the step's sample, not written since.
    bool is_of(const at::Tensor& tensor) const;
    // Return the model input and keep no reference to it; undefined where there is none.
    at::Tensor take() { return std::exchange(scaled_, at::Tensor()); }
    // Begin a step: drop what was not asked for, and return whether to write the next model input.
    bool begin_step();
    void expect_again() { wanted_ = true; }
    void clear();

  private:
    // Compared by identity; the sample's memory is not kept.
    std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> sample_;
    int64_t version_ = 0;
    at::Tensor scaled_;
    bool wanted_ = false;
};

}  // namespace fastdiff::dropin
