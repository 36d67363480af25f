// SPDX-License-Identifier: MIT
// The threads of a block taken together, for kernels with barriers, shuffles and shared memory. Each thread is a
// context with a stack of its own; a barrier gives the turn to the next thread, and nobody goes on before all have come
// to it. Include before a .cu file: cuda_runtime.h then launches through `run_block`.
#pragma once

#include <ucontext.h>

#include <functional>
#include <type_traits>
#include <vector>

#define CUDA_ON_HOST_BLOCKS 1
#include "cuda_runtime.h"

// Blocks run one after another, so one copy is enough. It keeps what the block before has left.
#define __shared__ static

namespace cuda_on_host {

enum class Meeting { kNone, kBarrier, kShuffle };

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool alive = false;
    Meeting meeting = Meeting::kNone;
    alignas(8) char lane[8];
};

struct Block {
    std::vector<Thread> threads = std::vector<Thread>(kMostThreads);
    unsigned size = 0, current = 0;
    ucontext_t scheduler;
    std::function<void()> body;
    bool diverged = false;  // threads met at different places
};
inline Block block;

inline void enter() {
    block.body();
    Thread& self = block.threads[block.current];
    self.alive = false;
    self.meeting = Meeting::kNone;
    swapcontext(&self.context, &block.scheduler);
}

inline void meet(Meeting at) {
    Thread& self = block.threads[block.current];
    self.meeting = at;
    swapcontext(&self.context, &block.scheduler);
}

inline void run_block(unsigned threads, bool backwards, std::function<void()> body) {
    block.size = threads;
    block.body = std::move(body);
    for (unsigned t = 0; t < threads; ++t) {
        Thread& thread = block.threads[t];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        thread.alive = true;
        makecontext(&thread.context, enter, 0);
    }
    for (bool any = true; any;) {
        any = false;
        Meeting place = Meeting::kNone;
        for (unsigned i = 0; i < threads; ++i) {
            block.current = backwards ? threads - 1 - i : i;
            Thread& thread = block.threads[block.current];
            if (!thread.alive) continue;
            threadIdx.x = block.current;
            swapcontext(&block.scheduler, &thread.context);
            if (!thread.alive) continue;
            if (any && thread.meeting != place) block.diverged = true;
            place = thread.meeting;
            any = true;
        }
    }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::meet(cuda_on_host::Meeting::kBarrier); }
inline void __threadfence() {}

// All threads of the block shuffle together, each within its warp of 32.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int apart) {
    using namespace cuda_on_host;
    const unsigned self = block.current, other = (self & ~31u) | ((self ^ static_cast<unsigned>(apart)) & 31u);
    *reinterpret_cast<T*>(block.threads[self].lane) = value;
    meet(Meeting::kShuffle);
    const T result = *reinterpret_cast<const T*>(block.threads[other].lane);
    meet(Meeting::kShuffle);
    return result;
}

template <typename T>
T __ldcg(const T* from) {
    return *from;
}

template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = before + value;
    return before;
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = value > before ? value : before;
    return before;
}
template <typename T>
T atomicMin(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = value < before ? value : before;
    return before;
}
template <typename T>
T atomicOr(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = before | value;
    return before;
}
