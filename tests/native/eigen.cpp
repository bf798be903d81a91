// Eigenvalues and eigenvectors of symmetric matrices, against what is known of them: the
// definition, invariants, and matrices whose values have a formula. Prints each broken promise;
// `eigen` exits with their number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using namespace fedkd_fast::cpu;
using Values = std::vector<double>;
constexpr double kPi = 3.14159265358979323846;

int broken = 0;

void expect(bool holds, const std::string& what, double figure) {
  if (holds) return;
  ++broken;
  std::printf("%s: %.3g\n", what.c_str(), figure);
}

// ---- tridiagonal matrices -----------------------------------------------------------------------

struct Tridiagonal {
  std::string name;
  Values diagonal, beside;
  Values known = {};  // eigenvalues, descending, where there is a formula

  int64_t side() const { return static_cast<int64_t>(diagonal.size()); }
  double size() const {
    double most = 0.0;
    for (const double value : diagonal) most = std::max(most, std::abs(value));
    for (const double value : beside) most = std::max(most, std::abs(value));
    return most;
  }
};

Tridiagonal laplacian(int64_t side, double scale) {
  Tridiagonal t{"laplacian " + std::to_string(side),
                Values(static_cast<size_t>(side), 2 * scale),
                Values(static_cast<size_t>(side), -scale),
                {}};
  for (int64_t k = side; k >= 1; --k)
    t.known.push_back(
        scale * (2 - 2 * std::cos(kPi * static_cast<double>(k) / static_cast<double>(side + 1))));
  return t;
}

// Pairs of values that agree to all digits: Wilkinson 1965.
Tridiagonal wilkinson(int64_t half) {
  Tridiagonal t{"wilkinson", {}, Values(static_cast<size_t>(2 * half + 1), 1.0), {}};
  for (int64_t i = -half; i <= half; ++i) t.diagonal.push_back(static_cast<double>(std::abs(i)));
  return t;
}

Tridiagonal random_entries(int64_t side, std::mt19937_64& generator) {
  std::normal_distribution<double> normal;
  Tridiagonal t{"random " + std::to_string(side), {}, {}, {}};
  for (int64_t i = 0; i < side; ++i) {
    // Some entries beside the diagonal are tiny, and some are nothing.
    t.diagonal.push_back(normal(generator));
    const double entry = normal(generator);
    t.beside.push_back(i % 7 == 3 ? 0.0 : i % 7 == 5 ? 1e-9 * entry : entry);
  }
  return t;
}

void check_values(const Tridiagonal& t) {
  const int64_t side = t.side();
  Values values(static_cast<size_t>(side));
  tridiagonal_values(t.diagonal.data(), t.beside.data(), side, values.data());
  const double allowed = 1e-14 * static_cast<double>(side) * t.size();
  expect(std::is_sorted(values.begin(), values.end(), std::greater<double>()),
         t.name + ": values descend", 0.0);
  double trace = 0.0, squares = 0.0;
  for (size_t i = 0; i < values.size(); ++i) {
    trace += values[i] - t.diagonal[i];
    squares += values[i] * values[i] - t.diagonal[i] * t.diagonal[i];
    if (i + 1 < values.size()) squares -= 2 * t.beside[i] * t.beside[i];
  }
  expect(std::abs(trace) <= allowed, t.name + ": trace", trace);
  expect(std::abs(squares) <= 4 * allowed * t.size(), t.name + ": squares", squares);
  for (size_t i = 0; i < t.known.size(); ++i)
    expect(std::abs(values[i] - t.known[i]) <= 4e-15 * t.size(), t.name + ": a known value",
           values[i] - t.known[i]);
}

void check_vectors(const Tridiagonal& t) {
  const int64_t side = t.side();
  const auto count = static_cast<size_t>(side);
  Values values(count), rows(count * count);
  tridiagonal_values(t.diagonal.data(), t.beside.data(), side, values.data());
  tridiagonal_vectors(t.diagonal.data(), t.beside.data(), side, values.data(), side, rows.data());
  for (size_t k = 0; k < count; ++k) {
    const double* const z = rows.data() + k * count;
    double norm = 0.0, rest = 0.0;
    for (size_t i = 0; i < count; ++i) {
      double image = (t.diagonal[i] - values[k]) * z[i];
      if (i > 0) image += t.beside[i - 1] * z[i - 1];
      if (i + 1 < count) image += t.beside[i] * z[i + 1];
      rest += image * image;
      norm += z[i] * z[i];
    }
    expect(std::abs(norm - 1) <= 1e-12, t.name + ": length", norm);
    expect(std::sqrt(rest) <= 1e-13 * t.size(), t.name + ": residual", std::sqrt(rest));
    for (size_t other = 0; other < k; ++other) {
      const double distance = values[other] - values[k];
      double product = 0.0;
      for (size_t i = 0; i < count; ++i) product += z[i] * rows[other * count + i];
      expect(std::abs(product) * distance <= 1e-14 * t.size(), t.name + ": angle", product);
    }
  }
}

// ---- full matrices ------------------------------------------------------------------------------

// A·Q = Q·T, with Q from the reflections in blocks as whoever wants vectors applies them.
template <typename Real>
void check_reduction(int64_t side, std::mt19937_64& generator) {
  const std::string name = "reduction " + std::to_string(side);
  const int64_t stride = (side + kSymmetricPad - 1) / kSymmetricPad * kSymmetricPad;
  const auto n = static_cast<size_t>(side), padded = static_cast<size_t>(stride);
  std::normal_distribution<double> normal;
  std::vector<Real> matrix(n * padded, Real(0));
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j <= i; ++j)
      matrix[i * padded + j] = matrix[j * padded + i] = static_cast<Real>(normal(generator));
  const std::vector<Real> before = matrix;
  std::vector<Real> taus(n);
  Values diagonal(n), beside(n);
  tridiagonalise(matrix.data(), side, stride, taus.data(), diagonal.data(), beside.data());

  // rows of Qᵀ: those of I times H_1⋯H_{side-1}.
  Values q(n * n, 0.0);
  for (size_t i = 0; i < n; ++i) q[i * n + i] = 1.0;
  constexpr size_t kBlock = 5;
  for (size_t first = 0; first < n; first += kBlock) {
    const size_t count = std::min(kBlock, n - first);
    const Real* const v = matrix.data() + first * padded;
    std::vector<Real> products(count * count), factor(count * count);
    for (size_t a = 0; a < count; ++a)
      for (size_t b = 0; b < count; ++b)
        for (size_t j = 0; j < n; ++j)
          products[a * count + b] += v[a * padded + j] * v[b * padded + j];
    reflector_factor(products.data(), taus.data() + first, static_cast<int64_t>(count),
                     factor.data());
    for (size_t i = 0; i < n; ++i) {
      Values along(count), turned(count);
      for (size_t a = 0; a < count; ++a)
        for (size_t j = 0; j < n; ++j)
          along[a] += q[i * n + j] * static_cast<double>(v[a * padded + j]);
      for (size_t a = 0; a < count; ++a)
        for (size_t b = 0; b < count; ++b)
          turned[b] += along[a] * static_cast<double>(factor[a * count + b]);
      for (size_t b = 0; b < count; ++b)
        for (size_t j = 0; j < n; ++j)
          q[i * n + j] -= turned[b] * static_cast<double>(v[b * padded + j]);
    }
  }
  const double eps = static_cast<double>(std::numeric_limits<Real>::epsilon());
  const double allowed = 8 * eps * std::sqrt(static_cast<double>(side));
  double skew = 0.0, rest = 0.0;
  for (size_t i = 0; i < n; ++i) {
    Values image(n);  // of row i of Qᵀ
    for (size_t a = 0; a < n; ++a)
      for (size_t j = 0; j < n; ++j)
        image[j] += q[i * n + a] * static_cast<double>(before[a * padded + j]);
    for (size_t k = 0; k < n; ++k) {
      double entry = 0.0, product = 0.0;
      for (size_t j = 0; j < n; ++j) {
        entry += image[j] * q[k * n + j];
        product += q[i * n + j] * q[k * n + j];
      }
      const double wanted = i == k                                 ? diagonal[i]
                            : std::max(i, k) - std::min(i, k) == 1 ? beside[std::min(i, k)]
                                                                   : 0.0;
      rest = std::max(rest, std::abs(entry - wanted));
      skew = std::max(skew, std::abs(product - (i == k ? 1.0 : 0.0)));
    }
  }
  expect(skew <= allowed, name + ": skew", skew);
  expect(rest <= 2 * allowed * std::sqrt(static_cast<double>(side)), name + ": rest", rest);
}

}  // namespace

int main() {
  std::mt19937_64 generator(7);
  for (const int64_t side : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 129}) {
    check_reduction<float>(side, generator);
    check_reduction<double>(side, generator);
    const Tridiagonal random = random_entries(side, generator);
    check_values(random);
    check_vectors(random);
    for (const double scale : {1.0, 1e-30, 1e30}) {
      const Tridiagonal t = laplacian(side, scale);
      check_values(t);
      check_vectors(t);
    }
  }
  check_values(wilkinson(10));
  check_vectors(wilkinson(10));
  const Values equal(40, 3.0), nothing(40, 0.0);
  check_values({"identity", equal, nothing, equal});
  check_values({"zero", nothing, nothing, nothing});
  Values mixed(50);
  for (size_t i = 0; i < mixed.size(); ++i) mixed[i] = std::sin(static_cast<double>(i));
  Values sorted = mixed;
  std::sort(sorted.begin(), sorted.end(), std::greater<double>());
  check_values({"diagonal", mixed, Values(50, 0.0), sorted});
  // One huge value beside small ones, which are known to eps of the huge one.
  check_values({"one huge", {1e8, 1, 2, 3}, {1e-3, 0.5, 0.25, 0}});
  // A row whose squares are beyond the range: it must not spoil the others.
  for (const double tiny : {1e-150, 1e-156, 1e-160, 1e-162, 1e-300}) {
    constexpr int64_t kSide = 4, kStride = kSymmetricPad;
    std::vector<double> matrix(kSide * kStride, 0.0), taus(kSide), diagonal(kSide), beside(kSide);
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j)
        matrix[static_cast<size_t>(i * kStride + j)] = i == 3 || j == 3
                                                           ? tiny * static_cast<double>(i + j)
                                                           : 1.0 / static_cast<double>(i + j + 1);
    double squares = 0.0, left = 0.0;
    for (const double value : matrix) squares += value * value;
    tridiagonalise(matrix.data(), kSide, kStride, taus.data(), diagonal.data(), beside.data());
    for (size_t i = 0; i < kSide; ++i)
      left += diagonal[i] * diagonal[i] + (i + 1 < kSide ? 2 * beside[i] * beside[i] : 0.0);
    expect(std::abs(left - squares) <= 1e-14, "a tiny row", left - squares);
  }
  // No answer, but an end, and it says so.
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Values diagonal(40, 1.0), values(40), rows(40);
    diagonal[20] = bad;
    tridiagonal_values(diagonal.data(), nothing.data(), 40, values.data());
    expect(!std::isfinite(values[0]), "not finite", values[0]);
    tridiagonal_vectors(diagonal.data(), nothing.data(), 40, values.data(), 1, rows.data());
  }
  std::printf("%d broken promises\n", broken);
  return broken != 0;
}
