// truncated_svd on a GPU: matrices of one shape in one batch, by torch's batched products around
// the kernels of cuda/.
//
// X is the matrix or its transpose, M×N with M >= N, scaled to entries near 1. Three ways, the next
// one where the one before does not serve:
//
// * subspace, where an earlier matrix says that few components are wanted: passes B ← orth(XᵀX·B)
//   from its long-side vectors, and from random ones beyond, then (XB)ᵀ(XB) = W Λ Wᵀ, V = B·W,
//   U = X·V/σ (Halko, Martinsson, Tropp 2011). The passes only turn the subspace, so bfloat16
//   serves. What certifies the energy is in fp64: B, its images and their energies. Cards with fp64
//   tensor cores multiply in it as fast as in fp32, and it does not depend on whether torch may
//   use TF32.
// * Gram: XᵀX and torch's eigh, in fp64.
// * full: torch's SVD in fp64, for float64 matrices, and where XᵀX lacks the digits.
//
// The host waits once, for ranks, energies and states of all matrices together, and knows then how
// large the factors are. It waits beside that where a stop in absolute units needs the norms before
// a way can be chosen, inside torch's eigh and SVD, which look at their own status, and once for
// every further way.

#include <map>

#include "bind_truncated_svd_cuda.h"

namespace fedkd_fast::bind::on_gpu_half {
namespace {

constexpr double kOversampling = 1.15;
// Of the short side; beyond, all eigenvectors are cheaper.
constexpr double kMostDirections = 0.5;
// Small problems up to this side stay in shared memory, so wider ones get batches of their own.
constexpr int64_t kNarrow = 96;

// Of every matrix; an enqueued look, that nothing has waited for.
Tensor scan(std::vector<Job>& jobs, int64_t count, cudaStream_t stream) {
  static_assert(sizeof(cuda::MatrixFacts) == 2 * sizeof(double));
  const Tensor& anchor = jobs[0].matrix;
  Tensor facts = empty_like_device(anchor, {count, 2}, ScalarType::Double);
  std::map<ScalarType, std::vector<std::vector<Job*>>> lists;
  for (Job& job : jobs) {
    auto& of_type = lists[job.matrix.scalar_type()];
    if (of_type.empty() || of_type.back().size() == cuda::kMostMatrices) of_type.emplace_back();
    of_type.back().push_back(&job);
  }
  Tensor parts =
      empty_like_device(anchor, {cuda::kMostMatrices, cuda::kScanParts, 2}, ScalarType::Double);
  for (const auto& [type, of_type] : lists)
    for (const std::vector<Job*>& list : of_type)
      with_type(list[0]->matrix, [&](auto zero) {
        check_launch(cuda::scan_matrices(
            list_of<decltype(zero)>(list), parts.mutable_data_ptr<double>(),
            reinterpret_cast<cuda::MatrixFacts*>(facts.mutable_data_ptr<double>()), stream));
      });
  return facts;
}

const cuda::MatrixFacts* facts_in(const Tensor& tensor) {
  return reinterpret_cast<const cuda::MatrixFacts*>(tensor.const_data_ptr<double>());
}

// How wide a subspace a matrix with this sum of squares wants, judged by an earlier one; 0 where
// the optimal rank is promised, where nothing is known, and where it would be too wide.
int64_t width_of(const Job& job, double squares) {
  const int64_t side = job.side();
  if (job.matrix.scalar_type() != ScalarType::Float || !job.earlier.shares || !(squares > 0.0))
    return 0;
  const Goal goal(job.wanted, squares, 0, job.rows(), job.cols());
  if (!goal.leaves_room(squares, side)) return 0;
  const double* shares = job.earlier.shares->const_data_ptr<double>();
  std::vector<double> energies(shares, shares + job.earlier.shares->size(0));
  for (double& energy : energies) energy *= squares;
  const int64_t rank = goal.predict(energies, static_cast<int64_t>(energies.size()), squares, side);
  const int64_t width = width_for(rank, kOversampling);
  return static_cast<double>(width) <= kMostDirections * static_cast<double>(side) ? width : 0;
}

void choose_way(Job& job, double squares) {
  job.width = width_of(job, squares);
  if (job.matrix.scalar_type() == ScalarType::Float)
    job.way = job.width > 0 ? Way::kSubspace : Way::kGram;
}

// Those that wait for nothing come first.
std::vector<std::vector<Job*>> grouped(const std::vector<Job*>& jobs) {
  std::map<std::tuple<Way, bool, ScalarType, int64_t, int64_t>, std::vector<Job*>> alike;
  for (Job* job : jobs)
    alike[{job->way, job->width > kNarrow, job->matrix.scalar_type(), job->rows(), job->cols()}]
        .push_back(job);
  std::vector<std::vector<Job*>> groups;
  for (const auto& [key, members] : alike)
    for (size_t first = 0; first < members.size(); first += cuda::kMostMatrices) {
      const size_t end = std::min<size_t>(members.size(), first + cuda::kMostMatrices);
      groups.emplace_back(members.begin() + static_cast<std::ptrdiff_t>(first),
                          members.begin() + static_cast<std::ptrdiff_t>(end));
    }
  return groups;
}

// Goes one way with each of the jobs; returns those that have to go the next one.
std::vector<Job*> go(const std::vector<Job*>& jobs, const cuda::MatrixFacts* facts, uint64_t seed,
                     cudaStream_t stream, std::vector<Factors>& factors) {
  std::vector<Batch> batches;
  int64_t report_values = 0;
  for (std::vector<Job*>& group : grouped(jobs)) {
    batches.emplace_back(std::move(group), facts, seed, stream);
    report_values += batches.back().report_values();
  }
  Tensor reports = empty_like_device(jobs[0]->matrix, {report_values}, ScalarType::Double);
  double* place = reports.mutable_data_ptr<double>();
  for (Batch& batch : batches) {
    batch.solve(place);
    place += batch.report_values();
  }
  const Tensor host = on_host(reports);  // waits
  const double* report = host.const_data_ptr<double>();
  size_t bad = factors.size();
  for (const Batch& batch : batches) {
    bad = std::min(bad, batch.first_not_finite(report));
    report += batch.report_values();
  }
  STD_TORCH_CHECK(bad == factors.size(), "matrix ", bad, " holds NaN or Inf");
  std::vector<Job*> left;
  report = host.const_data_ptr<double>();
  for (Batch& batch : batches) {
    for (Job* job : batch.finish(report, factors)) left.push_back(job);
    report += batch.report_values();
  }
  return left;
}

}  // namespace

std::vector<Factors> truncated_svd(const std::vector<Tensor>& matrices,
                                   const std::vector<Wanted>& wanted,
                                   const std::vector<Earlier>& earlier, int64_t seed) {
  const GpuScope gpu(matrices[0]);
  std::vector<Factors> factors;
  std::vector<Job> jobs;
  for (size_t i = 0; i < matrices.size(); ++i) {
    factors.push_back(empty_factors(matrices[i], 0));
    if (matrices[i].numel() > 0)
      jobs.push_back({i, torch::stable::contiguous(matrices[i]), wanted[i], earlier[i]});
  }
  if (jobs.empty()) return factors;
  const Tensor facts = scan(jobs, static_cast<int64_t>(matrices.size()), gpu.stream);
  // A share of the energy needs no norm.
  const StopBy by = wanted[0].by;
  std::optional<Tensor> known;
  if (by == StopBy::kError || by == StopBy::kFloor) known = on_host(facts);
  std::vector<Job*> open;
  for (Job& job : jobs) {
    choose_way(job, known ? facts_in(*known)[job.number].squares : 1.0);
    open.push_back(&job);
  }
  while (!open.empty())
    open = go(open, facts_in(facts), static_cast<uint64_t>(seed), gpu.stream, factors);
  return factors;
}

}  // namespace fedkd_fast::bind::on_gpu_half
