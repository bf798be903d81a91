// Every CUDA kernel on the simt engine against its CPU kernel, for sanitizer builds: sizes with
// ragged edges, one block and several. Prints one line a case; exits with 1 where results differ.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/half.h"
#include "common/quantise.h"
#include "kernels.h"
#include "simt_cases.h"

namespace {

using namespace fedkd_fast;
using namespace simt_cases;

// Rows of all widths, so that every shift of the bit stream occurs.
void pack_and_unpack(int64_t rank, int64_t count) {
  const std::vector<float> values = normal(rank * count, 1);
  std::vector<float> scale;
  std::vector<uint8_t> bits;
  std::vector<int64_t> offsets{0};
  for (int64_t k = 0; k < rank; ++k) {
    bits.push_back(static_cast<uint8_t>(k % (kMaxCodeBits + 1)));
    scale.push_back(0.3f / static_cast<float>(1 + k));
    offsets.push_back(offsets.back() + packed_bytes(count, bits.back()));
  }
  const auto bytes = static_cast<size_t>(offsets.back());
  std::vector<uint8_t> here(bytes, 0xee), there(bytes, 0x11);
  cpu::pack_factors(values.data(), count, count, scale.data(), bits.data(), offsets.data(),
                    here.data(), 0, rank);
  const cudaError_t packed = cuda::pack_factors(values.data(), count, rank, count, scale.data(),
                                                bits.data(), offsets.data(), there.data(), nullptr);
  report("pack_factors " + text({rank, count}), packed == cudaSuccess && here == there);
  std::vector<float> back(values.size(), 1.0f), other(values.size(), 2.0f);
  cpu::unpack_factors(here.data(), count, scale.data(), bits.data(), offsets.data(), back.data(), 0,
                      rank);
  const cudaError_t unpacked = cuda::unpack_factors(
      here.data(), rank, count, scale.data(), bits.data(), offsets.data(), other.data(), nullptr);
  report("unpack_factors " + text({rank, count}), unpacked == cudaSuccess && back == other);
}

void reconstruct(int64_t rank, int64_t rows, int64_t cols) {
  const std::vector<float> left = normal(rank * rows, 2), right = normal(rank * cols, 3);
  std::vector<float> here(static_cast<size_t>(rows * cols)), there(here.size(), 7.0f);
  cpu::reconstruct(left.data(), right.data(), rank, rows, cols, here.data(), 0, rows);
  const cudaError_t error =
      cuda::reconstruct(left.data(), right.data(), rank, rows, cols, there.data(), nullptr);
  report("reconstruct " + text({rank, rows, cols}), error == cudaSuccess && here == there);
}

// A joint loss with everything in it, so that every term of the formulas occurs.
DistillMode full_mode(Denominator denominator) {
  return {denominator, denominator != Denominator::kConstant, true, true, 0.5, 2.0, 1.5, 0.1};
}
constexpr DistillMode kPlainMode{Denominator::kSample, false, false, false, 1.0, 1.0, 1.0, 0.0};

template <typename Storage>
void distill_loss(FloatType type, int64_t rows, int64_t classes, const DistillMode& mode) {
  using Real = typename Compute<Storage>::type;
  const auto logits = [&](unsigned seed) {
    std::vector<Storage> stored;
    for (const float value : normal(rows * classes, seed)) {
      stored.emplace_back();
      store_value(&stored.back(), static_cast<Real>(value));
    }
    return stored;
  };
  const std::vector<Storage> mentor = logits(4), mentee = logits(5);
  std::vector<int64_t> labels;
  std::vector<Real> weights;
  for (int64_t row = 0; row < rows; ++row) {
    labels.push_back(row % 5 == 3 ? -100 : row * 7 % classes);
    weights.push_back(static_cast<Real>(row % 4));
  }
  const auto cells = static_cast<size_t>(rows * classes);
  struct Result {
    std::vector<Real> statistics, states, total, summary;
    std::vector<Storage> grad_mentor, grad_mentee;
  };
  const auto empty = [&] {
    return Result{std::vector<Real>(static_cast<size_t>(5 * rows)),
                  std::vector<Real>(static_cast<size_t>(kRowStates * rows)),
                  std::vector<Real>(1),
                  std::vector<Real>(kDistillSummary),
                  std::vector<Storage>(cells),
                  std::vector<Storage>(cells)};
  };
  Result here = empty(), there = empty();
  DistillLossArgs args{};
  args.type = type;
  args.mentor_logits = mentor.data();
  args.mentee_logits = mentee.data();
  args.labels = labels.data();
  args.weights = rows > 1 ? weights.data() : nullptr;
  args.denominator_grad = rows > 1 && !mode.constant() ? weights.data() : nullptr;
  args.rows = rows;
  args.classes = args.mentor_stride = args.mentee_stride = classes;
  args.label_stride = 1;
  args.ignore_index = -100;
  args.mode = mode;
  args.gradient_scale = 1.0;
  const auto point_at = [&args](Result& result) {
    args.statistics = result.statistics.data();
    args.states = args.mode.batch() ? result.states.data() : nullptr;
    args.grad_mentor = result.grad_mentor.data();
    args.grad_mentee = result.grad_mentee.data();
  };
  point_at(here);
  std::vector<float> scratch(static_cast<size_t>(cpu::distill_loss_scratch(args)));
  cpu::distill_loss(args, scratch.empty() ? nullptr : scratch.data(), 0, rows);
  const DistillMeans means = cpu::mean_distill_loss(args);
  if (mode.batch()) cpu::distill_loss_gradients(args, means, 0, rows);
  store_summary(means, means.inverse_weight, here.total.data(), here.summary.data());
  point_at(there);
  DistillMeans other{};
  const cudaError_t error =
      cuda::distill_loss(args, &other, there.total.data(), there.summary.data(), nullptr);
  // The order of a row's sum differs; one step of the storage type for what is stored in 16 bits.
  const double step = sizeof(Storage) == 2 ? 1.0 / 128 : sizeof(Real) == 4 ? 1e-5 : 1e-13;
  bool near = error == cudaSuccess;
  const auto differ = [&](double x, double y) {
    return !(std::abs(x - y) <= step * (1 + std::abs(x)));
  };
  const auto compare = [&](const auto& a, const auto& b) {
    for (size_t i = 0; i < a.size(); ++i)
      near &= !differ(static_cast<double>(load_value(a[i])), static_cast<double>(load_value(b[i])));
  };
  compare(here.statistics, there.statistics);
  compare(here.grad_mentor, there.grad_mentor);
  compare(here.grad_mentee, there.grad_mentee);
  compare(here.total, there.total);
  compare(here.summary, there.summary);
  report("distill_loss " + text({rows, classes, static_cast<int64_t>(sizeof(Storage)),
                                 static_cast<int64_t>(mode.denominator)}),
         near);
}

template <typename Storage>
void layer_mse(FloatType type, int64_t samples, int64_t groups, int64_t positions, int64_t values,
               bool masked) {
  using Real = typename Compute<Storage>::type;
  LayerMseArgs args{};
  args.type = type;
  args.samples = samples;
  args.groups = groups;
  args.positions = positions;
  args.values = values;
  args.masks_values = masked && positions == values;
  const int64_t cells = samples * groups * positions * values;
  const auto stored = [&](unsigned seed) {
    std::vector<Storage> narrow(static_cast<size_t>(cells));
    const std::vector<float> wide = normal(cells, seed);
    for (size_t i = 0; i < narrow.size(); ++i) store_value(&narrow[i], static_cast<Real>(wide[i]));
    return narrow;
  };
  const std::vector<Storage> mentor = stored(6), mentee = stored(7);
  const std::vector<Real> scale(static_cast<size_t>(samples), Real(0.5));
  std::vector<uint8_t> mask(static_cast<size_t>(samples * positions));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 1;
  args.mentor = mentor.data();
  args.mentee = mentee.data();
  args.scale = scale.data();
  args.mask = masked ? mask.data() : nullptr;
  const int64_t blocks = samples * groups * layer_mse_blocks(args);
  struct Result {
    std::vector<double> sums;
    std::vector<Real> total, errors;
    std::vector<Storage> grad_mentor, grad_mentee;
  };
  const auto empty = [&] {
    return Result{std::vector<double>(static_cast<size_t>(blocks)), std::vector<Real>(1),
                  std::vector<Real>(static_cast<size_t>(samples)), mentor, mentee};
  };
  const auto point_at = [&args](Result& result) {
    args.sums = result.sums.data();
    args.total = result.total.data();
    args.errors = result.errors.data();
    args.grad_mentor = result.grad_mentor.data();
    args.grad_mentee = result.grad_mentee.data();
  };
  Result here = empty(), there = empty();
  point_at(here);
  cpu::layer_mse(args, 0, blocks);
  cpu::mean_layer_mse(args);
  point_at(there);
  bool same = cuda::layer_mse(args, nullptr) == cudaSuccess;
  const auto near = [](Real x, Real y) { return std::abs(x - y) <= Real(1e-5) * x; };
  same &= near(here.total[0], there.total[0]);  // the order of a sum differs
  same &= std::equal(here.errors.begin(), here.errors.end(), there.errors.begin(), near);
  const size_t bytes = mentor.size() * sizeof(Storage);
  same &= std::memcmp(here.grad_mentor.data(), there.grad_mentor.data(), bytes) == 0;
  const auto equal = [](Storage a, Storage b) { return load_value(a) == load_value(b); };
  same &= std::equal(here.grad_mentee.begin(), here.grad_mentee.end(), there.grad_mentee.begin(),
                     equal);
  report("layer_mse " + text({samples, groups, positions, values,
                              static_cast<int64_t>(sizeof(Storage)), masked}),
         same);
}

}  // namespace

int main() {
  for (const int64_t count : {1, 7, 8, 1023, 1025}) pack_and_unpack(18, count);
  pack_and_unpack(300, 9);  // more rows than one launch takes
  reconstruct(3, 5, 7);
  reconstruct(4, 2, 130);
  reconstruct(0, 3, 3);
  reconstruct(17, 66, 70);  // more than a tile takes, on all sides
  // A warp owns a row up to 1024 classes, a block beyond.
  for (const int64_t rows : {1, 9}) {
    distill_loss<float>(FloatType::kFloat32, rows, 33, kPlainMode);
    distill_loss<float>(FloatType::kFloat32, rows, 33, full_mode(Denominator::kBatch));
    distill_loss<double>(FloatType::kFloat64, rows, 2, full_mode(Denominator::kSample));
    distill_loss<float>(FloatType::kFloat32, rows, 20, full_mode(Denominator::kConstant));
    distill_loss<BFloat16>(FloatType::kBFloat16, rows, 31, kPlainMode);
    distill_loss<Float16>(FloatType::kFloat16, rows, 1, kPlainMode);
  }
  for (const int64_t rows : {1, 3}) {
    distill_loss<float>(FloatType::kFloat32, rows, 1031, kPlainMode);
    distill_loss<double>(FloatType::kFloat64, rows, 1025, full_mode(Denominator::kBatch));
  }
  distill_loss<float>(FloatType::kFloat32, 260, 1, kPlainMode);
  for (const bool masked : {false, true}) {
    layer_mse<float>(FloatType::kFloat32, 3, 2, 36, 36, masked);
    layer_mse<float>(FloatType::kFloat32, 2, 1, 300, 130, masked);
    layer_mse<double>(FloatType::kFloat64, 2, 1, 5, 17, masked);
    layer_mse<BFloat16>(FloatType::kBFloat16, 3, 3, 24, 24, masked);
    layer_mse<Float16>(FloatType::kFloat16, 2, 2, 7, 7, masked);
  }
  rans_cases();
  truncated_svd_cases();
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
