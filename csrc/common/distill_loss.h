// Formulas of the mutual distillation loss, shared by the CPU and the CUDA kernels.
//
// Wu et al., Nature Communications 13:2032 (2022), eqs (1)-(4), with a per-sample denominator and
// everything but a model's own probabilities held constant. For one row with logits t (mentor) and
// s (mentee), m = max, e = exp(logit - m), Z = sum e, and the shifted log ratio
// d = (s - m_s) - (t - m_t), one pass collects Z_s, Z_t, sum e_s d and sum e_t d; then
//
//   CE       = (m - logit_label) + ln Z
//   KL(s||t) =  (sum e_s d) / Z_s - ln Z_s + ln Z_t
//   KL(t||s) = -(sum e_t d) / Z_t - ln Z_t + ln Z_s
//
// Numerics. Z is kept in two parts, `peak` (how many logits equal the maximum, so the sum of their
// ones) and `tail` (all other terms): ln Z = log1p(peak - 1 + tail) keeps its relative accuracy on
// an easy sample, where Z - 1 is far below the rounding step of 1. Everything that is then divided
// by the denominator CE_t + CE_s is accurate relative to it: the divergences, whose terms shrink
// with the tails, and the gradient, whose label element is formed from expm1(-CE).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fedkd_fast {

// Smallest denominator CE_t + CE_s of a sample: bounds the weight of a sample that both models
// have solved. The same number stands in fedkd_fast/reference.py.
constexpr double kDenominatorFloor = 1e-6;

FEDKD_HD inline float exp_of(float value) { return expf(value); }
FEDKD_HD inline double exp_of(double value) { return exp(value); }
FEDKD_HD inline float expm1_of(float value) { return expm1f(value); }
FEDKD_HD inline double expm1_of(double value) { return expm1(value); }
FEDKD_HD inline float log1p_of(float value) { return log1pf(value); }
FEDKD_HD inline double log1p_of(double value) { return log1p(value); }

// Softmax statistics of one model over a set of classes.
template <typename Real>
struct SoftmaxState {
  Real max;     // largest logit
  Real peak;    // number of logits equal to it
  Real tail;    // sum of exp(logit - max) over the others
  Real moment;  // sum of exp(logit - max) * d over all

  FEDKD_HD Real sum() const { return peak + tail; }
  FEDKD_HD Real log_sum() const { return log1p_of((peak - Real(1)) + tail); }
};

// Statistics of a row of logits, or of a part of it. `empty` is true before the first class.
template <typename Real>
struct PairState {
  SoftmaxState<Real> mentor;
  SoftmaxState<Real> mentee;
  bool empty;
};

template <typename Real>
FEDKD_HD inline PairState<Real> empty_pair() {
  return {{Real(0), Real(0), Real(0), Real(0)}, {Real(0), Real(0), Real(0), Real(0)}, true};
}

// One class is its own maximum, so its shifted log ratio is 0.
template <typename Real>
FEDKD_HD inline PairState<Real> single_class(Real mentor_logit, Real mentee_logit) {
  return {
      {mentor_logit, Real(1), Real(0), Real(0)}, {mentee_logit, Real(1), Real(0), Real(0)}, false};
}

// Both parts brought to the larger maximum; `shift` is what each part's d changes by. A NaN maximum
// takes the last branch, whose factor is then NaN.
template <typename Real>
FEDKD_HD inline SoftmaxState<Real> merge_softmax(const SoftmaxState<Real>& left, Real left_shift,
                                                 const SoftmaxState<Real>& right,
                                                 Real right_shift) {
  const Real left_moment = left.moment + left_shift * left.sum();
  const Real right_moment = right.moment + right_shift * right.sum();
  if (left.max == right.max) {
    return {left.max, left.peak + right.peak, left.tail + right.tail, left_moment + right_moment};
  }
  if (left.max > right.max) {
    const Real factor = exp_of(right.max - left.max);
    return {left.max, left.peak, left.tail + factor * right.sum(),
            left_moment + factor * right_moment};
  }
  const Real factor = exp_of(left.max - right.max);
  return {right.max, right.peak, right.tail + factor * left.sum(),
          right_moment + factor * left_moment};
}

// Statistics of the union of two disjoint sets of classes of one row.
template <typename Real>
FEDKD_HD inline PairState<Real> merge(const PairState<Real>& left, const PairState<Real>& right) {
  if (left.empty) return right;
  if (right.empty) return left;
  const Real mentor_max = left.mentor.max > right.mentor.max ? left.mentor.max : right.mentor.max;
  const Real mentee_max = left.mentee.max > right.mentee.max ? left.mentee.max : right.mentee.max;
  const Real left_shift = (left.mentee.max - mentee_max) - (left.mentor.max - mentor_max);
  const Real right_shift = (right.mentee.max - mentee_max) - (right.mentor.max - mentor_max);
  return {merge_softmax(left.mentor, left_shift, right.mentor, right_shift),
          merge_softmax(left.mentee, left_shift, right.mentee, right_shift), false};
}

template <typename Real>
struct RowLoss {
  Real ce_mentor;
  Real ce_mentee;
  Real kl_mentor;  // KL(s||t): the mentor learns from the mentee
  Real kl_mentee;  // KL(t||s)
  Real denominator;
};

// Rounding can carry a divergence below zero; a NaN must pass.
template <typename Real>
FEDKD_HD inline Real not_negative(Real value) {
  return value < Real(0) ? Real(0) : value;
}

template <typename Real>
FEDKD_HD inline RowLoss<Real> row_loss(const PairState<Real>& state, Real mentor_label_logit,
                                       Real mentee_label_logit) {
  const Real log_t = state.mentor.log_sum();
  const Real log_s = state.mentee.log_sum();
  RowLoss<Real> loss;
  loss.ce_mentor = (state.mentor.max - mentor_label_logit) + log_t;
  loss.ce_mentee = (state.mentee.max - mentee_label_logit) + log_s;
  loss.kl_mentor = not_negative((state.mentee.moment / state.mentee.sum() - log_s) + log_t);
  loss.kl_mentee = not_negative((log_s - log_t) - state.mentor.moment / state.mentor.sum());
  const Real floor = static_cast<Real>(kDenominatorFloor);
  const Real total = loss.ce_mentor + loss.ce_mentee;
  loss.denominator = total < floor ? floor : total;
  return loss;
}

// Gradient of one model's row loss: d/dt [CE_t + KL(s||t) / D] = p_t - onehot + (p_t - p_s) / D,
// as own * e_own - peer * e_peer away from the label. All of it times `scale`.
template <typename Real>
struct GradientFactors {
  Real mentor_own;
  Real mentor_peer;
  Real mentor_label;
  Real mentee_own;
  Real mentee_peer;
  Real mentee_label;
};

template <typename Real>
FEDKD_HD inline GradientFactors<Real> gradient_factors(const PairState<Real>& state,
                                                       const RowLoss<Real>& loss, Real scale) {
  const Real weight = Real(1) / loss.denominator;
  const Real inverse_t = scale / state.mentor.sum();
  const Real inverse_s = scale / state.mentee.sum();
  // p_label - 1, exact where p_label rounds to 1.
  const Real miss_t = expm1_of(-loss.ce_mentor);
  const Real miss_s = expm1_of(-loss.ce_mentee);
  GradientFactors<Real> factors;
  factors.mentor_own = inverse_t + inverse_t * weight;
  factors.mentor_peer = inverse_s * weight;
  factors.mentor_label = scale * (miss_t + (miss_t - miss_s) * weight);
  factors.mentee_own = inverse_s + inverse_s * weight;
  factors.mentee_peer = inverse_t * weight;
  factors.mentee_label = scale * (miss_s + (miss_s - miss_t) * weight);
  return factors;
}

// Row statistics lie as (5, R): ce_mentor, ce_mentee, kl_mentor, kl_mentee, denominator.
template <typename Real>
FEDKD_HD inline void store_row_loss(Real* statistics, std::int64_t rows, std::int64_t row,
                                    const RowLoss<Real>& loss) {
  statistics[row] = loss.ce_mentor;
  statistics[rows + row] = loss.ce_mentee;
  statistics[2 * rows + row] = loss.kl_mentor;
  statistics[3 * rows + row] = loss.kl_mentee;
  statistics[4 * rows + row] = loss.denominator;
}

}  // namespace fedkd_fast
