// Dense rows to integers of one step, and what that loses.

#include <algorithm>
#include <cmath>

#include "cpu/block_sums.h"
#include "kernels_round_rows.h"

namespace fedkd_fast::cpu {
namespace {

// Rounds value(0) to value(count - 1) of a row.
template <typename Value>
FEDKD_FORMULA double round_values(const Value& value, int64_t count, float divisor, float step,
                                  float* sent) {
  if (divisor == 0.0f) {
    std::fill_n(sent, count, 0.0f);
    return sum_in_blocks(count, [&](int64_t i) { return value(i) * value(i); });
  }
  return sum_in_blocks(count, [&](int64_t i) {
    const float whole = std::rint(value(i) / divisor);
    const float low = whole > -kLargestInteger ? whole : -kLargestInteger;
    sent[i] = low < kLargestInteger ? low : kLargestInteger;
    const float off = value(i) - sent[i] * step;
    return off * off;
  });
}

}  // namespace

FEDKD_CLONES
double row_squares(const float* values, const float* minus, int64_t count) {
  if (minus == nullptr)
    return sum_in_blocks(count, [=](int64_t i) { return values[i] * values[i]; });
  return sum_in_blocks(count, [=](int64_t i) {
    const float value = values[i] - minus[i];
    return value * value;
  });
}

FEDKD_CLONES
double round_row(const float* values, const float* minus, int64_t count, float divisor, float step,
                 float* sent) {
  if (minus == nullptr)
    return round_values([=](int64_t i) { return values[i]; }, count, divisor, step, sent);
  return round_values([=](int64_t i) { return values[i] - minus[i]; }, count, divisor, step, sent);
}

}  // namespace fedkd_fast::cpu
