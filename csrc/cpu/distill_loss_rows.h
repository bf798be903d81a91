// What the CPU kernels of distill_loss share: a row with its types, which rows count, statistics
// and states in memory, and where gradients are written.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/half_vectors.h"
#include "cpu/streaming.h"
#include "cpu/vectors.h"
// After what it is compiled with.
#include "common/distill_loss.h"
#include "common/half.h"
#include "kernels.h"

namespace fedkd_fast::cpu {

constexpr int64_t kBlock = 1024;      // classes whose terms are summed before they join the rest
constexpr int64_t kLaneClasses = 64;  // rows of more are not computed in lanes
// Of the two models' exponentials in scratch; a multiple of a cache line.
constexpr int64_t stash_stride(int64_t classes) { return (classes + 15) / 16 * 16; }
constexpr int kStatistics = 5;
constexpr float kFloor = static_cast<float>(kDenominatorFloor);

// What a kernel needs of the arguments, with its own types.
template <typename Storage>
struct Row {
  Row(const DistillLossArgs& args, int64_t row)
      : mentor(static_cast<const Storage*>(args.mentor_logits) + row * args.mentor_stride),
        mentee(static_cast<const Storage*>(args.mentee_logits) + row * args.mentee_stride),
        grad_mentor(static_cast<Storage*>(args.grad_mentor) + row * args.classes),
        grad_mentee(static_cast<Storage*>(args.grad_mentee) + row * args.classes),
        label(args.labels[row * args.label_stride]) {}

  const Storage* mentor;
  const Storage* mentee;
  Storage* grad_mentor;
  Storage* grad_mentee;
  int64_t label;
};

inline double row_weight(const DistillLossArgs& args, int64_t row) {
  if (args.weights == nullptr) return 1.0;
  if (args.type == FloatType::kFloat64) return static_cast<const double*>(args.weights)[row];
  return static_cast<const float*>(args.weights)[row];
}

template <typename Real>
Real row_denominator_grad(const DistillLossArgs& args, int64_t row) {
  return args.denominator_grad == nullptr ? Real{}
                                          : static_cast<const Real*>(args.denominator_grad)[row];
}

enum class RowStatus { kCounts, kIgnored, kBad };

inline RowStatus row_status(const DistillLossArgs& args, int64_t row) {
  const int64_t label = args.labels[row * args.label_stride];
  const double weight = row_weight(args, row);
  if (label == args.ignore_index || weight == 0.0) return RowStatus::kIgnored;
  const bool good = label >= 0 && label < args.classes && weight > 0.0 && std::isfinite(weight);
  return good ? RowStatus::kCounts : RowStatus::kBad;
}

inline float uncounted_statistic(RowStatus status, int field) {
  if (status == RowStatus::kBad) return std::numeric_limits<float>::quiet_NaN();
  return field == kStatistics - 1 ? 1.0f : 0.0f;
}

template <typename Storage>
void fill_gradients(const DistillLossArgs& args, const Row<Storage>& row, RowStatus status) {
  using Real = typename Compute<Storage>::type;
  const Real value = status == RowStatus::kBad ? std::numeric_limits<Real>::quiet_NaN() : Real{};
  for (int64_t j = 0; j < args.classes; ++j) store_value(row.grad_mentor + j, value);
  for (int64_t j = 0; j < args.classes; ++j) store_value(row.grad_mentee + j, value);
}

// Rows that do not count: true when the row is finished.
template <typename Storage>
bool finish_uncounted(const DistillLossArgs& args, const Row<Storage>& row, int64_t index) {
  using Real = typename Compute<Storage>::type;
  const RowStatus status = row_status(args, index);
  if (status == RowStatus::kCounts) return false;
  for (int field = 0; field < kStatistics; ++field)
    static_cast<Real*>(args.statistics)[field * args.rows + index] =
        uncounted_statistic(status, field);
  if (args.grad_mentor != nullptr) fill_gradients(args, row, status);
  return true;
}

template <typename Real>
void store_row_loss(const DistillLossArgs& args, int64_t row, const RowLoss<Real>& loss) {
  // The floor of a mean is the mean's.
  const Real denominator =
      args.mode.batch() ? loss.total : at_least(loss.total, static_cast<Real>(kDenominatorFloor));
  const Real values[kStatistics] = {loss.ce_mentor, loss.ce_mentee, loss.kl_mentor, loss.kl_mentee,
                                    denominator};
  for (int field = 0; field < kStatistics; ++field)
    static_cast<Real*>(args.statistics)[field * args.rows + row] = values[field];
}

template <typename Real>
void store_state(const DistillLossArgs& args, int64_t row, const RowState<Real>& state) {
  visit_states(state, [&](int field, const Real& value) {
    static_cast<Real*>(args.states)[field * args.rows + row] = value;
  });
}

template <typename Real>
RowState<Real> load_state(const DistillLossArgs& args, int64_t row) {
  RowState<Real> state;
  visit_states(state, [&](int field, Real& value) {
    value = static_cast<const Real*>(args.states)[field * args.rows + row];
  });
  return state;
}

template <typename Real>
void finish_softmax(Real label_step, Softmax<Real>* model) {
  model->label_step = label_step;
  model->label_exp = std::exp(-label_step);
  model->log_sum = std::log1p(model->beyond());
}

template <typename Real>
void finish_state(const ModeOf<Real>& mode, Real mentor_label, Real mentee_label,
                  RowState<Real>* state) {
  const Real step_t = state->mentor.max - mentor_label, step_s = state->mentee.max - mentee_label;
  finish_softmax(step_t, &state->mentor);
  finish_softmax(step_s, &state->mentee);
  if (!mode.soft) {
    state->soft_mentor = state->mentor;
    state->soft_mentee = state->mentee;
    return;
  }
  finish_softmax(step_t * mode.inverse_temperature, &state->soft_mentor);
  finish_softmax(step_s * mode.inverse_temperature, &state->soft_mentee);
}

template <typename Real>
Pull<Real> sample_pull(const DistillLossArgs& args, const ModeOf<Real>& mode, int64_t row,
                       const RowLoss<Real>& loss) {
  return row_pull(loss.total, mode.divergence * loss.kl_mentor, mode.divergence * loss.kl_mentee,
                  static_cast<Real>(row_weight(args, row) * args.gradient_scale),
                  row_denominator_grad<Real>(args, row), mode);
}

template <typename Real>
Pull<Real> batch_pull(const DistillLossArgs& args, const ModeOf<Real>& mode, int64_t row,
                      const DistillMeans& means) {
  return row_pull(static_cast<Real>(means.denominator), static_cast<Real>(means.numerator[0]),
                  static_cast<Real>(means.numerator[1]),
                  static_cast<Real>(row_weight(args, row) * args.gradient_scale),
                  static_cast<Real>(means.denominator_grad), mode);
}

inline bool in_place(const DistillLossArgs& args) {
  return args.grad_mentor == args.mentor_logits || args.grad_mentee == args.mentee_logits;
}

inline int64_t gradient_bytes(const DistillLossArgs& args) {
  return 2 * storage_bytes(args.type) * args.rows * args.classes;
}

inline bool streams_gradients(const DistillLossArgs& args) {
  return args.grad_mentor != nullptr && !in_place(args) && gradient_bytes(args) > kStreamedBytes;
}

// fp32 gradients that wait for the mean of D.
inline bool stashes_in_gradients(const DistillLossArgs& args) {
  return args.type == FloatType::kFloat32 && args.states != nullptr && args.mode.plain() &&
         gradient_bytes(args) <= kStreamedBytes;
}

// fp64: plain scalar code, for gradient checks.
void double_rows(const DistillLossArgs& args, int64_t begin, int64_t end);
void double_gradients(const DistillLossArgs& args, const DistillMeans& means, int64_t begin,
                      int64_t end);

}  // namespace fedkd_fast::cpu
