// row_squares, round_rows: the part of kernels.h that rounds dense rows.
//
// Rows are contiguous. `minus`, where it is not null, is taken off the values first: what factors
// leave of a matrix is never written out.
#pragma once

#include <cstdint>

namespace fedkd_fast {

constexpr float kLargestInteger = 4194303.0f;  // 2^22 - 1: beyond, the coder takes no integers

namespace cpu {

// Squared norm of a row.
double row_squares(const float* values, const float* minus, int64_t count);

// sent = rint(value / divisor), in ±kLargestInteger; returns the sum of (value - sent · step)². A
// divisor of 0 sends zeros.
double round_row(const float* values, const float* minus, int64_t count, float divisor, float step,
                 float* sent);

}  // namespace cpu
}  // namespace fedkd_fast
