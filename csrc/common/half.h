// Conversions between fp32 and the two 16-bit storage formats, on their bits (uint16_t).
//
// Written without branches, so that a plain loop over them vectorises. Rounding to 16 bits is to
// nearest, ties to even; NaN stays NaN, overflow becomes Inf, subnormals are kept. GPUs have
// instructions for it, which differ in the payloads of NaN alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace fedkd_fast {

FEDKD_HD inline float float_from_bits(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FEDKD_HD inline std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// Storage types of tensors. `Real`, the type of their arithmetic, is double for kFloat64, else
// float.
enum class FloatType { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline std::int64_t storage_bytes(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

// The arithmetic type of a storage type: 16-bit formats compute in fp32.
template <typename Storage>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

FEDKD_HD inline double load_value(double stored) { return stored; }
FEDKD_HD inline float load_value(float stored) { return stored; }

FEDKD_HD inline float load_value(BFloat16 stored) {
  return float_from_bits(static_cast<std::uint32_t>(stored.bits) << 16);
}

FEDKD_HD inline float load_value(Float16 stored) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored.bits));
  return value;
#else
  const std::uint32_t sign = (stored.bits & 0x8000u) << 16;
  const std::uint32_t shifted = (stored.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const float scaled = float_from_bits(shifted) * float_from_bits(0x77800000u);
  // An all-ones exponent (Inf, NaN) has to stay all ones.
  const std::uint32_t special = shifted >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_from_bits(bits_from_float(scaled) | special | sign);
#endif
}

FEDKD_HD inline void store_value(double* place, double value) { *place = value; }
FEDKD_HD inline void store_value(float* place, float value) { *place = value; }

FEDKD_HD inline void store_value(BFloat16* place, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(place->bits) : "f"(value));
#else
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  place->bits = static_cast<std::uint16_t>(is_nan ? ((bits >> 16) | 0x40u) : rounded);
#endif
}

FEDKD_HD inline void store_value(Float16* place, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(place->bits) : "f"(value));
#else
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the fp32 adder round at 2^-24.
  const std::uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  // 0xc8000000 = -(112 << 23) moves the bias from 127 to 15; 0xfff and the odd bit round to even.
  const std::uint32_t normal = (magnitude + 0xc8000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 65536 or more: Inf
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  place->bits = static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace fedkd_fast
