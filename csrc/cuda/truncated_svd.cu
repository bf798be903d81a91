// The parts of truncated_svd around torch's batched GEMM and eigensolver, on CUDA: scan and scale a
// batch of matrices, choose ranks, finish factors. The algorithm is that of cpu/truncated_svd.cpp.
//
// Mapping. scan: one block a matrix, 16 bytes a load, one tree over the block. scale: one thread
// for 16 bytes of input, blocks over the batch. select: one thread a matrix, its energies added in
// the order that the CPU adds them, so that equal energies give equal ranks. finish: one block for
// one component of one matrix: norm and peak in one tree over the block, then both vectors are
// written. Shared memory: 3 KiB in scan, 6 KiB in finish. fp64 throughout; reductions have a fixed
// order, so equal inputs give equal bits. Nothing waits for the host.

#include <cfloat>
#include <cmath>

#include "common/truncated_svd.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Scalar>
__global__ void scan_matrices_kernel(const Scalar* matrices, int64_t size, int* exponents,
                                     int* states) {
  __shared__ double largest[kThreads];
  __shared__ int bad[kThreads];
  constexpr int64_t kStep = Vector<Scalar>::kSize;
  const Scalar* const matrix = matrices + blockIdx.x * size;
  const int thread = static_cast<int>(threadIdx.x);
  const bool whole = is_aligned(matrix);
  const int64_t vectors_end = size / kStep * kStep;
  double peak = 0.0;
  bool finite = true;
  const auto look = [&](Scalar value) {
    const double magnitude = fabs(static_cast<double>(value));
    peak = magnitude > peak ? magnitude : peak;
    finite = finite && magnitude <= DBL_MAX;  // false for NaN and Inf
  };
  for (int64_t i = thread * kStep; i < vectors_end; i += kThreads * kStep) {
    const Vector<Scalar> values = load_vector(matrix + i, whole);
    for (int j = 0; j < kStep; ++j) look(values.at[j]);
  }
  for (int64_t i = vectors_end + thread; i < size; i += kThreads) look(matrix[i]);
  largest[thread] = peak;
  bad[thread] = finite ? 0 : 1;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();  // the wider level is written
    if (thread < width) {
      const double other = largest[thread + width];
      largest[thread] = largest[thread] > other ? largest[thread] : other;
      bad[thread] |= bad[thread + width];
    }
  }
  if (thread > 0) return;
  const MatrixState state = bad[0]              ? MatrixState::kNotFinite
                            : largest[0] == 0.0 ? MatrixState::kZero
                                                : MatrixState::kUsable;
  states[blockIdx.x] = static_cast<int>(state);
  exponents[blockIdx.x] = state == MatrixState::kUsable ? ilogb(largest[0]) : 0;
}

template <typename Scalar>
__global__ void scale_matrices_kernel(const Scalar* matrices, int64_t batch, int64_t size,
                                      const int* exponents, double* scaled) {
  constexpr int64_t kStep = Vector<Scalar>::kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStep;
  if (first >= size) return;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const Scalar* const in = matrices + b * size + first;
    double* const out = scaled + b * size + first;
    const ScaleDown scale(exponents[b]);
    if (first + kStep <= size) {
      const Vector<Scalar> values = load_vector(in, is_aligned(in));
      for (int i = 0; i < kStep; ++i) out[i] = scale(static_cast<double>(values.at[i]));
    } else {
      for (int64_t i = 0; first + i < size; ++i) out[i] = scale(static_cast<double>(in[i]));
    }
  }
}

__global__ void select_ranks_kernel(const double* ascending, int64_t batch, int64_t count,
                                    const int* states, double energy, int64_t rank, int64_t* ranks,
                                    double* energies, int* unfit) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= batch) return;
  const double* const values = ascending + b * count;
  const auto energy_at = [values, count](int64_t k) {
    const double value = values[count - 1 - k];
    return value > 0.0 ? value : 0.0;
  };
  int64_t kept = 0;
  double captured = 0.0, total = 0.0;
  if (states[b] == static_cast<int>(MatrixState::kUsable)) {
    for (int64_t k = 0; k < count; ++k) total += energy_at(k);
    kept = rank >= 0 ? (rank < count ? rank : count) : select_rank(energy_at, count, total, energy);
    for (int64_t k = 0; k < kept; ++k) captured += energy_at(k);
  }
  ranks[b] = kept;
  energies[2 * b] = captured;
  energies[2 * b + 1] = total;
  unfit[b] = kept > 0 && !(energy_at(kept - 1) > kGramFloor * energy_at(0)) ? 1 : 0;
}

// The better of two candidates for the largest magnitude: the first of equals.
__device__ bool is_better(double magnitude, int64_t index, double other, int64_t other_index) {
  return magnitude > other || (magnitude == other && index < other_index);
}

template <typename Scalar>
__global__ void finish_factors_kernel(FinishArgs args, Scalar* left, Scalar* sigma, Scalar* right) {
  __shared__ double squares[kThreads];
  __shared__ double peaks[kThreads];
  __shared__ int64_t places[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t k = blockIdx.x;
  for (int64_t b = blockIdx.y; b < args.batch; b += gridDim.y) {
    Scalar* const left_out = left + (b * args.width + k) * args.left.length;
    Scalar* const right_out = right + (b * args.width + k) * args.right.length;
    if (k >= args.ranks[b]) {  // padding
      for (int64_t i = thread; i < args.left.length; i += kThreads) left_out[i] = Scalar(0);
      for (int64_t i = thread; i < args.right.length; i += kThreads) right_out[i] = Scalar(0);
      if (thread == 0) sigma[b * args.width + k] = Scalar(0);
      continue;
    }
    double sum = 0.0, peak = 0.0;
    int64_t place = args.left.length;
    const auto add_square = [&](double value) { sum += value * value; };
    if (args.singular == nullptr && args.left_is_scaled)
      for (int64_t i = thread; i < args.left.length; i += kThreads)
        add_square(args.left.at(b, k, i));
    else if (args.singular == nullptr)
      for (int64_t i = thread; i < args.right.length; i += kThreads)
        add_square(args.right.at(b, k, i));
    for (int64_t i = thread; i < args.left.length; i += kThreads) {
      const double value = args.left.at(b, k, i);
      if (is_better(fabs(value), i, fabs(peak), place)) {
        peak = value;
        place = i;
      }
    }
    __syncthreads();  // the previous matrix's results have been read
    squares[thread] = sum;
    peaks[thread] = peak;
    places[thread] = place;
    for (int width = kThreads / 2; width > 0; width /= 2) {
      __syncthreads();  // the wider level is written
      if (thread < width) {
        squares[thread] += squares[thread + width];
        if (is_better(fabs(peaks[thread + width]), places[thread + width], fabs(peaks[thread]),
                      places[thread])) {
          peaks[thread] = peaks[thread + width];
          places[thread] = places[thread + width];
        }
      }
    }
    __syncthreads();  // the results are there
    const double norm = args.singular == nullptr ? sqrt(squares[0]) : 1.0;
    const double value = args.singular == nullptr ? norm : args.singular[b * args.width + k];
    const double sign = peaks[0] < 0.0 ? -1.0 : 1.0;
    const double left_factor = args.left_is_scaled ? sign / norm : sign;
    const double right_factor = args.left_is_scaled ? sign : sign / norm;
    if (thread == 0)
      sigma[b * args.width + k] = static_cast<Scalar>(ldexp(value, args.exponents[b]));
    for (int64_t i = thread; i < args.left.length; i += kThreads)
      left_out[i] = static_cast<Scalar>(args.left.at(b, k, i) * left_factor);
    for (int64_t i = thread; i < args.right.length; i += kThreads)
      right_out[i] = static_cast<Scalar>(args.right.at(b, k, i) * right_factor);
  }
}

}  // namespace

template <typename Scalar>
cudaError_t scan_matrices(const Scalar* matrices, int64_t batch, int64_t size, int* exponents,
                          int* states, cudaStream_t stream) {
  return launch<scan_matrices_kernel<Scalar>>(dim3(static_cast<unsigned>(batch)), dim3(kThreads), 0,
                                              stream, matrices, size, exponents, states);
}

template <typename Scalar>
cudaError_t scale_matrices(const Scalar* matrices, int64_t batch, int64_t size,
                           const int* exponents, double* scaled, cudaStream_t stream) {
  constexpr int64_t kBlockValues = kThreads * Vector<Scalar>::kSize;
  const auto blocks = static_cast<unsigned>((size + kBlockValues - 1) / kBlockValues);
  return launch<scale_matrices_kernel<Scalar>>(dim3(blocks, blocks_of(batch)), dim3(kThreads), 0,
                                               stream, matrices, batch, size, exponents, scaled);
}

cudaError_t select_ranks(const double* ascending, int64_t batch, int64_t count, const int* states,
                         double energy, int64_t rank, int64_t* ranks, double* energies, int* unfit,
                         cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((batch + kThreads - 1) / kThreads);
  return launch<select_ranks_kernel>(dim3(blocks), dim3(kThreads), 0, stream, ascending, batch,
                                     count, states, energy, rank, ranks, energies, unfit);
}

template <typename Scalar>
cudaError_t finish_factors(const FinishArgs& args, Scalar* left, Scalar* sigma, Scalar* right,
                           cudaStream_t stream) {
  if (args.width == 0) return cudaSuccess;
  return launch<finish_factors_kernel<Scalar>>(
      dim3(static_cast<unsigned>(args.width), blocks_of(args.batch)), dim3(kThreads), 0, stream,
      args, left, sigma, right);
}

template cudaError_t scan_matrices<float>(const float*, int64_t, int64_t, int*, int*, cudaStream_t);
template cudaError_t scan_matrices<double>(const double*, int64_t, int64_t, int*, int*,
                                           cudaStream_t);
template cudaError_t scale_matrices<float>(const float*, int64_t, int64_t, const int*, double*,
                                           cudaStream_t);
template cudaError_t scale_matrices<double>(const double*, int64_t, int64_t, const int*, double*,
                                            cudaStream_t);
template cudaError_t finish_factors<float>(const FinishArgs&, float*, float*, float*, cudaStream_t);
template cudaError_t finish_factors<double>(const FinishArgs&, double*, double*, double*,
                                            cudaStream_t);

}  // namespace fedkd_fast::cuda
