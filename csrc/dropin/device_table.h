// SPDX-License-Identifier: MIT
// A table of rows on the CPU and its copies on devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <forward_list>
#include <optional>

namespace fastdiff::dropin {

// Copy a tensor from the CPU to another device on its current stream; the host does not wait for the copy.
at::Tensor copy_to_device(const at::Tensor& tensor, const at::Device& device);

class DeviceTable {
  public:
    DeviceTable() = default;
    explicit DeviceTable(at::Tensor host) : host_(std::move(host)) {}

    const at::Tensor& host() const { return host_; }
    // Return the table on a device, for kernels on the device's current stream. It is copied there once, and the host
    // does not wait for the copy. The reference holds until the table is destroyed. Needs the GIL.
    const at::Tensor& on(const at::Device& device);

  private:
    struct Copy {
        at::Tensor table;
        // The end of the copy, and the streams that come after it; on a CUDA device only.
        std::optional<c10::Event> copied;
        c10::SmallVector<c10::Stream, 2> readers;
    };

    static void order_after_copy(Copy* copy);

    at::Tensor host_;
    std::forward_list<Copy> copies_;
};

}  // namespace fastdiff::dropin
