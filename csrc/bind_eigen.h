// Leading eigenvectors of a symmetric matrix on the CPU: our tridiagonal form and its vectors, and
// torch's products to turn them back.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bind_linalg.h"
#include "kernels.h"

namespace fedkd_fast::bind {

template <typename Real>
constexpr ScalarType kTypeOf =
    std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;

template <typename Real>
class Tridiagonal {
 public:
  // symmetric (L, L) fp32 or Real, of which the lower triangle counts.
  explicit Tridiagonal(const Tensor& symmetric)
      : symmetric_(symmetric),
        side_(symmetric.size(0)),
        stride_((side_ + cpu::kSymmetricPad - 1) / cpu::kSymmetricPad * cpu::kSymmetricPad),
        reflectors_(empty_like_device(symmetric, {side_, stride_}, kTypeOf<Real>)),
        taus_(static_cast<size_t>(side_)),
        diagonal_(taus_.size()),
        beside_(taus_.size()),
        values_(taus_.size()) {
    Real* const to = reflectors_.mutable_data_ptr<Real>();
    if (symmetric.scalar_type() == ScalarType::Float)
      fill(symmetric.const_data_ptr<float>(), to);
    else
      fill(symmetric.const_data_ptr<Real>(), to);
    cpu::tridiagonalise(to, side_, stride_, taus_.data(), diagonal_.data(), beside_.data());
    cpu::tridiagonal_values(diagonal_.data(), beside_.data(), side_, values_.data());
  }

  // Descending, none below zero.
  std::vector<double> energies() const {
    std::vector<double> found(values_);
    for (double& value : found) value = std::max(value, 0.0);
    return found;
  }

  // (count, L) fp32: eigenvectors of the largest values, as rows.
  Tensor rows(int64_t count) const {
    return std::is_same_v<Real, float> ? exact_rows(count)
                                       : torch::stable::to(exact_rows(count), ScalarType::Float);
  }

  // The same as they were found.
  Tensor exact_rows(int64_t count) const {
    if (!apart(count)) {
      const auto [values, vectors] = eigh(torch::stable::to(symmetric_, kTypeOf<Real>));
      return leading_rows<Real>(vectors, count);
    }
    Tensor rows = empty_like_device(symmetric_, {count, side_}, kTypeOf<Real>);
    cpu::tridiagonal_vectors(diagonal_.data(), beside_.data(), side_, values_.data(), count,
                             rows.mutable_data_ptr<Real>());
    for (int64_t first = 1; first < side_; first += kReflectorsAtOnce)
      turn(rows, first, std::min(first + kReflectorsAtOnce, side_));
    return rows;
  }

 private:
  static constexpr int64_t kReflectorsAtOnce = 48;
  // Of the largest value. Vectors of values that are closer than this are not orthogonal.
  static constexpr double kLeastDistance = 1e-9;

  template <typename From>
  void fill(const From* from, Real* to) const {
    for (int64_t i = 0; i < side_; ++i) {
      for (int64_t j = 0; j <= i; ++j)
        to[j * stride_ + i] = to[i * stride_ + j] = static_cast<Real>(from[i * side_ + j]);
      std::fill(to + i * stride_ + side_, to + (i + 1) * stride_, Real(0));
    }
  }

  bool apart(int64_t count) const {
    const double least = kLeastDistance * std::max(values_.front(), -values_.back());
    for (int64_t k = 0; k < std::min(count, side_ - 1); ++k) {
      const auto i = static_cast<size_t>(k);
      if (!(values_[i] - values_[i + 1] > least)) return false;
    }
    return true;
  }

  // rows ← rows·H_first⋯H_{last-1} = rows - rows·Vᵀ·T·V (Schreiber, Van Loan 1989).
  void turn(Tensor& rows, int64_t first, int64_t last) const {
    const int64_t length = last - 1, count = last - first;
    Tensor reflectors = torch::stable::narrow(const_cast<Tensor&>(reflectors_), 0, first, count);
    reflectors = torch::stable::narrow(reflectors, 1, 0, length);
    const Tensor products = mm(reflectors, mT(reflectors));
    Tensor factor = empty_like_device(symmetric_, {count, count}, kTypeOf<Real>);
    cpu::reflector_factor(products.const_data_ptr<Real>(), taus_.data() + first, count,
                          factor.mutable_data_ptr<Real>());
    const Tensor change =
        mm(mm(mm(torch::stable::narrow(rows, 1, 0, length), mT(reflectors)), factor), reflectors);
    Real* const to = rows.mutable_data_ptr<Real>();
    const Real* const from = change.const_data_ptr<Real>();
    for (int64_t k = 0; k < rows.size(0); ++k)
      for (int64_t j = 0; j < length; ++j) to[k * side_ + j] -= from[k * length + j];
  }

  Tensor symmetric_;
  int64_t side_, stride_;
  Tensor reflectors_;
  std::vector<Real> taus_;
  std::vector<double> diagonal_, beside_, values_;
};

}  // namespace fedkd_fast::bind
