// A batch of truncated_svd's GPU half: torch's batched products around the kernels of cuda/.

#include <cstring>
#include <limits>
#include <numeric>

#include "bind_linalg.h"
#include "bind_truncated_svd_cuda.h"

namespace fedkd_fast::bind::on_gpu_half {
namespace {

// One would do from a good start. With three the start does not matter, and they cost little
// beside the eigenproblem.
constexpr int kPasses = 3;

using torch::stable::matmul;

Tensor wide(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Double); }
Tensor rough(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::BFloat16); }

// rows · rowsᵀ
Tensor gram_of(const Tensor& rows) { return torch::stable::contiguous(matmul(rows, mT(rows))); }

// Component k of each matrix, counted from the last one: ascending order, turned round.
cuda::ComponentsView turned(const Tensor& rows) {
  const int64_t last = rows.size(1) - 1;
  return {rows.const_data_ptr<double>() + last * rows.stride(1), rows.size(2), rows.stride(0),
          -rows.stride(1), rows.stride(2)};
}

cuda::ComponentsView straight(const Tensor& rows) {
  return {rows.const_data_ptr<double>(), rows.size(2), rows.stride(0), rows.stride(1),
          rows.stride(2)};
}

}  // namespace

Batch::Batch(std::vector<Job*> jobs, const cuda::MatrixFacts* facts, uint64_t seed,
             cudaStream_t stream)
    : jobs_(std::move(jobs)),
      facts_(facts),
      seed_(seed),
      stream_(stream),
      count_(static_cast<int64_t>(jobs_.size())),
      rows_(jobs_[0]->rows()),
      cols_(jobs_[0]->cols()),
      transposed_(rows_ <= cols_),
      way_(jobs_[0]->way),
      components_(way_ == Way::kSubspace ? 0 : jobs_[0]->side()) {
  for (const Job* job : jobs_) components_ = std::max(components_, job->width);
}

void Batch::solve(double* reports) {
  Tensor scaled = empty({rows_, cols_}, ScalarType::Double);
  std::optional<Tensor> coarse;
  if (way_ == Way::kSubspace) coarse = empty({rows_, cols_}, ScalarType::BFloat16);
  with_type(jobs_[0]->matrix, [&](auto zero) {
    check_launch(cuda::scale_matrices(
        list_of<decltype(zero)>(jobs_), facts_, scaled.mutable_data_ptr<double>(),
        coarse ? static_cast<BFloat16*>(coarse->mutable_data_ptr()) : nullptr, stream_));
  });
  images_ = lying(scaled);
  if (way_ == Way::kSubspace)
    by_subspace(lying(*coarse));
  else if (way_ == Way::kGram)
    by_gram();
  else
    by_svd();
  cuda::SelectArgs args{};
  args.count = static_cast<int>(count_);
  args.by = jobs_[0]->wanted.by;
  args.slack = jobs_[0]->matrix.scalar_type() == ScalarType::Float ? kTieOfRounded : kTie;
  for (size_t b = 0; b < jobs_.size(); ++b) {
    args.index[b] = static_cast<int>(jobs_[b]->number);
    args.limit[b] = jobs_[b]->wanted.limit;
  }
  args.spectra = spectra();
  args.side = std::min(rows_, cols_);
  args.facts = facts_;
  check_launch(cuda::select_ranks(args, reports, stream_));
}

size_t Batch::first_not_finite(const double* reports) const {
  for (const Job* job : jobs_) {
    if (reports[0] == static_cast<double>(cuda::MatrixState::kNotFinite)) return job->number;
    reports += report_length();
  }
  return std::numeric_limits<size_t>::max();
}

std::vector<Job*> Batch::finish(const double* reports, std::vector<Factors>& factors) {
  std::vector<Job*> left;
  std::vector<int64_t> ranks;
  for (const Job* job : jobs_) {
    ranks.push_back(settle(*job, reports, factors[job->number]));
    if (ranks.back() < 0) {
      left.push_back(jobs_[ranks.size() - 1]);
      left.back()->way = way_ == Way::kSubspace ? Way::kGram : Way::kFull;
      left.back()->width = 0;
    }
    reports += report_length();
  }
  const int64_t most = *std::max_element(ranks.begin(), ranks.end());
  if (most > 0)
    with_type(jobs_[0]->matrix,
              [&](auto zero) { enqueue_factors<decltype(zero)>(ranks, most, factors); });
  return left;
}

Tensor Batch::empty(std::vector<int64_t> size, ScalarType type) const {
  size.insert(size.begin(), count_);
  return empty_like_device(jobs_[0]->matrix, std::move(size), type);
}

Tensor Batch::lying(const Tensor& matrices) const { return transposed_ ? matrices : mT(matrices); }

cuda::Spectra Batch::spectra() const {
  return {values_->const_data_ptr<double>(), components_, way_ == Way::kFull};
}

Tensor Batch::orthonormal(const Tensor& rows) const {
  const Tensor gram = gram_of(rows);
  Tensor inverse = empty({components_, components_}, ScalarType::Double);
  check_launch(cuda::cholesky_inverse(gram.const_data_ptr<double>(), count_, components_,
                                      inverse.mutable_data_ptr<double>(), stream_));
  return matmul(inverse, rows);
}

void Batch::by_subspace(const Tensor& to_long) {
  const Tensor to_short = mT(to_long);
  const int64_t length = std::max(rows_, cols_);
  Tensor start = empty({components_, length}, ScalarType::BFloat16);
  cuda::EarlierRows known{};
  std::vector<Tensor> bases;
  for (const Job* job : jobs_) {
    const auto b = static_cast<size_t>(known.count++);
    if (!job->earlier.basis) continue;
    bases.push_back(torch::stable::contiguous(*job->earlier.basis));
    known.at[b] = bases.back().const_data_ptr<float>();
    known.rows[b] = std::min(bases.back().size(0), components_);
  }
  check_launch(cuda::start_rows(known, components_, length, seed_,
                                static_cast<BFloat16*>(start.mutable_data_ptr()), stream_));
  Tensor rows = wide(matmul(start, to_short));
  for (int pass = 0; pass < kPasses; ++pass)
    rows = wide(matmul(matmul(rough(orthonormal(rows)), to_long), to_short));
  // Once more, because the rows of a steep spectrum are nearly dependent.
  basis_ = orthonormal(orthonormal(rows));
  images_ = matmul(*basis_, *images_);
  const Tensor gram = gram_of(*images_);
  values_ = empty({components_}, ScalarType::Double);
  vectors_ = empty({components_, components_}, ScalarType::Double);
  Tensor scratch = empty({cuda::jacobi_scratch(components_)}, ScalarType::Double);
  check_launch(cuda::jacobi_eigh(
      gram.const_data_ptr<double>(), count_, components_, scratch.mutable_data_ptr<double>(),
      values_->mutable_data_ptr<double>(), vectors_->mutable_data_ptr<double>(), stream_));
}

void Batch::by_gram() {
  const auto [values, vectors] = eigh(gram_of(*images_));
  values_ = torch::stable::contiguous(values);
  vectors_ = mT(vectors);
}

void Batch::by_svd() {
  const auto [u, s, vh] = svd(mT(*images_));
  values_ = torch::stable::contiguous(s);
  images_ = mT(u);
  vectors_ = vh;
}

int64_t Batch::settle(const Job& job, const double* report, Factors& found) const {
  cuda::Report head;
  std::memcpy(&head, report, sizeof(head));
  const double* energies = report + cuda::kReportHead;
  auto rank = static_cast<int64_t>(head.rank);
  const bool pays = rank <= job.most_rank();
  if (way_ != Way::kFull && (rank < 0 || (pays && head.unfit != 0.0))) return -1;
  if (rank < 0) rank = components_;
  const int64_t kept = pays ? rank : 0;
  found = empty_factors(job.matrix, kept);
  found.rank = rank;
  found.total = head.total;
  found.captured = std::accumulate(energies, energies + kept, 0.0);
  if (head.total > 0.0) {
    found.shares = torch::stable::empty({components_}, ScalarType::Double);
    std::transform(energies, energies + components_, found.shares.mutable_data_ptr<double>(),
                   [&](double energy) { return energy / head.total; });
  }
  return kept;
}

template <typename Scalar>
void Batch::enqueue_factors(const std::vector<int64_t>& ranks, int64_t most,
                            std::vector<Factors>& factors) {
  // Of ascending components the last ones are wanted.
  const bool full = way_ == Way::kFull;
  Tensor& vectors = *vectors_;
  const Tensor turn = full ? vectors : torch::stable::narrow(vectors, 1, components_ - most, most);
  const Tensor long_rows = full ? *images_ : matmul(turn, *images_);
  const Tensor short_rows = basis_ ? matmul(turn, *basis_) : turn;
  const auto view = [full](const Tensor& rows) { return full ? straight(rows) : turned(rows); };
  cuda::FinishArgs<Scalar> args{};
  args.count = static_cast<int>(count_);
  for (size_t b = 0; b < jobs_.size(); ++b) {
    args.index[b] = static_cast<int>(jobs_[b]->number);
    if (ranks[b] <= 0) continue;
    args.rank[b] = static_cast<int>(ranks[b]);
    Factors& found = factors[jobs_[b]->number];
    args.left_out[b] = found.left.template mutable_data_ptr<Scalar>();
    args.sigma_out[b] = found.sigma.template mutable_data_ptr<Scalar>();
    args.right_out[b] = found.right.template mutable_data_ptr<Scalar>();
  }
  args.left = view(transposed_ ? short_rows : long_rows);
  args.right = view(transposed_ ? long_rows : short_rows);
  args.spectra = spectra();
  args.left_is_long = !transposed_;
  args.facts = facts_;
  check_launch(cuda::finish_factors(args, stream_));
}

}  // namespace fedkd_fast::bind::on_gpu_half
