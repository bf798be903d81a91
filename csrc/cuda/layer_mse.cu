// Squared errors between layers of two models on CUDA, with both gradients in one pass: one launch
// for sums and gradients, one for the errors, one for their total.
//
// A thread block owns a block of positions of one group (common/layer_mse.h), 16 bytes of each
// model at a time where rows of values allow it. Two streams in, up to two out, a handful of
// operations a value: bound by memory. A thread sums a few dozen squares in the arithmetic type,
// all beyond that is fp64 in a fixed order, so equal inputs give equal bits. Shared memory: one
// value a warp. No host synchronisation.

#include <cstdint>

#include "common/half.h"
#include "common/layer_mse.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the block, in all its threads.
template <typename T>
__device__ T sum_block(T value) {
  __shared__ T of_warps[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(kAllLanes, value, offset);
  __syncthreads();  // what was summed before has been read
  if (thread % kWarp == 0) of_warps[thread / kWarp] = value;
  __syncthreads();  // every warp's sum is there
  T total = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) total += of_warps[warp];
  return total;
}

__device__ int64_t counted_positions(const LayerMseArgs& args, int64_t sample) {
  if (args.mask == nullptr) return args.positions;
  const uint8_t* const mask = args.mask + sample * args.positions;
  int counted = 0;
  for (int64_t at = static_cast<int>(threadIdx.x); at < args.positions; at += kThreads)
    counted += mask[at] != 0 ? 1 : 0;
  return sum_block(counted);
}

// kSize neighbouring values of a row; what does not count is neither used nor, as a whole, read.
template <int kSize, typename Storage, typename Real>
__device__ Real visit(const LayerMseArgs& args, int64_t at, const uint8_t* mask, bool counts,
                      Real factor) {
  const auto* const mentor = static_cast<const Storage*>(args.mentor) + at;
  const auto* const mentee = static_cast<const Storage*>(args.mentee) + at;
  auto* const grad_mentor = static_cast<Storage*>(args.grad_mentor) + at;
  auto* const grad_mentee = static_cast<Storage*>(args.grad_mentee) + at;
  constexpr bool kWhole = kSize > 1;
  Vector<Storage> t, s, out_t, out_s;
  if (counts) {
    if constexpr (kWhole) {
      t = load_vector(mentor, true);
      s = load_vector(mentee, true);
    } else {
      t.at[0] = *mentor;
      s.at[0] = *mentee;
    }
  }
  Real squares = Real(0);
  for (int i = 0; i < kSize; ++i) {
    const bool keeps = counts && (mask == nullptr || mask[i] != 0);
    const Real difference =
        keeps ? static_cast<Real>(load_value(t.at[i])) - static_cast<Real>(load_value(s.at[i]))
              : Real(0);
    squares += difference * difference;
    store_value(&out_t.at[i], difference * factor);
    store_value(&out_s.at[i], -(difference * factor));
  }
  if constexpr (kWhole) {
    if (args.grad_mentor != nullptr) store_vector(grad_mentor, out_t, true);
    if (args.grad_mentee != nullptr) store_vector(grad_mentee, out_s, true);
  } else {
    if (args.grad_mentor != nullptr) *grad_mentor = out_t.at[0];
    if (args.grad_mentee != nullptr) *grad_mentee = out_s.at[0];
  }
  return squares;
}

template <typename Storage, int kSize>
__global__ void layer_mse_kernel(LayerMseArgs args) {
  using Real = typename Compute<Storage>::type;
  const int64_t blocks = layer_mse_blocks(args), each = layer_mse_positions(args);
  const int64_t all = args.samples * args.groups * blocks;
  for (int64_t index = blockIdx.x; index < all; index += gridDim.x) {
    const int64_t group = index / blocks, sample = group / args.groups;
    const int64_t first = index % blocks * each;
    const int64_t rest = args.positions - first, positions = rest < each ? rest : each;
    const Real weight = layer_mse_weight<Real>(args, counted_positions(args, sample));
    const Real factor = Real(2) * static_cast<const Real*>(args.scale)[sample] * weight;
    const int64_t start = (group * args.positions + first) * args.values;
    const uint8_t* const mask = args.mask ? args.mask + sample * args.positions : nullptr;
    // A block holds few values, or one row of values: 32 bits tell them apart.
    const auto row = static_cast<uint32_t>(args.values / kSize);
    const uint32_t vectors = static_cast<uint32_t>(positions) * row;
    Real squares = Real(0);
    for (uint32_t vector = threadIdx.x; vector < vectors; vector += kThreads) {
      const uint32_t position = vector / row, value = (vector - position * row) * kSize;
      const bool counts = mask == nullptr || mask[first + position] != 0;
      squares +=
          visit<kSize, Storage>(args, start + int64_t{vector} * kSize,
                                args.masks_values && mask ? mask + value : nullptr, counts, factor);
    }
    const double total = sum_block(static_cast<double>(squares));
    if (threadIdx.x == 0) args.sums[index] = total;
  }
}

template <typename Real>
__global__ void mean_layer_mse_kernel(LayerMseArgs args) {
  const int64_t blocks = args.groups * layer_mse_blocks(args);
  for (int64_t sample = blockIdx.x; sample < args.samples; sample += gridDim.x) {
    double own = 0.0;
    for (int64_t block = static_cast<int>(threadIdx.x); block < blocks; block += kThreads)
      own += args.sums[sample * blocks + block];
    const double weight = layer_mse_weight<double>(args, counted_positions(args, sample));
    const double error = sum_block(own) * weight;
    if (threadIdx.x == 0) static_cast<Real*>(args.errors)[sample] = static_cast<Real>(error);
  }
}

template <typename Real>
__global__ void total_layer_mse_kernel(LayerMseArgs args) {
  const auto* const errors = static_cast<const Real*>(args.errors);
  double own = 0.0;
  for (int64_t sample = static_cast<int>(threadIdx.x); sample < args.samples; sample += kThreads)
    own += static_cast<double>(errors[sample]) *
           static_cast<double>(static_cast<const Real*>(args.scale)[sample]);
  const double total = sum_block(own);
  if (threadIdx.x == 0) *static_cast<Real*>(args.total) = static_cast<Real>(total);
}

template <typename Storage>
cudaError_t run(const LayerMseArgs& args, cudaStream_t stream) {
  using Real = typename Compute<Storage>::type;
  constexpr int kSize = Vector<Storage>::kSize;
  const int64_t all = args.samples * args.groups * layer_mse_blocks(args);
  const dim3 grid(blocks_of(all)), block(kThreads);
  bool whole = args.values % kSize == 0;
  for (const void* place : {args.mentor, args.mentee, static_cast<const void*>(args.grad_mentor),
                            static_cast<const void*>(args.grad_mentee)})
    whole = whole && reinterpret_cast<uintptr_t>(place) % 16 == 0;
  cudaError_t error = cudaSuccess;
  if (all > 0)
    error = whole ? launch<layer_mse_kernel<Storage, kSize>>(grid, block, 0, stream, args)
                  : launch<layer_mse_kernel<Storage, 1>>(grid, block, 0, stream, args);
  if (error == cudaSuccess && args.samples > 0)
    error =
        launch<mean_layer_mse_kernel<Real>>(dim3(blocks_of(args.samples)), block, 0, stream, args);
  if (error != cudaSuccess) return error;
  return launch<total_layer_mse_kernel<Real>>(dim3(1), block, 0, stream, args);
}

}  // namespace

cudaError_t layer_mse(const LayerMseArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case FloatType::kFloat64:
      return run<double>(args, stream);
    case FloatType::kFloat32:
      return run<float>(args, stream);
    case FloatType::kBFloat16:
      return run<BFloat16>(args, stream);
    case FloatType::kFloat16:
      return run<Float16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fedkd_fast::cuda
