// truncated_svd on a GPU: matrices of one shape in one batch, by torch's batched products and
// eigensolver around the kernels of cuda/truncated_svd.cu.

#include <algorithm>
#include <map>

#include "bind_linalg.h"
#include "bind_truncated_svd.h"
#include "kernels.h"

namespace fedkd_fast::bind::on_gpu_half {
namespace {

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
  GpuBatch(const Tensor& matrix, size_t index, double energy, int64_t rank, Tensor& left,
           Tensor& sigma, Tensor& right, Tensor& ranks, Tensor& energies)
      : gpu_(matrix),
        index_(static_cast<int64_t>(index)),
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
      STD_TORCH_CHECK(state(b) != cuda::MatrixState::kNotFinite, "matrix ", index_ + b,
                      " holds NaN or Inf");
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
  int64_t index_;  // of the first matrix in the list
  int64_t batch_, rows_, cols_, width_;
  double energy_;
  int64_t rank_;
  Tensor exponents_, states_, unfit_;
  Tensor scaled_;  // (B, P, Q) fp64
  Scalar *left_, *sigma_, *right_;
  int64_t* ranks_;
  double* energies_;
};

}  // namespace

std::vector<Factors> truncated_svd(const std::vector<Tensor>& matrices,
                                   const std::vector<Wanted>& wanted, const std::vector<Earlier>&,
                                   int64_t) {
  std::vector<Factors> factors(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& matrix = matrices[i];
    const bool by_rank = wanted[i].by == StopBy::kRank;
    STD_TORCH_CHECK(by_rank || wanted[i].by == StopBy::kEnergy, "only by energy or rank on CUDA");
    const int64_t rows = matrix.size(0), cols = matrix.size(1), full = std::min(rows, cols);
    const int64_t rank =
        by_rank ? std::min<int64_t>(full, static_cast<int64_t>(wanted[i].limit)) : -1;
    const int64_t width = by_rank ? rank : full;
    const auto zeros = [&](std::vector<int64_t> size, ScalarType type) {
      Tensor tensor = empty_like_device(matrix, std::move(size), type);
      return torch::stable::zero_(tensor);
    };
    const ScalarType type = matrix.scalar_type();
    Tensor left = zeros({1, width, rows}, type), sigma = zeros({1, width}, type);
    Tensor right = zeros({1, width, cols}, type), ranks = zeros({1}, ScalarType::Long);
    Tensor energies = zeros({1, 2}, ScalarType::Double);
    const Tensor one = torch::stable::unsqueeze(matrix, 0);
    if (full > 0) {
      if (type == ScalarType::Float)
        GpuBatch<float>(one, i, wanted[i].limit, rank, left, sigma, right, ranks, energies)
            .factorise();
      else
        GpuBatch<double>(one, i, wanted[i].limit, rank, left, sigma, right, ranks, energies)
            .factorise();
    }
    Factors& found = factors[i];
    found.rank = on_host(ranks).const_data_ptr<int64_t>()[0];
    const Tensor host = on_host(energies);
    found.captured = host.const_data_ptr<double>()[0];
    found.total = host.const_data_ptr<double>()[1];
    const auto cut = [&](const Tensor& batch) {
      Tensor first = torch::stable::select(batch, 0, 0);
      return torch::stable::contiguous(torch::stable::narrow(first, 0, 0, found.rank));
    };
    found.left = cut(left), found.sigma = cut(sigma), found.right = cut(right);
    found.shares = torch::stable::empty({0}, ScalarType::Double);
  }
  return factors;
}

}  // namespace fedkd_fast::bind::on_gpu_half
