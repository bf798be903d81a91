// Mutual distillation loss on CUDA: one launch for statistics and gradients and one for the means;
// a third for the gradients where D is the mean over all rows.
//
// A team of threads owns a row: one warp up to 1024 classes, one block beyond. Three sweeps over
// the row, 16 bytes of each model at a time: its maxima, its sums (common/distill_loss.h), its
// gradients; the second and third find it in cache. Teams reduce by shuffles, and over warps in
// shared memory, in a fixed order. The means run in one block, in fp64, over a fixed partition, so
// equal inputs give equal bits. Shared memory: 8 sums of 8 warps in a block team, 20 KiB in the
// means. No host synchronisation.

#include <cmath>
#include <cstdint>

#include "common/distill_loss.h"
#include "common/half.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kWarpRowClasses = 1024;  // longer rows take a whole block
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSums = 8;

__device__ inline float exp_of(float value) { return expf(value); }
__device__ inline double exp_of(double value) { return exp(value); }
__device__ inline float log1p_of(float value) { return log1pf(value); }
__device__ inline double log1p_of(double value) { return log1p(value); }

// One row of one team.
template <typename Storage>
struct Row {
  using Real = typename Compute<Storage>::type;
  __device__ Row(const DistillLossArgs& args, int64_t index)
      : mentor(static_cast<const Storage*>(args.mentor_logits) + index * args.mentor_stride),
        mentee(static_cast<const Storage*>(args.mentee_logits) + index * args.mentee_stride),
        grad_mentor(static_cast<Storage*>(args.grad_mentor) + index * args.classes),
        grad_mentee(static_cast<Storage*>(args.grad_mentee) + index * args.classes),
        label(args.labels[index * args.label_stride]),
        weight(args.weights ? static_cast<const Real*>(args.weights)[index] : Real(1)),
        denominator_grad(args.denominator_grad
                             ? static_cast<const Real*>(args.denominator_grad)[index]
                             : Real(0)),
        ignored(label == args.ignore_index || weight == Real(0)),
        bad(!ignored && !(label >= 0 && label < args.classes && weight > Real(0) &&
                          weight < static_cast<Real>(INFINITY))) {}

  const Storage* const mentor;
  const Storage* const mentee;
  Storage* const grad_mentor;
  Storage* const grad_mentee;
  const int64_t label;
  const Real weight, denominator_grad;
  const bool ignored, bad;
};

// Both values of each class of this thread: vectors, dealt to the team in turn, and a rest of less
// than one vector.
template <int kTeam, typename Storage, typename Visit>
__device__ void visit_classes(const Row<Storage>& row, int64_t classes, int member,
                              const Visit& visit) {
  using Real = typename Compute<Storage>::type;
  constexpr int64_t kStep = Vector<Storage>::kSize;
  const bool whole = is_aligned(row.mentor) && is_aligned(row.mentee);
  const int64_t vectors_end = classes / kStep * kStep;
  for (int64_t j = member * kStep; j < vectors_end; j += kTeam * kStep) {
    const Vector<Storage> t = load_vector(row.mentor + j, whole);
    const Vector<Storage> s = load_vector(row.mentee + j, whole);
    for (int i = 0; i < kStep; ++i)
      visit(static_cast<Real>(load_value(t.at[i])), static_cast<Real>(load_value(s.at[i])));
  }
  for (int64_t j = vectors_end + member; j < classes; j += kTeam)
    visit(static_cast<Real>(load_value(row.mentor[j])),
          static_cast<Real>(load_value(row.mentee[j])));
}

template <typename Real>
struct Sum {
  __device__ Real operator()(Real a, Real b) const { return a + b; }
};
template <typename Real>
struct Largest {
  __device__ Real operator()(Real a, Real b) const { return b > a ? b : a; }
};

// Each value becomes that of the whole team, in all its threads.
template <int kTeam, int kCount, typename Real, typename Join>
__device__ void reduce_team(Real (&values)[kCount], int member, const Join& join) {
  for (int i = 0; i < kCount; ++i) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      values[i] = join(values[i], __shfl_down_sync(kAllLanes, values[i], offset));
    values[i] = __shfl_sync(kAllLanes, values[i], 0);
  }
  if constexpr (kTeam > kWarp) {
    __shared__ Real of_warps[kWarps][kCount];
    __syncthreads();  // what was reduced before has been read
    if (member % kWarp == 0)
      for (int i = 0; i < kCount; ++i) of_warps[member / kWarp][i] = values[i];
    __syncthreads();  // every warp's values are there
    for (int i = 0; i < kCount; ++i) {
      values[i] = of_warps[0][i];
      for (int warp = 1; warp < kWarps; ++warp) values[i] = join(values[i], of_warps[warp][i]);
    }
  }
}

template <typename Real>
__device__ void finish_softmax(const Real* sums, Real label_step, Softmax<Real>* model) {
  model->peak = sums[0];
  model->tail = sums[1];
  model->moment = sums[2];
  model->slack = sums[3];
  model->label_step = label_step;
  model->label_exp = exp_of(-label_step);
  model->log_sum = log1p_of(model->beyond());
}

template <int kTeam, typename Storage, typename Real>
__device__ void scan_row(const Row<Storage>& row, int64_t classes, int member, Real scale,
                         Real label_t, Real label_s, Softmax<Real>* mentor, Softmax<Real>* mentee) {
  Real sums[kSums] = {};
  const Real max_t = mentor->max, max_s = mentee->max;
  visit_classes<kTeam>(row, classes, member, [&](Real t_logit, Real s_logit) {
    const Real t = (t_logit - max_t) * scale, s = (s_logit - max_s) * scale;
    const Real t_exp = exp_of(t), s_exp = exp_of(s), ratio = s - t;
    sums[0] += t == Real(0) ? Real(1) : Real(0);
    sums[1] += t == Real(0) ? Real(0) : t_exp;
    sums[2] += t_exp * ratio;
    sums[3] -= t;
    sums[4] += s == Real(0) ? Real(1) : Real(0);
    sums[5] += s == Real(0) ? Real(0) : s_exp;
    sums[6] += s_exp * ratio;
    sums[7] -= s;
  });
  reduce_team<kTeam>(sums, member, Sum<Real>());
  finish_softmax(sums, (max_t - label_t) * scale, mentor);
  finish_softmax(sums + kSums / 2, (max_s - label_s) * scale, mentee);
}

template <int kTeam, typename Storage, typename Real>
__device__ RowState<Real> row_state(const Row<Storage>& row, const ModeOf<Real>& mode,
                                    int64_t classes, int member) {
  // Before the team meets: gradients may take the place of the logits.
  const Real label_t = static_cast<Real>(load_value(row.mentor[row.label]));
  const Real label_s = static_cast<Real>(load_value(row.mentee[row.label]));
  const Real lowest = static_cast<Real>(-INFINITY);
  Real most[2] = {lowest, lowest};
  const Largest<Real> largest;
  visit_classes<kTeam>(row, classes, member, [&](Real t, Real s) {
    most[0] = largest(most[0], t);
    most[1] = largest(most[1], s);
  });
  reduce_team<kTeam>(most, member, largest);
  RowState<Real> state;
  state.mentor.max = state.soft_mentor.max = most[0];
  state.mentee.max = state.soft_mentee.max = most[1];
  scan_row<kTeam>(row, classes, member, Real(1), label_t, label_s, &state.mentor, &state.mentee);
  if (mode.soft) {
    scan_row<kTeam>(row, classes, member, mode.inverse_temperature, label_t, label_s,
                    &state.soft_mentor, &state.soft_mentee);
  } else {
    state.soft_mentor = state.mentor;
    state.soft_mentee = state.mentee;
  }
  return state;
}

// Both gradients of one class.
template <typename Storage, typename Real>
__device__ void store_gradients(const ModeOf<Real>& mode, const RowState<Real>& state,
                                const RowGradient<Real>& gradient, Storage mentor, Storage mentee,
                                bool at_label, Storage* grad_mentor, Storage* grad_mentee) {
  const ModelGradient<Real>& t = gradient.mentor;
  const ModelGradient<Real>& s = gradient.mentee;
  const Real t_step = static_cast<Real>(load_value(mentor)) - state.mentor.max;
  const Real s_step = static_cast<Real>(load_value(mentee)) - state.mentee.max;
  const Real t_soft = t_step * mode.inverse_temperature, s_soft = s_step * mode.inverse_temperature;
  const Real ratio = s_soft - t_soft, t_exp = exp_of(t_soft), s_exp = exp_of(s_soft);
  Real t_out = t_exp * (t.own - ratio * t.flow) - s_exp * t.peer - t.spread;
  Real s_out = s_exp * (s.own + ratio * s.flow) - t_exp * s.peer - s.spread;
  if (mode.soft) {
    t_out += exp_of(t_step) * t.task;
    s_out += exp_of(s_step) * s.task;
  }
  store_value(grad_mentor, at_label ? t.label : t_out);
  store_value(grad_mentee, at_label ? s.label : s_out);
}

template <int kTeam, typename Storage, typename Real>
__device__ void write_gradients(const Row<Storage>& row, const ModeOf<Real>& mode, int64_t classes,
                                int member, const RowState<Real>& state,
                                const RowGradient<Real>& gradient) {
  constexpr int64_t kStep = Vector<Storage>::kSize;
  const bool whole = is_aligned(row.mentor) && is_aligned(row.mentee);
  const bool whole_gradients = is_aligned(row.grad_mentor) && is_aligned(row.grad_mentee);
  const int64_t vectors_end = classes / kStep * kStep;
  for (int64_t j = member * kStep; j < vectors_end; j += kTeam * kStep) {
    const Vector<Storage> t = load_vector(row.mentor + j, whole);
    const Vector<Storage> s = load_vector(row.mentee + j, whole);
    Vector<Storage> out_t, out_s;
    for (int i = 0; i < kStep; ++i)
      store_gradients(mode, state, gradient, t.at[i], s.at[i], j + i == row.label, &out_t.at[i],
                      &out_s.at[i]);
    store_vector(row.grad_mentor + j, out_t, whole_gradients);
    store_vector(row.grad_mentee + j, out_s, whole_gradients);
  }
  for (int64_t j = vectors_end + member; j < classes; j += kTeam)
    store_gradients(mode, state, gradient, row.mentor[j], row.mentee[j], j == row.label,
                    row.grad_mentor + j, row.grad_mentee + j);
}

template <int kTeam, typename Storage>
__device__ void fill_gradients(const DistillLossArgs& args, const Row<Storage>& row, int member) {
  using Real = typename Compute<Storage>::type;
  const Real fill = row.ignored ? Real(0) : static_cast<Real>(nanf(""));
  for (int64_t j = member; j < args.classes; j += kTeam) {
    store_value(row.grad_mentor + j, fill);
    store_value(row.grad_mentee + j, fill);
  }
}

template <typename Real>
__device__ void store_statistics(const DistillLossArgs& args, int64_t index, Real ce_mentor,
                                 Real ce_mentee, Real kl_mentor, Real kl_mentee, Real denominator) {
  Real* const out = static_cast<Real*>(args.statistics) + index;
  out[0] = ce_mentor;
  out[args.rows] = ce_mentee;
  out[2 * args.rows] = kl_mentor;
  out[3 * args.rows] = kl_mentee;
  out[4 * args.rows] = denominator;
}

// All threads of a team see the same row and label, so a team takes every branch together.
template <int kTeam, typename Visit>
__device__ void visit_rows(const DistillLossArgs& args, const Visit& visit) {
  constexpr int kTeams = kThreads / kTeam;
  const int member = static_cast<int>(threadIdx.x) % kTeam;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kTeam;
  for (int64_t index = first; index < args.rows; index += static_cast<int64_t>(gridDim.x) * kTeams)
    visit(index, member);
}

template <typename Storage, int kTeam>
__global__ void distill_loss_kernel(DistillLossArgs args) {
  using Real = typename Compute<Storage>::type;
  const ModeOf<Real> mode(args.mode, static_cast<double>(args.classes));
  visit_rows<kTeam>(args, [&](int64_t index, int member) {
    const Row<Storage> row(args, index);
    if (row.ignored || row.bad) {
      const Real fill = row.ignored ? Real(0) : static_cast<Real>(nanf(""));
      if (args.grad_mentor != nullptr) fill_gradients<kTeam>(args, row, member);
      if (member == 0)
        store_statistics(args, index, fill, fill, fill, fill, row.ignored ? Real(1) : fill);
      return;
    }
    const RowState<Real> state = row_state<kTeam>(row, mode, args.classes, member);
    const RowLoss<Real> loss = row_loss(state, mode);
    if (member == 0)
      store_statistics(args, index, loss.ce_mentor, loss.ce_mentee, loss.kl_mentor, loss.kl_mentee,
                       args.mode.batch() ? loss.total : at_least(loss.total, mode.floor));
    if (args.states != nullptr) {
      Real* const out = static_cast<Real*>(args.states) + index;
      if (member == 0)
        visit_states(state, [&](int field, const Real& value) { out[field * args.rows] = value; });
    } else if (args.grad_mentor != nullptr) {
      const Pull<Real> pull =
          row_pull(loss.total, loss.kl_mentor * mode.divergence, loss.kl_mentee * mode.divergence,
                   row.weight, row.denominator_grad, mode);
      write_gradients<kTeam>(row, mode, args.classes, member, state,
                             row_gradient(state, pull, loss, mode));
    }
  });
}

template <typename Storage, int kTeam>
__global__ void distill_loss_gradients_kernel(DistillLossArgs args, const DistillMeans* means) {
  using Real = typename Compute<Storage>::type;
  const ModeOf<Real> mode(args.mode, static_cast<double>(args.classes));
  visit_rows<kTeam>(args, [&](int64_t index, int member) {
    const Row<Storage> row(args, index);
    if (row.ignored || row.bad) return;
    RowState<Real> state;
    const Real* const from = static_cast<const Real*>(args.states) + index;
    visit_states(state, [&](int field, Real& value) { value = from[field * args.rows]; });
    const Pull<Real> pull =
        row_pull(static_cast<Real>(means->denominator), static_cast<Real>(means->numerator[0]),
                 static_cast<Real>(means->numerator[1]), row.weight,
                 static_cast<Real>(means->denominator_grad), mode);
    write_gradients<kTeam>(row, mode, args.classes, member, state,
                           row_gradient(state, pull, row_loss(state, mode), mode));
  });
}

template <typename Real>
__global__ void mean_distill_loss_kernel(DistillLossArgs args, DistillMeans* means,
                                         Real* total_loss, Real* summary) {
  // task, divergence and numerator of both models, D, its gradient, weights.
  constexpr int kMeans = 9;
  __shared__ double sums[kMeans][kThreads];
  Real* const statistics = static_cast<Real*>(args.statistics);
  Real* const denominator = statistics + 4 * args.rows;
  const int thread = static_cast<int>(threadIdx.x);
  double own[kMeans] = {};
  for (int64_t row = thread; row < args.rows; row += kThreads) {
    const double weight =
        args.weights ? static_cast<double>(static_cast<const Real*>(args.weights)[row]) : 1.0;
    if (args.labels[row * args.label_stride] == args.ignore_index || weight == 0.0) continue;
    for (int model = 0; model < 2; ++model) {
      const double kl = static_cast<double>(statistics[(2 + model) * args.rows + row]);
      own[model] += weight * static_cast<double>(statistics[model * args.rows + row]);
      own[2 + model] += weight * (kl / static_cast<double>(denominator[row]));
      own[4 + model] += weight * kl;
    }
    own[6] += weight * static_cast<double>(denominator[row]);
    own[7] +=
        args.denominator_grad
            ? weight * static_cast<double>(static_cast<const Real*>(args.denominator_grad)[row])
            : 0.0;
    own[8] += weight;
  }
  for (int i = 0; i < kMeans; ++i) sums[i][thread] = own[i];
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();  // the sums of the wider level are written
    if (thread < width)
      for (int i = 0; i < kMeans; ++i) sums[i][thread] += sums[i][thread + width];
  }
  __syncthreads();  // the sums of all are written
  const double weights = sums[8][0];
  const double inverse = weights > 0.0 ? 1.0 / weights : weights == 0.0 ? 0.0 : weights;
  const double total = sums[6][0] * inverse;
  const double common = at_least(total, kDenominatorFloor);
  if (thread == 0) {
    DistillMeans found;
    for (int model = 0; model < 2; ++model) {
      const double factor = args.mode.divergence * inverse;
      found.task[model] = sums[model][0] * args.mode.task * inverse;
      found.numerator[model] = sums[4 + model][0] * factor;
      found.divergence[model] =
          args.mode.batch() ? found.numerator[model] / common : sums[2 + model][0] * factor;
    }
    found.denominator = total;
    found.denominator_grad = sums[7][0] * inverse;
    found.inverse_weight = inverse;
    store_summary(found, inverse, total_loss, summary);
    if (means != nullptr) *means = found;
  }
  if (!args.mode.batch()) return;
  for (int64_t row = thread; row < args.rows; row += kThreads) {
    const bool weightless = args.weights && static_cast<const Real*>(args.weights)[row] == Real(0);
    if (args.labels[row * args.label_stride] != args.ignore_index && !weightless)
      denominator[row] = static_cast<Real>(common);
  }
}

dim3 grid_for(int64_t rows, int64_t teams) { return dim3(blocks_of((rows + teams - 1) / teams)); }

template <typename Storage, int kTeam>
cudaError_t run_teams(const DistillLossArgs& args, DistillMeans* means, void* total, void* summary,
                      cudaStream_t stream) {
  using Real = typename Compute<Storage>::type;
  const dim3 grid = grid_for(args.rows, kThreads / kTeam);
  cudaError_t error = cudaSuccess;
  if (args.rows > 0)
    error = launch<distill_loss_kernel<Storage, kTeam>>(grid, dim3(kThreads), 0, stream, args);
  if (error == cudaSuccess)
    error = launch<mean_distill_loss_kernel<Real>>(dim3(1), dim3(kThreads), 0, stream, args, means,
                                                   static_cast<Real*>(total),
                                                   static_cast<Real*>(summary));
  if (error == cudaSuccess && args.rows > 0 && args.states != nullptr)
    error = launch<distill_loss_gradients_kernel<Storage, kTeam>>(
        grid, dim3(kThreads), 0, stream, args, static_cast<const DistillMeans*>(means));
  return error;
}

template <typename Storage>
cudaError_t run(const DistillLossArgs& args, DistillMeans* means, void* total, void* summary,
                cudaStream_t stream) {
  return args.classes <= kWarpRowClasses
             ? run_teams<Storage, kWarp>(args, means, total, summary, stream)
             : run_teams<Storage, kThreads>(args, means, total, summary, stream);
}

}  // namespace

cudaError_t distill_loss(const DistillLossArgs& args, DistillMeans* means, void* total,
                         void* summary, cudaStream_t stream) {
  switch (args.type) {
    case FloatType::kFloat64:
      return run<double>(args, means, total, summary, stream);
    case FloatType::kFloat32:
      return run<float>(args, means, total, summary, stream);
    case FloatType::kBFloat16:
      return run<BFloat16>(args, means, total, summary, stream);
    case FloatType::kFloat16:
      return run<Float16>(args, means, total, summary, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fedkd_fast::cuda
