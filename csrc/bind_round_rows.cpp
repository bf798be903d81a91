// measure_rows, round_rows: one pass over the values each, rows shared out over threads;
// dense_step.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "bind_torch.h"
#include "common/levels.h"
#include "kernels.h"

namespace fedkd_fast::bind {
namespace {

Tensor checked_values(const Tensor& values) {
  check_tensor(values, "values", 2, ScalarType::Float);
  return in_order(values);
}

Tensor checked_squares(const Tensor& squares, int64_t rows) {
  check_tensor(squares, "squares", 1, ScalarType::Double);
  STD_TORCH_CHECK(squares.size(0) == rows, "squares must have a number for each row, ", rows,
                  ", got ", squares.size(0));
  const Tensor ordered = in_order(squares);
  const double* const found = ordered.const_data_ptr<double>();
  STD_TORCH_CHECK(
      std::all_of(found, found + rows, [](double one) { return one >= 0.0 && std::isfinite(one); }),
      "squares must be finite and none below zero");
  return ordered;
}

}  // namespace

std::tuple<Tensor, Tensor> measure_rows(const Tensor& values) {
  const Tensor rows = checked_values(values);
  const int64_t count = rows.size(0), length = rows.size(1);
  const float* const from = rows.const_data_ptr<float>();
  Tensor squares = empty_on_host({count}, ScalarType::Double);
  Tensor largest = empty_on_host({count}, ScalarType::Float);
  double* const out = squares.mutable_data_ptr<double>();
  float* const most = largest.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, count, row_grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      out[row] = cpu::measure_row(from + row * length, length, most + row);
  });
  return {squares, largest};
}

std::tuple<Tensor, Tensor, Tensor> round_rows(const Tensor& values, const Tensor& squares,
                                              int64_t step) {
  const Tensor rows = checked_values(values);
  const int64_t count = rows.size(0), length = rows.size(1);
  const Tensor of_rows = checked_squares(squares, count);
  STD_TORCH_CHECK(-kScaleLimit <= step && step <= kScaleLimit, "step must lie within ±",
                  kScaleLimit, ", got ", step);
  Tensor multiplier = empty_on_host({count}, ScalarType::Float);
  Tensor levels = empty_on_host({count}, ScalarType::Short);
  Tensor lost = empty_on_host({}, ScalarType::Double);
  float* const factors = multiplier.mutable_data_ptr<float>();
  std::vector<double> parts(static_cast<size_t>(count));
  for (size_t row = 0; row < parts.size(); ++row)
    parts[row] = cpu::row_height(of_rows.const_data_ptr<double>()[row], length);
  cpu::row_levels(parts.data(), count, static_cast<int>(step), levels.mutable_data_ptr<int16_t>(),
                  factors);
  const float* const from = rows.const_data_ptr<float>();
  const auto scale = static_cast<float>(exp2_fixed(static_cast<int>(step)));
  torch::stable::parallel_for(0, count, row_grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      parts[static_cast<size_t>(row)] =
          cpu::rounding_loss(from + row * length, length, factors[row], scale);
  });
  *lost.mutable_data_ptr<double>() = std::accumulate(parts.begin(), parts.end(), 0.0);
  return {multiplier, levels, lost};
}

Tensor dense_step(const Tensor& values, const Tensor& squares, double most_lost, bool whole) {
  const Tensor rows = checked_values(values);
  const int64_t count = rows.size(0), length = rows.size(1);
  const Tensor of_rows = checked_squares(squares, count);
  const double* const found = of_rows.const_data_ptr<double>();
  STD_TORCH_CHECK(count > 0 && length > 0 && *std::max_element(found, found + count) > 0.0,
                  "values must not all be zero");
  STD_TORCH_CHECK(most_lost > 0.0 && most_lost < std::numeric_limits<double>::infinity(),
                  "most_lost must be positive and finite, got ", most_lost);
  Tensor step = empty_on_host({}, ScalarType::Long);
  *step.mutable_data_ptr<int64_t>() =
      cpu::dense_step(rows.const_data_ptr<float>(), found, count, length, most_lost, whole);
  return step;
}

}  // namespace fedkd_fast::bind
