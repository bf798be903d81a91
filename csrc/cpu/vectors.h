// For sources that compute with vectors of the compiler.
//
// Vectors wider than the machine's are taken apart in memory, which can cost ten times as much. So
// kernels are compiled for two widths: in a FEDKD_WIDE function for kWideBytes, to be called where
// has_wide_vectors(), and in a FEDKD_CLONES function for kNarrowBytes.
#pragma once

#include <cstdint>

#include "common/macros.h"

// Into each FEDKD_WIDE or FEDKD_CLONES function, with its instructions.
#if defined(__GNUC__)
#define FEDKD_INLINE inline __attribute__((always_inline))
#else
#define FEDKD_INLINE inline
#endif

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FEDKD_WIDE __attribute__((target("arch=x86-64-v4")))
#else
#define FEDKD_WIDE
#endif

namespace fedkd_fast::cpu {

constexpr int kWideBytes = 64, kNarrowBytes = 32;

inline bool has_wide_vectors() {
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
  static const bool has = __builtin_cpu_supports("x86-64-v4") != 0;
  return has;
#else
  return false;
#endif
}

// Spelt out: the compiler knows no vector whose size is that of a template. `Unaligned` is of any
// address, whatever type was written there.
template <typename Real, int kBytes>
struct VectorOf;
#define FEDKD_VECTOR_OF(Real, Integer, kBytes)                                                     \
  template <>                                                                                      \
  struct VectorOf<Real, kBytes> {                                                                  \
    typedef Real Values __attribute__((vector_size(kBytes), may_alias));                           \
    typedef Real Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(Real)), may_alias)); \
    typedef Integer Bits __attribute__((vector_size(kBytes)));                                     \
    typedef uint8_t Bytes __attribute__((vector_size(kBytes / sizeof(Real))));                     \
    typedef uint16_t Wider __attribute__((vector_size(kBytes / sizeof(Real) * 2)));                \
    static constexpr int kLanes = kBytes / static_cast<int>(sizeof(Real));                         \
  };
FEDKD_VECTOR_OF(float, int32_t, 32)
FEDKD_VECTOR_OF(float, int32_t, 64)
FEDKD_VECTOR_OF(double, int64_t, 32)
FEDKD_VECTOR_OF(double, int64_t, 64)
#undef FEDKD_VECTOR_OF

}  // namespace fedkd_fast::cpu
