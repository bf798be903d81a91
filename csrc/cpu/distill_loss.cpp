// Mutual distillation loss on the CPU: both cross entropies, both divergences and both gradients.
//
// Three sweeps over a row: its maxima, its sums (common/distill_loss.h), its gradients. The
// exponentials of the second are kept for the third where they are all that it needs: in scratch
// that stays in L2 while a row is worked on, or, where gradients wait for a mean over all rows, in
// the gradients themselves if the last cache holds these. Rows of few classes are computed one in
// each lane. Gradients too large for the caches are written around them. fp32 and 16-bit storage
// run on vectors with their own exponential; fp64 exists for gradient checks and is plain scalar
// code. Rows are independent: results do not depend on the number of threads, only on the
// instruction set.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/distill_loss_rows.h"
#include "cpu/vectors.h"

namespace fedkd_fast::cpu {
namespace {

// 2^r on [-1/2, 1/2].
constexpr float kExp2[] = {1.0f,           0.6931469776f,  0.2402224209f,
                           0.05550733743f, 0.00967151264f, 0.001326472714f};

}  // namespace

// The vector rows, compiled once per instruction set; templates and inline functions above keep the
// baseline and may be inlined into any of them.
#ifdef FEDKD_X86_VECTORS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define FEDKD_ISA avx512
#define FEDKD_LANES 16
#define FEDKD_FMA(a, b, c) (Vector) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define FEDKD_STREAM(to, value) _mm512_stream_ps(to, (__m512)(value))
#define FEDKD_STREAM_HALVES(to, value) \
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)(value))
#include "cpu/distill_loss_rows.inc"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FEDKD_ISA avx2
#define FEDKD_LANES 8
#define FEDKD_FMA(a, b, c) (Vector) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define FEDKD_STREAM(to, value) _mm256_stream_ps(to, (__m256)(value))
#define FEDKD_STREAM_HALVES(to, value) \
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)(value))
#include "cpu/distill_loss_rows.inc"
#pragma GCC pop_options
#endif

#define FEDKD_ISA baseline
#define FEDKD_LANES 4
#define FEDKD_FMA(a, b, c) ((a) * (b) + (c))
#define FEDKD_STREAM(to, value) store(to, value)
#define FEDKD_STREAM_HALVES(to, value) std::memcpy(to, &(value), sizeof(value))
#include "cpu/distill_loss_rows.inc"

namespace {

struct Kernels {
  void (*rows)(const DistillLossArgs&, float*, int64_t, int64_t);
  void (*gradients)(const DistillLossArgs&, const DistillMeans&, int64_t, int64_t);
};

template <typename Storage>
Kernels choose_kernels() {
#ifdef FEDKD_X86_VECTORS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {avx512::rows<Storage>, avx512::gradients<Storage>};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {avx2::rows<Storage>, avx2::gradients<Storage>};
#endif
  return {baseline::rows<Storage>, baseline::gradients<Storage>};
}

template <typename Storage>
const Kernels& kernels() {
  static const Kernels chosen = choose_kernels<Storage>();
  return chosen;
}

template <typename Real>
DistillMeans mean_rows(const DistillLossArgs& args) {
  Real* const statistics = static_cast<Real*>(args.statistics);
  Real* const denominator = statistics + 4 * args.rows;
  DistillMeans means{};
  double weights = 0.0;
  const auto at = [&](int field, int64_t row) {
    return double{statistics[field * args.rows + row]};
  };
  for (int64_t row = 0; row < args.rows; ++row) {
    if (row_status(args, row) == RowStatus::kIgnored) continue;
    const double weight = row_weight(args, row);
    weights += weight;
    means.denominator += weight * denominator[row];
    means.denominator_grad += weight * row_denominator_grad<Real>(args, row);
    for (int model = 0; model < 2; ++model) {
      means.task[model] += weight * at(model, row);
      means.numerator[model] += weight * at(2 + model, row);
      means.divergence[model] += weight * at(2 + model, row) / denominator[row];
    }
  }
  means.inverse_weight = weights > 0.0 ? 1.0 / weights : std::isnan(weights) ? weights : 0.0;
  for (double* value :
       {&means.task[0], &means.task[1], &means.divergence[0], &means.divergence[1],
        &means.denominator, &means.denominator_grad, &means.numerator[0], &means.numerator[1]})
    *value *= means.inverse_weight;
  for (int model = 0; model < 2; ++model) {
    means.task[model] *= args.mode.task;
    means.numerator[model] *= args.mode.divergence;
    means.divergence[model] *= args.mode.divergence;
  }
  if (args.mode.batch()) {
    const double common = at_least(means.denominator, kDenominatorFloor);
    for (int model = 0; model < 2; ++model)
      means.divergence[model] = means.numerator[model] / common;
    for (int64_t row = 0; row < args.rows; ++row)
      if (row_status(args, row) != RowStatus::kIgnored)
        denominator[row] = static_cast<Real>(common);
  }
  return means;
}

}  // namespace

LabelScan scan_labels(const DistillLossArgs& args) {
  LabelScan scan{-1, -1, 0.0};
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t label = args.labels[row * args.label_stride];
    const double weight = row_weight(args, row);
    if (scan.first_bad_weight < 0 && !(weight >= 0.0 && std::isfinite(weight)))
      scan.first_bad_weight = row;
    if (label == args.ignore_index) continue;
    scan.weight += weight;
    if (scan.first_bad_label < 0 && (label < 0 || label >= args.classes))
      scan.first_bad_label = row;
  }
  return scan;
}

int64_t distill_loss_scratch(const DistillLossArgs& args) {
  const bool stashes = args.type != FloatType::kFloat64 && args.classes > kLaneClasses &&
                       args.grad_mentor != nullptr && args.states == nullptr && args.mode.plain();
  return stashes ? 2 * stash_stride(args.classes) : 0;
}

void distill_loss(const DistillLossArgs& args, float* scratch, int64_t begin, int64_t end) {
  switch (args.type) {
    case FloatType::kFloat64:
      return double_rows(args, begin, end);
    case FloatType::kFloat32:
      return kernels<float>().rows(args, scratch, begin, end);
    case FloatType::kBFloat16:
      return kernels<BFloat16>().rows(args, scratch, begin, end);
    case FloatType::kFloat16:
      return kernels<Float16>().rows(args, scratch, begin, end);
  }
}

void distill_loss_gradients(const DistillLossArgs& args, const DistillMeans& means, int64_t begin,
                            int64_t end) {
  switch (args.type) {
    case FloatType::kFloat64:
      return double_gradients(args, means, begin, end);
    case FloatType::kFloat32:
      return kernels<float>().gradients(args, means, begin, end);
    case FloatType::kBFloat16:
      return kernels<BFloat16>().gradients(args, means, begin, end);
    case FloatType::kFloat16:
      return kernels<Float16>().gradients(args, means, begin, end);
  }
}

DistillMeans mean_distill_loss(const DistillLossArgs& args) {
  return args.type == FloatType::kFloat64 ? mean_rows<double>(args) : mean_rows<float>(args);
}

}  // namespace fedkd_fast::cpu
