// The small dense problems of truncated_svd on CUDA: one block takes a matrix of up to a few
// hundred rows, because torch's solvers for them go through a batch one by one, and wait.
//
// A matrix lies in shared memory where it fits, else in the device's, where cache holds it.
//
// cholesky_inverse eliminates row by row: behind row j, entry (i, k) holds what is left of G for
// k >= i, and T, without its scales, for k <= j. All entries of a step are independent, a warp
// takes a row, and one barrier parts the steps.
//
// jacobi_eigh turns pairs of rows and columns by angles that make their common entry zero (cyclic
// Jacobi, Golub and Van Loan 8.5.5), half of the side at once: round r pairs index i with -i modulo
// side - 1, shifted by r, so that every pair meets once in side - 1 rounds. Angles are chosen, a
// barrier, the 2×2 blocks of A ← J·A·Jᵀ and the pairs of rows of V ← J·V are turned, a warp for a
// pair of rows, a barrier. Entries count as zero by the size of their own rows, not of the whole
// matrix: small eigenvalues have to have vectors that are as orthogonal, in A, as those of large
// ones.

#include <cmath>

#include "cuda/launch.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kThreads = kLargeBlock, kWarp = 32, kWarps = kThreads / kWarp;
// Of the squared length of a row: what is left of it outside the span of those before is rounding.
constexpr double kLeastPivot = 1e-12;
// An entry is zero below this share of the geometric mean of its two rows' diagonal entries, and
// below that share of the trace.
constexpr double kZeroCosine = 1e-9, kZeroShare = 1e-17;
constexpr int kMostSweeps = 16;

__global__ void cholesky_inverse_kernel(const double* grams, int64_t batch, int side, bool fits,
                                        double* inverses) {
  const int64_t size = static_cast<int64_t>(side) * side;
  double* const scales = dynamic_shared<double>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    const double* const gram = grams + b * size;
    double* const out = inverses + b * size;
    double* const work = fits ? scales + side : out;
    // Each thread also writes what it copies here, so matrices need no barrier between them.
    for (int i = warp; i < side; i += kWarps)
      for (int k = lane; k < side; k += kWarp) {
        const int64_t e = static_cast<int64_t>(i) * side + k;
        work[e] = gram[e];
      }
    for (int j = 0; j < side; ++j) {
      __syncthreads();  // row j is ready
      const double* const row = work + static_cast<int64_t>(j) * side;
      const double pivot = row[j];
      const bool own = pivot > kLeastPivot * gram[static_cast<int64_t>(j) * side + j];
      const double inverse = own ? 1.0 / pivot : 0.0;
      if (thread == 0) scales[j] = own ? 1.0 / sqrt(pivot) : 0.0;
      for (int i = j + 1 + warp; i < side; i += kWarps) {
        double* const other = work + static_cast<int64_t>(i) * side;
        const double factor = row[i] * inverse;
        for (int k = lane; k < side; k += kWarp) {
          if (k == j)
            other[k] = -factor;
          else if (k < j || k >= i)
            other[k] -= factor * row[k];
        }
      }
    }
    __syncthreads();  // the scales are there
    for (int i = warp; i < side; i += kWarps)
      for (int k = lane; k < side; k += kWarp) {
        const int64_t e = static_cast<int64_t>(i) * side + k;
        out[e] = k < i ? work[e] * scales[i] : k == i ? scales[i] : 0.0;
      }
  }
}

// The pair that member i < side/2 of a round belongs to, for an even side.
struct Pair {
  int p, q;
  __device__ Pair(int round, int i, int side) {
    const int turning = side - 1;  // members; the last one stays
    p = round + i < turning ? round + i : round + i - turning;
    q = i == 0 ? turning : round >= i ? round - i : round - i + turning;
  }
};

// Cosine and sine that turn (a_pp, a_pq; a_pq, a_qq) into a diagonal, by 45 degrees at most.
struct Turn {
  double cosine = 1.0, sine = 0.0;
  __device__ Turn() {}
  __device__ Turn(double app, double apq, double aqq, double least) {
    if (!(fabs(apq) > least && apq * apq > kZeroCosine * kZeroCosine * fabs(app * aqq))) return;
    const double slope = (aqq - app) / (2.0 * apq);
    const double tangent = (slope < 0.0 ? -1.0 : 1.0) / (fabs(slope) + sqrt(1.0 + slope * slope));
    cosine = 1.0 / sqrt(1.0 + tangent * tangent);
    sine = tangent * cosine;
  }
  __device__ void apply(double& p, double& q) const {
    const double old = p;
    p = cosine * old - sine * q;
    q = sine * old + cosine * q;
  }
};

__global__ void jacobi_eigh_kernel(const double* symmetric, int64_t batch, int side,
                                   double* scratch, double* values, double* vectors) {
  __shared__ int turns_made[kMostSweeps];
  const int even = side + side % 2, half = even / 2;  // a row and column of zeros change nothing
  const int64_t size = static_cast<int64_t>(even) * even;
  Turn* const turns = dynamic_shared<Turn>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    double* const a = scratch ? scratch + b * 2 * size : reinterpret_cast<double*>(turns + half);
    double* const v = a + size;
    // Each thread also reads the vectors that it writes here, so matrices need no barrier between.
    for (int i = warp; i < even; i += kWarps)
      for (int k = lane; k < even; k += kWarp) {
        const int64_t e = static_cast<int64_t>(i) * even + k;
        a[e] = i < side && k < side ? symmetric[(b * side + i) * side + k] : 0.0;
        v[e] = i == k ? 1.0 : 0.0;
      }
    if (thread < kMostSweeps) turns_made[thread] = 0;
    __syncthreads();  // the matrix is there
    double trace = 0.0;
    for (int i = 0; i < side; ++i) trace += a[static_cast<int64_t>(i) * even + i];
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
      for (int round = 0; round < even - 1; ++round) {
        for (int i = thread; i < half; i += kThreads) {
          const Pair pair(round, i, even);
          const double* const row = a + static_cast<int64_t>(pair.p) * even;
          const Turn turn(row[pair.p], row[pair.q], a[static_cast<int64_t>(pair.q) * even + pair.q],
                          kZeroShare * trace);
          turns[i] = turn;
          if (turn.sine != 0.0) atomicAdd(&turns_made[sweep], 1);
        }
        __syncthreads();  // the angles are there
        for (int i = warp; i < half; i += kWarps) {
          const Pair rows(round, i, even);
          const Turn turn = turns[i];
          double* const upper = a + static_cast<int64_t>(rows.p) * even;
          double* const lower = a + static_cast<int64_t>(rows.q) * even;
          for (int j = lane; j < half; j += kWarp) {
            const Turn other = turns[j];
            if (turn.sine == 0.0 && other.sine == 0.0) continue;
            const Pair columns(round, j, even);
            double pp = upper[columns.p], pq = upper[columns.q];
            double qp = lower[columns.p], qq = lower[columns.q];
            turn.apply(pp, qp);
            turn.apply(pq, qq);
            other.apply(pp, pq);
            other.apply(qp, qq);
            upper[columns.p] = pp, upper[columns.q] = pq;
            lower[columns.p] = qp, lower[columns.q] = qq;
          }
          if (turn.sine == 0.0) continue;
          double* const first = v + static_cast<int64_t>(rows.p) * even;
          double* const second = v + static_cast<int64_t>(rows.q) * even;
          for (int k = lane; k < even; k += kWarp) turn.apply(first[k], second[k]);
        }
        __syncthreads();  // the matrix is turned
      }
      if (turns_made[sweep] == 0) break;
    }
    // Row i goes where as many values are smaller; its place stands where the angles were.
    auto* const places = reinterpret_cast<int*>(turns);
    const auto value = [a, even](int i) { return a[static_cast<int64_t>(i) * even + i]; };
    for (int i = thread; i < side; i += kThreads) {
      int place = 0;
      for (int j = 0; j < side; ++j)
        place += value(j) < value(i) || (value(j) == value(i) && j < i) ? 1 : 0;
      places[i] = place;
      values[b * side + place] = value(i);
    }
    __syncthreads();  // the places are there
    for (int i = warp; i < side; i += kWarps)
      for (int k = lane; k < side; k += kWarp)
        vectors[(b * side + places[i]) * side + k] = v[static_cast<int64_t>(i) * even + k];
  }
}

int64_t even_side(int64_t side) { return side + side % 2; }

int64_t turns_bytes(int64_t side) {
  return even_side(side) / 2 * static_cast<int64_t>(sizeof(Turn));
}

// Matrix and vectors.
int64_t jacobi_values(int64_t side) { return 2 * even_side(side) * even_side(side); }

int64_t bytes_of(int64_t values) { return values * static_cast<int64_t>(sizeof(double)); }

}  // namespace

cudaError_t cholesky_inverse(const double* grams, int64_t batch, int64_t side, double* inverses,
                             cudaStream_t stream) {
  const bool fits = bytes_of(side + side * side) <= most_shared_bytes();
  const auto shared_bytes = static_cast<size_t>(bytes_of(fits ? side + side * side : side));
  return launch<cholesky_inverse_kernel>(dim3(blocks_of(batch)), dim3(kThreads), shared_bytes,
                                         stream, grams, batch, static_cast<int>(side), fits,
                                         inverses);
}

int64_t jacobi_scratch(int64_t side) {
  const int64_t values = jacobi_values(side);
  constexpr int64_t kOwnBytes = kMostSweeps * sizeof(int);
  return kOwnBytes + turns_bytes(side) + bytes_of(values) <= most_shared_bytes() ? 0 : values;
}

cudaError_t jacobi_eigh(const double* symmetric, int64_t batch, int64_t side, double* scratch,
                        double* values, double* vectors, cudaStream_t stream) {
  const bool fits = jacobi_scratch(side) == 0;
  const auto shared_bytes =
      static_cast<size_t>(turns_bytes(side) + (fits ? bytes_of(jacobi_values(side)) : 0));
  return launch<jacobi_eigh_kernel>(dim3(blocks_of(batch)), dim3(kThreads), shared_bytes, stream,
                                    symmetric, batch, static_cast<int>(side),
                                    fits ? nullptr : scratch, values, vectors);
}

}  // namespace fedkd_fast::cuda
