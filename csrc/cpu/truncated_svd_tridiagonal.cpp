// A symmetric matrix to tridiagonal form, for the subspaces of truncated_svd: A = Q T Qᵀ by
// Householder reflections, 4/3·n³ operations.
//
// One pass over the triangle a column does all of it: it applies the last reflection and multiplies
// with the next vector, so that the matrix is read and written once. Up to n of about 500 it stays
// in the L2 cache; beyond, operations and memory take about the same time.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/vectors.h"
#include "kernels.h"

namespace fedkd_fast {
namespace cpu {
namespace {

// Columns [from, to) of kRows rows of A ← A - v·wᵀ - w·vᵀ, and what they add to A·next: of the rows
// by dot products, of the columns, where `both`, by symmetry.
template <typename Real, int kBytes, int kRows, bool both>
FEDKD_INLINE void sweep_rows(Real* matrix, int64_t stride, int64_t row, int64_t from, int64_t to,
                             const Real* v, const Real* w, const Real* next, Real* image) {
  using Values = typename VectorOf<Real, kBytes>::Unaligned;
  constexpr int kLanes = VectorOf<Real, kBytes>::kLanes;
  Real* at[kRows];
  Values dots[kRows];
  for (int i = 0; i < kRows; ++i) {
    at[i] = matrix + (row + i) * stride;
    dots[i] = Values{};
  }
  for (int64_t j = from; j < to; j += kLanes) {
    const Values vj = *reinterpret_cast<const Values*>(v + j);
    const Values wj = *reinterpret_cast<const Values*>(w + j);
    const Values nj = *reinterpret_cast<const Values*>(next + j);
    Values sum = *reinterpret_cast<const Values*>(image + j);
    for (int i = 0; i < kRows; ++i) {
      Values* const place = reinterpret_cast<Values*>(at[i] + j);
      Values x = *place;
      x -= v[row + i] * wj;
      x -= w[row + i] * vj;
      *place = x;
      if (both) sum += x * next[row + i];
      dots[i] += x * nj;
    }
    if (both) *reinterpret_cast<Values*>(image + j) = sum;
  }
  for (int i = 0; i < kRows; ++i) {
    Real total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += dots[i][lane];
    image[row + i] += total;
  }
}

// image = A·next after A ← A - v·wᵀ - w·vᵀ, of the leading `side` rows and columns. Only the lower
// triangle counts, and the squares of one pack on the diagonal. v, w and next are 0 beyond.
template <typename Real, int kBytes>
FEDKD_INLINE void sweep(Real* matrix, int64_t stride, int64_t side, const Real* v, const Real* w,
                        const Real* next, Real* image) {
  constexpr int kLanes = VectorOf<Real, kBytes>::kLanes, kRows = 8;
  std::fill_n(image, stride, Real(0));
  for (int64_t block = 0; block < side; block += kLanes) {
    const int64_t end = std::min(block + kLanes, side);
    int64_t row = block;
    for (; row + kRows <= end; row += kRows) {
      sweep_rows<Real, kBytes, kRows, true>(matrix, stride, row, 0, block, v, w, next, image);
      sweep_rows<Real, kBytes, kRows, false>(matrix, stride, row, block, block + kLanes, v, w, next,
                                             image);
    }
    for (; row < end; ++row) {
      sweep_rows<Real, kBytes, 1, true>(matrix, stride, row, 0, block, v, w, next, image);
      sweep_rows<Real, kBytes, 1, false>(matrix, stride, row, block, block + kLanes, v, w, next,
                                         image);
    }
  }
}

template <typename Real>
FEDKD_INLINE double dot(const Real* a, const Real* b, int64_t count) {
  constexpr int kLanes = 16;
  double parts[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      parts[lane] += static_cast<double>(a[j + lane]) * static_cast<double>(b[j + lane]);
  for (; j < count; ++j) parts[0] += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  double total = 0.0;
  for (const double part : parts) total += part;
  return total;
}

// x becomes v, whose last entry is 1, with (I - tau·v·vᵀ)·x = beta·e_last; returns tau.
template <typename Real>
FEDKD_INLINE Real reflect(Real* x, int64_t count, double* beta) {
  const double rest = dot(x, x, count - 1), last = static_cast<double>(x[count - 1]);
  x[count - 1] = Real(1);
  *beta = last;
  // Squares of less have lost their digits, and beside the rest of the matrix it is nothing.
  if (rest < 0x1p-960) return Real(0);
  *beta = last > 0.0 ? -std::sqrt(rest + last * last) : std::sqrt(rest + last * last);
  const double inverse = 1.0 / (last - *beta);
  for (int64_t j = 0; j < count - 1; ++j)
    x[j] = static_cast<Real>(static_cast<double>(x[j]) * inverse);
  return static_cast<Real>((*beta - last) / *beta);
}

template <typename Real, int kBytes>
FEDKD_INLINE void reduce(Real* matrix, int64_t side, int64_t stride, Real* taus, double* diagonal,
                         double* beside) {
  std::vector<Real> scratch(static_cast<size_t>(3 * stride), Real(0));
  Real *const w = scratch.data(), *const image = w + stride;
  const Real* v = image + stride;
  std::fill_n(taus, side, Real(0));
  // From the last row on: what is left is the leading part, whose rows are contiguous.
  for (int64_t i = side - 1; i > 0; --i) {
    Real* const x = matrix + i * stride;
    for (int64_t j = 0; j <= i; ++j) x[j] -= v[i] * w[j] + w[i] * v[j];
    diagonal[i] = static_cast<double>(x[i]);
    taus[i] = reflect(x, i, &beside[i - 1]);
    std::fill_n(x + i, stride - i, Real(0));
    sweep<Real, kBytes>(matrix, stride, i, v, w, x, image);
    const auto tau = static_cast<double>(taus[i]);
    const auto half = static_cast<Real>(0.5 * tau * tau * dot(image, x, i));
    for (int64_t j = 0; j < i; ++j) w[j] = taus[i] * image[j] - half * x[j];
    w[i] = Real(0);
    v = x;
  }
  diagonal[0] =
      static_cast<double>(matrix[0]) - 2.0 * static_cast<double>(v[0]) * static_cast<double>(w[0]);
  std::fill_n(matrix, stride, Real(0));
}

FEDKD_WIDE void reduce_floats_wide(float* matrix, int64_t side, int64_t stride, float* taus,
                                   double* diagonal, double* beside) {
  reduce<float, kWideBytes>(matrix, side, stride, taus, diagonal, beside);
}
FEDKD_CLONES
void reduce_floats(float* matrix, int64_t side, int64_t stride, float* taus, double* diagonal,
                   double* beside) {
  reduce<float, kNarrowBytes>(matrix, side, stride, taus, diagonal, beside);
}
FEDKD_WIDE void reduce_doubles_wide(double* matrix, int64_t side, int64_t stride, double* taus,
                                    double* diagonal, double* beside) {
  reduce<double, kWideBytes>(matrix, side, stride, taus, diagonal, beside);
}
FEDKD_CLONES
void reduce_doubles(double* matrix, int64_t side, int64_t stride, double* taus, double* diagonal,
                    double* beside) {
  reduce<double, kNarrowBytes>(matrix, side, stride, taus, diagonal, beside);
}

}  // namespace

template <>
void tridiagonalise<float>(float* matrix, int64_t side, int64_t stride, float* taus,
                           double* diagonal, double* beside) {
  const auto reduce = has_wide_vectors() ? reduce_floats_wide : reduce_floats;
  reduce(matrix, side, stride, taus, diagonal, beside);
}
template <>
void tridiagonalise<double>(double* matrix, int64_t side, int64_t stride, double* taus,
                            double* diagonal, double* beside) {
  const auto reduce = has_wide_vectors() ? reduce_doubles_wide : reduce_doubles;
  reduce(matrix, side, stride, taus, diagonal, beside);
}

template <typename Real>
void reflector_factor(const Real* products, const Real* taus, int64_t count, Real* factor) {
  std::fill_n(factor, count * count, Real(0));
  for (int64_t k = 0; k < count; ++k) {
    factor[k * count + k] = taus[k];
    for (int64_t i = 0; i < k; ++i) {
      Real sum = 0;
      for (int64_t j = i; j < k; ++j) sum += factor[i * count + j] * products[k * count + j];
      factor[i * count + k] = -taus[k] * sum;
    }
  }
}
template void reflector_factor<float>(const float*, const float*, int64_t, float*);
template void reflector_factor<double>(const double*, const double*, int64_t, double*);

}  // namespace cpu
}  // namespace fedkd_fast
