// truncated_svd: checks, and the half that serves the device.

#include "bind_truncated_svd.h"

#include <cmath>
#include <numeric>

namespace fedkd_fast::bind {
namespace {

StopBy stop_by(const std::string& name) {
  if (name == "energy") return StopBy::kEnergy;
  if (name == "rank") return StopBy::kRank;
  if (name == "error") return StopBy::kError;
  STD_TORCH_CHECK(name == "floor", "stop must be energy, rank, error or floor, got ", name);
  return StopBy::kFloor;
}

void check_limit(StopBy by, double limit, size_t index) {
  if (by == StopBy::kEnergy) {
    STD_TORCH_CHECK(limit > 0.0 && limit <= 1.0, "energy must lie in (0, 1], got ", limit,
                    " for matrix ", index);
  } else {
    STD_TORCH_CHECK(limit >= 0.0 && std::isfinite(limit), "the limit must be finite and >= 0, got ",
                    limit, " for matrix ", index);
  }
}

void check_matrix(const Tensor& matrix, size_t index) {
  STD_TORCH_CHECK(matrix.dim() == 2, "matrix ", index, " must have 2 dimensions, got shape ",
                  shape_text(matrix));
  STD_TORCH_CHECK(
      matrix.scalar_type() == ScalarType::Float || matrix.scalar_type() == ScalarType::Double,
      "matrix ", index, " must be float32 or float64");
}

// What an earlier matrix left may come from a file: what makes no sense is as good as nothing.
bool makes_sense(const Tensor& shares) {
  const double* share = shares.const_data_ptr<double>();
  for (int64_t k = 0; k < shares.size(0); ++k)
    if (!(share[k] >= 0.0 && share[k] <= 2.0 && (k == 0 || share[k] <= share[k - 1]))) return false;
  return shares.size(0) > 0 && share[0] > 0.0;
}

Earlier checked_earlier(const Tensor& matrix, const Tensor& basis, const Tensor& shares,
                        size_t index) {
  Earlier earlier;
  check_tensor(shares, "shares", 1, ScalarType::Double);
  STD_TORCH_CHECK(shares.is_cpu(), "shares must be on the CPU");
  const Tensor spectrum = torch::stable::contiguous(shares);
  if (makes_sense(spectrum)) earlier.shares = spectrum;
  STD_TORCH_CHECK(basis.dim() == 2, "basis ", index, " must have 2 dimensions, got shape ",
                  shape_text(basis));
  if (basis.size(0) == 0) return earlier;
  const int64_t length = std::max(matrix.size(0), matrix.size(1));
  STD_TORCH_CHECK(basis.size(1) == length, "basis ", index, " must have shape (L, ", length,
                  "), got ", shape_text(basis));
  check_same_device(matrix, "matrix", basis, "basis");
  STD_TORCH_CHECK(basis.scalar_type() == ScalarType::Float, "basis ", index, " must be float32");
  STD_TORCH_CHECK(shares.size(0) > 0, "basis ", index, " must come with shares");
  if (earlier.shares) earlier.basis = basis;
  return earlier;
}

}  // namespace

Goal::Goal(const Wanted& wanted, double total, int exponent, int64_t rows, int64_t cols)
    : Stop(wanted.by, wanted.limit, total, exponent, std::min(rows, cols)),
      most_rank(std::min(rows, cols)) {
  // K·(P + Q + 1) numbers of fp32 have to stay below the budget.
  if (wanted.budget_bytes >= 0)
    most_rank = std::min(most_rank, (wanted.budget_bytes - 1) / (4 * (rows + cols + 1)));
}

int64_t Goal::choose(const std::vector<double>& energies, double total, int64_t side,
                     double slack) const {
  return choose_rank([&](int64_t k) { return energies[static_cast<size_t>(k)]; },
                     static_cast<int64_t>(energies.size()), total, side, slack);
}

int64_t Goal::predict(const std::vector<double>& energies, int64_t known, double total,
                      int64_t side) const {
  if (by == StopBy::kRank) return rank;
  if (by == StopBy::kEnergy) return cpu::predict_rank(energies.data(), known, side, total, energy);
  const int64_t kept = choose(energies, total, side);
  return kept >= 0 ? kept : std::min(side, 2 * static_cast<int64_t>(energies.size()));
}

int64_t width_for(int64_t rank, double oversampling) {
  constexpr int64_t kExtraDirections = 8, kStep = 8;
  const auto wanted =
      static_cast<int64_t>(oversampling * static_cast<double>(rank)) + kExtraDirections;
  return (wanted + kStep - 1) / kStep * kStep;
}

Factors empty_factors(const Tensor& matrix, int64_t rank) {
  const ScalarType type = matrix.scalar_type();
  return {empty_like_device(matrix, {rank, matrix.size(0)}, type),
          empty_like_device(matrix, {rank}, type),
          empty_like_device(matrix, {rank, matrix.size(1)}, type),
          torch::stable::empty({0}, ScalarType::Double)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
           Tensor, Tensor>
truncated_svd(const std::vector<Tensor>& matrices, const std::string& stop,
              const std::vector<double>& limits, const std::vector<Tensor>& bases,
              const std::vector<Tensor>& shares, const std::vector<int64_t>& budgets_bytes,
              int64_t seed) {
  const size_t count = matrices.size();
  STD_TORCH_CHECK(count > 0, "matrices must hold at least one matrix");
  const auto one_each = [&](size_t size, const char* name) {
    STD_TORCH_CHECK(size == count, name, " must have one entry per matrix: ", count,
                    " matrices, got ", size);
  };
  one_each(limits.size(), "limits");
  one_each(bases.size(), "bases");
  one_each(shares.size(), "shares");
  one_each(budgets_bytes.size(), "budgets_bytes");
  const StopBy by = stop_by(stop);
  std::vector<Wanted> wanted;
  std::vector<Earlier> earlier;
  for (size_t i = 0; i < count; ++i) {
    check_matrix(matrices[i], i);
    check_same_device(matrices[0], "matrix 0", matrices[i],
                      ("matrix " + std::to_string(i)).c_str());
    check_limit(by, limits[i], i);
    wanted.push_back({by, limits[i], budgets_bytes[i]});
    earlier.push_back(checked_earlier(matrices[i], bases[i], shares[i], i));
  }
#ifdef FEDKD_FAST_HAS_CUDA
  const bool gpu = on_gpu(matrices[0]);
#else
  const bool gpu = false;
#endif
  std::vector<Factors> factors;
  if (gpu) {
#ifdef FEDKD_FAST_HAS_CUDA
    factors = on_gpu_half::truncated_svd(matrices, wanted, earlier, seed);
#endif
  } else {
    factors = on_cpu_half::truncated_svd(matrices, wanted, earlier, seed);
  }
  std::vector<Tensor> left, sigma, right, found_shares;
  Tensor ranks = torch::stable::empty({static_cast<int64_t>(count)}, ScalarType::Long);
  Tensor energies = torch::stable::empty({static_cast<int64_t>(count), 2}, ScalarType::Double);
  for (size_t i = 0; i < count; ++i) {
    left.push_back(factors[i].left);
    sigma.push_back(factors[i].sigma);
    right.push_back(factors[i].right);
    found_shares.push_back(factors[i].shares);
    ranks.mutable_data_ptr<int64_t>()[i] = factors[i].rank;
    energies.mutable_data_ptr<double>()[2 * i] = factors[i].captured;
    energies.mutable_data_ptr<double>()[2 * i + 1] = factors[i].total;
  }
  return {left, sigma, right, found_shares, ranks, energies};
}

}  // namespace fedkd_fast::bind
