// What the two halves of truncated_svd's binding share: what is wanted of a matrix, and what comes
// of it.
#pragma once

#include <vector>

#include "bind_torch.h"
#include "common/truncated_svd.h"

namespace fedkd_fast::bind {

struct Wanted {
  StopBy by;
  double limit;
  int64_t budget_bytes;  // that fp32 factors have to stay below; -1 for any
};

// What is known of a matrix before it is looked at: of an earlier, similar one.
struct Earlier {
  std::optional<Tensor> basis;   // (L, max(P, Q)) fp32: its long-side vectors, in order
  std::optional<Tensor> shares;  // (S,) fp64: its leading σ²/Σσ², descending
};

// The stop of one matrix, and what pays.
struct Goal : Stop {
  int64_t most_rank;  // beyond, factors do not pay

  Goal(const Wanted& wanted, double total, int exponent, int64_t rows, int64_t cols);
  // As choose_rank, of all energies that are there.
  int64_t choose(const std::vector<double>& energies, double total, int64_t side,
                 double slack = 0.0) const;
  // The rank that is wanted, judged by the first `known` energies of a spectrum of `side`.
  int64_t predict(const std::vector<double>& energies, int64_t known, double total,
                  int64_t side) const;
};

// How wide a subspace is that is to find components of this rank: by the factor more, because the
// last ones converge slowly and the rank may grow, and a few besides.
int64_t width_for(int64_t rank, double oversampling);

// Of one matrix; component-major. Without factors where they do not pay: rank is then beyond what
// pays, and left, sigma and right have no rows.
struct Factors {
  Tensor left, sigma, right;  // (K, P), (K,), (K, Q)
  Tensor shares;              // (S,) fp64
  int64_t rank = 0;
  double captured = 0.0, total = 0.0;  // sums of σ², in one unit
};

// With room for `rank` components, and no spectrum.
Factors empty_factors(const Tensor& matrix, int64_t rank);

// Leading factors before they are dressed: unit rows of the long and the short side, and norms.
// The long side is that of Q where both are equal.
struct Found {
  std::vector<double> energies;  // of all components that were looked at, descending
  int64_t rank = 0;
  Tensor long_rows, short_rows;  // (K, M), (K, N)
  std::vector<double> norms;     // (K)
};

class Products;

namespace on_cpu_half {
// Matrices with a shorter side of no more than this are never iterated on.
constexpr int64_t kGramSide = 64;

// In fp32, of the matrix behind the products, whose squares are safe, and whose sum is `total`.
// Nothing where fp32 lacks the digits.
std::optional<Found> solve_in_fp32(Products matrix, double total, const Goal& goal,
                                   const Earlier& earlier, uint64_t seed);

std::vector<Factors> truncated_svd(const std::vector<Tensor>& matrices,
                                   const std::vector<Wanted>& wanted,
                                   const std::vector<Earlier>& earlier, int64_t seed);
}  // namespace on_cpu_half
#ifdef FEDKD_FAST_HAS_CUDA
namespace on_gpu_half {
std::vector<Factors> truncated_svd(const std::vector<Tensor>& matrices,
                                   const std::vector<Wanted>& wanted,
                                   const std::vector<Earlier>& earlier, int64_t seed);
}
#endif

}  // namespace fedkd_fast::bind
