// Products with one matrix on the CPU, exact and coarse.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "bind_rows.h"
#include "kernels.h"

namespace fedkd_fast::bind {

// Whether products with the matrix may run in int8, which is only worth it with VNNI.
inline bool multiplies_int8(const Tensor& matrix) {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool able = __builtin_cpu_supports("avx512vnni") != 0;
#else
  constexpr bool able = false;
#endif
  return able && matrix.size(0) < kMostInt8Terms && matrix.size(1) < kMostInt8Terms;
}

// Products with a matrix X, M×N, and its transpose: exact ones in fp32, and coarse ones.
class Products {
 public:
  // largest: the largest magnitude of each row. levels, where they are known: the rows in steps of
  // level_step(largest).
  Products(const Tensor& matrix, const float* largest, std::optional<Tensor> levels)
      : matrix_(matrix),
        transposed_(matrix.size(0) <= matrix.size(1)),
        coarse_(multiplies_int8(matrix)),
        largest_(largest),
        levels_(std::move(levels)) {}

  // To be called once before anything is multiplied roughly. Levels of rows of zeros may be
  // anything: their step is 0.
  void prepare() {
    if (!coarse_) return;
    const int64_t rows = matrix_.size(0), cols = matrix_.size(1);
    row_steps_.resize(static_cast<size_t>(rows));
    std::transform(largest_, largest_ + rows, row_steps_.begin(), level_step);
    if (levels_) return;
    levels_ = empty_like_device(matrix_, {rows, cols}, ScalarType::Char);
    cpu::quantise_rows(matrix_.const_data_ptr<float>(), rows, cols, nullptr, largest_,
                       static_cast<int8_t*>(levels_->mutable_data_ptr()), row_steps_.data());
  }

  int64_t long_side() const { return std::max(matrix_.size(0), matrix_.size(1)); }
  int64_t short_side() const { return std::min(matrix_.size(0), matrix_.size(1)); }

  // rows (L, N) · Xᵀ
  Tensor to_long(const Tensor& rows) const { return mm(rows, transposed_ ? matrix_ : mT(matrix_)); }
  // XᵀX, its lower triangle.
  Tensor gram() const { return lower_gram(transposed_ ? matrix_ : mT(matrix_)); }

  Tensor roughly_to_long(const Tensor& rows) const { return roughly(rows, transposed_); }
  // rows (L, M) · X
  Tensor roughly_to_short(const Tensor& rows) const { return roughly(rows, !transposed_); }

  // rows (L, N) · (XᵀX - shift)
  Tensor roughly_around(const Tensor& rows, float shift) const {
    if (!coarse_) {
      Tensor out = roughly_to_short(roughly_to_long(rows));
      cpu::subtract_scaled(out.mutable_data_ptr<float>(), rows.const_data_ptr<float>(), shift,
                           out.numel());
      return out;
    }
    Coarse coarse = coarsely(rows, transposed_);
    const Tensor sums = times(coarse, transposed_);
    coarse.levels = empty_like_device(rows, {sums.size(0), sums.size(1)}, ScalarType::Char);
    // Steps of the matrix's rows belong to the columns of one product and to the entries of the
    // other: to either, but once each.
    std::vector<float> squared(row_steps_);
    for (float& step : squared) step *= step;
    cpu::requantise_rows(static_cast<const int32_t*>(sums.const_data_ptr()), sums.size(0),
                         sums.size(1), transposed_ ? nullptr : squared.data(),
                         static_cast<int8_t*>(coarse.levels.mutable_data_ptr()),
                         coarse.steps.data());
    return finely(times(coarse, !transposed_), coarse.steps, !transposed_, &rows, shift);
  }

 private:
  struct Coarse {
    Tensor levels;
    std::vector<float> steps;
  };

  // rows · matrix where they are as long as its columns, rows · matrixᵀ otherwise.
  Tensor roughly(const Tensor& rows, bool along_columns) const {
    if (!coarse_) return mm(rows, along_columns ? matrix_ : mT(matrix_));
    const Coarse coarse = coarsely(rows, along_columns);
    return finely(times(coarse, along_columns), coarse.steps, along_columns, nullptr, 0.0f);
  }

  Coarse coarsely(const Tensor& rows, bool along_columns) const {
    const int64_t count = rows.size(0), length = rows.size(1);
    Coarse coarse{empty_like_device(rows, {count, length}, ScalarType::Char),
                  std::vector<float>(static_cast<size_t>(count))};
    cpu::quantise_rows(rows.const_data_ptr<float>(), count, length,
                       along_columns ? row_steps_.data() : nullptr, nullptr,
                       static_cast<int8_t*>(coarse.levels.mutable_data_ptr()), coarse.steps.data());
    return coarse;
  }

  Tensor times(const Coarse& coarse, bool along_columns) const {
    return int_mm(coarse.levels, along_columns ? *levels_ : mT(*levels_));
  }

  // What the sums stand for, less shift · basis.
  Tensor finely(const Tensor& sums, const std::vector<float>& steps, bool along_columns,
                const Tensor* basis, float shift) const {
    const int64_t count = sums.size(0), length = sums.size(1);
    Tensor out = empty_like_device(sums, {count, length}, ScalarType::Float);
    cpu::dequantise_rows(static_cast<const int32_t*>(sums.const_data_ptr()), count, length,
                         steps.data(), along_columns ? nullptr : row_steps_.data(),
                         basis ? basis->const_data_ptr<float>() : nullptr, shift,
                         out.mutable_data_ptr<float>());
    return out;
  }

  const Tensor matrix_;
  const bool transposed_, coarse_;
  const float* const largest_;
  std::optional<Tensor> levels_;  // int8: matrix ≈ diag(row_steps) · levels
  std::vector<float> row_steps_;
};

}  // namespace fedkd_fast::bind
