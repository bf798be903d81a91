// The passes of fit_factors between its matrix products: loops that vectorise.

#include <cmath>

#include "cpu/block_sums.h"
#include "kernels_fit_factors.h"
#include "kernels_round_rows.h"

namespace fedkd_fast::cpu {
namespace {

// A die of 16 bits, which those of neighbours, in a row or below it, say nothing of: a hash with
// constants of Wellons' hash-prospector.
FEDKD_FORMULA uint32_t die(uint32_t place) {
  place *= 0x9e3779b1u;
  place = (place ^ place >> 16) * 0x21f0aaadu;
  place = (place ^ place >> 15) * 0x735a2d97u;
  return place >> 16;
}

}  // namespace

FEDKD_CLONES
double evenness(const float* values, int64_t count) {
  const double squares = sum_in_blocks(count, [=](int64_t i) { return values[i] * values[i]; });
  const double sum = sum_in_blocks(count, [=](int64_t i) { return std::abs(values[i]); });
  const double used =
      sum_in_blocks(count, [=](int64_t i) { return values[i] != 0.0f ? 1.0f : 0.0f; });
  return squares > 0.0 ? sum * sum / (used * squares) : 1.0;
}

FEDKD_CLONES
double round_vector(const float* near, int64_t count, float multiplier, float shrink, float* sent,
                    float* off) {
  const float scale = multiplier * shrink;
  for (int64_t i = 0; i < count; ++i) {
    sent[i] = clamped(std::rint(near[i] * scale));
    off[i] = sent[i] - near[i] * multiplier;
  }
  double parts[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (int lane = 0; lane < kSumLanes; ++lane)
      parts[lane] += static_cast<double>(sent[i + lane]) * static_cast<double>(sent[i + lane]);
  for (; i < count; ++i) parts[0] += static_cast<double>(sent[i]) * static_cast<double>(sent[i]);
  double total = 0.0;
  for (const double part : parts) total += part;
  return total;
}

FEDKD_CLONES
void narrow(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) store_value(to + i, from[i]);
}

FEDKD_CLONES
void narrow_by_dice(const float* from, int64_t count, uint32_t place, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i].bits = static_cast<uint16_t>(
        (bits_from_float(from[i]) + die(place + static_cast<uint32_t>(i))) >> 16);
}

#define FEDKD_PRODUCT float
#include "cpu/fit_factors.inc"
#undef FEDKD_PRODUCT
#define FEDKD_PRODUCT BFloat16
#include "cpu/fit_factors.inc"
#undef FEDKD_PRODUCT

}  // namespace fedkd_fast::cpu
