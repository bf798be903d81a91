// Levels of dense rows at a step, and what rounding them loses.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/half.h"
#include "common/levels.h"
#include "common/rans.h"
#include "cpu/block_sums.h"
#include "kernels_round_rows.h"

namespace fedkd_fast::cpu {
namespace {

// What values are multiplied by at the level first + quantum · index.
constexpr size_t kShrinks = (kRansMostLevel - kRansFirstLevel) / kRowQuantum + 1;

std::array<double, kShrinks> shrink_table() {
  std::array<double, kShrinks> table{};
  for (size_t i = 0; i < table.size(); ++i) {
    const int level = kRansFirstLevel + kRowQuantum * static_cast<int>(i);
    table[i] = std::max(1.0 - kRowShrink / (12.0 * exp2_fixed(32 * level)), kLeastShrink);
  }
  return table;
}

}  // namespace

FEDKD_CLONES
double measure_row(const float* values, int64_t count, float* largest) {
  // Of magnitudes, the bits have the same order, and those of NaN are the largest.
  uint32_t bits = 0;
  const double squares = sum_in_blocks(count, [&](int64_t i) {
    bits = std::max(bits, bits_from_float(values[i]) & 0x7fffffffu);
    return values[i] * values[i];
  });
  *largest = float_from_bits(bits);
  return squares;
}

double row_height(double squares, int64_t count) {
  return squares > 0.0 ? 8.0 * std::log2(squares / static_cast<double>(count))
                       : -std::numeric_limits<double>::infinity();
}

int row_levels(const double* heights, int64_t rows, int step, int16_t* levels, float* multipliers) {
  static const auto shrinks = shrink_table();
  const double scale = exp2_fixed(step), lowest = -1e6;
  const auto level_of = [&](double height) {
    const double level = std::max(height - static_cast<double>(step) / 16.0, lowest);
    return kRowQuantum * static_cast<int>(std::lrint(level / kRowQuantum));
  };
  int top = level_of(lowest);
  for (int64_t row = 0; row < rows; ++row) top = std::max(top, level_of(heights[row]));
  const int least = std::max(kRansFirstLevel, top - kRowQuantum * (kMostRowCodes - 1));
  for (int64_t row = 0; row < rows; ++row) {
    const int level = level_of(heights[row]);
    const bool sent = level >= least && top <= kRansMostLevel;
    levels[row] = sent ? static_cast<int16_t>(level) : kZeroLevel;
    const auto index = static_cast<size_t>(sent ? (level - kRansFirstLevel) / kRowQuantum : 0);
    multipliers[row] = sent ? static_cast<float>(shrinks[index] / scale) : 0.0f;
  }
  return top;
}

FEDKD_CLONES
double rounding_loss(const float* values, int64_t count, float multiplier, float step) {
  return sum_in_blocks(count, [=](int64_t i) {
    const float off = values[i] - clamped(std::rint(values[i] * multiplier)) * step;
    return off * off;
  });
}

}  // namespace fedkd_fast::cpu
