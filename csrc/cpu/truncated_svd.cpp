// The parts of truncated_svd that are not a GEMM or a factorisation: what is read, rounded, drawn,
// predicted, scaled and moved. bind_truncated_svd_cpu.cpp strings them together and says why.
//
// Each is one pass over its operands, in loops that vectorise; sums of many squares run in fp64 in
// sixteen partial sums, whose order is fixed.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/half.h"
#include "common/truncated_svd.h"
#include "kernels.h"

namespace fedkd_fast {

namespace cpu {
namespace {

constexpr int kLanes = 16;
constexpr uint32_t kNotFinite = 0x7f800000u;  // the least magnitude of NaN and Inf

double sum_lanes(const double* parts) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += parts[lane];
  return total;
}

// The magnitude bits of IEEE numbers order like integers: NaN and Inf are the largest.
FEDKD_CLONES
uint32_t scan_row(const float* row, int64_t cols, double* parts) {
  uint32_t most[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = row[j + lane];
      const uint32_t magnitude = bits_from_float(value) & 0x7fffffffu;
      most[lane] = most[lane] > magnitude ? most[lane] : magnitude;
      parts[lane] += static_cast<double>(value) * static_cast<double>(value);
    }
  for (int lane = 0; j < cols; ++j, ++lane) {
    most[lane] = std::max(most[lane], bits_from_float(row[j]) & 0x7fffffffu);
    parts[lane] += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  }
  return *std::max_element(most, most + kLanes);
}

// To the nearest: adding 1.5 · 2^23 leaves the integer in the low bits.
inline int8_t nearest_level(float value) {
  constexpr float kMagic = 12582912.0f;
  return static_cast<int8_t>(static_cast<int32_t>(bits_from_float(value + kMagic)) - 0x4b400000);
}

FEDKD_CLONES
void quantise_row(const float* row, const float* factors, float step, int64_t count,
                  int8_t* levels) {
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  if (factors == nullptr) {
    for (int64_t j = 0; j < count; ++j) levels[j] = nearest_level(row[j] * inverse);
    return;
  }
  for (int64_t j = 0; j < count; ++j) levels[j] = nearest_level(row[j] * factors[j] * inverse);
}

}  // namespace

MatrixScan scan_matrix(const float* matrix, int64_t rows, int64_t cols, float* largest,
                       int8_t* levels) {
  uint32_t most = 0;
  double parts[kLanes] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t magnitude = scan_row(matrix + i * cols, cols, parts);
    largest[i] = float_from_bits(magnitude);
    // While the row is in the cache.
    if (levels && magnitude > 0 && magnitude < kNotFinite)
      quantise_row(matrix + i * cols, nullptr, level_step(largest[i]), cols, levels + i * cols);
    most = std::max(most, magnitude);
  }
  const bool finite = most < kNotFinite;
  const int exponent = finite && most ? std::ilogb(float_from_bits(most)) : 0;
  return {finite, most == 0, exponent, sum_lanes(parts)};
}

MatrixScan scan_matrix(const double* matrix, int64_t rows, int64_t cols, double* largest) {
  double peak = 0.0;
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {
    double most = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
      const double magnitude = std::abs(matrix[i * cols + j]);
      most = magnitude > most ? magnitude : most;
      finite &= magnitude <= std::numeric_limits<double>::max();  // false for NaN and Inf
    }
    largest[i] = most;
    peak = std::max(peak, most);
  }
  const bool zero = finite && peak == 0.0;
  return {finite, zero, finite && !zero ? std::ilogb(peak) : 0, 0.0};
}

namespace {

FEDKD_CLONES
void scale_row(const float* in, int64_t count, double scale, float* out) {
  for (int64_t j = 0; j < count; ++j)
    out[j] = static_cast<float>(static_cast<double>(in[j]) * scale);
}

FEDKD_CLONES
double sum_squares(const float* values, int64_t count) {
  double parts[kLanes] = {};
  scan_row(values, count, parts);
  return sum_lanes(parts);
}

FEDKD_CLONES
float largest_magnitude(const float* values, int64_t count) {
  float most[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float magnitude = std::abs(values[i + lane]);
      most[lane] = most[lane] > magnitude ? most[lane] : magnitude;
    }
  for (; i < count; ++i) most[0] = std::max(most[0], std::abs(values[i]));
  return *std::max_element(most, most + kLanes);
}

FEDKD_CLONES
float largest_product(const float* row, const float* factors, int64_t count) {
  if (factors == nullptr) return largest_magnitude(row, count);
  float most[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float magnitude = std::abs(row[j + lane] * factors[j + lane]);
      most[lane] = most[lane] > magnitude ? most[lane] : magnitude;
    }
  for (; j < count; ++j) most[0] = std::max(most[0], std::abs(row[j] * factors[j]));
  return *std::max_element(most, most + kLanes);
}

FEDKD_CLONES
void dequantise_row(const int32_t* sums, float step, const float* factors, int64_t count,
                    float* out) {
  if (factors == nullptr) {
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<float>(sums[j]) * step;
    return;
  }
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<float>(sums[j]) * step * factors[j];
}

FEDKD_CLONES
void scale_in_place(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

}  // namespace

void gather_rows(const float* matrix, int64_t cols, const int64_t* ids, int64_t count, int exponent,
                 float* out) {
  const double scale = std::ldexp(1.0, -exponent);
  for (int64_t i = 0; i < count; ++i)
    scale_row(matrix + (ids ? ids[i] : i) * cols, cols, scale, out + i * cols);
}

template <typename Scalar>
void widen_matrix(const Scalar* matrix, int64_t count, int exponent, double* out) {
  const ScaleDown scaled(exponent);
  for (int64_t i = 0; i < count; ++i) out[i] = scaled(static_cast<double>(matrix[i]));
}

double squared_norm(const float* values, int64_t count) { return sum_squares(values, count); }

double squared_norm(const double* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += values[i] * values[i];
  return total;
}

void quantise_rows(const float* rows, int64_t count, int64_t length, const float* factors,
                   const float* largest, int8_t* levels, float* steps) {
  for (int64_t k = 0; k < count; ++k) {
    const float* row = rows + k * length;
    steps[k] = level_step(largest ? largest[k] : largest_product(row, factors, length));
    quantise_row(row, factors, steps[k], length, levels + k * length);
  }
}

void requantise_rows(const int32_t* sums, int64_t count, int64_t length, const float* factors,
                     int8_t* levels, float* steps) {
  std::vector<float> row(static_cast<size_t>(length));
  for (int64_t k = 0; k < count; ++k) {
    dequantise_row(sums + k * length, steps[k], factors, length, row.data());
    quantise_rows(row.data(), 1, length, nullptr, nullptr, levels + k * length, steps + k);
  }
}

void dequantise_rows(const int32_t* sums, int64_t count, int64_t length, const float* steps,
                     const float* factors, const float* basis, float shift, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    dequantise_row(sums + k * length, steps[k], factors, length, out + k * length);
    if (basis) subtract_scaled(out + k * length, basis + k * length, shift, length);
  }
}

FEDKD_CLONES
void random_signs(uint64_t seed, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = random_sign(seed, i);
}

int64_t predict_rank(const double* energies, int64_t known, int64_t side, double total,
                     double energy) {
  double captured = 0.0;
  for (int64_t k = 0; k < known; ++k) {
    captured += energies[k];
    if (captured > energy * total) return k + 1;
  }
  const int64_t few = std::min<int64_t>(known, 4);
  double level = 0.0;
  for (int64_t k = known - few; k < known; ++k) level += energies[k] / static_cast<double>(few);
  const double rest = total - captured, start = std::sqrt(static_cast<double>(known));
  if (!(level > 0.0 && rest > 0.0)) return side;
  // The integral of level · exp(-b (√k - start)) from `known` to `end`.
  const auto integral = [&](double b, int64_t end) {
    const double root = std::sqrt(static_cast<double>(end));
    if (b < 1e-9) return level * static_cast<double>(end - known);
    return level * 2.0 / (b * b) *
           ((b * start + 1) - (b * root + 1) * std::exp(-b * (root - start)));
  };
  double slow = 0.0, fast = 64.0;
  for (int step = 0; step < 40; ++step) {
    const double middle = 0.5 * (slow + fast);
    (integral(middle, side) > rest ? slow : fast) = middle;
  }
  const double wanted = (energy * total - captured) * integral(slow, side) / rest;
  int64_t low = known, high = side;
  while (low + 1 < high) {
    const int64_t middle = low + (high - low) / 2;
    (integral(slow, middle) > wanted ? high : low) = middle;
  }
  return high;
}

void normalise_rows(float* rows, int64_t count, int64_t length, double* norms) {
  for (int64_t k = 0; k < count; ++k) {
    norms[k] = std::sqrt(sum_squares(rows + k * length, length));
    if (norms[k] > 0.0)
      scale_in_place(rows + k * length, length, static_cast<float>(1.0 / norms[k]));
  }
}

void permute_rows(const float* rows, int64_t length, const int64_t* order, int64_t count,
                  float* out) {
  for (int64_t k = 0; k < count; ++k)
    std::copy_n(rows + order[k] * length, length, out + k * length);
}

FEDKD_CLONES
void subtract_scaled(float* a, const float* b, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] -= factor * b[i];
}

void fix_signs(float* left, int64_t left_length, float* right, int64_t right_length, int64_t rank) {
  for (int64_t k = 0; k < rank; ++k) {
    float* const row = left + k * left_length;
    const float most = largest_magnitude(row, left_length);
    int64_t peak = 0;
    while (std::abs(row[peak]) < most) ++peak;
    if (row[peak] < 0.0f) {
      scale_in_place(row, left_length, -1.0f);
      scale_in_place(right + k * right_length, right_length, -1.0f);
    }
  }
}

void scatter_columns(const float* rows, int64_t count, const int64_t* ids, int64_t length,
                     int64_t height, float* out) {
  std::fill_n(out, count * height, 0.0f);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < length; ++i) out[k * height + ids[i]] = rows[k * length + i];
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

template void widen_matrix<float>(const float*, int64_t, int, double*);
template void widen_matrix<double>(const double*, int64_t, int, double*);
template void finish_factors<float>(const VectorsView&, const VectorsView&, const double*, int64_t,
                                    int, bool, float*, float*, float*);
template void finish_factors<double>(const VectorsView&, const VectorsView&, const double*, int64_t,
                                     int, bool, double*, double*, double*);

}  // namespace cpu
}  // namespace fedkd_fast
