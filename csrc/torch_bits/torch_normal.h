// SPDX-License-Identifier: MIT
// Binding of torch's normal numbers on the CPU: the bits of torch.randn, with the generator in the state that torch
// would leave, by the loops of csrc/torch_bits/torch_normal_loop.inc.
//
// It serves calls for which torch runs the code that the loops repeat: at least 16 float32 numbers, in contiguous
// memory, from a CPU generator, with no dispatch mode or transform active. It declines any other call before drawing,
// and the caller asks torch. fastdiff/noise/torch_normals.py checks before the first call that this torch draws such
// numbers.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Generator.h>

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>

#include "../bindings/output_allocator.h"
#include "../bindings/tensors.h"

namespace fastdiff::bindings {

namespace py = pybind11;

constexpr int64_t kStateWords = at::MERSENNE_STATE_N;
constexpr int64_t kGroup = 16;
// Numbers per chunk: its words are still in the cache when they are transformed. Whole groups.
constexpr int64_t kChunk = 8192;
// Numbers up to which one thread draws alone: the step's own bound.
constexpr int64_t kAlone = 65536;

// State of a Mersenne Twister: its untempered words, and the index of the next one.
using StateWords = std::array<uint32_t, kStateWords>;

// Copy the next `count` words to float memory.
inline void take_words(StateWords* state, uint32_t* next, float* to, int64_t count) {
    const int64_t ready = std::min<int64_t>(count, kStateWords - *next);
    std::memcpy(to, state->data() + *next, ready * sizeof(uint32_t));
    *next += static_cast<uint32_t>(ready);
    to += ready, count -= ready;
    if (count == 0) return;
    const float* last = reinterpret_cast<const float*>(state->data());
    for (; count >= kStateWords; count -= kStateWords, to += kStateWords) {
        cpu_build.twist(last, to);
        last = to;
    }
    std::array<float, kStateWords> partial;
    if (count > 0) {
        cpu_build.twist(last, partial.data());
        std::memcpy(to, partial.data(), count * sizeof(uint32_t));
        last = partial.data();
    }
    std::memcpy(state->data(), last, sizeof *state);
    *next = static_cast<uint32_t>(count == 0 ? kStateWords : count);
}

// Words of a generator, in torch's order. `finish` writes the state back.
class Words {
  public:
    explicit Words(at::CPUGeneratorImpl* generator)
        : generator_(generator), engine_(generator->engine()), data_(engine_.data()) {
        // torch keeps the number of words left and the next index separately; a state set by hand may be inconsistent.
        known = engine_.is_valid() && (data_.left_ == 1 || data_.left_ + data_.next_ == kStateWords + 1);
        if (data_.left_ == 1) data_.next_ = kStateWords;
    }

    void take(float* to, int64_t count) { take_words(&data_.state_, &data_.next_, to, count); }

    // Leave the generator in the state that torch would after as many words.
    void finish() {
        data_.left_ = static_cast<int>(kStateWords + 1 - data_.next_);
        engine_.set_data(data_);
        generator_->set_engine(engine_);
    }

    bool known;

  private:
    at::CPUGeneratorImpl* generator_;
    at::mt19937 engine_;
    at::mt19937_data_pod data_;
};

// Whole groups of normal numbers, by chunks: the words of chunks are sequential, their transforms independent.
class Chunks {
  public:
    Chunks(Words* words, float* out, int64_t count)
        : words_(words), out_(out), count_(count), chunks_((count + kChunk - 1) / kChunk) {}

    void draw() {
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) take(chunk), transform(chunk);
    }

    // The calling thread takes all words; every free thread, in the end it too, transforms chunks whose words are
    // there. One parallel region in all: each region waits for its last thread to be scheduled.
    void draw_shared(int64_t threads) {
        at::parallel_for(0, std::min(threads, chunks_), 1, [this](int64_t begin, int64_t) {
            for (int64_t chunk = 0; begin == 0 && chunk < chunks_; ++chunk) {
                take(chunk);
                ready_.store(chunk + 1, std::memory_order_release);
            }
            for (int64_t chunk = next_.fetch_add(1); chunk < chunks_; chunk = next_.fetch_add(1)) {
                while (ready_.load(std::memory_order_acquire) <= chunk) std::this_thread::yield();
                transform(chunk);
            }
        });
    }

  private:
    int64_t size(int64_t chunk) const { return std::min(kChunk, count_ - chunk * kChunk); }
    void take(int64_t chunk) { words_->take(out_ + chunk * kChunk, size(chunk)); }
    void transform(int64_t chunk) const { cpu_build.words_to_normals(out_ + chunk * kChunk, size(chunk) / kGroup); }

    Words* words_;
    float* out_;
    int64_t count_, chunks_;
    std::atomic<int64_t> ready_{0}, next_{0};
};

// Fill `count` ≥ 16 places like torch: whole groups in order, then, with a remainder, the last 16 again.
inline void draw_normals(Words* words, float* out, int64_t count) {
    const int64_t whole = count - count % kGroup;
    const int64_t threads = count > kAlone && !at::in_parallel_region() ? at::get_num_threads() : 1;
    Chunks chunks(words, out, whole);
    if (threads > 1)
        chunks.draw_shared(threads);
    else
        chunks.draw();
    if (whole == count) return;
    words->take(out + whole, count - whole);  // torch draws these too and overwrites them
    words->take(out + count - kGroup, kGroup);
    cpu_build.words_to_normals(out + count - kGroup, 1);
}

// Return the generator of a Python object (None: torch's default); nullopt if it is not a CPU generator of torch.
inline std::optional<at::Generator> cpu_generator(PyObject* object) {
    if (object == Py_None) return at::detail::getDefaultCPUGenerator();
    const int generator = THPGenerator_Check(object);
    if (generator < 0) PyErr_Clear();  // an object whose type cannot be checked
    if (generator != 1) return std::nullopt;
    const at::Generator& held = reinterpret_cast<THPGenerator*>(object)->cdata;
    if (!held.defined() || !held.device().is_cpu()) return std::nullopt;
    return held;
}

// Return true if an operator called here would go straight to its kernel: no Python mode, no tracer, no transform of
// torch.func, no functionalization. Autocast does not concern drawing.
inline bool called_plainly() {
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    const c10::DispatchKeySet usual = c10::default_included_set | c10::autocast_dispatch_keyset;
    return (included - usual).empty() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
           !at::impl::torch_function_mode_enabled();
}

// Draw the numbers; return false if the generator's state is inconsistent. Releases the GIL above a grain, where torch
// does at any size; the generator's lock is released before the GIL is taken again.
inline bool draw_from(at::Generator generator, float* out, int64_t count) {
    std::optional<py::gil_scoped_release> release;
    if (count > kDrawGrain) release.emplace();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    Words words(generator.get<at::CPUGeneratorImpl>());
    if (!words.known) return false;
    draw_normals(&words, out, count);
    words.finish();
    return true;
}

// Read the sizes of a new tensor of at least `kGroup` elements; return false for anything else.
inline bool read_sizes(PyObject* shape, c10::SmallVector<int64_t, 6>* sizes, int64_t* count) {
    const bool list = PyList_Check(shape);
    if (!list && !PyTuple_Check(shape)) return false;
    *count = 1;
    for (Py_ssize_t i = 0; i < Py_SIZE(shape); ++i) {
        PyObject* item = list ? PyList_GET_ITEM(shape, i) : PyTuple_GET_ITEM(shape, i);
        if (!PyLong_CheckExact(item)) return false;
        int overflow = 0;
        const int64_t size = PyLong_AsLongLongAndOverflow(item, &overflow);
        if (overflow != 0 || size < 1 || __builtin_mul_overflow(*count, size, count)) return false;
        sizes->push_back(size);
    }
    return *count >= kGroup;
}

// Return a new contiguous float32 CPU tensor with the numbers of torch.randn; undefined, with nothing drawn, if torch
// has to draw.
inline at::Tensor torch_normal(at::IntArrayRef sizes, int64_t numel, PyObject* generator) {
    if (numel < kGroup || cpu_build.twist == nullptr || !called_plainly()) return at::Tensor();
    const std::optional<at::Generator> held = cpu_generator(generator);
    if (!held.has_value()) return at::Tensor();
    c10::SmallVector<int64_t, 6> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    at::Tensor out = new_on_cpu(sizes, strides, at::kFloat);
    return draw_from(*held, static_cast<float*>(out.data_ptr()), numel) ? out : at::Tensor();
}

// Set by fastdiff/noise/torch_normals.py once it has checked that `torch_normal` draws torch's numbers.
inline bool draws_as_torch = false;

// torch_randn(shape, generator): a new float32 CPU tensor equal to torch.randn(shape, generator=generator), or None.
inline PyObject* torch_randn(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 2, "torch_randn: expected 2 arguments, got ", count);
    c10::SmallVector<int64_t, 6> sizes;
    int64_t numel = 0;
    if (!read_sizes(objects[0], &sizes, &numel)) Py_RETURN_NONE;
    at::Tensor out = torch_normal(sizes, numel, objects[1]);
    if (!out.defined()) Py_RETURN_NONE;
    return THPVariable_Wrap(std::move(out));
    END_HANDLE_TH_ERRORS
}

// torch_randn_(out, generator): fill a contiguous float32 tensor like torch.randn; return whether it was filled.
inline PyObject* torch_randn_(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 2, "torch_randn_: expected 2 arguments, got ", count);
    if (cpu_build.twist == nullptr || !called_plainly() || !THPVariable_Check(objects[0])) Py_RETURN_FALSE;
    const at::Tensor out = THPVariable_Unpack(objects[0]);  // a reference: without the GIL the caller may drop its own
    const bool plain = is_plain_eager(out) && out.is_cpu() && out.scalar_type() == at::kFloat &&
                       out.numel() >= kGroup && out.is_contiguous() && storage_covers(out, out.numel());
    if (!plain) Py_RETURN_FALSE;
    const std::optional<at::Generator> generator = cpu_generator(objects[1]);
    if (!generator.has_value() || !draw_from(*generator, static_cast<float*>(out.data_ptr()), out.numel()))
        Py_RETURN_FALSE;
    bump_version(out);
    Py_RETURN_TRUE;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
