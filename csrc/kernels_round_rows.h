// measure_rows, round_rows, dense_step: the part of kernels.h that rounds dense rows.
//
// Rows are contiguous. Steps are log2 in 1/256 octave, levels in 1/16: what a row's standard
// deviation is over the step. Integers are not written out: the coder makes them once more.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fedkd_fast {

constexpr float kLargestInteger = 4194303.0f;  // 2^22 - 1: beyond, the coder takes no integers

FEDKD_FORMULA float clamped(float whole) {
  const float low = whole > -kLargestInteger ? whole : -kLargestInteger;
  return low < kLargestInteger ? low : kLargestInteger;
}

// Levels of dense rows travel in quarters of an octave, down to so many below the largest one.
constexpr int kRowQuantum = 4, kMostRowCodes = 63;
// The level of a row that is sent as zeros.
constexpr int16_t kZeroLevel = INT16_MIN;
// Values are multiplied by 1 - kRowShrink / (12 r²), but no less than kLeastShrink, r the ratio of
// the level, before they are rounded: of two integers that are about as near the smaller is
// cheaper. Rows have heavier tails than Gaussians, which want all of it.
constexpr double kRowShrink = 0.7, kLeastShrink = 0.3;

namespace cpu {

// Squared norm of a row, and its largest magnitude: NaN where one is.
double measure_row(const float* values, int64_t count, float* largest);

// The level at step 0 of a row of so many values; minus infinity where they are zeros.
double row_height(double squares, int64_t count);

// Levels of rows at a step, and what values are multiplied by before they are rounded. Returns the
// largest level that any row would have, were there no least one.
int row_levels(const double* heights, int64_t rows, int step, int16_t* levels, float* multipliers);

// The sum of (value - step · q)², q = rint(value · multiplier) in ±kLargestInteger.
double rounding_loss(const float* values, int64_t count, float multiplier, float step);

// The coarsest step at which rounding (rows, count) values loses at most so much, going by some of
// the rows where there are many, but for `whole`; the finest there is where none is fine enough.
// Not all of the rows may be zeros.
int dense_step(const float* values, const double* squares, int64_t rows, int64_t count,
               double most_lost, bool whole);

}  // namespace cpu
}  // namespace fedkd_fast
