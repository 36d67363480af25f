// SPDX-License-Identifier: MIT
// Looks at every access to memory of code that was compiled with -fsanitize=thread,alignment, without the sanitizers'
// libraries: their entry points are defined in accesses.cpp.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>

namespace accesses {

// Memory that may be read, and written where `writable`.
struct Span {
    const void* begin;
    int64_t bytes;
    int64_t writable;
    int64_t read;     // bytes, each as often as it was read
    int64_t written;  // bytes
};

enum Verdict : int {
    kFine = 0,
    kOutside = 1,     // an access to memory that is neither in a span nor on the stack of the code that is watched
    kMisaligned = 2,  // one that is not at a multiple of its type's alignment: a device refuses it
};

// Where the first access that is not fine goes instead of happening, with its verdict.
extern jmp_buf refused;

// Watches from here to `stop`; what lies on the stack above `frame` is not the code's own.
void watch(Span* spans, int64_t count, const void* frame);
void stop();

}  // namespace accesses
