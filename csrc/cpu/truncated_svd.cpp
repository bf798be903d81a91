// The parts of truncated_svd that are not a GEMM or an eigenproblem: scan, orient, choose the rank,
// finish the factors. The binding strings them together with torch's matmul and eigh:
//
//   X = A or Aᵀ, tall, scaled by a power of two, in fp64     G = XᵀX = V Λ Vᵀ     U Σ = X V
//
// and, from the short-side vectors B of an earlier matrix, by subspace iteration (Halko,
// Martinsson, Tropp 2011): B ← orth(XᵀX·B) twice, then (XB)ᵀ(XB) takes the place of G.
//
// With fp32 input the products in G are exact to fp64, so energies are true to about 1e-14 and the
// rank is the optimum of eq (8). Both passes over A cost 8 bytes an element; G costs M·N² and eigh
// about 9·N³ operations, which dominate.

#include <cmath>
#include <limits>

#include "common/truncated_svd.h"
#include "kernels.h"

namespace fedkd_fast {

namespace cpu {

template <typename Scalar>
MatrixScan scan_matrix(const MatrixView& matrix) {
  const auto* data = static_cast<const Scalar*>(matrix.data);
  Scalar largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < matrix.rows; ++i) {
    const Scalar* row = data + i * matrix.row_stride;
    for (int64_t j = 0; j < matrix.cols; ++j) {
      const Scalar magnitude = std::abs(row[j * matrix.col_stride]);
      largest = magnitude > largest ? magnitude : largest;
      finite &= magnitude <= std::numeric_limits<Scalar>::max();  // false for NaN and Inf
    }
  }
  const bool zero = finite && largest == 0;
  return {finite, finite && !zero ? std::ilogb(largest) : 0, zero};
}

template <typename Scalar>
void orient_matrix(const MatrixView& matrix, int exponent, double* out) {
  const auto* data = static_cast<const Scalar*>(matrix.data);
  const bool transposed = matrix.rows < matrix.cols;
  const int64_t long_side = transposed ? matrix.cols : matrix.rows;
  const int64_t short_side = transposed ? matrix.rows : matrix.cols;
  const int64_t long_stride = transposed ? matrix.col_stride : matrix.row_stride;
  const int64_t short_stride = transposed ? matrix.row_stride : matrix.col_stride;
  const ScaleDown scaled(exponent);
  for (int64_t i = 0; i < long_side; ++i)
    for (int64_t j = 0; j < short_side; ++j)
      out[i * short_side + j] =
          scaled(static_cast<double>(data[i * long_stride + j * short_stride]));
}

double squared_norm(const double* values, int64_t count) {
  double squares = 0.0;
  for (int64_t i = 0; i < count; ++i) squares += values[i] * values[i];
  return squares;
}

int64_t basis_width(const float* basis, int64_t rows, int64_t length) {
  for (int64_t k = 0; k < rows; ++k) {
    double squares = 0.0;
    for (int64_t i = 0; i < length; ++i) {
      const auto value = static_cast<double>(basis[k * length + i]);
      squares += value * value;
    }
    if (!(squares > 0.0 && std::isfinite(squares))) return k;
  }
  return rows;
}

void extend_basis(const float* basis, int64_t known, int64_t wanted, int64_t length, double* out) {
  for (int64_t i = 0; i < known * length; ++i) out[i] = static_cast<double>(basis[i]);
  // splitmix64 (Steele, Lea, Flood 2014) of the position: directions that no spectrum is aligned
  // to.
  for (int64_t i = known * length; i < wanted * length; ++i) {
    uint64_t bits = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    out[i] = static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63;
  }
}

template <typename Scalar>
void finish_factors(const VectorsView& long_vectors, const VectorsView& short_vectors,
                    const double* singular, int64_t rank, int exponent, bool transposed,
                    Scalar* left, Scalar* sigma, Scalar* right) {
  Scalar* const long_out = transposed ? right : left;
  Scalar* const short_out = transposed ? left : right;
  const VectorsView& left_vectors = transposed ? short_vectors : long_vectors;
  for (int64_t k = 0; k < rank; ++k) {
    double norm = 1.0;
    if (singular == nullptr) {
      double squares = 0.0;
      for (int64_t i = 0; i < long_vectors.length; ++i)
        squares += long_vectors.at(i, k) * long_vectors.at(i, k);
      norm = std::sqrt(squares);
    }
    sigma[k] = static_cast<Scalar>(std::ldexp(singular == nullptr ? norm : singular[k], exponent));

    double peak = 0.0;
    for (int64_t i = 0; i < left_vectors.length; ++i)
      if (std::abs(left_vectors.at(i, k)) > std::abs(peak)) peak = left_vectors.at(i, k);
    const double sign = peak < 0.0 ? -1.0 : 1.0;
    for (int64_t i = 0; i < long_vectors.length; ++i)
      long_out[k * long_vectors.length + i] =
          static_cast<Scalar>(long_vectors.at(i, k) * (sign / norm));
    for (int64_t i = 0; i < short_vectors.length; ++i)
      short_out[k * short_vectors.length + i] = static_cast<Scalar>(short_vectors.at(i, k) * sign);
  }
}

template MatrixScan scan_matrix<float>(const MatrixView&);
template MatrixScan scan_matrix<double>(const MatrixView&);
template void orient_matrix<float>(const MatrixView&, int, double*);
template void orient_matrix<double>(const MatrixView&, int, double*);
template void finish_factors<float>(const VectorsView&, const VectorsView&, const double*, int64_t,
                                    int, bool, float*, float*, float*);
template void finish_factors<double>(const VectorsView&, const VectorsView&, const double*, int64_t,
                                     int, bool, double*, double*, double*);

}  // namespace cpu
}  // namespace fedkd_fast
