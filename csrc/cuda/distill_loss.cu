// Mutual distillation loss on CUDA: statistics and gradients in one launch, the means in another.
//
// A team of threads owns a row: one warp up to 1024 classes, one block beyond. Each thread folds
// its classes, 16 bytes of each model at a time, into one online state, the team merges its states
// in a fixed tree (common/distill_loss.h), and a second sweep, which finds the row in cache, writes
// the gradients. The mean runs in one block, in fp64, over a fixed partition, so equal
// inputs give equal bits. Shared memory: 8 states in a block team, 6 KiB in the mean. No host
// synchronisation.

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

template <typename Real>
__device__ SoftmaxState<Real> shuffle_down(const SoftmaxState<Real>& state, int offset) {
  return {__shfl_down_sync(kAllLanes, state.max, offset),
          __shfl_down_sync(kAllLanes, state.peak, offset),
          __shfl_down_sync(kAllLanes, state.tail, offset),
          __shfl_down_sync(kAllLanes, state.moment, offset)};
}

template <typename Real>
__device__ SoftmaxState<Real> broadcast(const SoftmaxState<Real>& state) {
  return {__shfl_sync(kAllLanes, state.max, 0), __shfl_sync(kAllLanes, state.peak, 0),
          __shfl_sync(kAllLanes, state.tail, 0), __shfl_sync(kAllLanes, state.moment, 0)};
}

// Lane 0 holds the whole after log2(32) steps and hands it to the others.
template <typename Real>
__device__ PairState<Real> merge_warp(PairState<Real> state) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const PairState<Real> other{
        shuffle_down(state.mentor, offset), shuffle_down(state.mentee, offset),
        __shfl_down_sync(kAllLanes, static_cast<int>(state.empty), offset) != 0};
    state = merge(state, other);
  }
  return {broadcast(state.mentor), broadcast(state.mentee),
          __shfl_sync(kAllLanes, static_cast<int>(state.empty), 0) != 0};
}

// Both gradients of one class.
template <typename Storage, typename Real>
__device__ void store_gradients(const PairState<Real>& state, const GradientFactors<Real>& factors,
                                Storage mentor, Storage mentee, bool at_label, Storage* grad_mentor,
                                Storage* grad_mentee) {
  const Real t = exp_of(static_cast<Real>(load_value(mentor)) - state.mentor.max);
  const Real s = exp_of(static_cast<Real>(load_value(mentee)) - state.mentee.max);
  store_value(grad_mentor,
              at_label ? factors.mentor_label : t * factors.mentor_own - s * factors.mentor_peer);
  store_value(grad_mentee,
              at_label ? factors.mentee_label : s * factors.mentee_own - t * factors.mentee_peer);
}

template <typename Storage, int kTeam>
__global__ void distill_loss_kernel(DistillLossArgs args) {
  using Real = typename Compute<Storage>::type;
  constexpr int kTeams = kThreads / kTeam;
  constexpr int64_t kStep = Vector<Storage>::kSize;
  __shared__ PairState<Real> warp_states[kWarps];
  const int member = static_cast<int>(threadIdx.x) % kTeam;
  const int64_t first_row =
      static_cast<int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kTeam;
  Real* const statistics = static_cast<Real*>(args.statistics);
  // All threads of a team see the same row and label, so a team takes every branch together.
  for (int64_t row = first_row; row < args.rows; row += static_cast<int64_t>(gridDim.x) * kTeams) {
    const Storage* const mentor =
        static_cast<const Storage*>(args.mentor_logits) + row * args.mentor_stride;
    const Storage* const mentee =
        static_cast<const Storage*>(args.mentee_logits) + row * args.mentee_stride;
    Storage* const grad_mentor = static_cast<Storage*>(args.grad_mentor) + row * args.classes;
    Storage* const grad_mentee = static_cast<Storage*>(args.grad_mentee) + row * args.classes;
    const int64_t label = args.labels[row * args.label_stride];
    const bool ignored = label == args.ignore_index;
    if (ignored || label < 0 || label >= args.classes) {
      const Real fill = ignored ? Real(0) : static_cast<Real>(nanf(""));
      for (int64_t j = member; j < args.classes; j += kTeam) {
        store_value(grad_mentor + j, fill);
        store_value(grad_mentee + j, fill);
      }
      if (member == 0)
        store_row_loss(statistics, args.rows, row,
                       RowLoss<Real>{fill, fill, fill, fill, ignored ? Real(1) : fill});
      continue;
    }
    // Classes come in vectors, dealt to the team in turn, and a rest of less than one vector.
    const bool whole = is_aligned(mentor) && is_aligned(mentee);
    const int64_t vectors_end = args.classes / kStep * kStep;
    PairState<Real> state = empty_pair<Real>();
    for (int64_t j = member * kStep; j < vectors_end; j += kTeam * kStep) {
      const Vector<Storage> t = load_vector(mentor + j, whole), s = load_vector(mentee + j, whole);
      for (int i = 0; i < kStep; ++i)
        state = merge(state, single_class<Real>(load_value(t.at[i]), load_value(s.at[i])));
    }
    for (int64_t j = vectors_end + member; j < args.classes; j += kTeam)
      state = merge(state, single_class<Real>(load_value(mentor[j]), load_value(mentee[j])));
    state = merge_warp(state);
    if constexpr (kTeam > kWarp) {
      __syncthreads();  // the previous row's states have been read before they are overwritten
      if (member % kWarp == 0) warp_states[member / kWarp] = state;
      __syncthreads();  // every warp's state is there
      state = warp_states[0];
      for (int warp = 1; warp < kWarps; ++warp) state = merge(state, warp_states[warp]);
    }
    const RowLoss<Real> loss =
        row_loss<Real>(state, load_value(mentor[label]), load_value(mentee[label]));
    const GradientFactors<Real> factors =
        gradient_factors(state, loss, static_cast<Real>(args.gradient_scale));
    if (member == 0) store_row_loss(statistics, args.rows, row, loss);
    const bool whole_gradients = is_aligned(grad_mentor) && is_aligned(grad_mentee);
    for (int64_t j = member * kStep; j < vectors_end; j += kTeam * kStep) {
      const Vector<Storage> t = load_vector(mentor + j, whole), s = load_vector(mentee + j, whole);
      Vector<Storage> out_t, out_s;
      for (int i = 0; i < kStep; ++i)
        store_gradients(state, factors, t.at[i], s.at[i], j + i == label, &out_t.at[i],
                        &out_s.at[i]);
      store_vector(grad_mentor + j, out_t, whole_gradients);
      store_vector(grad_mentee + j, out_s, whole_gradients);
    }
    for (int64_t j = vectors_end + member; j < args.classes; j += kTeam)
      store_gradients(state, factors, mentor[j], mentee[j], j == label, grad_mentor + j,
                      grad_mentee + j);
  }
}

template <typename Real>
__global__ void mean_distill_loss_kernel(DistillLossArgs args, Real* mentor_mean, Real* mentee_mean,
                                         Real* inverse_count) {
  __shared__ double mentor_sums[kThreads];
  __shared__ double mentee_sums[kThreads];
  __shared__ double counts[kThreads];
  const Real* const ce_mentor = static_cast<const Real*>(args.statistics);
  const Real* const ce_mentee = ce_mentor + args.rows;
  const Real* const kl_mentor = ce_mentee + args.rows;
  const Real* const kl_mentee = kl_mentor + args.rows;
  const Real* const denominator = kl_mentee + args.rows;
  const int thread = static_cast<int>(threadIdx.x);
  double mentor = 0.0, mentee = 0.0, count = 0.0;
  for (int64_t row = thread; row < args.rows; row += kThreads) {
    const double weight = 1.0 / static_cast<double>(denominator[row]);
    count += args.labels[row * args.label_stride] != args.ignore_index ? 1.0 : 0.0;
    mentor += static_cast<double>(ce_mentor[row]) + static_cast<double>(kl_mentor[row]) * weight;
    mentee += static_cast<double>(ce_mentee[row]) + static_cast<double>(kl_mentee[row]) * weight;
  }
  mentor_sums[thread] = mentor;
  mentee_sums[thread] = mentee;
  counts[thread] = count;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();  // the sums of the wider level are written
    if (thread < width) {
      mentor_sums[thread] += mentor_sums[thread + width];
      mentee_sums[thread] += mentee_sums[thread + width];
      counts[thread] += counts[thread + width];
    }
  }
  if (thread == 0) {
    const double inverse = counts[0] > 0.0 ? 1.0 / counts[0] : 0.0;
    *mentor_mean = static_cast<Real>(mentor_sums[0] * inverse);
    *mentee_mean = static_cast<Real>(mentee_sums[0] * inverse);
    *inverse_count = static_cast<Real>(inverse);
  }
}

dim3 grid_for(int64_t rows, int64_t teams) { return dim3(blocks_of((rows + teams - 1) / teams)); }

template <typename Storage>
cudaError_t run(const DistillLossArgs& args, void* mentor_mean, void* mentee_mean,
                void* inverse_count, cudaStream_t stream) {
  using Real = typename Compute<Storage>::type;
  cudaError_t error = cudaSuccess;
  if (args.rows > 0 && args.classes <= kWarpRowClasses)
    error = launch<distill_loss_kernel<Storage, kWarp>>(grid_for(args.rows, kWarps), dim3(kThreads),
                                                        0, stream, args);
  else if (args.rows > 0)
    error = launch<distill_loss_kernel<Storage, kThreads>>(grid_for(args.rows, 1), dim3(kThreads),
                                                           0, stream, args);
  if (error != cudaSuccess) return error;
  return launch<mean_distill_loss_kernel<Real>>(
      dim3(1), dim3(kThreads), 0, stream, args, static_cast<Real*>(mentor_mean),
      static_cast<Real*>(mentee_mean), static_cast<Real*>(inverse_count));
}

}  // namespace

cudaError_t distill_loss(const DistillLossArgs& args, void* mentor_mean, void* mentee_mean,
                         void* inverse_count, cudaStream_t stream) {
  switch (args.type) {
    case LogitType::kFloat64:
      return run<double>(args, mentor_mean, mentee_mean, inverse_count, stream);
    case LogitType::kFloat32:
      return run<float>(args, mentor_mean, mentee_mean, inverse_count, stream);
    case LogitType::kBFloat16:
      return run<BFloat16>(args, mentor_mean, mentee_mean, inverse_count, stream);
    case LogitType::kFloat16:
      return run<Float16>(args, mentor_mean, mentee_mean, inverse_count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fedkd_fast::cuda
