// The passes of fit_factors between its matrix products: loops that vectorise.

#include <algorithm>
#include <cmath>

#include "common/macros.h"
#include "kernels_fit_factors.h"

namespace fedkd_fast::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 1024;  // terms that are summed in fp32

// A die of 16 bits, which those of neighbours, in a row or below it, say nothing of: a hash with
// constants of Wellons' hash-prospector.
FEDKD_FORMULA uint32_t die(uint32_t place) {
  place *= 0x9e3779b1u;
  place = (place ^ place >> 16) * 0x21f0aaadu;
  place = (place ^ place >> 15) * 0x735a2d97u;
  return place >> 16;
}

// The sum of term(0) to term(count - 1): in sixteen partial sums of a block in fp32, beyond in
// fp64, in an order of its own.
template <typename Term>
FEDKD_FORMULA double sum_in_blocks(int64_t count, const Term& term) {
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(count, first + kBlock);
    float parts[kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) parts[lane] += term(i + lane);
    for (; i < end; ++i) parts[0] += term(i);
    for (const float part : parts) total += static_cast<double>(part);
  }
  return total;
}

}  // namespace

FEDKD_CLONES
double round_vector(const float* near, int64_t count, float multiplier, float shrink, float* sent,
                    float* off) {
  const float scale = multiplier * shrink;
  for (int64_t i = 0; i < count; ++i) {
    sent[i] = std::rint(near[i] * scale);
    off[i] = sent[i] - near[i] * multiplier;
  }
  double parts[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
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
