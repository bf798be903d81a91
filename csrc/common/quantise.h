// The uniform quantiser of the wire, shared to the bit by every device.
//
//   code   = clamp(floor(x · (0.5 / scale)) + 2^(b-1), 0, 2^b - 1)
//   level  = 2 · code - (2^b - 1)                    an odd integer, symmetric around zero
//   value  = scale · level                           one fp32 rounding
//
// `scale` is half the step. A mid-rise quantiser uses all 2^b levels, which matters at 1-3 bits,
// where most columns of a factor live; exact zeros are what b = 0 is for.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fedkd_fast {

constexpr int kMaxCodeBits = 16;

// Scales below 2^-125 would make 0.5 / scale overflow; the binding refuses them.
constexpr float kMinScale = 2.350988701644575e-38f;

FEDKD_HD inline float inverse_step(float scale) { return 0.5f / scale; }

// `inverse` = inverse_step(scale). NaN encodes as code 0; the caller checks for NaN beforehand.
FEDKD_HD inline uint32_t quantise(float value, float inverse, int bits) {
  const float half = static_cast<float>(1 << (bits - 1));
  float cell = value * inverse;
  // Clamped as float first: a huge quotient has no defined integer.
  cell = cell > -half ? cell : -half;
  cell = cell < half - 1.0f ? cell : half - 1.0f;
  const int whole = static_cast<int>(cell);  // towards zero
  const int floored = whole - (cell < static_cast<float>(whole) ? 1 : 0);
  return static_cast<uint32_t>(floored + (1 << (bits - 1)));
}

FEDKD_HD inline float dequantise(uint32_t code, float scale, int bits) {
  const int level = 2 * static_cast<int>(code) - ((1 << bits) - 1);
  return scale * static_cast<float>(level);
}

FEDKD_HD inline int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

}  // namespace fedkd_fast
