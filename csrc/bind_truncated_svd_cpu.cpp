// truncated_svd on the CPU: one matrix per thread, each by the cheapest way that is sure.
//
// Most go to bind_truncated_svd_fp32.cpp. In fp64, by XᵀX and its eigenvectors, or by a full SVD
// where fp64 lacks the digits, go small matrices, float64, a wanted rank, and energies that leave
// less than kFinestShare: their rank is the optimum.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "bind_eigen.h"
#include "bind_products.h"
#include "bind_share.h"
#include "bind_truncated_svd.h"
#include "kernels.h"

namespace fedkd_fast::bind::on_cpu_half {
namespace {

// Squares of numbers within these powers of two stay inside fp32.
constexpr int kSafeExponent = 24;

Tensor rows_like(const Tensor& like, int64_t rows, int64_t length, ScalarType type) {
  return empty_like_device(like, {rows, length}, type);
}

// ---- fp64 ---------------------------------------------------------------------------------------

Tensor shares_of(const Tensor& like, const std::vector<double>& energies, double total) {
  Tensor shares =
      empty_like_device(like, {static_cast<int64_t>(energies.size())}, ScalarType::Double);
  double* data = shares.mutable_data_ptr<double>();
  for (size_t k = 0; k < energies.size(); ++k) data[k] = energies[k] / total;
  return shares;
}

double sum_of(const std::vector<double>& energies, int64_t count) {
  return std::accumulate(energies.begin(), energies.begin() + count, 0.0);
}

// By the Gram matrix where fp64 has the digits for it, else by a full SVD.
template <typename Scalar>
Factors exactly(const Tensor& matrix, const MatrixScan& scan, const Wanted& wanted) {
  const int64_t rows = matrix.size(0), cols = matrix.size(1);
  Tensor wide = rows_like(matrix, rows, cols, ScalarType::Double);
  cpu::widen_matrix(matrix.const_data_ptr<Scalar>(), matrix.numel(), scan.exponent,
                    wide.mutable_data_ptr<double>());
  const double total = cpu::squared_norm(wide.const_data_ptr<double>(), wide.numel());
  const Goal goal(wanted, total, scan.exponent, rows, cols);
  const bool transposed = rows <= cols;
  const Tensor tall = transposed ? mT(wide) : wide;
  const int64_t side = std::min(rows, cols);

  const auto dressed = [&](const std::vector<double>& energies, int64_t rank,
                           const VectorsView& long_vectors, const VectorsView& short_vectors,
                           const double* singular) {
    const bool pays = rank <= goal.most_rank;
    Factors factors = empty_factors(matrix, pays ? rank : 0);
    cpu::finish_factors<Scalar>(long_vectors, short_vectors, singular, pays ? rank : 0,
                                scan.exponent, transposed,
                                factors.left.template mutable_data_ptr<Scalar>(),
                                factors.sigma.template mutable_data_ptr<Scalar>(),
                                factors.right.template mutable_data_ptr<Scalar>());
    factors.shares = shares_of(matrix, energies, total);
    factors.rank = rank;
    factors.captured = pays ? sum_of(energies, rank) : 0.0;
    factors.total = total;
    return factors;
  };

  if constexpr (std::is_same_v<Scalar, float>) {
    const Tridiagonal<double> eigen(lower_gram<double>(mT(tall)));
    const std::vector<double> energies = eigen.energies();
    const int64_t rank = goal.choose(energies, total, side, kTieOfRounded);
    if (rank >= 0 && rank <= goal.most_rank &&
        (rank == 0 || energies[static_cast<size_t>(rank - 1)] > kGramFloor * energies[0])) {
      const Tensor leading = eigen.exact_rows(rank);
      const Tensor long_vectors = mm(leading, mT(tall));
      const auto rows_of = [](const Tensor& tensor) {
        return VectorsView{tensor.const_data_ptr<double>(), tensor.size(1), tensor.stride(1),
                           tensor.stride(0)};
      };
      return dressed(energies, rank, rows_of(long_vectors), rows_of(leading), nullptr);
    }
    if (rank > goal.most_rank) return dressed(energies, rank, {}, {}, nullptr);
  }
  const auto [u, s, vh] = svd(tall);
  const double* singular = s.template const_data_ptr<double>();
  std::vector<double> energies(static_cast<size_t>(side));
  for (size_t k = 0; k < energies.size(); ++k) energies[k] = singular[k] * singular[k];
  const double tie = std::is_same_v<Scalar, float> ? kTieOfRounded : kTie;
  int64_t rank = goal.choose(energies, sum_of(energies, side), side, tie);
  if (rank < 0) rank = side;
  const VectorsView long_vectors{u.template const_data_ptr<double>(), tall.size(0), u.stride(0),
                                 u.stride(1)};
  const VectorsView short_vectors{vh.template const_data_ptr<double>(), side, vh.stride(1),
                                  vh.stride(0)};
  return dressed(energies, rank, long_vectors, short_vectors, singular);
}

// ---- fp32 ---------------------------------------------------------------------------------------

struct NotFinite : Complaint {
  const char* what() const noexcept override { return "holds NaN or Inf"; }
};

struct Scanned {
  MatrixScan scan;
  std::vector<float> largest;    // magnitude of each row, of float32 matrices
  std::optional<Tensor> levels;  // as Products takes them, where it may use them

  Scanned(const Tensor& matrix, const Wanted& wanted) {
    const int64_t rows = matrix.size(0), cols = matrix.size(1);
    if (matrix.scalar_type() == ScalarType::Double) {
      std::vector<double> unused(static_cast<size_t>(rows));
      scan = cpu::scan_matrix(matrix.const_data_ptr<double>(), rows, cols, unused.data());
      return;
    }
    largest.resize(static_cast<size_t>(rows));
    const bool iterates = wanted.by != StopBy::kRank &&
                          (wanted.by != StopBy::kEnergy || 1.0 - wanted.limit >= kFinestShare);
    if (iterates && multiplies_int8(matrix) && std::min(rows, cols) > kGramSide)
      levels = rows_like(matrix, rows, cols, ScalarType::Char);
    scan = cpu::scan_matrix(matrix.const_data_ptr<float>(), rows, cols, largest.data(),
                            levels ? static_cast<int8_t*>(levels->mutable_data_ptr()) : nullptr);
  }
};

// Ids of rows that are not zero, where leaving the others out is worth a copy.
std::vector<int64_t> used_rows(const std::vector<float>& largest) {
  std::vector<int64_t> ids;
  const auto unused = static_cast<size_t>(std::count(largest.begin(), largest.end(), 0.0f));
  if (2 * unused < largest.size()) return ids;
  ids.reserve(largest.size() - unused);
  for (size_t i = 0; i < largest.size(); ++i)
    if (largest[i] != 0.0f) ids.push_back(static_cast<int64_t>(i));
  return ids;
}

std::optional<Factors> quickly(const Tensor& matrix, const Goal& goal, Scanned scanned,
                               const std::vector<int64_t>& ids, int exponent, double total,
                               const Earlier& earlier, uint64_t seed) {
  const int64_t cols = matrix.size(1);
  const int64_t rows = ids.empty() ? matrix.size(0) : static_cast<int64_t>(ids.size());
  Tensor work = matrix;
  std::vector<float>& largest = scanned.largest;
  if (!ids.empty() || exponent != 0) {
    work = rows_like(matrix, rows, cols, ScalarType::Float);
    cpu::gather_rows(matrix.const_data_ptr<float>(), cols, ids.empty() ? nullptr : ids.data(), rows,
                     exponent, work.mutable_data_ptr<float>());
    for (size_t i = 0; i < static_cast<size_t>(rows); ++i)
      largest[i] = std::ldexp(largest[ids.empty() ? i : static_cast<size_t>(ids[i])], -exponent);
    scanned.levels.reset();
  }
  Earlier known = earlier;
  // Vectors with an entry for each row, but not for these rows.
  if (known.basis && known.basis->size(1) != std::max(rows, cols)) known.basis.reset();
  std::optional<Found> solved = solve_in_fp32(
      Products(work, largest.data(), std::move(scanned.levels)), total, goal, known, seed);
  if (!solved) return std::nullopt;
  Found& found = *solved;

  Factors factors = empty_factors(matrix, 0);
  factors.shares = shares_of(matrix, found.energies, total);
  factors.rank = found.rank;
  factors.total = total;
  if (found.rank == 0 || found.rank > goal.most_rank) return factors;
  const int64_t rank = found.rank;
  // Norms are truer than the energies that ordered the components, so neighbours may have to change
  // places.
  std::vector<int64_t> order(static_cast<size_t>(rank));
  std::iota(order.begin(), order.end(), 0);
  const auto larger = [&](int64_t a, int64_t b) {
    return found.norms[static_cast<size_t>(a)] > found.norms[static_cast<size_t>(b)];
  };
  if (!std::is_sorted(order.begin(), order.end(), larger)) {
    std::stable_sort(order.begin(), order.end(), larger);
    for (Tensor* rows_of : {&found.long_rows, &found.short_rows}) {
      Tensor sorted = rows_like(matrix, rank, rows_of->size(1), ScalarType::Float);
      cpu::permute_rows(rows_of->const_data_ptr<float>(), rows_of->size(1), order.data(), rank,
                        sorted.mutable_data_ptr<float>());
      *rows_of = sorted;
    }
  }
  const bool transposed = rows <= cols;
  factors.left = transposed ? found.short_rows : found.long_rows;
  factors.right = transposed ? found.long_rows : found.short_rows;
  cpu::fix_signs(factors.left.mutable_data_ptr<float>(), rows,
                 factors.right.mutable_data_ptr<float>(), cols, rank);
  factors.sigma = empty_like_device(matrix, {rank}, ScalarType::Float);
  for (int64_t k = 0; k < rank; ++k) {
    const double norm = found.norms[static_cast<size_t>(order[static_cast<size_t>(k)])];
    factors.captured += norm * norm;
    factors.sigma.mutable_data_ptr<float>()[k] = static_cast<float>(std::ldexp(norm, exponent));
  }
  if (!ids.empty()) {
    Tensor whole = rows_like(matrix, rank, matrix.size(0), ScalarType::Float);
    cpu::scatter_columns(factors.left.const_data_ptr<float>(), rank, ids.data(), rows,
                         matrix.size(0), whole.mutable_data_ptr<float>());
    factors.left = whole;
  }
  return factors;
}

template <typename Scalar>
Factors factorise(const Tensor& matrix, const Wanted& wanted, const Earlier& earlier,
                  uint64_t seed) {
  Scanned scanned(matrix, wanted);
  const MatrixScan scan = scanned.scan;
  if (!scan.finite) throw NotFinite();
  if (scan.zero) return empty_factors(matrix, 0);
  if constexpr (std::is_same_v<Scalar, float>) {
    const int exponent = std::abs(scan.exponent) <= kSafeExponent ? 0 : scan.exponent;
    const double total = std::ldexp(scan.squares, -2 * exponent);
    const std::vector<int64_t> ids = used_rows(scanned.largest);
    const int64_t rows = ids.empty() ? matrix.size(0) : static_cast<int64_t>(ids.size());
    const Goal goal(wanted, total, exponent, matrix.size(0), matrix.size(1));
    if (goal.leaves_room(total, std::min(rows, matrix.size(1)))) {
      const std::optional<Factors> factors =
          quickly(matrix, goal, std::move(scanned), ids, exponent, total, earlier, seed);
      if (factors) return *factors;
    }
  }
  return exactly<Scalar>(matrix, scan, wanted);
}

}  // namespace

std::vector<Factors> truncated_svd(const std::vector<Tensor>& matrices,
                                   const std::vector<Wanted>& wanted,
                                   const std::vector<Earlier>& earlier, int64_t seed) {
  // Longest first, so that no thread is left with a long one at the end.
  const auto cost = [&](int64_t i) {
    const Tensor& matrix = matrices[static_cast<size_t>(i)];
    return matrix.numel() * std::min(matrix.size(0), matrix.size(1));
  };
  std::vector<int64_t> order(matrices.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  std::vector<Factors> factors(matrices.size());
  share_out(order, "matrix", false, [&](size_t i) {
    const Tensor matrix = torch::stable::contiguous(matrices[i]);
    const auto random = static_cast<uint64_t>(seed);
    factors[i] = matrix.scalar_type() == ScalarType::Float
                     ? factorise<float>(matrix, wanted[i], earlier[i], random)
                     : factorise<double>(matrix, wanted[i], earlier[i], random);
  });
  return factors;
}

}  // namespace fedkd_fast::bind::on_cpu_half
