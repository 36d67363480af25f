// SPDX-License-Identifier: MIT
// Memory for new outputs on the CPU, reused.
//
// A loop makes its outputs anew at every step and drops those of the step before. Left to malloc, small ones come from
// the top of the heap, which is trimmed and grown again in turn, and large ones are mapped and unmapped: the kernel
// then zeroes every page of every output, which costs more than the step does. Here a block that is given back is kept
// for the next output of its size.
//
// What a caller gets is an ordinary tensor: its own TensorImpl, its own storage, resizable by torch's CPU allocator.
// The storage's deleter gives the block back, whoever runs it, on whatever thread and however late. As in memory that
// torch allocates, the deleter's context is the address of the data, so that what looks for that (copy-on-write) finds
// it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/util/accumulate.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace fastdiff::bindings {

// Stands before the data of a block.
struct alignas(64) BlockHeader {
    size_t bytes;  // of the data
    void* memory;  // what was allocated
};

constexpr size_t kHugePage = size_t{2} << 20;
// Large blocks begin at different places in a page: a step that goes through eight tensors that all begin at the same
// one finds their elements in the same few sets of the caches. Measured on an EPYC: 1.12 times as fast for eight
// tensors, 1.03 for four.
constexpr size_t kStagger = 4096 + 256, kStaggers = 16;

inline void* data_of(BlockHeader* block) { return block + 1; }
inline BlockHeader* block_of(void* data) { return static_cast<BlockHeader*>(data) - 1; }

// Null where there is no memory.
inline BlockHeader* allocate_block(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return nullptr;
    const bool large = bytes >= kHugePage;
    static std::atomic<size_t> allocated{0};
    const size_t stagger = large ? allocated++ % kStaggers * kStagger : 0;
    const size_t total = stagger + sizeof(BlockHeader) + bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, large ? kHugePage : alignof(BlockHeader), total) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Advice: where the kernel does not take it, pages are small.
    if (large) (void)madvise(memory, total / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    auto* block = reinterpret_cast<BlockHeader*>(static_cast<char*>(memory) + stagger);
    block->bytes = bytes;
    block->memory = memory;
    return block;
}

// Held for some tens of instructions: who waits does so on the spot, and nobody enters the kernel.
class SpinLock {
  public:
    void lock() {
        while (taken_.exchange(true, std::memory_order_acquire))
            while (taken_.load(std::memory_order_relaxed)) std::this_thread::yield();
    }
    void unlock() { taken_.store(false, std::memory_order_release); }

  private:
    std::atomic<bool> taken_{false};
};

// The free blocks, up to a limit in bytes and in number; what was used longest ago goes first.
class FreeBlocks {
  public:
    static constexpr size_t kMost = 64;

    // A block of exactly this size, the one given back last, or null.
    BlockHeader* take(size_t bytes) {
        const std::lock_guard<SpinLock> lock(lock_);
        for (size_t i = count_; i-- > 0;) {
            if (sizes_[i] != bytes) continue;
            BlockHeader* block = blocks_[i];
            remove(i, 1);
            held_ -= bytes;
            return block;
        }
        return nullptr;
    }

    void give_back(BlockHeader* block) {
        std::array<BlockHeader*, kMost> surplus;
        size_t dropped = 0;
        {
            const std::lock_guard<SpinLock> lock(lock_);
            const size_t bytes = block->bytes;
            if (bytes > limit_) {
                surplus[dropped++] = block;
            } else {
                dropped = drop_until(limit_ - bytes, kMost - 1, &surplus);
                sizes_[count_] = bytes;
                blocks_[count_++] = block;
                held_ += bytes;
            }
        }
        for (size_t i = 0; i < dropped; ++i) std::free(surplus[i]->memory);
    }

    // Frees all there are; returns their bytes.
    size_t release() {
        std::array<BlockHeader*, kMost> surplus;
        size_t dropped = 0, bytes = 0;
        {
            const std::lock_guard<SpinLock> lock(lock_);
            bytes = held_;
            dropped = drop_until(0, 0, &surplus);
        }
        for (size_t i = 0; i < dropped; ++i) std::free(surplus[i]->memory);
        return bytes;
    }

    void set_limit(size_t bytes) {
        {
            const std::lock_guard<SpinLock> lock(lock_);
            limit_ = bytes;
        }
        release();
    }

    size_t limit() {
        const std::lock_guard<SpinLock> lock(lock_);
        return limit_;
    }

    size_t held() {
        const std::lock_guard<SpinLock> lock(lock_);
        return held_;
    }

    // A child of fork has only the thread that forked: nobody else may hold the lock at that moment.
    void before_fork() { lock_.lock(); }
    void after_fork() { lock_.unlock(); }

  private:
    // Takes the oldest out until no more than these are left; returns how many.
    size_t drop_until(size_t bytes, size_t number, std::array<BlockHeader*, kMost>* surplus) {
        size_t dropped = 0;
        while (held_ > bytes || count_ - dropped > number) {
            held_ -= sizes_[dropped];
            (*surplus)[dropped] = blocks_[dropped];
            ++dropped;
        }
        if (dropped > 0) remove(0, dropped);
        return dropped;
    }

    void remove(size_t at, size_t number) {
        for (size_t i = at + number; i < count_; ++i) {
            sizes_[i - number] = sizes_[i];
            blocks_[i - number] = blocks_[i];
        }
        count_ -= number;
    }

    SpinLock lock_;
    // Oldest first. Sizes stand apart, so that looking for one touches no block.
    std::array<size_t, kMost> sizes_{};
    std::array<BlockHeader*, kMost> blocks_{};
    size_t count_ = 0, held_ = 0;
#ifdef __SANITIZE_ADDRESS__
    size_t limit_ = 0;  // a block that is reused is one whose use after free goes unseen
#else
    size_t limit_ = size_t{256} << 20;
#endif
};

// Never destroyed: tensors may outlive what is static.
inline FreeBlocks& free_blocks() {
    static FreeBlocks* const blocks = [] {
        auto* made = new FreeBlocks;
#ifndef _WIN32
        pthread_atfork([] { free_blocks().before_fork(); }, [] { free_blocks().after_fork(); },
                       [] { free_blocks().after_fork(); });
#endif
        return made;
    }();
    return *blocks;
}

inline void give_back(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    free_blocks().give_back(block_of(data));
}

// What at::empty_strided makes of these, dense ones, on the CPU; to be written in full.
inline at::Tensor new_on_cpu(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
    const caffe2::TypeMeta dtype = c10::scalarTypeToTypeMeta(type);
    const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * dtype.itemsize();
    at::Allocator* const allocator = c10::GetCPUAllocator();
    // Someone who brings an allocator for torch's memory on the CPU wants this too to come from it.
    const bool usual = allocator == c10::GetDefaultCPUAllocator();
    BlockHeader* block = usual ? free_blocks().take(bytes) : nullptr;
    if (block == nullptr && usual && bytes <= free_blocks().limit()) block = allocate_block(bytes);
    if (block == nullptr) return at::empty_strided(sizes, strides, at::TensorOptions().dtype(type).device(at::kCPU));
    void* data = data_of(block);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                         at::DataPtr(data, data, &give_back, at::Device(at::kCPU)),
                                                         allocator, /*resizable=*/true);
    at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                               c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
    made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    return made;
}

// A tensor of this type where a dense one like this is, to be written in full.
inline at::Tensor new_output(const at::Tensor& like, at::ScalarType type) {
    return like.is_cpu() ? new_on_cpu(like.sizes(), like.strides(), type)
                         : at::empty_strided(like.sizes(), like.strides(), like.options().dtype(type));
}

}  // namespace fastdiff::bindings
