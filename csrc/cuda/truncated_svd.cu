// What surrounds the products of truncated_svd on CUDA: matrices are scanned and scaled, first
// subspaces gathered, ranks chosen, factors finished. The solvers' small problems are in
// truncated_svd_small.cu, the algorithm in bind_truncated_svd_cuda.cpp.
//
// Mapping. scan: up to kScanParts blocks a matrix, 16 bytes a load, one tree over the block, and
// one thread a matrix that merges its parts in order. scale: one thread for 16 bytes of input,
// blocks over the batch. start: one thread for 8 values. select: one block a matrix, whose first
// thread adds the energies in the order that the CPU adds them, so that equal energies give equal
// ranks. finish: one block for one component of one matrix: norm and peak in one tree over the
// block, then both vectors are written. Shared memory: 4 KiB in scan, 6 KiB in finish. fp64
// throughout; reductions have a fixed order, so equal inputs give equal bits.

#include <cfloat>
#include <cmath>

#include "common/half.h"
#include "common/truncated_svd.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSelectThreads = 64;
// An entry of a row of unit length is no more than 1, and rounding leaves it below.
constexpr float kMostOfUnitRow = 2.0f;

// Of one part of a matrix.
struct ScanPart {
  double peak;  // largest magnitude; Inf where a value is not finite
  double squares;
};

template <typename Scalar>
__global__ void scan_matrices_kernel(MatrixList<Scalar> matrices, ScanPart* parts) {
  __shared__ ScanPart found[kThreads];
  constexpr int64_t kStep = Vector<Scalar>::kSize;
  const int thread = static_cast<int>(threadIdx.x);
  for (int b = static_cast<int>(blockIdx.y); b < matrices.count; b += static_cast<int>(gridDim.y)) {
    const Scalar* const matrix = matrices.at[b];
    const int64_t size = matrices.size[b];
    const bool whole = is_aligned(matrix);
    const int64_t vectors_end = size / kStep * kStep;
    ScanPart mine{0.0, 0.0};
    const auto look = [&mine](Scalar value) {
      const double magnitude = fabs(static_cast<double>(value));
      const double bounded = magnitude <= DBL_MAX ? magnitude : HUGE_VAL;  // NaN, too
      mine.peak = bounded > mine.peak ? bounded : mine.peak;
      mine.squares += magnitude * magnitude;
    };
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + thread;
    for (int64_t i = first * kStep; i < vectors_end; i += step * kStep) {
      const Vector<Scalar> values = load_vector(matrix + i, whole);
      for (int j = 0; j < kStep; ++j) look(values.at[j]);
    }
    for (int64_t i = vectors_end + first; i < size; i += step) look(matrix[i]);
    found[thread] = mine;
    for (int width = kThreads / 2; width > 0; width /= 2) {
      __syncthreads();  // the wider level is written
      if (thread < width) {
        const ScanPart other = found[thread + width];
        mine.peak = other.peak > mine.peak ? other.peak : mine.peak;
        mine.squares += other.squares;
        found[thread] = mine;
      }
    }
    if (thread == 0) parts[b * kScanParts + blockIdx.x] = mine;
    __syncthreads();  // the last level has been read
  }
}

template <typename Scalar>
__global__ void merge_scans_kernel(MatrixList<Scalar> matrices, const ScanPart* parts, int count,
                                   MatrixFacts* facts) {
  const int b = static_cast<int>(threadIdx.x);
  if (b >= matrices.count) return;
  ScanPart whole{0.0, 0.0};
  for (int part = 0; part < count; ++part) {
    const ScanPart& one = parts[b * kScanParts + part];
    whole.peak = one.peak > whole.peak ? one.peak : whole.peak;
    whole.squares += one.squares;
  }
  const MatrixState state = whole.peak > DBL_MAX ? MatrixState::kNotFinite
                            : whole.peak == 0.0  ? MatrixState::kZero
                                                 : MatrixState::kUsable;
  facts[matrices.index[b]] = {whole.squares, state == MatrixState::kUsable ? ilogb(whole.peak) : 0,
                              state};
}

template <typename Scalar>
__global__ void scale_matrices_kernel(MatrixList<Scalar> matrices, int64_t size,
                                      const MatrixFacts* facts, double* scaled, BFloat16* coarse) {
  constexpr int64_t kStep = Vector<Scalar>::kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStep;
  if (first >= size) return;
  const bool full = first + kStep <= size;
  for (int b = static_cast<int>(blockIdx.y); b < matrices.count; b += static_cast<int>(gridDim.y)) {
    const Scalar* const in = matrices.at[b] + first;
    double* const out = scaled + b * size + first;
    BFloat16* const rough = coarse == nullptr ? nullptr : coarse + b * size + first;
    const MatrixFacts& fact = facts[matrices.index[b]];
    const bool finite = fact.state != MatrixState::kNotFinite;
    const ScaleDown scale(fact.exponent);
    const auto put = [&](int i, Scalar stored) {
      const double value = finite ? scale(static_cast<double>(stored)) : 0.0;
      out[i] = value;
      if (rough != nullptr) store_value(rough + i, static_cast<float>(value));
    };
    if (full) {
      const Vector<Scalar> values = load_vector(in, is_aligned(in));
      for (int i = 0; i < kStep; ++i) put(i, values.at[i]);
    } else {
      for (int i = 0; first + i < size; ++i) put(i, in[i]);
    }
  }
}

__global__ void start_rows_kernel(EarlierRows earlier, int64_t size, int64_t length, uint64_t seed,
                                  BFloat16* out) {
  constexpr int kStep = Vector<BFloat16>::kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStep;
  if (first >= size) return;
  const bool full = first + kStep <= size;
  for (int b = static_cast<int>(blockIdx.y); b < earlier.count; b += static_cast<int>(gridDim.y)) {
    const float* const rows = earlier.at[b] + first;
    const int64_t known = earlier.rows[b] * length - first;
    const auto entry = [&](int i) {
      const float value = i < known ? rows[i] : HUGE_VALF;
      BFloat16 stored;
      store_value(&stored, fabsf(value) <= kMostOfUnitRow ? value : random_sign(seed, first + i));
      return stored;
    };
    BFloat16* const place = out + b * size + first;
    if (full) {
      Vector<BFloat16> row;
      for (int i = 0; i < kStep; ++i) row.at[i] = entry(i);
      store_vector(place, row, is_aligned(place));
    } else {
      for (int i = 0; first + i < size; ++i) place[i] = entry(i);
    }
  }
}

__global__ void select_ranks_kernel(SelectArgs args, double* reports) {
  const int64_t count = args.spectra.count;
  for (int b = static_cast<int>(blockIdx.x); b < args.count; b += static_cast<int>(gridDim.x)) {
    double* const report = reports + b * (kReportHead + count);
    const MatrixFacts& fact = args.facts[args.index[b]];
    const auto energy_at = [&args, b](int64_t k) { return args.spectra.energy(b, k); };
    for (int64_t k = threadIdx.x; k < count; k += kSelectThreads)
      report[kReportHead + k] = energy_at(k);
    if (threadIdx.x > 0) continue;
    double total = 0.0;
    int64_t rank = 0;
    if (fact.state == MatrixState::kUsable) {
      if (count == args.side)
        for (int64_t k = 0; k < count; ++k) total += energy_at(k);
      else
        total = ldexp(fact.squares, -2 * fact.exponent);
      const Stop stop(args.by, args.limit[b], total, fact.exponent, args.side);
      rank = stop.choose_rank(energy_at, count, total, args.side, args.slack);
    }
    const bool unfit = rank > 0 && !(energy_at(rank - 1) > kGramFloor * energy_at(0));
    *reinterpret_cast<Report*>(report) = {static_cast<double>(fact.state),
                                          static_cast<double>(rank), unfit ? 1.0 : 0.0, total};
  }
}

// The better of two candidates for the largest magnitude: the first of equals.
__device__ bool is_better(double magnitude, int64_t index, double other, int64_t other_index) {
  return magnitude > other || (magnitude == other && index < other_index);
}

template <typename Scalar>
__global__ void finish_factors_kernel(FinishArgs<Scalar> args) {
  __shared__ double squares[kThreads];
  __shared__ double peaks[kThreads];
  __shared__ int64_t places[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t k = blockIdx.x;
  for (int b = static_cast<int>(blockIdx.y); b < args.count; b += static_cast<int>(gridDim.y)) {
    if (k >= args.rank[b]) continue;
    double sum = 0.0, peak = 0.0;
    int64_t place = args.left.length;
    const ComponentsView& long_side = args.left_is_long ? args.left : args.right;
    if (!args.spectra.singular)
      for (int64_t i = thread; i < long_side.length; i += kThreads) {
        const double value = long_side.at(b, k, i);
        sum += value * value;
      }
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
    const double norm = args.spectra.singular ? 1.0 : sqrt(squares[0]);
    const double sign = peaks[0] < 0.0 ? -1.0 : 1.0;
    const double left_factor = args.left_is_long ? sign / norm : sign;
    const double right_factor = args.left_is_long ? sign : sign / norm;
    Scalar* const left_out = args.left_out[b] + k * args.left.length;
    Scalar* const right_out = args.right_out[b] + k * args.right.length;
    if (thread == 0)
      args.sigma_out[b][k] =
          static_cast<Scalar>(ldexp(args.spectra.sigma(b, k), args.facts[args.index[b]].exponent));
    for (int64_t i = thread; i < args.left.length; i += kThreads)
      left_out[i] = static_cast<Scalar>(args.left.at(b, k, i) * left_factor);
    for (int64_t i = thread; i < args.right.length; i += kThreads)
      right_out[i] = static_cast<Scalar>(args.right.at(b, k, i) * right_factor);
  }
}

}  // namespace

template <typename Scalar>
cudaError_t scan_matrices(const MatrixList<Scalar>& matrices, double* parts, MatrixFacts* facts,
                          cudaStream_t stream) {
  auto* const found = reinterpret_cast<ScanPart*>(parts);
  const unsigned blocks = blocks_of(kScanParts);
  const cudaError_t error = launch<scan_matrices_kernel<Scalar>>(
      dim3(blocks, blocks_of(matrices.count)), dim3(kThreads), 0, stream, matrices, found);
  if (error != cudaSuccess) return error;
  return launch<merge_scans_kernel<Scalar>>(dim3(1), dim3(kMostMatrices), 0, stream, matrices,
                                            found, static_cast<int>(blocks), facts);
}

template <typename Scalar>
cudaError_t scale_matrices(const MatrixList<Scalar>& matrices, const MatrixFacts* facts,
                           double* scaled, BFloat16* coarse, cudaStream_t stream) {
  constexpr int64_t kBlockValues = kThreads * Vector<Scalar>::kSize;
  const int64_t size = matrices.size[0];
  const auto blocks = static_cast<unsigned>((size + kBlockValues - 1) / kBlockValues);
  return launch<scale_matrices_kernel<Scalar>>(dim3(blocks, blocks_of(matrices.count)),
                                               dim3(kThreads), 0, stream, matrices, size, facts,
                                               scaled, coarse);
}

cudaError_t start_rows(const EarlierRows& earlier, int64_t width, int64_t length, uint64_t seed,
                       BFloat16* out, cudaStream_t stream) {
  constexpr int64_t kBlockValues = kThreads * Vector<BFloat16>::kSize;
  const int64_t size = width * length;
  const auto blocks = static_cast<unsigned>((size + kBlockValues - 1) / kBlockValues);
  return launch<start_rows_kernel>(dim3(blocks, blocks_of(earlier.count)), dim3(kThreads), 0,
                                   stream, earlier, size, length, seed, out);
}

cudaError_t select_ranks(const SelectArgs& args, double* reports, cudaStream_t stream) {
  return launch<select_ranks_kernel>(dim3(blocks_of(args.count)), dim3(kSelectThreads), 0, stream,
                                     args, reports);
}

template <typename Scalar>
cudaError_t finish_factors(const FinishArgs<Scalar>& args, cudaStream_t stream) {
  int most = 0;
  for (int b = 0; b < args.count; ++b) most = args.rank[b] > most ? args.rank[b] : most;
  if (most == 0) return cudaSuccess;
  return launch<finish_factors_kernel<Scalar>>(
      dim3(static_cast<unsigned>(most), blocks_of(args.count)), dim3(kThreads), 0, stream, args);
}

template cudaError_t scan_matrices<float>(const MatrixList<float>&, double*, MatrixFacts*,
                                          cudaStream_t);
template cudaError_t scan_matrices<double>(const MatrixList<double>&, double*, MatrixFacts*,
                                           cudaStream_t);
template cudaError_t scale_matrices<float>(const MatrixList<float>&, const MatrixFacts*, double*,
                                           BFloat16*, cudaStream_t);
template cudaError_t scale_matrices<double>(const MatrixList<double>&, const MatrixFacts*, double*,
                                            BFloat16*, cudaStream_t);
template cudaError_t finish_factors<float>(const FinishArgs<float>&, cudaStream_t);
template cudaError_t finish_factors<double>(const FinishArgs<double>&, cudaStream_t);

}  // namespace fedkd_fast::cuda
