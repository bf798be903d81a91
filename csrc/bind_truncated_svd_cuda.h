// What the two files of truncated_svd's GPU half share: a matrix on its way, and batches of them.
#pragma once

#include "bind_truncated_svd.h"
#include "kernels.h"

namespace fedkd_fast::bind::on_gpu_half {

// Ways to the components, see bind_truncated_svd_cuda.cpp; where one does not serve, the next does.
enum class Way { kSubspace, kGram, kFull };

struct Job {
  size_t number;  // in the list
  Tensor matrix;  // contiguous
  Wanted wanted;
  Earlier earlier;
  Way way = Way::kFull;
  int64_t width = 0;  // of its subspace

  int64_t rows() const { return matrix.size(0); }
  int64_t cols() const { return matrix.size(1); }
  int64_t side() const { return std::min(rows(), cols()); }
  int64_t most_rank() const { return Goal(wanted, 1.0, 0, rows(), cols()).most_rank; }
};

// Calls work(Scalar{}) for the type of a matrix.
template <typename Work>
void with_type(const Tensor& matrix, const Work& work) {
  if (matrix.scalar_type() == ScalarType::Float)
    work(float{});
  else
    work(double{});
}

template <typename Scalar>
cuda::MatrixList<Scalar> list_of(const std::vector<Job*>& jobs) {
  cuda::MatrixList<Scalar> list{};
  for (const Job* job : jobs) {
    const auto i = static_cast<size_t>(list.count++);
    list.at[i] = job->matrix.const_data_ptr<Scalar>();
    list.size[i] = job->matrix.numel();
    list.index[i] = static_cast<int>(job->number);
  }
  return list;
}

// At most kMostMatrices matrices of one shape and type that go one way. Nothing here waits, but
// torch's eigh and SVD.
class Batch {
 public:
  Batch(std::vector<Job*> jobs, const cuda::MatrixFacts* facts, uint64_t seed, cudaStream_t stream);

  int64_t report_values() const { return count_ * report_length(); }

  // Enqueues all that leads to the ranks.
  void solve(double* reports);

  // Of reports that are on the host. The number of the first matrix that is not finite; beyond all
  // numbers where there is none.
  size_t first_not_finite(const double* reports) const;
  // Enqueues the factors; returns the jobs that have to go the next way.
  std::vector<Job*> finish(const double* reports, std::vector<Factors>& factors);

 private:
  int64_t report_length() const { return cuda::kReportHead + components_; }
  Tensor empty(std::vector<int64_t> size, ScalarType type) const;  // of the batch
  // Xᵀ, (B, N, M): rows of the short side times it are rows of the long one.
  Tensor lying(const Tensor& matrices) const;
  Tensor orthonormal(const Tensor& rows) const;
  cuda::Spectra spectra() const;

  void by_subspace(const Tensor& to_long);
  void by_gram();
  void by_svd();

  // What the report says of a matrix; returns how many components to write, or -1 where it has to
  // go the next way.
  int64_t settle(const Job& job, const double* report, Factors& found) const;
  template <typename Scalar>
  void enqueue_factors(const std::vector<int64_t>& ranks, int64_t most,
                       std::vector<Factors>& factors);

  std::vector<Job*> jobs_;
  const cuda::MatrixFacts* facts_;
  uint64_t seed_;
  cudaStream_t stream_;
  int64_t count_, rows_, cols_;
  bool transposed_;
  Way way_;
  int64_t components_;             // that are looked at: L, or N
  std::optional<Tensor> basis_;    // (B, L, N) fp64; none where it is the identity
  std::optional<Tensor> images_;   // (B, L, M) fp64: basis · Xᵀ; Uᵀ where the way is full
  std::optional<Tensor> values_;   // (B, L) fp64: as cuda::Spectra has them
  std::optional<Tensor> vectors_;  // (B, L, L) fp64: rows, in the order of the values
};

}  // namespace fedkd_fast::bind::on_gpu_half
