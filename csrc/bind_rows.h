// Rows of vectors on the CPU: stacked, multiplied with each other, made orthonormal.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "bind_linalg.h"
#include "kernels.h"

namespace fedkd_fast::bind {

// Blocks of a symmetric product, from widths on where smaller products are as fast as large ones:
// with n of them it is (n+1)/2n of the work.
constexpr int64_t kFewGramBlocks = 4, kWideForFew = 112;
constexpr int64_t kManyGramBlocks = 8, kWideForMany = 512;
// |U·Uᵀ - I| that Newton-Schulz steps mend: each squares it. Beyond, fp64 takes over.
constexpr float kMostSkew = 1e-2f, kLittleSkew = 2e-6f;
constexpr int kMostSteps = 2;
// Of unit rows; below, Cholesky in fp64 leaves more of fp32's rounding than QR.
constexpr double kLeastPivot = 0.02;

inline Tensor stacked(const Tensor& upper, const Tensor& lower) {
  const int64_t length = upper.size(1);
  Tensor rows =
      empty_like_device(upper, {upper.size(0) + lower.size(0), length}, ScalarType::Float);
  float* const out = rows.mutable_data_ptr<float>();
  std::copy_n(upper.const_data_ptr<float>(), upper.numel(), out);
  std::copy_n(lower.const_data_ptr<float>(), lower.numel(), out + upper.numel());
  return rows;
}

inline Tensor first_rows(const Tensor& rows, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(rows), 0, 0, count);
}

// rows · rowsᵀ, of which only the lower triangle means something.
template <typename Real = float>
Tensor lower_gram(const Tensor& rows) {
  const int64_t width = rows.size(0);
  if (width < kWideForFew) return mm(rows, mT(rows));
  const int64_t blocks = width < kWideForMany ? kFewGramBlocks : kManyGramBlocks;
  Tensor gram = empty_like_device(rows, {width, width}, rows.scalar_type());
  Real* const out = gram.mutable_data_ptr<Real>();
  std::fill_n(out, width * width, Real(0));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = width * block / blocks, end = width * (block + 1) / blocks;
    const Tensor part = mm(torch::stable::narrow(const_cast<Tensor&>(rows), 0, first, end - first),
                           mT(first_rows(rows, end)));
    const Real* from = part.const_data_ptr<Real>();
    for (int64_t i = first; i < end; ++i, from += end) std::copy_n(from, end, out + i * width);
  }
  return gram;
}

// An orthonormal basis of the span of rows, which are normalised where they are: RRᵀ = LLᵀ, L⁻¹R;
// where that fails, by QR. It is as good as RRᵀ is exact, over the square of the least pivot: in
// fp64 as good as fp32 can hold, down to the least pivot that is taken; in fp32 good enough to go
// on from.
template <typename Real>
Tensor orthonormal(Tensor rows) {
  const int64_t width = rows.size(0), length = rows.size(1);
  std::vector<double> norms(static_cast<size_t>(width));
  cpu::normalise_rows(rows.mutable_data_ptr<float>(), width, length, norms.data());
  constexpr bool fine = std::is_same_v<Real, double>;
  const auto [lower, failed] =
      cholesky(lower_gram<Real>(fine ? torch::stable::to(rows, ScalarType::Double) : rows));
  bool sure = !failed;
  for (int64_t i = 0; sure && fine && i < width; ++i)
    sure = lower.template const_data_ptr<Real>()[i * (width + 1)] > kLeastPivot;
  if (!sure) return torch::stable::contiguous(mT(qr(mT(rows))));
  return solve_lower(fine ? torch::stable::to(lower, ScalarType::Float) : lower, rows);
}

// U ← U - (UUᵀ - I)·U/2 for unit rows that are nearly orthogonal; false where they are not.
inline bool straighten(Tensor& rows) {
  const int64_t width = rows.size(0);
  for (int step = 0; step < kMostSteps; ++step) {
    Tensor skew = lower_gram(rows);
    float* const data = skew.mutable_data_ptr<float>();
    float most = 0.0f;
    for (int64_t i = 0; i < width; ++i) {
      data[i * (width + 1)] -= 1.0f;
      for (int64_t j = 0; j <= i; ++j) {
        const float value = data[i * width + j];
        data[j * width + i] = value;
        most = std::max(most, std::abs(value));
      }
    }
    if (!(most <= kMostSkew)) return false;
    if (most <= kLittleSkew) return true;
    const Tensor correction = mm(skew, rows);
    cpu::subtract_scaled(rows.mutable_data_ptr<float>(), correction.const_data_ptr<float>(), 0.5f,
                         rows.numel());
    if (most * most <= kLittleSkew) return true;
  }
  return true;
}

}  // namespace fedkd_fast::bind
