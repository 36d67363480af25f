// SPDX-License-Identifier: MIT
// How a scheduler was left after a step: its attributes, the lists among them and the tensors that steps read.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <utility>
#include <vector>

namespace fastdiff::bindings {

namespace py = pybind11;

// Counts the times that a step has read an attribute that none had read before: what has been watched until then
// lacks it.
inline int64_t reads_epoch = 0;

// A number that another definition of a class never has: it changes when an attribute of the class or of a base is
// replaced. 0 where Python has none.
inline unsigned int class_version(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030D0000
    if ((type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG) == 0) return 0;
#endif
    return type->tp_version_tag;
}

class Watch {
  public:
    // What is watched no more, to die once all is in order: what dies may call back.
    using Gone = c10::SmallVector<py::object, 16>;

    // Remember the attributes that some step has read (the keys of the dictionary `reads`), and what is in the lists
    // among them. `owner` is one of the attributes and no state; it is not held, so that the scheduler dies with its
    // last reference.
    void look(PyObject* attributes, PyObject* owner, PyObject* reads) {
        Gone gone;
        size_t count = 0, lists = 0;
        Py_ssize_t at = 0;
        PyObject *key = nullptr, *value = nullptr;
        for (size_t i = static_cast<size_t>(PyDict_GET_SIZE(attributes)); i < values_.size(); ++i)
            keep(&values_[i], nullptr, &gone), keep(&keys_[i], nullptr, &gone);
        values_.resize(static_cast<size_t>(PyDict_GET_SIZE(attributes)));
        keys_.resize(values_.size());
        while (PyDict_Next(attributes, &at, &key, &value) != 0) {
            keep(&keys_[count], key, &gone);
            const bool read = PyDict_Contains(reads, key) == 1;
            keep(&values_[count++], value == owner ? nullptr : read ? value : kNotCompared, &gone);
            if (!read || !PyList_Check(value)) continue;
            if (lists == lists_.size()) lists_.emplace_back();
            look_into(value, &lists_[lists++], &gone);
        }
        for (size_t j = lists; j < lists_.size(); ++j)
            for (py::object& item : lists_[j].second) keep(&item, nullptr, &gone);
        lists_.resize(lists);
    }

    // Remember one attribute anew; false where it was not there, or was or is a list: then all have to be looked at.
    bool look_at(PyObject* key, PyObject* value, Gone* gone) {
        for (size_t i = 0; i < keys_.size(); ++i) {
            if (keys_[i].ptr() != key) continue;
            const py::object& before = values_[i];
            if (before.ptr() == kNotCompared) return true;
            if (PyList_Check(value) || before.ptr() == nullptr || PyList_Check(before.ptr())) return false;
            keep(&values_[i], value, gone);
            return true;
        }
        return false;
    }
    // Remember what is in a list that is an attribute already.
    bool look_into(PyObject* value, Gone* gone) {
        for (List& list : lists_)
            if (list.first == value) return look_into(value, &list, gone), true;
        return false;
    }

    // Remember tensors and how often they have been written; inference tensors do not count that.
    void versions(PyObject* tensors) {
        versions_.clear();
        for (const py::handle tensor : py::handle(tensors)) {
            const at::Tensor& unpacked = THPVariable_Unpack(tensor.ptr());
            versions_.emplace_back(unpacked, unpacked._version());
        }
    }

    void versions(std::vector<std::pair<at::Tensor, int64_t>> counted) { std::swap(versions_, counted); }

    // Whether all of it is as it was.
    bool unchanged(PyObject* attributes, PyObject* owner) const {
        if (static_cast<size_t>(PyDict_GET_SIZE(attributes)) != values_.size()) return false;
        size_t count = 0;
        Py_ssize_t at = 0;
        PyObject *key = nullptr, *value = nullptr;
        while (PyDict_Next(attributes, &at, &key, &value) != 0) {
            PyObject* kept = values_[count++].ptr();
            if (kept != value && kept != kNotCompared && !(kept == nullptr && value == owner)) return false;
        }
        for (const auto& [list, items] : lists_) {
            if (static_cast<size_t>(PyList_GET_SIZE(list)) != items.size()) return false;
            for (size_t i = 0; i < items.size(); ++i)
                if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)) != items[i].ptr()) return false;
        }
        for (const auto& [tensor, version] : versions_)
            if (tensor._version() != version) return false;
        return true;
    }

    // What the garbage collector has to see.
    int traverse(visitproc visit, void* arg) const {
        for (const py::object& value : values_) Py_VISIT(value.ptr());
        for (const auto& [list, items] : lists_)
            for (const py::object& item : items) Py_VISIT(item.ptr());
        return 0;
    }

    void clear() {
        // What dies may call back; by then there is nothing here.
        const auto values = std::exchange(values_, {});
        const auto keys = std::exchange(keys_, {});
        const auto lists = std::exchange(lists_, {});
        versions_.clear();
    }

  private:
    // In place of the value of an attribute that no step has read.
    static inline PyObject* const kNotCompared = Py_Ellipsis;
    // A list is one of the values, and held as such.
    using List = std::pair<PyObject*, std::vector<py::object>>;

    static void keep(py::object* slot, PyObject* object, Gone* gone) {
        if (slot->ptr() == object) return;
        gone->push_back(std::exchange(*slot, py::reinterpret_borrow<py::object>(object)));
    }

    static void look_into(PyObject* value, List* list, Gone* gone) {
        auto& [watched, items] = *list;
        watched = value;
        for (size_t i = static_cast<size_t>(PyList_GET_SIZE(value)); i < items.size(); ++i)
            keep(&items[i], nullptr, gone);
        items.resize(static_cast<size_t>(PyList_GET_SIZE(value)));
        for (size_t i = 0; i < items.size(); ++i)
            keep(&items[i], PyList_GET_ITEM(value, static_cast<Py_ssize_t>(i)), gone);
    }

    std::vector<py::object> keys_, values_;
    std::vector<List> lists_;
    std::vector<std::pair<at::Tensor, int64_t>> versions_;
};

}  // namespace fastdiff::bindings
