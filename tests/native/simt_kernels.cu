// Every CUDA kernel on the simt engine against its CPU kernel, for sanitizer builds: sizes with
// ragged edges, one block and several. Prints one line a case; exits with 1 where results differ.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/half.h"
#include "common/quantise.h"
#include "common/truncated_svd.h"
#include "kernels.h"

namespace {

using namespace fedkd_fast;

int failures = 0;

void report(const std::string& name, bool right) {
  std::printf("%s %s\n", right ? "ok  " : "FAIL", name.c_str());
  std::fflush(stdout);
  failures += right ? 0 : 1;
}

std::string text(std::initializer_list<int64_t> sizes) {
  std::string joined;
  for (const int64_t size : sizes) joined += (joined.empty() ? "" : "x") + std::to_string(size);
  return joined;
}

std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = distribution(generator);
  return values;
}

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

template <typename Storage>
void distill_loss(LogitType type, int64_t rows, int64_t classes) {
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
  for (int64_t row = 0; row < rows; ++row)
    labels.push_back(row % 5 == 3 ? -100 : row * 7 % classes);
  const auto cells = static_cast<size_t>(rows * classes);
  struct Result {
    std::vector<Real> statistics, means;
    std::vector<Storage> grad_mentor, grad_mentee;
  };
  const auto empty = [&] {
    return Result{std::vector<Real>(static_cast<size_t>(5 * rows)), std::vector<Real>(3),
                  std::vector<Storage>(cells), std::vector<Storage>(cells)};
  };
  Result here = empty(), there = empty();
  DistillLossArgs args{};
  args.type = type;
  args.mentor_logits = mentor.data();
  args.mentee_logits = mentee.data();
  args.labels = labels.data();
  args.rows = rows;
  args.classes = args.mentor_stride = args.mentee_stride = classes;
  args.label_stride = 1;
  args.ignore_index = -100;
  args.gradient_scale = 1.0;
  const auto point_at = [&args](Result& result) {
    args.statistics = result.statistics.data();
    args.grad_mentor = result.grad_mentor.data();
    args.grad_mentee = result.grad_mentee.data();
  };
  point_at(here);
  cpu::distill_loss(args, 0, rows);
  double means[3];
  cpu::mean_distill_loss(args, means);
  for (size_t i = 0; i < 3; ++i) here.means[i] = static_cast<Real>(means[i]);
  point_at(there);
  const cudaError_t error =
      cuda::distill_loss(args, &there.means[0], &there.means[1], &there.means[2], nullptr);
  // The order of a row's sum differs; one step of the storage type for what is stored in 16 bits.
  const double step = sizeof(Storage) == 2 ? 1.0 / 128 : sizeof(Real) == 4 ? 1e-5 : 1e-13;
  bool near = error == cudaSuccess;
  const auto compare = [&](const auto& a, const auto& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      const auto x = static_cast<double>(load_value(a[i]));
      near &= std::abs(x - static_cast<double>(load_value(b[i]))) <= step * (1e-2 + std::abs(x));
    }
  };
  compare(here.statistics, there.statistics);
  compare(here.means, there.means);
  compare(here.grad_mentor, there.grad_mentor);
  compare(here.grad_mentee, there.grad_mentee);
  report("distill_loss " + text({rows, classes, static_cast<int64_t>(sizeof(Storage))}), near);
}

// Matrices: ordinary, zero, holding NaN, subnormal, huge.
template <typename Scalar>
void scan_and_scale(int64_t rows, int64_t cols) {
  constexpr int64_t kBatch = 5;
  const int64_t size = rows * cols;
  std::vector<Scalar> matrices;
  for (const float value : normal(kBatch * size, 6)) matrices.push_back(static_cast<Scalar>(value));
  for (int64_t i = 0; i < size; ++i) {
    const auto at = static_cast<size_t>(i);
    const auto stride = static_cast<size_t>(size);
    matrices[stride + at] = 0;
    matrices[3 * stride + at] *= std::numeric_limits<Scalar>::min() / 64;
    matrices[4 * stride + at] *= std::numeric_limits<Scalar>::max() / 64;
  }
  matrices[static_cast<size_t>(3 * size - 1)] = std::numeric_limits<Scalar>::quiet_NaN();
  std::vector<int> exponents(kBatch), states(kBatch);
  std::vector<double> here(static_cast<size_t>(size)), there(static_cast<size_t>(kBatch * size));
  bool right = cuda::scan_matrices(matrices.data(), kBatch, size, exponents.data(), states.data(),
                                   nullptr) == cudaSuccess &&
               cuda::scale_matrices(matrices.data(), kBatch, size, exponents.data(), there.data(),
                                    nullptr) == cudaSuccess;
  for (int64_t b = 0; b < kBatch; ++b) {
    const Scalar* const matrix = matrices.data() + b * size;
    std::vector<uint8_t> used(static_cast<size_t>(rows));
    const MatrixScan scan = cpu::scan_matrix(matrix, rows, cols, used.data());
    const auto state = static_cast<cuda::MatrixState>(states[static_cast<size_t>(b)]);
    right &= scan.finite == (state != cuda::MatrixState::kNotFinite) &&
             scan.zero == (state == cuda::MatrixState::kZero);
    if (!scan.finite) continue;
    right &= scan.exponent == exponents[static_cast<size_t>(b)];
    cpu::widen_matrix(matrix, size, scan.exponent, here.data());
    right &= std::equal(here.begin(), here.end(), there.begin() + b * size);
  }
  report("scan_matrices, scale_matrices " + text({rows, cols, sizeof(Scalar)}), right);
}

void select_ranks(int64_t batch, int64_t count, int64_t wanted_rank) {
  std::vector<double> ascending(static_cast<size_t>(batch * count));
  std::vector<int> states(static_cast<size_t>(batch)), unfit(states.size(), -1);
  for (int64_t b = 0; b < batch; ++b) {
    states[static_cast<size_t>(b)] = b % 3 == 2 ? static_cast<int>(cuda::MatrixState::kZero) : 0;
    for (int64_t k = 0; k < count; ++k)
      ascending[static_cast<size_t>(b * count + k)] =
          std::pow(static_cast<double>(count - k), -0.5 - static_cast<double>(b % 7));
  }
  std::vector<int64_t> ranks(states.size(), -1);
  std::vector<double> energies(2 * states.size());
  bool right = cuda::select_ranks(ascending.data(), batch, count, states.data(), 0.9, wanted_rank,
                                  ranks.data(), energies.data(), unfit.data(), nullptr) == 0;
  for (int64_t b = 0; b < batch; ++b) {
    const auto at = [&](int64_t k) {
      return ascending[static_cast<size_t>(b * count + count - 1 - k)];
    };
    double total = 0.0;
    for (int64_t k = 0; k < count; ++k) total += at(k);
    const bool zero = states[static_cast<size_t>(b)] != 0;
    const int64_t expected = zero               ? 0
                             : wanted_rank >= 0 ? std::min(wanted_rank, count)
                                                : select_rank(at, count, total, 0.9);
    right &= ranks[static_cast<size_t>(b)] == expected;
    const bool steep = expected > 0 && !(at(expected - 1) > kGramFloor * at(0));
    right &= unfit[static_cast<size_t>(b)] == (steep ? 1 : 0);
    right &= energies[static_cast<size_t>(2 * b + 1)] == (zero ? 0.0 : total);
  }
  report("select_ranks " + text({batch, count, wanted_rank}), right);
}

template <typename Scalar>
void finish_factors(int64_t rows, int64_t cols, int64_t width, bool unit) {
  const bool tall = rows >= cols;
  const int64_t long_side = std::max(rows, cols), short_side = std::min(rows, cols);
  std::vector<double> long_vectors, short_vectors;
  for (const float value : normal(long_side * width, 7)) long_vectors.push_back(value);
  for (const float value : normal(short_side * width, 8)) short_vectors.push_back(value);
  // Three matrices of unlike rank, the last one done by the block of the first; ascending
  // components, as eigensolvers give them, on the long side.
  const std::vector<int64_t> ranks{width, width / 2, width};
  const std::vector<int> exponents{3, -2, 0};
  const cuda::ComponentsView long_view{long_vectors.data() + (width - 1) * long_side, long_side, 0,
                                       -long_side, 1};
  const cuda::ComponentsView short_view{short_vectors.data(), short_side, 0, 1, width};
  std::vector<double> singular;
  for (int64_t k = 0; k < 3 * width; ++k) singular.push_back(1.0 / static_cast<double>(1 + k));
  const cuda::FinishArgs args{3,
                              width,
                              tall ? long_view : short_view,
                              tall ? short_view : long_view,
                              unit ? singular.data() : nullptr,
                              tall,
                              exponents.data(),
                              ranks.data()};
  const auto sized = [&](int64_t length) {
    return std::vector<Scalar>(static_cast<size_t>(3 * width * length), Scalar(9));
  };
  std::vector<Scalar> left = sized(rows), sigma = sized(1), right = sized(cols);
  bool good = cuda::finish_factors(args, left.data(), sigma.data(), right.data(), nullptr) == 0;
  for (int64_t b = 0; b < 3; ++b) {
    const int64_t rank = ranks[static_cast<size_t>(b)];
    std::vector<Scalar> here_left(static_cast<size_t>(width * rows)), here_sigma(here_left.size()),
        here_right(static_cast<size_t>(width * cols));
    cpu::finish_factors<Scalar>(
        {long_view.data, long_side, 1, -long_side}, {short_view.data, short_side, width, 1},
        unit ? singular.data() + b * width : nullptr, rank, exponents[static_cast<size_t>(b)],
        !tall, here_left.data(), here_sigma.data(), here_right.data());
    const auto same = [&](const std::vector<Scalar>& a, const std::vector<Scalar>& all,
                          int64_t length) {
      for (int64_t i = 0; i < width * length; ++i) {
        const auto x = static_cast<double>(a[static_cast<size_t>(i)]);
        const auto y = static_cast<double>(all[static_cast<size_t>(b * width * length + i)]);
        good &= std::abs(x - y) <= (sizeof(Scalar) == 4 ? 1e-6 : 1e-14) * (1.0 + std::abs(x));
      }
    };
    same(here_left, left, rows);
    same(here_sigma, sigma, 1);
    same(here_right, right, cols);
  }
  report("finish_factors " + text({rows, cols, width, sizeof(Scalar)}), good);
}

}  // namespace

int main() {
  for (const int64_t count : {1, 7, 8, 1023, 1025}) pack_and_unpack(18, count);
  pack_and_unpack(300, 9);  // more rows than one launch takes
  reconstruct(3, 5, 7);
  reconstruct(4, 2, 130);
  reconstruct(0, 3, 3);
  // A warp owns a row up to 1024 classes, a block beyond.
  for (const int64_t rows : {1, 9}) {
    distill_loss<float>(LogitType::kFloat32, rows, 33);
    distill_loss<double>(LogitType::kFloat64, rows, 2);
    distill_loss<BFloat16>(LogitType::kBFloat16, rows, 31);
    distill_loss<Float16>(LogitType::kFloat16, rows, 1);
  }
  for (const int64_t rows : {1, 3}) {
    distill_loss<float>(LogitType::kFloat32, rows, 1031);
    distill_loss<double>(LogitType::kFloat64, rows, 1025);
  }
  distill_loss<float>(LogitType::kFloat32, 260, 1);
  scan_and_scale<float>(7, 3);
  scan_and_scale<float>(41, 33);
  scan_and_scale<double>(31, 17);
  select_ranks(3, 1, -1);
  select_ranks(259, 20, -1);
  select_ranks(8, 40, 40);  // the last eigenvalues of steep spectra are too small
  for (const bool unit : {false, true}) {
    finish_factors<float>(300, 5, 5, unit);
    finish_factors<double>(3, 270, 2, unit);
  }
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
