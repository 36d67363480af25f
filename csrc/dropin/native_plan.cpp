// SPDX-License-Identifier: MIT
#include "native_plan.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "../bindings/tensors.h"
#include "../row_layout.h"

namespace fastdiff::dropin {

using bindings::scalar_type_of;

namespace {

std::vector<py::object> objects(const py::handle& sequence) {
    std::vector<py::object> found;
    for (const py::handle item : sequence) found.push_back(py::reinterpret_borrow<py::object>(item));
    return found;
}

// Entries are ints, which are slots, or objects of the class `Constant`, which have a value.
std::vector<SlotOrConstant> entries(const py::handle& sequence) {
    std::vector<SlotOrConstant> found;
    for (const py::handle item : sequence) {
        if (PyLong_CheckExact(item.ptr()))
            found.push_back({item.cast<int>(), py::object()});
        else
            found.push_back({-1, item.attr("value")});
    }
    return found;
}

// Copy a table of one row with another scale of the model input; no mode of torch sees the copy.
at::Tensor with_model_input_scale(const at::Tensor& table, double scale) {
    const c10::InferenceMode normal_mode(false);
    at::Tensor copy = at::detail::empty_cpu(table.sizes(), table.options());
    std::memcpy(copy.data_ptr(), table.const_data_ptr(), table.nbytes());
    if (table.scalar_type() == at::kDouble)
        copy.mutable_data_ptr<double>()[kModelInputScale] = scale;
    else
        copy.mutable_data_ptr<float>()[kModelInputScale] = static_cast<float>(scale);
    return copy;
}

Py_ssize_t index_or(const py::handle& index, Py_ssize_t missing) {
    return index.is_none() ? missing : index.cast<Py_ssize_t>();
}

}  // namespace

NativePlan::NativePlan(const py::handle& plan) : plan(plan.ptr()) {
    native_eligible = plan.attr("native_eligible").cast<bool>();
    for (const py::handle source : plan.attr("attribute_inputs")) {
        const auto pair = source.cast<py::tuple>();
        attribute_inputs.emplace_back(pair[0], index_or(pair[1], -1));
    }
    for (const py::handle name : plan.attr("argument_inputs")) argument_inputs.push_back(interned(name));
    history = plan.attr("history").cast<std::vector<int>>();
    size_t drawn = 0;
    for (const py::handle each : plan.attr("draws")) {
        draws.push_back({scalar_type_of(each.attr("dtype").ptr()),
                         static_cast<NoiseSource>(each.attr("source").cast<int>()),
                         each.attr("purpose").cast<int64_t>(), each.attr("fused").cast<bool>()});
        drawn += draws.back().fused ? 0 : 1;
    }
    noise = static_cast<int>(index_or(plan.attr("noise"), -1));
    kept = plan.attr("kept").cast<int64_t>();
    variance_kind = plan.attr("variance_kind").cast<int64_t>();
    for (const py::handle dtype : plan.attr("output_dtypes")) output_types.push_back(scalar_type_of(dtype.ptr()));
    for (const py::handle item : plan.attr("constant_writes").attr("items")()) {
        const auto pair = item.cast<py::tuple>();
        constant_writes.emplace_back(pair[0], pair[1]);
    }
    for (const py::handle item : plan.attr("tensor_writes")) {
        const auto pair = item.cast<py::tuple>();
        tensor_writes.emplace_back(pair[0], pair[1].cast<int>());
    }
    for (const py::handle item : plan.attr("list_writes")) {
        const auto triple = item.cast<py::tuple>();
        list_writes.push_back({triple[0], index_or(triple[1], -1), entries(triple[2])});
    }
    results = entries(plan.attr("results"));
    result_type = plan.attr("result_type");
    if (!plan.attr("result_names").is_none()) result_names = objects(plan.attr("result_names"));
    const size_t inputs = attribute_inputs.size() + argument_inputs.size() + drawn;
    first_output = static_cast<int>(inputs);
    const size_t slots = inputs + static_cast<size_t>(kept) + 1;
    native_eligible = native_eligible && slots <= kMaxSlots && history.size() <= kMaxHistory && kept < kMaxStepOutputs;
    if (!native_eligible) return;
    table_ = DeviceTable(THPVariable_Unpack(plan.attr("host_table").ptr()));
    const auto keeps_noise = [this](const SlotOrConstant& entry) { return entry.slot == noise; };
    noise_is_scratch = noise >= 0 && draws.size() == 1 && draws[0].type == at::kFloat &&
                       output_types[0] == at::kFloat &&
                       std::none_of(tensor_writes.begin(), tensor_writes.end(),
                                    [this](const auto& write) { return write.second == noise; }) &&
                       std::none_of(list_writes.begin(), list_writes.end(),
                                    [&](const ListWrite& write) {
                                        return std::any_of(write.entries.begin(), write.entries.end(), keeps_noise);
                                    }) &&
                       std::none_of(results.begin(), results.end(), keeps_noise);
}

NativePlan* NativePlan::scaling(at::ScalarType type) const {
    for (const Scaling& each : scalings_)
        if (each.plan->output_types[0] == type) return each.plan;
    return nullptr;
}

void NativePlan::set_scaling(NativePlan* scaling_plan, double factor) {
    const at::ScalarType type = scaling_plan->output_types[0];
    // The plan's state decides the factor, so a plan that is there already scales alike.
    if (!scaling_plan->native_eligible || scaling(type) != nullptr) return;
    scalings_.push_front({scaling_plan, py::reinterpret_borrow<py::object>(scaling_plan->plan)});
    // The scaled sample has the same bits from both plans only if they compute in one dtype.
    const at::Tensor& host = table_.host();
    if (!native_eligible || type != output_types[0] || results.empty() || results[0].slot != first_output ||
        host.scalar_type() != scaling_plan->table_.host().scalar_type())
        return;
    table_with_model_input_ = DeviceTable(with_model_input_scale(host, factor));
}

DeviceTable* NativePlan::table_with_model_input() {
    return table_with_model_input_.host().defined() ? &table_with_model_input_ : nullptr;
}

void define_native_plan(py::module_& m) {
    py::class_<NativePlan>(m, "NativePlan")
        .def(py::init<const py::handle&>(), py::arg("plan"))
        .def(
            "set_next",
            [](NativePlan& self, NativePlan& next) {
                self.next_plan = &next;
                self.next_plan_owner = py::reinterpret_borrow<py::object>(next.plan);
            },
            py::arg("next"), "Set the plan that follows where nothing is changed.")
        .def(
            "set_scaling", &NativePlan::set_scaling, py::arg("scaling"), py::arg("factor"),
            "Set the plan by which `scale_model_input` scales the sample after this step; it multiplies by the factor.")
        .def(
            "table",
            [](NativePlan& self, const std::string& device) {
                return own(THPVariable_Wrap(self.table(at::Device(device))));
            },
            py::arg("device"), "The row as a table on a device, copied there once.");
}

}  // namespace fastdiff::dropin
