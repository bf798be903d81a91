// Mutual distillation loss in fp64, for gradient checks: distill_loss.cpp as plain scalar code.

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/distill_loss_rows.h"

namespace fedkd_fast::cpu {
namespace {

constexpr int64_t kBlock64 = 64;  // classes whose terms are summed before they join the rest

void scan_double(const Row<double>& row, int64_t classes, double scale, Softmax<double>* t_state,
                 Softmax<double>* s_state) {
  Softmax<double>&t = *t_state, &s = *s_state;
  t.peak = t.tail = t.moment = t.slack = s.peak = s.tail = s.moment = s.slack = 0.0;
  const auto add = [](Softmax<double>* sums, double step, double exponential, double ratio) {
    (step == 0.0 ? sums->peak : sums->tail) += exponential;
    sums->moment += exponential * ratio;
    sums->slack -= step;
  };
  for (int64_t first = 0; first < classes; first += kBlock64) {
    Softmax<double> t_part{}, s_part{};
    for (int64_t j = first; j < std::min(first + kBlock64, classes); ++j) {
      const double t_step = (row.mentor[j] - t.max) * scale;
      const double s_step = (row.mentee[j] - s.max) * scale;
      add(&t_part, t_step, std::exp(t_step), s_step - t_step);
      add(&s_part, s_step, std::exp(s_step), s_step - t_step);
    }
    for (auto [sums, part] : {std::pair(&t, &t_part), std::pair(&s, &s_part)}) {
      sums->peak += part->peak;
      sums->tail += part->tail;
      sums->moment += part->moment;
      sums->slack += part->slack;
    }
  }
}

void write_double(const ModeOf<double>& mode, const Row<double>& row, int64_t classes,
                  const RowState<double>& state, const RowGradient<double>& gradient) {
  const ModelGradient<double>&t = gradient.mentor, &s = gradient.mentee;
  for (int64_t j = 0; j < classes; ++j) {
    const double t_step = row.mentor[j] - state.mentor.max;
    const double s_step = row.mentee[j] - state.mentee.max;
    const double ratio = (s_step - t_step) * mode.inverse_temperature;
    const double t_exp = std::exp(t_step * mode.inverse_temperature);
    const double s_exp = std::exp(s_step * mode.inverse_temperature);
    row.grad_mentor[j] =
        std::exp(t_step) * t.task + t_exp * (t.own - ratio * t.flow) - s_exp * t.peer - t.spread;
    row.grad_mentee[j] =
        std::exp(s_step) * s.task + s_exp * (s.own + ratio * s.flow) - t_exp * s.peer - s.spread;
  }
  row.grad_mentor[row.label] = t.label;
  row.grad_mentee[row.label] = s.label;
}

}  // namespace

void double_rows(const DistillLossArgs& args, int64_t begin, int64_t end) {
  const ModeOf<double> mode(args.mode, static_cast<double>(args.classes));
  const int64_t classes = args.classes;
  for (int64_t index = begin; index < end; ++index) {
    const Row<double> row(args, index);
    if (finish_uncounted(args, row, index)) continue;
    RowState<double> state;
    state.mentor.max = *std::max_element(row.mentor, row.mentor + classes);
    state.mentee.max = *std::max_element(row.mentee, row.mentee + classes);
    scan_double(row, classes, 1.0, &state.mentor, &state.mentee);
    state.soft_mentor = state.mentor;
    state.soft_mentee = state.mentee;
    if (mode.soft)
      scan_double(row, classes, mode.inverse_temperature, &state.soft_mentor, &state.soft_mentee);
    finish_state(mode, row.mentor[row.label], row.mentee[row.label], &state);
    const RowLoss<double> loss = row_loss(state, mode);
    store_row_loss(args, index, loss);
    if (args.states != nullptr) {
      store_state(args, index, state);
    } else if (args.grad_mentor != nullptr) {
      const Pull<double> pull = sample_pull(args, mode, index, loss);
      write_double(mode, row, classes, state, row_gradient(state, pull, loss, mode));
    }
  }
}

void double_gradients(const DistillLossArgs& args, const DistillMeans& means, int64_t begin,
                      int64_t end) {
  const ModeOf<double> mode(args.mode, static_cast<double>(args.classes));
  for (int64_t index = begin; index < end; ++index) {
    const Row<double> row(args, index);
    if (finish_uncounted(args, row, index)) continue;
    const RowState<double> state = load_state<double>(args, index);
    const RowLoss<double> loss = row_loss(state, mode);
    const Pull<double> pull = batch_pull(args, mode, index, means);
    write_double(mode, row, args.classes, state, row_gradient(state, pull, loss, mode));
  }
}

}  // namespace fedkd_fast::cpu
