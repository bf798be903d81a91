// Mutual distillation loss on the CPU: both cross entropies, both divergences and both gradients.
//
// One online pass over a row in blocks that stay in L1 (common/distill_loss.h), then one pass that
// writes the gradients. fp32 runs on vectors with its own exponential; the exponentials of the
// first pass are kept in the gradient rows, so that the second pass has none to compute. 16-bit
// rows are widened block by block and keep their exponentials only where one block holds the whole
// row. fp64 exists for gradient checks and is plain scalar code. Rows are independent: results do
// not depend on the number of threads, only on the instruction set.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/distill_loss.h"
#include "common/half.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FEDKD_X86_VECTORS
#include <immintrin.h>
#endif

namespace fedkd_fast::cpu {
namespace {

constexpr int64_t kBlock = 1024;      // classes per block: 8 KiB of logits, 8 KiB of exponentials
constexpr int64_t kMaxBlocks = 256;   // rows of more classes take longer blocks
constexpr int64_t kDoubleBlock = 64;  // sums of sums, whose rounding grows slower

// What a kernel needs of the arguments, with its own types.
template <typename Storage>
struct Row {
  using Real = typename Compute<Storage>::type;

  Row(const DistillLossArgs& args, int64_t row)
      : mentor(static_cast<const Storage*>(args.mentor_logits) + row * args.mentor_stride),
        mentee(static_cast<const Storage*>(args.mentee_logits) + row * args.mentee_stride),
        grad_mentor(static_cast<Storage*>(args.grad_mentor) + row * args.classes),
        grad_mentee(static_cast<Storage*>(args.grad_mentee) + row * args.classes),
        label(args.labels[row * args.label_stride]) {}

  const Storage* mentor;
  const Storage* mentee;
  Storage* grad_mentor;
  Storage* grad_mentee;
  int64_t label;
};

template <typename Storage>
void fill_row(const DistillLossArgs& args, const Row<Storage>& row,
              typename Compute<Storage>::type value) {
  for (int64_t j = 0; j < args.classes; ++j) store_value(row.grad_mentor + j, value);
  for (int64_t j = 0; j < args.classes; ++j) store_value(row.grad_mentee + j, value);
}

// Rows without a loss: true when the row is finished.
template <typename Storage>
bool finish_unlabelled(const DistillLossArgs& args, const Row<Storage>& row, int64_t index) {
  using Real = typename Compute<Storage>::type;
  if (row.label == args.ignore_index) {
    const Real zero(0);
    store_row_loss(static_cast<Real*>(args.statistics), args.rows, index,
                   RowLoss<Real>{zero, zero, zero, zero, Real(1)});
    fill_row(args, row, zero);
    return true;
  }
  if (row.label < 0 || row.label >= args.classes) {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    store_row_loss(static_cast<Real*>(args.statistics), args.rows, index,
                   RowLoss<Real>{nan, nan, nan, nan, nan});
    fill_row(args, row, nan);
    return true;
  }
  return false;
}

// Statistics, then the two gradient elements at the label; returns the factors of all others.
template <typename Storage>
GradientFactors<typename Compute<Storage>::type> finish_row(
    const DistillLossArgs& args, const Row<Storage>& row, int64_t index,
    const PairState<typename Compute<Storage>::type>& state) {
  using Real = typename Compute<Storage>::type;
  const RowLoss<Real> loss =
      row_loss(state, load_value(row.mentor[row.label]), load_value(row.mentee[row.label]));
  store_row_loss(static_cast<Real*>(args.statistics), args.rows, index, loss);
  return gradient_factors(state, loss, static_cast<Real>(args.gradient_scale));
}

template <typename Storage>
void store_label(const Row<Storage>& row,
                 const GradientFactors<typename Compute<Storage>::type>& factors) {
  store_value(row.grad_mentor + row.label, factors.mentor_label);
  store_value(row.grad_mentee + row.label, factors.mentee_label);
}

void double_rows(const DistillLossArgs& args, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Row<double> row(args, index);
    if (finish_unlabelled(args, row, index)) continue;
    PairState<double> state = empty_pair<double>();
    for (int64_t first = 0; first < args.classes; first += kDoubleBlock) {
      PairState<double> part = empty_pair<double>();
      for (int64_t j = first; j < std::min(first + kDoubleBlock, args.classes); ++j)
        part = merge(part, single_class(row.mentor[j], row.mentee[j]));
      state = merge(state, part);
    }
    const GradientFactors<double> factors = finish_row(args, row, index, state);
    for (int64_t j = 0; j < args.classes; ++j) {
      const double mentor = std::exp(row.mentor[j] - state.mentor.max);
      const double mentee = std::exp(row.mentee[j] - state.mentee.max);
      row.grad_mentor[j] = mentor * factors.mentor_own - mentee * factors.mentor_peer;
      row.grad_mentee[j] = mentee * factors.mentee_own - mentor * factors.mentee_peer;
    }
    store_label(row, factors);
  }
}

}  // namespace

// The vector rows, compiled once per instruction set; templates and inline functions above keep the
// baseline and may be inlined into any of them.
#ifdef FEDKD_X86_VECTORS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define FEDKD_ISA avx512
#define FEDKD_LANES 16
#define FEDKD_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "cpu/distill_loss_rows.inc"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FEDKD_ISA avx2
#define FEDKD_LANES 8
#define FEDKD_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "cpu/distill_loss_rows.inc"
#pragma GCC pop_options
#endif

#define FEDKD_ISA baseline
#define FEDKD_LANES 4
#define FEDKD_FMA(a, b, c) ((a) * (b) + (c))
#include "cpu/distill_loss_rows.inc"

namespace {

template <typename Storage>
using RowsKernel = void (*)(const DistillLossArgs&, int64_t, int64_t);

template <typename Storage>
RowsKernel<Storage> choose_rows() {
#ifdef FEDKD_X86_VECTORS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::vector_rows<Storage>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2::vector_rows<Storage>;
#endif
  return baseline::vector_rows<Storage>;
}

template <typename Storage>
void run_rows(const DistillLossArgs& args, int64_t begin, int64_t end) {
  static const RowsKernel<Storage> rows = choose_rows<Storage>();
  rows(args, begin, end);
}

template <typename Real>
void mean_rows(const DistillLossArgs& args, double means[3]) {
  const Real* ce_mentor = static_cast<const Real*>(args.statistics);
  const Real* ce_mentee = ce_mentor + args.rows;
  const Real* kl_mentor = ce_mentee + args.rows;
  const Real* kl_mentee = kl_mentor + args.rows;
  const Real* denominator = kl_mentee + args.rows;
  double mentor = 0.0, mentee = 0.0;
  int64_t count = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    count += args.labels[row * args.label_stride] != args.ignore_index;
    mentor += double{ce_mentor[row]} + double{kl_mentor[row]} / double{denominator[row]};
    mentee += double{ce_mentee[row]} + double{kl_mentee[row]} / double{denominator[row]};
  }
  means[2] = count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
  means[0] = mentor * means[2];
  means[1] = mentee * means[2];
}

}  // namespace

LabelScan scan_labels(const DistillLossArgs& args) {
  LabelScan scan{-1, 0};
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t label = args.labels[row * args.label_stride];
    if (label == args.ignore_index) continue;
    ++scan.counted;
    if (scan.first_bad < 0 && (label < 0 || label >= args.classes)) scan.first_bad = row;
  }
  return scan;
}

void distill_loss(const DistillLossArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case LogitType::kFloat64:
      return double_rows(args, begin, end);
    case LogitType::kFloat32:
      return run_rows<float>(args, begin, end);
    case LogitType::kBFloat16:
      return run_rows<BFloat16>(args, begin, end);
    case LogitType::kFloat16:
      return run_rows<Float16>(args, begin, end);
  }
}

void mean_distill_loss(const DistillLossArgs& args, double means[3]) {
  if (args.type == LogitType::kFloat64)
    mean_rows<double>(args, means);
  else
    mean_rows<float>(args, means);
}

}  // namespace fedkd_fast::cpu
