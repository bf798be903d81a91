// Stores around the caches, for results that are too large to be found there again.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FEDKD_X86_VECTORS
#include <immintrin.h>
#endif

namespace fedkd_fast::cpu {

// Gradients of both models beyond this leave no room in the caches for what is worth keeping.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

constexpr uintptr_t kStreamedAlignment = 16;

inline bool can_stream(const void* to) {
  return reinterpret_cast<uintptr_t>(to) % kStreamedAlignment == 0;
}

// kBytes: a multiple of 16; `to` aligned to as many.
template <int kBytes>
FEDKD_FORMULA void stream(void* to, const void* from) {
#ifdef FEDKD_X86_VECTORS
  for (int byte = 0; byte < kBytes; byte += 16)
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(static_cast<char*>(to) + byte),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + byte)));
#else
  std::memcpy(to, from, kBytes);
#endif
}

// They become visible to other threads.
inline void finish_streaming() {
#ifdef FEDKD_X86_VECTORS
  _mm_sfence();
#endif
}

}  // namespace fedkd_fast::cpu
