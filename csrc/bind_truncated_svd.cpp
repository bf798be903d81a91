// truncated_svd: torch's GEMM and eigensolver around the kernels of cpu/truncated_svd.cpp.

#include <array>
#include <cmath>
#include <numeric>
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

Tensor orthonormal(const Tensor& matrix) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrix),
                                    torch::stable::detail::from(std::string("reduced"))};
  call_torch("aten::linalg_qr", "", stack);
  (void)torch::stable::detail::to<Tensor>(stack[1]);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor mT(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// U = X V / sigma loses orthogonality like eps64 · (sigma_1 / sigma_K)². Below this share of the
// first eigenvalue (sigma_K < 1e-4 sigma_1) that would show in fp32, and a full SVD takes over.
constexpr double kGramFloor = 1e-8;

// A warm start looks for this many directions more than the basis has, and for these more besides:
// the rank grows from round to round, and the last of the directions converge slowly.
constexpr double kOversampling = 1.12;
constexpr int64_t kExtraDirections = 8;
constexpr int kPowerPasses = 2;

template <typename Scalar>
struct Job {
  MatrixView view;
  MatrixScan scan;
  double energy;
  int64_t rank;        // -1: by energy
  const float* basis;  // (basis_rows, short side), or null
  int64_t basis_rows;
  Scalar *left, *sigma, *right;
  int64_t* kept;
  double* energies;  // captured, total

  bool transposed() const { return view.rows < view.cols; }
  int64_t short_side() const { return std::min(view.rows, view.cols); }
  int64_t long_side() const { return std::max(view.rows, view.cols); }

  // Choose the rank and report it; -1 where the energies do not reach what is wanted of the total.
  int64_t choose(const std::vector<double>& found, double total) const {
    const auto count = static_cast<int64_t>(found.size());
    const int64_t chosen =
        rank >= 0 ? std::min(rank, count) : select_rank(found.data(), count, total, energy);
    *kept = std::max<int64_t>(chosen, 0);
    energies[0] = std::accumulate(found.begin(), found.begin() + *kept, 0.0);
    energies[1] = total;
    return chosen;
  }
};

// Eigenpairs of imagesᵀ·images give the factors: images = X·B (M×L), basis B (N×L, orthonormal) or
// null for B = I. False where they do not hold the energy, or where fp64 lacks the digits.
template <typename Scalar>
bool from_images(const Tensor& images, const Tensor* basis, const double* total,
                 const Job<Scalar>& job) {
  const auto [values, vectors] = eigh(torch::stable::matmul(mT(images), images));
  const double* ascending = values.template const_data_ptr<double>();
  std::vector<double> found(static_cast<size_t>(values.size(0)));
  for (size_t k = 0; k < found.size(); ++k)
    found[k] = std::max(ascending[found.size() - 1 - k], 0.0);
  const double sum = std::accumulate(found.begin(), found.end(), 0.0);
  const int64_t kept = job.choose(found, total ? *total : sum);
  if (kept == 0) return true;
  if (kept < 0 || !(found[static_cast<size_t>(kept - 1)] > kGramFloor * found[0])) return false;
  const Tensor leading =
      torch::stable::narrow(const_cast<Tensor&>(vectors), 1, values.size(0) - kept, kept);
  const Tensor long_vectors = torch::stable::matmul(images, leading);
  const Tensor short_vectors = basis ? torch::stable::matmul(*basis, leading) : leading;
  const auto descending = [kept](const Tensor& tensor) {
    return VectorsView{tensor.const_data_ptr<double>() + (kept - 1) * tensor.stride(1),
                       tensor.size(0), tensor.stride(0), -tensor.stride(1)};
  };
  cpu::finish_factors<Scalar>(descending(long_vectors), descending(short_vectors), nullptr, kept,
                              job.scan.exponent, job.transposed(), job.left, job.sigma, job.right);
  return true;
}

// Subspace iteration from the vectors of an earlier, similar matrix. What the subspace captures of
// |X|² is |X·B|² exactly, so the energy is certain; the rank may exceed the optimum a little.
template <typename Scalar>
bool from_basis(const Tensor& tall, const Job<Scalar>& job) {
  const int64_t side = job.short_side();
  const int64_t known = job.basis ? cpu::basis_width(job.basis, job.basis_rows, side) : 0;
  const auto wanted =
      static_cast<int64_t>(kOversampling * static_cast<double>(known)) + kExtraDirections;
  // Beyond this share of the spectrum all of it costs less.
  const double most = job.long_side() >= 2 * side ? 0.75 : 0.55;
  if (known == 0 || static_cast<double>(wanted) >= most * static_cast<double>(side)) return false;
  Tensor start = empty_like_device(tall, {wanted, side}, ScalarType::Double);
  cpu::extend_basis(job.basis, known, wanted, side, start.mutable_data_ptr<double>());
  Tensor basis = mT(start);
  for (int pass = 0; pass < kPowerPasses; ++pass)
    basis = orthonormal(torch::stable::matmul(mT(tall), torch::stable::matmul(tall, basis)));
  const double total =
      cpu::squared_norm(tall.const_data_ptr<double>(), job.long_side() * job.short_side());
  return from_images<Scalar>(torch::stable::matmul(tall, basis), &basis, &total, job);
}

template <typename Scalar>
void from_svd(const Tensor& tall, const Job<Scalar>& job) {
  const auto [u, s, vh] = svd(tall);
  const double* singular = s.template const_data_ptr<double>();
  std::vector<double> found(static_cast<size_t>(job.short_side()));
  for (size_t k = 0; k < found.size(); ++k) found[k] = singular[k] * singular[k];
  const int64_t kept = job.choose(found, std::accumulate(found.begin(), found.end(), 0.0));
  const VectorsView long_vectors{u.template const_data_ptr<double>(), job.long_side(), u.stride(0),
                                 u.stride(1)};
  const VectorsView short_vectors{vh.template const_data_ptr<double>(), job.short_side(),
                                  vh.stride(1), vh.stride(0)};
  cpu::finish_factors<Scalar>(long_vectors, short_vectors, singular, kept, job.scan.exponent,
                              job.transposed(), job.left, job.sigma, job.right);
}

// One matrix: from a warm basis where there is one and it serves, else by the Gram matrix where
// fp64 has the digits for it, else by a full SVD.
template <typename Scalar>
void factorise(const Job<Scalar>& job, const Tensor& like) {
  const Tensor tall =
      empty_like_device(like, {job.long_side(), job.short_side()}, ScalarType::Double);
  cpu::orient_matrix<Scalar>(job.view, job.scan.exponent, tall.mutable_data_ptr<double>());
  if constexpr (std::is_same_v<Scalar, float>) {
    if (from_basis<Scalar>(tall, job) || from_images<Scalar>(tall, nullptr, nullptr, job)) return;
  }
  from_svd<Scalar>(tall, job);
}

template <typename Scalar>
void factorise_batch(const Tensor& matrix, double energy, int64_t rank, const Tensor* basis,
                     Tensor& left, Tensor& sigma, Tensor& right, Tensor& ranks, Tensor& energies) {
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
  const int64_t basis_rows = basis ? basis->size(1) : 0;
  const float* const basis_data = basis ? basis->const_data_ptr<float>() : nullptr;
  const int64_t basis_stride = basis_rows * std::min(rows, cols);
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
      const float* const start = basis_data ? basis_data + b * basis_stride : nullptr;
      const Job<Scalar> job{view(b),
                            scan,
                            energy,
                            rank,
                            start,
                            basis_rows,
                            left_data + b * width * rows,
                            sigma_data + b * width,
                            right_data + b * width * cols,
                            rank_data + b,
                            energy_data + 2 * b};
      factorise<Scalar>(job, matrix);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> truncated_svd(const Tensor& matrix,
                                                                 double energy, int64_t rank,
                                                                 std::optional<Tensor> basis) {
  STD_TORCH_CHECK(matrix.dim() == 3, "matrix must have 3 dimensions, got shape ",
                  shape_text(matrix));
  STD_TORCH_CHECK(
      matrix.scalar_type() == ScalarType::Float || matrix.scalar_type() == ScalarType::Double,
      "matrix must be float32 or float64");
  STD_TORCH_CHECK(rank >= 0 || (energy > 0.0 && energy <= 1.0), "energy must lie in (0, 1], got ",
                  energy);
  const int64_t batch = matrix.size(0), rows = matrix.size(1), cols = matrix.size(2);
  const int64_t full = std::min(rows, cols);
  const bool warm = basis.has_value() && rank < 0 && energy < 1.0;
  if (basis) {
    check_tensor(*basis, "basis", 3, ScalarType::Float);
    STD_TORCH_CHECK(basis->size(0) == batch && basis->size(2) == full,
                    "basis must have shape (B, L, min(P, Q)), got ", shape_text(*basis),
                    " for matrix ", shape_text(matrix));
  }
  const Tensor start = warm ? torch::stable::contiguous(*basis) : matrix;
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
      factorise_batch<float>(matrix, energy, rank, warm ? &start : nullptr, left, sigma, right,
                             ranks, energies);
    else
      factorise_batch<double>(matrix, energy, rank, nullptr, left, sigma, right, ranks, energies);
  }
  return {left, sigma, right, ranks, energies};
}

}  // namespace fedkd_fast::bind
