// SPDX-License-Identifier: MIT
// Allocator of new outputs on the CPU, with a cache of freed blocks. Light: see tensors.h.
//
// A loop allocates its outputs at every step and drops those of the step before. With malloc, small ones come from the
// top of the heap, which is trimmed and grown again in turn, and large ones are mapped and unmapped: the kernel then
// zeroes every page of every output, which costs more than the step does. Here a freed block is cached for the next
// output of its size.
//
// The caller gets a usual tensor: its own TensorImpl, its own storage, resizable by torch's CPU allocator. The
// storage's deleter frees the block, on any thread and at any time. As in memory that torch allocates, the deleter's
// context is the address of the data, which copy-on-write relies on.
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

#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace fastdiff::bindings {

// Header in front of a block's data.
struct alignas(64) BlockHeader {
    size_t bytes;  // of the data
    void* memory;  // what was allocated
};

constexpr size_t kHugePage = size_t{2} << 20;
// Offset of large blocks within a page, different from block to block: eight tensors that begin at the same offset have
// their elements in the same few cache sets. Measured on an EPYC: 1.12 times as fast for eight
// tensors, 1.03 for four.
constexpr size_t kStagger = 4096 + 256, kStaggers = 16;

inline void* data_of(BlockHeader* block) { return block + 1; }
inline BlockHeader* block_of(void* data) { return static_cast<BlockHeader*>(data) - 1; }

// Allocate a block; null where there is no memory.
inline BlockHeader* allocate_block(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return nullptr;
    const bool large = bytes >= kHugePage;
    static std::atomic<size_t> allocated{0};
    const size_t stagger = large ? allocated++ % kStaggers * kStagger : 0;
    const size_t total = stagger + sizeof(BlockHeader) + bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, large ? kHugePage : alignof(BlockHeader), total) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Advice only: where the kernel ignores it, pages are small.
    if (large) (void)madvise(memory, total / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    auto* block = reinterpret_cast<BlockHeader*>(static_cast<char*>(memory) + stagger);
    block->bytes = bytes;
    block->memory = memory;
    return block;
}

// Spin lock for critical sections of some tens of instructions; waiting does not enter the kernel.
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

// Cache of freed blocks, up to a limit in bytes and in number; the least recently freed is evicted first.
class FreeBlocks {
  public:
    static constexpr size_t kMost = 64;

    // Take the block of exactly this size that was freed last; null where there is none.
    BlockHeader* take(size_t bytes) {
        const std::lock_guard<SpinLock> lock(lock_);
        for (size_t i = count_; i-- > 0;) {
            if (sizes_[i] != bytes) continue;
            BlockHeader* block = blocks_[i];
            remove(i, 1);
            bytes_ -= bytes;
            return block;
        }
        return nullptr;
    }

    void recycle(BlockHeader* block) {
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
                bytes_ += bytes;
            }
        }
        for (size_t i = 0; i < dropped; ++i) std::free(surplus[i]->memory);
    }

    // Return all blocks to malloc; returns their bytes.
    size_t release() {
        std::array<BlockHeader*, kMost> surplus;
        size_t dropped = 0, bytes = 0;
        {
            const std::lock_guard<SpinLock> lock(lock_);
            bytes = bytes_;
            dropped = drop_until(0, 0, &surplus);
        }
        for (size_t i = 0; i < dropped; ++i) std::free(surplus[i]->memory);
#ifdef __GLIBC__
        // A block may have come from a hole in malloc's heap, where it stays after `free`.
        if (dropped > 0) malloc_trim(0);
#endif
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

    size_t cached_bytes() {
        const std::lock_guard<SpinLock> lock(lock_);
        return bytes_;
    }

    // A child of fork has only the thread that forked, so no other thread may hold the lock at that moment.
    void before_fork() { lock_.lock(); }
    void after_fork() { lock_.unlock(); }

  private:
    // Evict the oldest until no more than these are left; returns how many.
    size_t drop_until(size_t bytes, size_t number, std::array<BlockHeader*, kMost>* surplus) {
        size_t dropped = 0;
        while (bytes_ > bytes || count_ - dropped > number) {
            bytes_ -= sizes_[dropped];
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
    // Oldest first. Sizes are stored apart, so that the search touches no block.
    std::array<size_t, kMost> sizes_{};
    std::array<BlockHeader*, kMost> blocks_{};
    size_t count_ = 0, bytes_ = 0;
#ifdef __SANITIZE_ADDRESS__
    size_t limit_ = 0;  // a reused block would hide a use after free
#else
    size_t limit_ = size_t{256} << 20;
#endif
};

// Never destroyed: tensors may outlive static objects.
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

inline void free_output(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    free_blocks().recycle(block_of(data));
}

// Return what at::empty_strided gives for dense strides on the CPU; the caller writes all elements.
inline at::Tensor new_on_cpu(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
    const caffe2::TypeMeta dtype = c10::scalarTypeToTypeMeta(type);
    const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * dtype.itemsize();
    at::Allocator* const allocator = c10::GetCPUAllocator();
    // An allocator set for torch's CPU memory serves these tensors too.
    const bool usual = allocator == c10::GetDefaultCPUAllocator();
    BlockHeader* block = usual ? free_blocks().take(bytes) : nullptr;
    if (block == nullptr && usual && bytes <= free_blocks().limit()) block = allocate_block(bytes);
    if (block == nullptr) return at::empty_strided(sizes, strides, at::TensorOptions().dtype(type).device(at::kCPU));
    void* data = data_of(block);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                         at::DataPtr(data, data, &free_output, at::Device(at::kCPU)),
                                                         allocator, /*resizable=*/true);
    at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                               c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
    made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    return made;
}

// Return a tensor of this type with the sizes, strides and device of a dense one; the caller writes all elements.
inline at::Tensor new_output(const at::Tensor& like, at::ScalarType type) {
    return like.is_cpu() ? new_on_cpu(like.sizes(), like.strides(), type)
                         : at::empty_strided(like.sizes(), like.strides(), like.options().dtype(type));
}

}  // namespace fastdiff::bindings
