// SPDX-License-Identifier: MIT
#include "accesses.h"

namespace accesses {

jmp_buf refused;

namespace {

Span* first = nullptr;
int64_t spans = 0;
uintptr_t stack_end = 0;  // 0: nothing is watched

[[noreturn]] void refuse(Verdict verdict) {
    stop();
    longjmp(refused, verdict);
}

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

void note(const void* pointer, size_t bytes, bool write) {
    if (stack_end == 0) return;
    const uintptr_t at = address(pointer);
    for (Span* span = first; span != first + spans; ++span) {
        const uintptr_t begin = address(span->begin);
        if (at < begin || at + bytes > begin + span->bytes || (write && !span->writable)) continue;
        (write ? span->written : span->read) += static_cast<int64_t>(bytes);
        return;
    }
    // A stack grows downwards: from this function's frame up to where the watch began lies what is the code's own.
    if (at >= address(__builtin_frame_address(0)) && at < stack_end) return;
    refuse(kOutside);
}

}  // namespace

void watch(Span* begin, int64_t count, const void* frame) {
    first = begin;
    spans = count;
    stack_end = address(frame);
}

void stop() { stack_end = 0; }

}  // namespace accesses

extern "C" {

#define ACCESSES(bytes)                                                               \
    void __tsan_read##bytes(void* at) { accesses::note(at, bytes, false); }           \
    void __tsan_write##bytes(void* at) { accesses::note(at, bytes, true); }           \
    void __tsan_unaligned_read##bytes(void* at) { accesses::note(at, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* at) { accesses::note(at, bytes, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// Of the host's code, which keeps what it knows of devices in atomics.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) { return *at; }
void __tsan_atomic8_store(volatile unsigned char* at, unsigned char value, int) { *at = value; }
unsigned __tsan_atomic32_load(const volatile unsigned* at, int) { return *at; }
void __tsan_atomic32_store(volatile unsigned* at, unsigned value, int) { *at = value; }

void __tsan_read_range(void* at, size_t bytes) { accesses::note(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { accesses::note(at, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __ubsan_handle_type_mismatch_v1(void*, void*) { accesses::refuse(accesses::kMisaligned); }

}  // extern "C"
