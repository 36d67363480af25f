// SPDX-License-Identifier: MIT
// A drop-in scheduler's plan (fastdiff/diffusers/compiler/plan.py) as C++ reads it: where a step's tensors come from,
// the row, and what becomes of the results.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "common.h"

namespace fastdiff::bindings {

// Slots of one step: what it reads, draws and makes.
constexpr size_t kSlots = 24;

// The number of a slot, or a constant.
struct Entry {
    int slot = -1;
    py::object constant;
};

struct Program {
    // `plan` is an object with the attributes that are read here, which fastdiff.diffusers.compiler.plan.Plan
    // describes.
    explicit Program(const py::handle& plan) : plan(plan.ptr()) {
        simple = plan.attr("native_eligible").cast<bool>();
        for (const py::handle source : plan.attr("attribute_inputs")) {
            const auto pair = source.cast<py::tuple>();
            from_attributes.emplace_back(pair[0], pair[1].is_none() ? -1 : pair[1].cast<Py_ssize_t>());
        }
        // The usual arguments come first.
        constexpr std::array<const char*, 3> usual = {"model_output", "timestep", "sample"};
        for (const py::handle name : plan.attr("argument_inputs")) {
            const auto* found = std::find(usual.begin(), usual.end(), name.cast<std::string>());
            if (found != usual.end())
                from_arguments.push_back(static_cast<int>(found - usual.begin()));
            else
                from_keywords.push_back(py::reinterpret_borrow<py::object>(name));
        }
        registers = plan.attr("history").cast<std::vector<int>>();
        for (const py::handle draw : plan.attr("draws")) {
            if (draw.attr("fused").cast<bool>()) {
                draws_inside = true;
                purpose = draw.attr("purpose").cast<int64_t>();
            } else {
                draws.push_back(draw.attr("dtype"));
                draw_types.push_back(scalar_type_of(draws.back().ptr()));
            }
        }
        if (!plan.attr("noise").is_none()) noise = plan.attr("noise").cast<int>();
        keeps = plan.attr("kept").cast<int64_t>();
        // A plan that is not simple may make more tensors than the fused step does.
        for (int64_t o = 0; simple && o <= keeps; ++o)
            made_types[static_cast<size_t>(o)] =
                scalar_type_of(py::object(plan.attr("output_dtypes")[py::int_(o)]).ptr());
        if (simple) table = THPVariable_Unpack(plan.attr("host_table").ptr());
        for (const py::handle item : plan.attr("constant_writes").attr("items")()) {
            const auto pair = item.cast<py::tuple>();
            constants.emplace_back(pair[0], pair[1]);
        }
        for (const py::handle item : plan.attr("tensor_writes")) {
            const auto pair = item.cast<py::tuple>();
            variables.emplace_back(pair[0], pair[1].cast<int>());
        }
        for (const py::handle item : plan.attr("list_writes")) {
            const auto triple = item.cast<py::tuple>();
            lists.push_back({triple[0], triple[1].is_none() ? -1 : triple[1].cast<Py_ssize_t>(), entries(triple[2])});
        }
        results = entries(plan.attr("results"));
        in_tuple = plan.attr("result_type").ptr() == reinterpret_cast<PyObject*>(&PyTuple_Type);
        kind = plan.attr("result_type");
        if (!plan.attr("result_names").is_none()) names = objects(plan.attr("result_names"));
        consumes_noise = noise >= 0 && draws.size() == 1 && draw_types[0] == at::kFloat && made_types[0] == at::kFloat;
        const auto leaves = [this](const Entry& entry) { return entry.slot == noise; };
        for (const auto& [name, slot] : variables) consumes_noise = consumes_noise && slot != noise;
        for (const List& list : lists)
            consumes_noise = consumes_noise && std::none_of(list.entries.begin(), list.entries.end(), leaves);
        consumes_noise = consumes_noise && std::none_of(results.begin(), results.end(), leaves);
        TORCH_CHECK_VALUE(registers.size() <= kRegisters, "Program: expected up to 4 registers");
        const size_t read = from_attributes.size() + from_arguments.size() + from_keywords.size() + draws.size();
        simple = simple && read + static_cast<size_t>(keeps) + 1 <= kSlots;
    }

    // What is written to a list of the scheduler.
    struct List {
        py::object name;
        Py_ssize_t stay;  // how many of its entries do, before the others; -1 for a new list
        std::vector<Entry> entries;
    };

    PyObject* plan;  // who owns this
    bool simple;
    std::vector<std::pair<py::object, Py_ssize_t>> from_attributes;
    std::vector<int> from_arguments;
    std::vector<py::object> from_keywords;
    std::vector<int> registers;
    std::vector<py::object> draws;  // dtypes
    std::vector<at::ScalarType> draw_types;
    int noise = -1;
    bool consumes_noise;  // one draw in float32, of which nothing is left: it may lie where the sample will
    bool draws_inside = false;
    int64_t purpose = 0;  // of noise that is drawn inside
    int64_t keeps;
    std::array<at::ScalarType, kMaxOutputs> made_types{};
    at::Tensor table;
    std::vector<std::pair<py::object, py::object>> constants;
    std::vector<std::pair<py::object, int>> variables;
    std::vector<List> lists;
    std::vector<Entry> results;
    bool in_tuple;
    py::object kind;
    std::vector<py::object> names;
    // The program of the same call at the next timestep with nothing changed between, once one has followed. Timesteps
    // go forward from one to the next, so no chain of them is a circle.
    Program* follower = nullptr;
    py::object follower_plan;

  private:
    static std::vector<py::object> objects(const py::handle& sequence) {
        std::vector<py::object> found;
        for (const py::handle item : sequence) found.push_back(py::reinterpret_borrow<py::object>(item));
        return found;
    }
    // Of a plan, an entry is an int or a `Constant`, which has a value.
    static std::vector<Entry> entries(const py::handle& sequence) {
        std::vector<Entry> found;
        for (const py::handle item : sequence) {
            if (PyLong_CheckExact(item.ptr()))
                found.push_back({item.cast<int>(), py::object()});
            else
                found.push_back({-1, item.attr("value")});
        }
        return found;
    }
};

inline void define_program(py::module_& m) {
    py::class_<Program>(m, "Program")
        .def(py::init<const py::handle&>(), py::arg("plan"))
        .def(
            "follow",
            [](Program& self, Program& next) {
                self.follower = &next;
                self.follower_plan = py::reinterpret_borrow<py::object>(next.plan);
            },
            py::arg("next"), "Say which program follows where nothing is changed.");
}

}  // namespace fastdiff::bindings
