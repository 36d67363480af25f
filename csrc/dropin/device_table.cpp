// SPDX-License-Identifier: MIT
#include "device_table.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "guards.h"

namespace fastdiff::dropin {

namespace {

c10::Stream current_stream_of(const at::Device& device) {
    return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// Return whether the current stream is captured in a CUDA graph, by torch's Python function: the headers of c10/cuda
// are not part of a torch without CUDA.
bool is_capturing() { return py::module_::import("torch.cuda").attr("is_current_stream_capturing")().cast<bool>(); }

}  // namespace

at::Tensor copy_to_device(const at::Tensor& tensor, const at::Device& device) {
    const py::object to_device = py::module_::import("fastdiff.device_copy").attr("to_device");
    return THPVariable_Unpack(to_device(own(THPVariable_Wrap(tensor)), device.str()).ptr());
}

const at::Tensor& DeviceTable::on(const at::Device& device) {
    if (device.is_cpu()) return host_;
    for (Copy& copy : copies_) {
        if (copy.table.device() != device) continue;
        if (copy.copied.has_value()) order_after_copy(&copy);
        return copy.table;
    }
    Copy copy{copy_to_device(host_, device), std::nullopt, {}};
    if (device.is_cuda()) {
        copy.readers.push_back(current_stream_of(device));
        copy.copied.emplace(device.type());
        copy.copied->record(copy.readers.back());
    }
    copies_.push_front(std::move(copy));
    return copies_.front().table;
}

// Make the current stream wait for the copy, unless it comes after it already.
void DeviceTable::order_after_copy(Copy* copy) {
    const c10::Stream stream = current_stream_of(copy->table.device());
    if (std::find(copy->readers.begin(), copy->readers.end(), stream) != copy->readers.end()) return;
    // A captured graph must not wait for an event outside it; the warm-up before the capture has waited.
    if (is_capturing()) return;
    copy->copied->block(stream);
    copy->table.record_stream(stream);
    copy->readers.push_back(stream);
}

}  // namespace fastdiff::dropin
