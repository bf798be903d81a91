// Levels and scales of entropy-coded rows, the same to the bit on every machine.
//
// Logarithms travel as integers: scales in 1/256 octave, sigmas and levels in 1/16 octave. What is
// computed from them here is computed in integers, or in double multiplications in one order.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fedkd_fast {

// Sigmas in [-kSigmaLimit, kSigmaLimit], scales with a logarithm in [-kScaleLimit, kScaleLimit]:
// 126 octaves, so that every scale is a normal float32.
constexpr int kSigmaLimit = 126 * 16;
constexpr int kScaleLimit = 126 * 256;
// The static tables end here.
constexpr int kMaxLevel = 335;
// No honest row lies lower; levels fit 16 bits with room.
constexpr int kMinLevel = -8192;

// 128 * log2(n) to the nearest integer, for n in [1, 2^63): half the logarithm in 1/256 octave.
// Eight binary digits of the fraction by repeated squaring of n / 2^floor(log2 n), kept truncated
// to 31 binary digits; the last digit rounds.
FEDKD_HD inline int half_log2(std::uint64_t n) {
  int whole = 0;
  for (std::uint64_t rest = n; rest > 1; rest >>= 1) ++whole;
  // In [2^31, 2^32), which stands for [1, 2).
  std::uint64_t mantissa = whole > 31 ? n >> (whole - 31) : n << (31 - whole);
  int digits = whole;
  for (int digit = 0; digit < 8; ++digit) {
    mantissa = (mantissa * mantissa) >> 31;
    const int carry = static_cast<int>(mantissa >> 32);
    mantissa >>= carry;
    digits = 2 * digits + carry;
  }
  return (digits + 1) >> 1;
}

// Level of a row of a factor: 16 * log2(rms / step) with rms = sigma / sqrt(entries), rounded.
FEDKD_HD inline int factor_level(int sigma, int step, int half_log2_entries) {
  return (16 * sigma - step - half_log2_entries + 8) >> 4;
}

// Logarithm of the scale of a row of the left factor, in 1/256 octave: step^2 / sigma.
FEDKD_HD inline int left_scale_log2(int sigma, int step) { return 2 * step - 16 * sigma; }

// 2^(e / 256): constants for the set bits of e & 255, from high to low, then an exact shift.
FEDKD_HD inline double exp2_fixed(int e) {
  const double roots[8] = {0x1.6a09e667f3bcdp+0, 0x1.306fe0a31b715p+0, 0x1.172b83c7d517bp+0,
                           0x1.0b5586cf9890fp+0, 0x1.059b0d3158574p+0, 0x1.02c9a3e778061p+0,
                           0x1.0163da9fb3335p+0, 0x1.00b1afa5abcbfp+0};
  double product = 1.0;
  for (int bit = 0; bit < 8; ++bit) {
    if ((e & (0x80 >> bit)) != 0) product *= roots[bit];
  }
  return std::ldexp(product, e >> 8);
}

}  // namespace fedkd_fast
