// Vectors of floats from and to the 16-bit formats: the formulas of common/half.h, lane by lane.
// They take on the instruction set of the function that they are inlined into.
#pragma once

#include <cstring>

#include "cpu/vectors.h"
// After what it is compiled with.
#include "common/half.h"

namespace fedkd_fast::cpu {

// Spelt out: the compiler knows no vector whose size is that of a template.
template <int kLanes>
struct VectorsOf;
template <>
struct VectorsOf<4> {
  typedef float Values __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
};
template <>
struct VectorsOf<8> {
  typedef float Values __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
};
template <>
struct VectorsOf<16> {
  typedef float Values __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
};

template <int kLanes>
struct HalfVectors {
  using Values = typename VectorsOf<kLanes>::Values;
  using Words = typename VectorsOf<kLanes>::Words;
  using Halves = typename VectorsOf<kLanes>::Halves;

  static FEDKD_INLINE Words widen(const void* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return __builtin_convertvector(halves, Words);
  }

  static FEDKD_INLINE Values load(const BFloat16* from) { return (Values)(widen(from) << 16); }

  static FEDKD_INLINE Values load(const Float16* from) {
    const Words bits = widen(from);
    const Words shifted = (bits & 0x7fffu) << 13;
    const Values scaled = (Values)shifted * 0x1p112f;
    const Words special = shifted >= 0x0f800000u ? Words{} + 0x7f800000u : Words{};
    return (Values)((Words)scaled | special | ((bits & 0x8000u) << 16));
  }

  static FEDKD_INLINE Halves narrow(const BFloat16*, const Values& values) {
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words half = (bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded;
    return __builtin_convertvector(half, Halves);
  }

  static FEDKD_INLINE Halves narrow(const Float16*, const Values& values) {
    const Words bits = (Words)values;
    const Words magnitude = bits & 0x7fffffffu;
    const Words subnormal = (Words)((Values)magnitude + 0.5f) - 0x3f000000u;
    const Words normal = (magnitude + 0xc8000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    Words half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
  }
};

}  // namespace fedkd_fast::cpu
