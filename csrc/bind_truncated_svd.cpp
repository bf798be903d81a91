// truncated_svd: torch's GEMM and eigensolver around the kernels of cpu/truncated_svd.cpp.

#include <array>
#include <cmath>
#include <optional>

#include "bind_torch.h"

namespace fedkd_fast::bind {
namespace {

template <size_t N>
void call_torch(const char* op, const char* overload, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
}

std::pair<Tensor, Tensor> eigh(const Tensor& gram) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(gram),
                                    torch::stable::detail::from(std::string("L"))};
  call_torch("aten::linalg_eigh", "", stack);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor> svd(const Tensor& matrix) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(matrix),
                                    torch::stable::detail::from(false),
                                    torch::stable::detail::from(std::optional<std::string>())};
  call_torch("aten::linalg_svd", "", stack);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

// U = X V / sigma loses orthogonality like eps64 · (sigma_1 / sigma_K)². Below this share of the
// first eigenvalue (sigma_K < 1e-4 sigma_1) that would show in fp32, and a full SVD takes over.
constexpr double kGramFloor = 1e-8;

template <typename Scalar>
struct SvdOutputs {
  Scalar *left, *sigma, *right;
  int64_t* rank;
  double* energies;  // captured, total
};

// One matrix: X = U Σ Vᵀ by the Gram matrix where fp64 has the digits for it, else by a full SVD.
template <typename Scalar>
void factorise(const MatrixView& view, const MatrixScan& scan, double energy, int64_t rank,
               const Tensor& like, const SvdOutputs<Scalar>& out) {
  const bool transposed = view.rows < view.cols;
  const int64_t long_side = std::max(view.rows, view.cols);
  const int64_t short_side = std::min(view.rows, view.cols);
  const Tensor tall = empty_like_device(like, {long_side, short_side}, ScalarType::Double);
  cpu::orient_matrix<Scalar>(view, scan.exponent, tall.mutable_data_ptr<double>());

  std::vector<double> energies(static_cast<size_t>(short_side));
  const auto choose = [&] {
    return rank >= 0 ? std::min(rank, short_side)
                     : select_rank(energies.data(), short_side, energy);
  };
  const auto report = [&](int64_t kept) {
    *out.rank = kept;
    out.energies[0] = out.energies[1] = 0.0;
    for (int64_t k = 0; k < short_side; ++k) {
      out.energies[1] += energies[static_cast<size_t>(k)];
      if (k + 1 == kept) out.energies[0] = out.energies[1];
    }
  };

  if constexpr (std::is_same_v<Scalar, float>) {
    const auto [values, vectors] =
        eigh(torch::stable::matmul(torch::stable::transpose(tall, 0, 1), tall));
    const double* ascending = values.template const_data_ptr<double>();
    for (int64_t k = 0; k < short_side; ++k)
      energies[static_cast<size_t>(k)] = std::max(ascending[short_side - 1 - k], 0.0);
    const int64_t kept = choose();
    if (kept == 0 || energies[static_cast<size_t>(kept - 1)] > kGramFloor * energies[0]) {
      report(kept);
      if (kept == 0) return;
      const Tensor kept_vectors =
          torch::stable::narrow(const_cast<Tensor&>(vectors), 1, short_side - kept, kept);
      const Tensor projected = torch::stable::matmul(tall, kept_vectors);
      const auto descending = [kept](const Tensor& tensor) {
        return VectorsView{tensor.const_data_ptr<double>() + (kept - 1) * tensor.stride(1),
                           tensor.size(0), tensor.stride(0), -tensor.stride(1)};
      };
      cpu::finish_factors<Scalar>(descending(projected), descending(kept_vectors), nullptr, kept,
                                  scan.exponent, transposed, out.left, out.sigma, out.right);
      return;
    }
  }
  const auto [u, s, vh] = svd(tall);
  const double* singular = s.template const_data_ptr<double>();
  for (int64_t k = 0; k < short_side; ++k)
    energies[static_cast<size_t>(k)] = singular[k] * singular[k];
  const int64_t kept = choose();
  report(kept);
  const VectorsView long_vectors{u.template const_data_ptr<double>(), long_side, u.stride(0),
                                 u.stride(1)};
  const VectorsView short_vectors{vh.template const_data_ptr<double>(), short_side, vh.stride(1),
                                  vh.stride(0)};
  cpu::finish_factors<Scalar>(long_vectors, short_vectors, singular, kept, scan.exponent,
                              transposed, out.left, out.sigma, out.right);
}

template <typename Scalar>
void factorise_batch(const Tensor& matrix, double energy, int64_t rank, Tensor& left, Tensor& sigma,
                     Tensor& right, Tensor& ranks, Tensor& energies) {
  const int64_t batch = matrix.size(0), rows = matrix.size(1), cols = matrix.size(2);
  const int64_t width = sigma.size(1);
  const auto view = [&](int64_t b) {
    return MatrixView{matrix.const_data_ptr<Scalar>() + b * matrix.stride(0), rows, cols,
                      matrix.stride(1), matrix.stride(2)};
  };
  std::vector<MatrixScan> scans(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    scans[static_cast<size_t>(b)] = cpu::scan_matrix<Scalar>(view(b));
    STD_TORCH_CHECK(scans[static_cast<size_t>(b)].finite, "matrix ", b,
                    " of the batch holds NaN or Inf");
  }
  Scalar* const left_data = left.mutable_data_ptr<Scalar>();
  Scalar* const sigma_data = sigma.mutable_data_ptr<Scalar>();
  Scalar* const right_data = right.mutable_data_ptr<Scalar>();
  int64_t* const rank_data = ranks.mutable_data_ptr<int64_t>();
  double* const energy_data = energies.mutable_data_ptr<double>();
  // One matrix per thread: torch's GEMM and eigensolver run serially inside.
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto& scan = scans[static_cast<size_t>(b)];
      if (scan.zero) continue;
      factorise<Scalar>(view(b), scan, energy, rank, matrix,
                        {left_data + b * width * rows, sigma_data + b * width,
                         right_data + b * width * cols, rank_data + b, energy_data + 2 * b});
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> truncated_svd(const Tensor& matrix,
                                                                 double energy, int64_t rank) {
  STD_TORCH_CHECK(matrix.dim() == 3, "matrix must have 3 dimensions, got shape ",
                  shape_text(matrix));
  STD_TORCH_CHECK(
      matrix.scalar_type() == ScalarType::Float || matrix.scalar_type() == ScalarType::Double,
      "matrix must be float32 or float64");
  STD_TORCH_CHECK(rank >= 0 || (energy > 0.0 && energy <= 1.0), "energy must lie in (0, 1], got ",
                  energy);
  const int64_t batch = matrix.size(0), rows = matrix.size(1), cols = matrix.size(2);
  const int64_t full = std::min(rows, cols);
  const int64_t width = rank >= 0 ? std::min(rank, full) : full;
  const auto zeros = [&](std::vector<int64_t> size, ScalarType type) {
    Tensor tensor = empty_like_device(matrix, std::move(size), type);
    return torch::stable::zero_(tensor);
  };
  const ScalarType type = matrix.scalar_type();
  Tensor left = zeros({batch, width, rows}, type), sigma = zeros({batch, width}, type);
  Tensor right = zeros({batch, width, cols}, type), ranks = zeros({batch}, ScalarType::Long);
  Tensor energies = zeros({batch, 2}, ScalarType::Double);
  if (batch > 0 && full > 0) {
    if (type == ScalarType::Float)
      factorise_batch<float>(matrix, energy, rank, left, sigma, right, ranks, energies);
    else
      factorise_batch<double>(matrix, energy, rank, left, sigma, right, ranks, energies);
  }
  return {left, sigma, right, ranks, energies};
}

}  // namespace fedkd_fast::bind
