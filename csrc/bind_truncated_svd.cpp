// truncated_svd: torch's GEMM and eigensolver around the kernels of cpu/truncated_svd.cpp.

#include <array>
#include <cmath>
#include <numeric>
#include <optional>

#include "bind_torch.h"
#include "common/truncated_svd.h"

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

// A warm start looks for this many directions more than the basis has, and for these more besides:
// the rank grows from round to round, and the last of the directions converge slowly.
constexpr double kOversampling = 1.12;
constexpr int64_t kExtraDirections = 8;
constexpr int kPowerPasses = 2;
constexpr double kMostDirections = 0.45;  // of a square matrix's side

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
        rank >= 0 ? std::min(rank, count)
                  : select_rank([&](int64_t k) { return found[static_cast<size_t>(k)]; }, count,
                                total, energy);
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
  // The passes cost M·N·L each, the whole spectrum about N³: with more directions, or a taller
  // matrix, a cold start is the faster one.
  if (known == 0 || static_cast<double>(wanted * job.long_side()) >=
                        kMostDirections * static_cast<double>(side * side))
    return false;
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

#ifdef FEDKD_FAST_HAS_CUDA
// Component k of matrix b, counted from the last of `components`: ascending order, turned round.
cuda::ComponentsView turned(const Tensor& tensor, int64_t components, int64_t entries) {
  const int64_t last = tensor.size(components) - 1, stride = tensor.stride(components);
  return {tensor.const_data_ptr<double>() + last * stride, tensor.size(entries), tensor.stride(0),
          -stride, tensor.stride(entries)};
}

cuda::ComponentsView straight(const Tensor& tensor, int64_t components, int64_t entries) {
  return {tensor.const_data_ptr<double>(), tensor.size(entries), tensor.stride(0),
          tensor.stride(components), tensor.stride(entries)};
}

// A batch on a GPU. The host waits for the scan, because NaN and Inf have to raise, and to learn
// which matrices the Gram matrix does not serve; for each of these, and for each float64 matrix, it
// waits once more, for a full SVD. torch's solvers look at their own status as well.
template <typename Scalar>
class GpuBatch {
 public:
  GpuBatch(const Tensor& matrix, double energy, int64_t rank, Tensor& left, Tensor& sigma,
           Tensor& right, Tensor& ranks, Tensor& energies)
      : gpu_(matrix),
        batch_(matrix.size(0)),
        rows_(matrix.size(1)),
        cols_(matrix.size(2)),
        width_(sigma.size(1)),
        energy_(energy),
        rank_(rank),
        exponents_(empty_like_device(matrix, {batch_}, ScalarType::Int)),
        states_(empty_like_device(matrix, {batch_}, ScalarType::Int)),
        unfit_(empty_like_device(matrix, {batch_}, ScalarType::Int)),
        scaled_(empty_like_device(matrix, {batch_, rows_, cols_}, ScalarType::Double)),
        left_(left.mutable_data_ptr<Scalar>()),
        sigma_(sigma.mutable_data_ptr<Scalar>()),
        right_(right.mutable_data_ptr<Scalar>()),
        ranks_(ranks.mutable_data_ptr<int64_t>()),
        energies_(energies.mutable_data_ptr<double>()) {
    const Tensor whole = torch::stable::contiguous(matrix);
    const auto* data = whole.const_data_ptr<Scalar>();
    const int64_t size = rows_ * cols_;
    check_launch(cuda::scan_matrices(data, batch_, size, exponents_.mutable_data_ptr<int>(),
                                     states_.mutable_data_ptr<int>(), gpu_.stream));
    check_launch(cuda::scale_matrices(data, batch_, size, exponents_.const_data_ptr<int>(),
                                      scaled_.mutable_data_ptr<double>(), gpu_.stream));
  }

  void factorise() {
    const Tensor states = on_host(states_);
    const auto state = [&](int64_t b) {
      return static_cast<cuda::MatrixState>(states.const_data_ptr<int>()[b]);
    };
    for (int64_t b = 0; b < batch_; ++b)
      STD_TORCH_CHECK(state(b) != cuda::MatrixState::kNotFinite, "matrix ", b,
                      " of the batch holds NaN or Inf");
    if constexpr (std::is_same_v<Scalar, float>) {
      by_gram();
      const Tensor unfit = on_host(unfit_);
      for (int64_t b = 0; b < batch_; ++b)
        if (unfit.const_data_ptr<int>()[b] != 0) by_svd(b);
    } else {
      for (int64_t b = 0; b < batch_; ++b)
        if (state(b) == cuda::MatrixState::kUsable) by_svd(b);
    }
  }

 private:
  void by_gram() {
    const bool tall = rows_ >= cols_;
    const Tensor flipped = torch::stable::transpose(scaled_, 1, 2);
    const auto [values, vectors] = eigh(tall ? torch::stable::matmul(flipped, scaled_)
                                             : torch::stable::matmul(scaled_, flipped));
    select(values, 0, batch_);
    const Tensor long_vectors = torch::stable::matmul(torch::stable::transpose(vectors, 1, 2),
                                                      tall ? flipped : scaled_);  // (B, N, M)
    const auto long_view = turned(long_vectors, 1, 2), short_view = turned(vectors, 2, 1);
    finish(0, batch_, tall ? long_view : short_view, tall ? short_view : long_view, nullptr);
  }

  void by_svd(int64_t b) {
    const auto [u, s, vh] = svd(torch::stable::narrow(scaled_, 0, b, 1));
    const Tensor singular = torch::stable::contiguous(on_host(s));
    const int64_t count = s.size(1);
    Tensor ascending = torch::stable::empty({count}, ScalarType::Double);
    for (int64_t k = 0; k < count; ++k) {
      const double value = singular.const_data_ptr<double>()[count - 1 - k];
      ascending.mutable_data_ptr<double>()[k] = value * value;
    }
    select(torch::stable::to(ascending, s.device()), b, 1);
    const Tensor kept = torch::stable::contiguous(s);
    finish(b, 1, straight(u, 2, 1), straight(vh, 1, 2), kept.const_data_ptr<double>());
  }

  void select(const Tensor& ascending, int64_t first, int64_t count) {
    const Tensor whole = torch::stable::contiguous(ascending);
    check_launch(cuda::select_ranks(whole.const_data_ptr<double>(), count, std::min(rows_, cols_),
                                    states_.const_data_ptr<int>() + first, energy_, rank_,
                                    ranks_ + first, energies_ + 2 * first,
                                    unfit_.mutable_data_ptr<int>() + first, gpu_.stream));
  }

  void finish(int64_t first, int64_t count, const cuda::ComponentsView& left,
              const cuda::ComponentsView& right, const double* singular) {
    const cuda::FinishArgs args{count,
                                width_,
                                left,
                                right,
                                singular,
                                rows_ >= cols_,
                                exponents_.const_data_ptr<int>() + first,
                                ranks_ + first};
    check_launch(cuda::finish_factors(args, left_ + first * width_ * rows_, sigma_ + first * width_,
                                      right_ + first * width_ * cols_, gpu_.stream));
  }

  GpuScope gpu_;
  int64_t batch_, rows_, cols_, width_;
  double energy_;
  int64_t rank_;
  Tensor exponents_, states_, unfit_;
  Tensor scaled_;  // (B, P, Q) fp64
  Scalar *left_, *sigma_, *right_;
  int64_t* ranks_;
  double* energies_;
};
#endif

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
    check_same_device(matrix, "matrix", *basis, "basis");
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
#ifdef FEDKD_FAST_HAS_CUDA
  // A warm basis is not looked at here: it makes nothing better.
  if (batch > 0 && full > 0 && on_gpu(matrix)) {
    if (type == ScalarType::Float)
      GpuBatch<float>(matrix, energy, rank, left, sigma, right, ranks, energies).factorise();
    else
      GpuBatch<double>(matrix, energy, rank, left, sigma, right, ranks, energies).factorise();
    return {left, sigma, right, ranks, energies};
  }
#endif
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
