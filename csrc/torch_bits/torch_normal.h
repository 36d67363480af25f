// SPDX-License-Identifier: MIT
// The binding of torch's own normal numbers on the CPU: the bits that torch.randn gives, and the generator left as
// torch leaves it, by loops of ours (csrc/torch_bits/torch_normal_loop.inc).
//
// It serves where torch runs the code that the loops repeat: 16 float32 numbers or more, in contiguous memory, from a
// CPU generator, with nothing around the call that would have to see an operator. Anything else it declines, before
// anything is drawn: the caller then asks torch. Whether this torch draws such numbers at all, fastdiff/torch_noise.py
// finds out before the first call.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Generator.h>

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>

#include "../bindings/blocks.h"
#include "../bindings/common.h"

namespace fastdiff::bindings {

constexpr int64_t kStateWords = at::MERSENNE_STATE_N;
constexpr int64_t kGroup = 16;
// Numbers made at a time: their words are still in the cache when they become normal. Whole groups.
constexpr int64_t kChunk = 8192;
// Numbers up to which one thread draws alone: as many as the step that they are for takes without help.
constexpr int64_t kAlone = 65536;

// The state of a Mersenne Twister: its words, untempered, and which of them comes next.
using StateWords = std::array<uint32_t, kStateWords>;

// Copies the next `count` words to where floats will be.
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

// The words of a generator, in the order in which torch takes them. Change the generator's state by `finish`.
class Words {
  public:
    explicit Words(at::CPUGeneratorImpl* generator)
        : generator_(generator), engine_(generator->engine()), data_(engine_.data()) {
        // torch counts what is left and where it is apart; a state set by hand may let them disagree.
        known = engine_.is_valid() && (data_.left_ == 1 || data_.left_ + data_.next_ == kStateWords + 1);
        if (data_.left_ == 1) data_.next_ = kStateWords;
    }

    void take(float* to, int64_t count) { take_words(&data_.state_, &data_.next_, to, count); }

    // Leaves the generator where torch would after as many words.
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

// Whole groups of normal numbers, a chunk at a time: words, which come one after another, then normals from each by
// itself.
class Chunks {
  public:
    Chunks(Words* words, float* out, int64_t count)
        : words_(words), out_(out), count_(count), chunks_((count + kChunk - 1) / kChunk) {}

    void draw() {
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) take(chunk), transform(chunk);
    }

    // The calling thread takes all words; whoever is free, itself too once it is done, makes normals of a chunk that
    // has its words. One region for all of it: each costs a wait for the last thread to get a core.
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

// Fills `count` ≥ 16 places as torch does: whole groups in order, then, where some are left over, the last 16 anew.
inline void draw_normals(Words* words, float* out, int64_t count) {
    const int64_t whole = count - count % kGroup;
    const int64_t threads = count > kAlone && !at::in_parallel_region() ? at::get_num_threads() : 1;
    Chunks chunks(words, out, whole);
    if (threads > 1)
        chunks.draw_shared(threads);
    else
        chunks.draw();
    if (whole == count) return;
    words->take(out + whole, count - whole);  // torch draws them too, and writes over them
    words->take(out + count - kGroup, kGroup);
    cpu_build.words_to_normals(out + count - kGroup, 1);
}

// The generator behind a Python object; none where it is not torch's for the CPU. None is torch's default.
inline std::optional<at::Generator> cpu_generator(PyObject* object) {
    if (object == Py_None) return at::detail::getDefaultCPUGenerator();
    const int generator = THPGenerator_Check(object);
    if (generator < 0) PyErr_Clear();  // an object that will not say what it is
    if (generator != 1) return std::nullopt;
    const at::Generator& held = reinterpret_cast<THPGenerator*>(object)->cdata;
    if (!held.defined() || !held.device().is_cpu()) return std::nullopt;
    return held;
}

// Whether an operator called here would go straight to its kernel: no mode in Python, no tracer, no transform of
// torch.func, no functionalization. Autocast has nothing to do with drawing.
inline bool called_plainly() {
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    const c10::DispatchKeySet usual = c10::default_included_set | c10::autocast_dispatch_keyset;
    return (included - usual).empty() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
           !at::impl::torch_function_mode_enabled();
}

// Whether the numbers were drawn. Without the GIL above a grain, as torch does at any size; a generator's lock is given
// back before the GIL is asked for.
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

// The sizes of a new tensor of at least `kGroup` elements; false for anything else, which is torch's to refuse or make.
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

// A new contiguous float32 tensor on the CPU with what torch.randn would draw; undefined, with nothing drawn, where
// torch has to.
inline at::Tensor torch_normal(at::IntArrayRef sizes, int64_t numel, PyObject* generator) {
    if (numel < kGroup || cpu_build.twist == nullptr || !called_plainly()) return at::Tensor();
    const std::optional<at::Generator> held = cpu_generator(generator);
    if (!held.has_value()) return at::Tensor();
    c10::SmallVector<int64_t, 6> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    at::Tensor out = new_on_cpu(sizes, strides, at::kFloat);
    return draw_from(*held, static_cast<float*>(out.data_ptr()), numel) ? out : at::Tensor();
}

// Whether `torch_normal` is known to draw what torch draws here; fastdiff/torch_noise.py says so after its trial.
inline bool draws_as_torch = false;

// torch_randn(shape, generator): a new float32 tensor on the CPU with what torch.randn(shape, generator=generator)
// would hold, or None.
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

// torch_randn_(out, generator): whether a contiguous float32 tensor was filled with what torch.randn would give.
inline PyObject* torch_randn_(PyObject* /*module*/, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 2, "torch_randn_: expected 2 arguments, got ", count);
    if (cpu_build.twist == nullptr || !called_plainly() || !THPVariable_Check(objects[0])) Py_RETURN_FALSE;
    const at::Tensor out = THPVariable_Unpack(objects[0]);  // held: without the GIL the caller's may go
    const bool plain = ordinary(out) && out.is_cpu() && out.scalar_type() == at::kFloat && out.numel() >= kGroup &&
                       out.is_contiguous() && backed(out, out.numel());
    if (!plain) Py_RETURN_FALSE;
    const std::optional<at::Generator> generator = cpu_generator(objects[1]);
    if (!generator.has_value() || !draw_from(*generator, static_cast<float*>(out.data_ptr()), out.numel()))
        Py_RETURN_FALSE;
    count_change(out);
    Py_RETURN_TRUE;
    END_HANDLE_TH_ERRORS
}

}  // namespace fastdiff::bindings
