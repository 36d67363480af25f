// SPDX-License-Identifier: MIT
#include "next_model_input.h"

#include "../bindings/tensors.h"

namespace fastdiff::dropin {

void NextModelInput::record(const at::Tensor& sample, at::Tensor scaled) {
    clear();
    if (!sample.defined()) return;
    if (sample.is_inference()) {  // writes to it are not counted
        wanted_ = false;
        return;
    }
    sample_.emplace(sample.getIntrusivePtr());
    version_ = sample._version();
    scaled_ = std::move(scaled);
}

bool NextModelInput::is_of(const at::Tensor& tensor) const {
    return sample_.has_value() && sample_->_unsafe_get_target() == tensor.unsafeGetTensorImpl() &&
           tensor._version() == version_ && bindings::is_plain_eager(tensor);
}

bool NextModelInput::begin_step() {
    wanted_ = wanted_ && !scaled_.defined();
    clear();
    return wanted_;
}

void NextModelInput::clear() {
    sample_.reset();
    scaled_.reset();
}

}  // namespace fastdiff::dropin
