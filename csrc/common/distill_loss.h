// Formulas of the mutual distillation loss, shared by the CPU and the CUDA kernels.
//
// Wu et al., Nature Communications 13:2032 (2022), eqs (1)-(4). For one row with logits t (mentor)
// and s (mentee), m = max, e = exp(logit - m), Z = sum e, and the shifted log ratio
// d = (s - m_s) - (t - m_t), one pass collects Z_s, Z_t, sum e_s d and sum e_t d; then
//
//   CE       = (m - logit_label) + ln Z
//   KL(s||t) =  (sum e_s d) / Z_s - ln Z_s + ln Z_t
//   KL(t||s) = -(sum e_t d) / Z_t - ln Z_t + ln Z_s
//
// where KL is taken of logits divided by the temperature. With p and q the probabilities at
// temperature 1 and those of KL, r = ln q_s - ln q_t, and onehot the smoothed label, the gradient
// is
//
//   g_t = a_t (p_t - onehot) + b (q_t - q_s) - f q_t (r + KL(t||s))
//   g_s = a_s (p_s - onehot) + b (q_s - q_t) + f q_s (r - KL(s||t))
//
// with b = w · divergence / (temperature · D), f = b where gradients flow into the targets and 0
// elsewhere, and a = w · (task - N / D² + dL/dD) with N = 0 for a constant D, the model's own
// divergence for separate losses, and the sum of both for a joint one.
//
// Numerics. Z is kept in two parts, `peak` (how many logits equal the maximum, so the sum of their
// ones) and `tail` (all other terms): ln Z = log1p(peak - 1 + tail) keeps its relative accuracy on
// an easy sample, where Z - 1 is far below the rounding step of 1. Everything that is then divided
// by the denominator CE_t + CE_s is accurate relative to it: the divergences, whose terms shrink
// with the tails, and the gradient, whose label element is formed from p_label - 1 without
// cancellation.
//
// Real is double, float, or a vector of floats, one row a lane, on which ?: chooses by lane; so
// there is no `if` here, and exponentials and logarithms come from the kernels.
#pragma once

#include "common/macros.h"

namespace fedkd_fast {

// Smallest denominator CE_t + CE_s: bounds the weight of what both models have solved. The same
// number stands in fedkd_fast/reference.py.
constexpr double kDenominatorFloor = 1e-6;

// What a divergence is divided by: CE_t + CE_s of its row, their mean over all rows, or 1.
enum class Denominator : int { kSample = 0, kBatch = 1, kConstant = 2 };

struct DistillMode {
  Denominator denominator;
  bool attached;       // gradients flow through D; not where that is 1
  bool joint;          // each model learns from both losses
  bool into_targets;   // gradients flow into the targets of KL; joint losses only
  double task;         // what a cross entropy is multiplied by
  double divergence;   // what a divergence is multiplied by
  double temperature;  // of KL
  double smoothing;    // share of the label that is spread over all classes

  FEDKD_FORMULA bool plain() const { return temperature == 1.0 && !into_targets; }
  FEDKD_FORMULA bool batch() const { return denominator == Denominator::kBatch; }
  FEDKD_FORMULA bool constant() const { return denominator == Denominator::kConstant; }
};

// Weighted means over the rows that count, in fp64 and in a fixed order; 0 where none does.
struct DistillMeans {
  double task[2];        // task·CE of mentor and mentee
  double divergence[2];  // divergence·KL(s||t) / D and divergence·KL(t||s) / D
  double denominator;    // CE_t + CE_s, which may lie below the floor
  double denominator_grad;
  double numerator[2];    // divergence·KL(s||t) and divergence·KL(t||s)
  double inverse_weight;  // 1 / the sum of weights
};

// What the caller is told beside the total: both losses, both tasks, both divergences, each mentor
// first, and what gradients still have to be multiplied by.
constexpr int kDistillSummary = 7;

template <typename Real>
FEDKD_FORMULA void store_summary(const DistillMeans& means, double pending_scale, Real* total,
                                 Real* summary) {
  const double mentor = means.task[0] + means.divergence[0];
  const double mentee = means.task[1] + means.divergence[1];
  *total = static_cast<Real>(mentor + mentee);
  summary[0] = static_cast<Real>(mentor);
  summary[1] = static_cast<Real>(mentee);
  summary[2] = static_cast<Real>(means.task[0]);
  summary[3] = static_cast<Real>(means.task[1]);
  summary[4] = static_cast<Real>(means.divergence[0]);
  summary[5] = static_cast<Real>(means.divergence[1]);
  summary[6] = static_cast<Real>(pending_scale);
}

// Softmax statistics of one row of one model at one temperature.
template <typename Real>
struct Softmax {
  Real max;     // largest logit
  Real peak;    // number of logits equal to it
  Real tail;    // sum of exp(logit - max) over the others
  Real moment;  // sum of exp(logit - max) · d over all
  Real slack;   // sum of max - logit over all; for label smoothing
  // When all classes are in:
  Real log_sum;     // log1p(beyond())
  Real label_step;  // max - logit of the label
  Real label_exp;   // exp(-label_step)

  FEDKD_FORMULA Real beyond() const { return (peak - 1.0f) + tail; }
  FEDKD_FORMULA Real sum() const { return peak + tail; }
  FEDKD_FORMULA Real surprise() const { return label_step + log_sum; }  // -ln p_label
  // p_label - 1: a label that is not at the maximum has at most a half.
  FEDKD_FORMULA Real miss() const {
    return label_step == Real{} ? -(beyond() / sum()) : label_exp / sum() - 1.0f;
  }
};
constexpr int kSoftmaxFields = 8;

// Both models, at temperature 1 and at that of KL; the same where that is 1.
template <typename Real>
struct RowState {
  Softmax<Real> mentor, mentee;
  Softmax<Real> soft_mentor, soft_mentee;
};
constexpr int kRowStates = 4 * kSoftmaxFields;

template <typename State, typename Visit>
FEDKD_FORMULA void visit_softmax(State& model, int first, const Visit& visit) {
  visit(first, model.max);
  visit(first + 1, model.peak);
  visit(first + 2, model.tail);
  visit(first + 3, model.moment);
  visit(first + 4, model.slack);
  visit(first + 5, model.log_sum);
  visit(first + 6, model.label_step);
  visit(first + 7, model.label_exp);
}

// Every value of a state with its number.
template <typename State, typename Visit>
FEDKD_FORMULA void visit_states(State& state, const Visit& visit) {
  visit_softmax(state.mentor, 0, visit);
  visit_softmax(state.mentee, kSoftmaxFields, visit);
  visit_softmax(state.soft_mentor, 2 * kSoftmaxFields, visit);
  visit_softmax(state.soft_mentee, 3 * kSoftmaxFields, visit);
}

template <typename Real>
struct RowLoss {
  Real ce_mentor;
  Real ce_mentee;
  Real kl_mentor;  // KL(s||t): the mentor learns from the mentee
  Real kl_mentee;  // KL(t||s)
  Real total;      // CE_t + CE_s, or 1 where that is D
};

// Rounding can carry a divergence below zero; a NaN must pass.
template <typename Real>
FEDKD_FORMULA Real not_negative(Real value) {
  return value < Real{} ? Real{} : value;
}

// The constants of a mode in the arithmetic type; vectors take them as scalars.
template <typename Scalar>
struct ModeOf {
  FEDKD_FORMULA ModeOf(const DistillMode& mode, double classes)
      : attached(mode.attached ? Scalar(1) : Scalar(0)),
        joint(mode.joint ? Scalar(1) : Scalar(0)),
        into_targets(mode.into_targets ? Scalar(1) : Scalar(0)),
        soft(mode.temperature != 1.0),
        smooth(mode.smoothing != 0.0),
        constant(mode.constant()),
        task(static_cast<Scalar>(mode.task)),
        divergence(static_cast<Scalar>(mode.divergence)),
        inverse_temperature(static_cast<Scalar>(1.0 / mode.temperature)),
        smoothing(static_cast<Scalar>(mode.smoothing)),
        spread(static_cast<Scalar>(mode.smoothing / classes)),
        floor(static_cast<Scalar>(kDenominatorFloor)) {}
  Scalar attached, joint, into_targets;  // 1 or 0
  bool soft, smooth, constant;
  Scalar task, divergence, inverse_temperature, smoothing, spread, floor;
};

template <typename Real, typename Scalar>
FEDKD_FORMULA Real cross_entropy(const Softmax<Real>& state, const ModeOf<Scalar>& mode) {
  if (!mode.smooth) return state.surprise();
  return state.log_sum +
         (state.label_step * (Scalar(1) - mode.smoothing) + state.slack * mode.spread);
}

template <typename Real, typename Scalar>
FEDKD_FORMULA RowLoss<Real> row_loss(const RowState<Real>& state, const ModeOf<Scalar>& mode) {
  const Softmax<Real>& t = state.soft_mentor;
  const Softmax<Real>& s = state.soft_mentee;
  RowLoss<Real> loss;
  loss.ce_mentor = cross_entropy(state.mentor, mode);
  loss.ce_mentee = cross_entropy(state.mentee, mode);
  loss.kl_mentor = not_negative((s.moment / s.sum() - s.log_sum) + t.log_sum);
  loss.kl_mentee = not_negative((s.log_sum - t.log_sum) - t.moment / t.sum());
  loss.total = mode.constant ? Real{} + 1.0f : loss.ce_mentor + loss.ce_mentee;
  return loss;
}

template <typename Real>
FEDKD_FORMULA Real at_least(Real total, Real floor) {
  return total < floor ? floor : total;
}

// The a and b of the gradient.
template <typename Real>
struct Pull {
  Real mentor;
  Real mentee;
  Real divergence;
};

// total: that of the row, or the mean of it; numerators likewise: divergence · KL.
template <typename Real, typename Scalar>
FEDKD_FORMULA Pull<Real> row_pull(Real total, Real numerator_mentor, Real numerator_mentee,
                                  Real weight, Real denominator_grad, const ModeOf<Scalar>& mode) {
  const Real floor = Real{} + mode.floor;
  const Real inverse = 1.0f / at_least(total, floor);
  const Real slope = inverse * inverse * mode.attached;
  const Real mentor = denominator_grad - slope * (numerator_mentor + numerator_mentee * mode.joint);
  const Real mentee = denominator_grad - slope * (numerator_mentee + numerator_mentor * mode.joint);
  // The floor does not move.
  return {weight * ((total < floor ? Real{} : mentor) + mode.task),
          weight * ((total < floor ? Real{} : mentee) + mode.task),
          weight * (inverse * (mode.divergence * mode.inverse_temperature))};
}

// Gradient of class j, with shifted logits x and exponentials e, and those at the temperature of
// KL: task·e_own + (own + flow·(x_own - x_peer))·e_own - peer·e_peer - spread; of the label:
// `label`. Where the temperature is 1, `own` holds what `task` would.
template <typename Real>
struct ModelGradient {
  Real task, own, flow, peer, spread, label;
};

// divergence_from_peer: KL(own || peer).
template <typename Real, typename Scalar>
FEDKD_FORMULA ModelGradient<Real> model_gradient(const Softmax<Real>& task,
                                                 const Softmax<Real>& own,
                                                 const Softmax<Real>& peer, Real pull,
                                                 Real divergence, Real divergence_from_peer,
                                                 const ModeOf<Scalar>& mode) {
  const Real inverse = 1.0f / own.sum();
  const Real flow = divergence * mode.into_targets;
  ModelGradient<Real> gradient;
  gradient.task = mode.soft ? pull / task.sum() : Real{};
  gradient.own = inverse * ((mode.soft ? divergence : divergence + pull) +
                            flow * ((peer.log_sum - own.log_sum) - divergence_from_peer));
  gradient.flow = inverse * flow;
  gradient.peer = divergence / peer.sum();
  gradient.spread = pull * mode.spread;
  const Real miss = own.miss();
  gradient.label =
      pull * (task.miss() + (mode.smoothing - mode.spread)) + divergence * (miss - peer.miss()) +
      flow * ((miss + 1.0f) * ((peer.surprise() - own.surprise()) - divergence_from_peer));
  return gradient;
}

template <typename Real>
struct RowGradient {
  ModelGradient<Real> mentor, mentee;
};

template <typename Real, typename Scalar>
FEDKD_FORMULA RowGradient<Real> row_gradient(const RowState<Real>& state, const Pull<Real>& pull,
                                             const RowLoss<Real>& loss,
                                             const ModeOf<Scalar>& mode) {
  return {model_gradient(state.mentor, state.soft_mentor, state.soft_mentee, pull.mentor,
                         pull.divergence, loss.kl_mentee, mode),
          model_gradient(state.mentee, state.soft_mentee, state.soft_mentor, pull.mentee,
                         pull.divergence, loss.kl_mentor, mode)};
}

}  // namespace fedkd_fast
