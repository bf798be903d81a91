// The kernels of truncated_svd on the simt engine against their CPU kernels, or plain loops.

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/half.h"
#include "common/truncated_svd.h"
#include "kernels.h"
#include "simt_cases.h"

namespace {

using namespace fedkd_fast;
using namespace simt_cases;

// Matrices: ordinary, zero, holding NaN, subnormal, huge; their facts stand in reverse order.
template <typename Scalar>
void scan_and_scale(int64_t rows, int64_t cols) {
  constexpr int kBatch = 5;
  const int64_t size = rows * cols;
  std::vector<Scalar> values;
  for (const float value : normal(kBatch * size, 6)) values.push_back(static_cast<Scalar>(value));
  for (int64_t i = 0; i < size; ++i) {
    const auto at = static_cast<size_t>(i);
    const auto stride = static_cast<size_t>(size);
    values[stride + at] = 0;
    values[3 * stride + at] *= std::numeric_limits<Scalar>::min() / 64;
    values[4 * stride + at] *= std::numeric_limits<Scalar>::max() / 64;
  }
  values[static_cast<size_t>(3 * size - 1)] = std::numeric_limits<Scalar>::quiet_NaN();
  cuda::MatrixList<Scalar> list{kBatch, {}, {}, {}};
  for (int b = 0; b < kBatch; ++b) {
    list.at[b] = values.data() + b * size;
    list.size[b] = size;
    list.index[b] = kBatch - 1 - b;
  }
  std::vector<double> parts(2 * cuda::kScanParts * kBatch);
  std::vector<cuda::MatrixFacts> facts(kBatch);
  std::vector<double> here(static_cast<size_t>(size)), there(static_cast<size_t>(kBatch * size));
  std::vector<BFloat16> coarse(there.size());
  bool right =
      cuda::scan_matrices(list, parts.data(), facts.data(), nullptr) == cudaSuccess &&
      cuda::scale_matrices(list, facts.data(), there.data(), coarse.data(), nullptr) == cudaSuccess;
  for (int b = 0; b < kBatch; ++b) {
    std::vector<Scalar> largest(static_cast<size_t>(rows));
    MatrixScan scan;
    if constexpr (std::is_same_v<Scalar, float>)
      scan = cpu::scan_matrix(list.at[b], rows, cols, largest.data(), nullptr);
    else
      scan = cpu::scan_matrix(list.at[b], rows, cols, largest.data());
    const cuda::MatrixFacts& fact = facts[static_cast<size_t>(list.index[b])];
    right &= scan.finite == (fact.state != cuda::MatrixState::kNotFinite) &&
             scan.zero == (fact.state == cuda::MatrixState::kZero);
    if (scan.finite) {
      right &= scan.exponent == fact.exponent;
      if (sizeof(Scalar) == 4)
        right &= std::abs(scan.squares - fact.squares) <= 1e-13 * scan.squares;
      cpu::widen_matrix(list.at[b], size, scan.exponent, here.data());
    } else {
      std::fill(here.begin(), here.end(), 0.0);
    }
    right &= std::equal(here.begin(), here.end(), there.begin() + b * size);
    for (int64_t i = 0; i < size; ++i) {
      BFloat16 rounded;
      store_value(&rounded, static_cast<float>(here[static_cast<size_t>(i)]));
      right &= rounded.bits == coarse[static_cast<size_t>(b * size + i)].bits;
    }
  }
  report("scan_matrices, scale_matrices " + text({rows, cols, sizeof(Scalar)}), right);
}

// No earlier rows, some, and more than are wanted; one value that is not of a unit row.
void start_rows(int64_t width, int64_t length) {
  std::vector<float> rows = normal((width + 1) * length, 9);
  for (float& value : rows) value = std::min(1.0f, std::max(-1.0f, value));
  rows[1] = std::numeric_limits<float>::infinity();
  const cuda::EarlierRows earlier{
      3, {nullptr, rows.data(), rows.data()}, {0, std::max<int64_t>(width - 2, 1), width + 1}};
  std::vector<BFloat16> out(static_cast<size_t>(3 * width * length));
  bool right = cuda::start_rows(earlier, width, length, 5, out.data(), nullptr) == cudaSuccess;
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t i = 0; i < width * length; ++i) {
      const bool known = i < earlier.rows[b] * length && i != 1;
      BFloat16 expected;
      store_value(&expected, known ? rows[static_cast<size_t>(i)] : random_sign(5, i));
      right &= out[static_cast<size_t>(b * width * length + i)].bits == expected.bits;
    }
  report("start_rows " + text({width, length}), right);
}

using Square = std::vector<double>;

Square product(const Square& left, const Square& right, int64_t side, bool transpose_right) {
  Square out(static_cast<size_t>(side * side));
  for (int64_t i = 0; i < side; ++i)
    for (int64_t j = 0; j < side; ++j)
      for (int64_t k = 0; k < side; ++k)
        out[static_cast<size_t>(i * side + j)] +=
            left[static_cast<size_t>(i * side + k)] *
            right[static_cast<size_t>(transpose_right ? j * side + k : k * side + j)];
  return out;
}

// Three R·Rᵀ of steep rows; the second has two rows alike, the third is zero.
std::vector<Square> grams(int64_t side) {
  std::vector<Square> found;
  for (unsigned b = 0; b < 3; ++b) {
    Square rows;
    for (const float value : normal(side * side, 10 + b)) rows.push_back(b < 2 ? value : 0.0);
    for (int64_t i = 0; i < side; ++i)
      for (int64_t k = 0; k < side; ++k)
        rows[static_cast<size_t>(i * side + k)] *= std::pow(static_cast<double>(i + 1), -2.0);
    if (b == 1) std::copy_n(rows.begin(), side, rows.end() - side);
    found.push_back(product(rows, rows, side, true));
  }
  return found;
}

Square joined(const std::vector<Square>& squares) {
  Square all;
  for (const Square& square : squares) all.insert(all.end(), square.begin(), square.end());
  return all;
}

Square part_of(const Square& all, int64_t b, int64_t size) {
  return Square(all.begin() + b * size, all.begin() + (b + 1) * size);
}

void cholesky_inverse(int64_t side) {
  const std::vector<Square> matrices = grams(side);
  Square all(static_cast<size_t>(3 * side * side), 9.0);
  bool right = cuda::cholesky_inverse(joined(matrices).data(), 3, side, all.data(), nullptr) == 0;
  for (int64_t b = 0; b < 3; ++b) {
    const Square inverse = part_of(all, b, side * side);
    const Square found = product(product(inverse, matrices[static_cast<size_t>(b)], side, false),
                                 inverse, side, true);
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j) {
        const bool dependent = b == 2 || (b == 1 && side > 1 && i == side - 1);
        const double value = found[static_cast<size_t>(i * side + j)];
        right &= std::abs(value - (i == j && !dependent ? 1.0 : 0.0)) <= 1e-8;
        right &= j <= i || inverse[static_cast<size_t>(i * side + j)] == 0.0;
      }
  }
  report("cholesky_inverse " + text({side}), right);
}

void jacobi_eigh(int64_t side) {
  const std::vector<Square> matrices = grams(side);
  Square values(static_cast<size_t>(3 * side)), vectors(static_cast<size_t>(3 * side * side));
  Square scratch(static_cast<size_t>(3 * cuda::jacobi_scratch(side)));
  bool right = cuda::jacobi_eigh(joined(matrices).data(), 3, side, scratch.data(), values.data(),
                                 vectors.data(), nullptr) == 0;
  for (int64_t b = 0; b < 3; ++b) {
    const Square rows = part_of(vectors, b, side * side);
    const Square found =
        product(product(rows, matrices[static_cast<size_t>(b)], side, false), rows, side, true);
    const Square unit = product(rows, rows, side, true);
    const double* const value = values.data() + b * side;
    const double most = value[side - 1];
    for (int64_t i = 0; i < side; ++i) {
      right &= i == 0 || value[i - 1] <= value[i];
      for (int64_t j = 0; j < side; ++j) {
        const auto at = static_cast<size_t>(i * side + j);
        right &= std::abs(found[at] - (i == j ? value[i] : 0.0)) <=
                 1e-8 * std::sqrt(std::abs(value[i] * value[j])) + 1e-14 * most;
        right &= std::abs(unit[at] - (i == j ? 1.0 : 0.0)) <= 1e-13;
      }
    }
  }
  report("jacobi_eigh " + text({side}), right);
}

std::vector<cuda::MatrixFacts> usable(size_t count) {
  return std::vector<cuda::MatrixFacts>(count, {1.0, 0, cuda::MatrixState::kUsable});
}

// All components of a matrix, or the first half of them.
void select_ranks(int count, int64_t side, StopBy by, bool half, bool singular) {
  const int64_t known = half ? side / 2 : side;
  std::vector<double> values(static_cast<size_t>(count * known));
  const auto energy = [](int b, int64_t k) {
    return std::pow(static_cast<double>(k + 1), -0.5 - static_cast<double>(b % 7));
  };
  std::vector<cuda::MatrixFacts> facts = usable(static_cast<size_t>(count));
  cuda::SelectArgs args{};
  args.count = count;
  args.by = by;
  for (int b = 0; b < count; ++b) {
    const int place = args.index[b] = count - 1 - b;
    cuda::MatrixFacts& fact = facts[static_cast<size_t>(place)];
    fact.exponent = b % 3 - 1;
    fact.squares = 0.0;
    for (int64_t k = 0; k < side; ++k) fact.squares += energy(b, k);
    fact.squares = std::ldexp(fact.squares, 2 * fact.exponent);
    if (b % 3 == 2) fact.state = cuda::MatrixState::kZero;
    args.limit[b] = by == StopBy::kRank ? 3 * b : by == StopBy::kEnergy ? 0.9 : 0.3;
    for (int64_t k = 0; k < known; ++k)
      values[static_cast<size_t>(b * known + (singular ? k : known - 1 - k))] =
          singular ? std::sqrt(energy(b, k)) : energy(b, k);
  }
  args.spectra = {values.data(), known, singular};
  args.side = side;
  args.facts = facts.data();
  const int64_t length = cuda::kReportHead + known;
  std::vector<double> reports(static_cast<size_t>(count * length), -9.0);
  bool right = cuda::select_ranks(args, reports.data(), nullptr) == 0;
  for (int b = 0; b < count; ++b) {
    const double* const found = reports.data() + b * length;
    const cuda::MatrixFacts& fact = facts[static_cast<size_t>(args.index[b])];
    const auto at = [&](int64_t k) { return args.spectra.energy(b, k); };
    double total = 0.0;
    for (int64_t k = 0; k < known; ++k) total += at(k);
    if (half) total = std::ldexp(fact.squares, -2 * fact.exponent);
    int64_t rank = 0;
    if (fact.state == cuda::MatrixState::kUsable)
      rank =
          Stop(by, args.limit[b], total, fact.exponent, side).choose_rank(at, known, total, side);
    const bool unfit = rank > 0 && !(at(rank - 1) > kGramFloor * at(0));
    right &= found[0] == static_cast<double>(fact.state) && found[1] == static_cast<double>(rank);
    right &= found[2] == (unfit ? 1.0 : 0.0);
    right &= fact.state != cuda::MatrixState::kUsable || found[3] == total;
    for (int64_t k = 0; k < known; ++k) right &= found[cuda::kReportHead + k] == at(k);
  }
  report("select_ranks " + text({count, side, static_cast<int64_t>(by), half, singular}), right);
}

template <typename Scalar>
void finish_factors(int64_t rows, int64_t cols, int width, bool unit) {
  const bool tall = rows > cols;
  const int64_t long_side = std::max(rows, cols), short_side = std::min(rows, cols);
  std::vector<double> long_vectors, short_vectors;
  for (const float value : normal(long_side * width, 7)) long_vectors.push_back(value);
  for (const float value : normal(short_side * width, 8)) short_vectors.push_back(value);
  // Three matrices of unlike rank, the last one done by the block of the first; ascending
  // components, as eigensolvers give them, on the long side.
  const cuda::ComponentsView long_view{long_vectors.data() + (width - 1) * long_side, long_side, 0,
                                       -long_side, 1};
  const cuda::ComponentsView short_view{short_vectors.data(), short_side, 0, 1, width};
  // Norms of the long vectors, or numbers of their own.
  std::vector<double> sigma(static_cast<size_t>(3 * width)), values(sigma.size());
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t k = 0; k < width; ++k) {
      double squares = 0.0;
      for (int64_t i = 0; i < long_side; ++i) squares += std::pow(long_view.at(b, k, i), 2);
      const auto at = static_cast<size_t>(b * width + k);
      sigma[at] = unit ? 1.0 / static_cast<double>(1 + at) : std::sqrt(squares);
      values[unit ? at : static_cast<size_t>(b * width + width - 1 - k)] =
          unit ? sigma[at] : squares;
    }
  std::vector<cuda::MatrixFacts> facts = usable(3);
  cuda::FinishArgs<Scalar> args{};
  args.count = 3;
  std::vector<std::vector<Scalar>> left(3), right(3), found_sigma(3);
  for (int b = 0; b < 3; ++b) {
    args.index[b] = 2 - b;
    facts[static_cast<size_t>(2 - b)].exponent = 3 - 4 * b;
    args.rank[b] = b == 1 ? width / 2 : width;
    const auto at = static_cast<size_t>(b), rank = static_cast<size_t>(args.rank[b]);
    left[at].resize(rank * static_cast<size_t>(rows));
    right[at].resize(rank * static_cast<size_t>(cols));
    found_sigma[at].resize(rank);
    args.left_out[b] = left[at].data();
    args.sigma_out[b] = found_sigma[at].data();
    args.right_out[b] = right[at].data();
  }
  args.left = tall ? long_view : short_view;
  args.right = tall ? short_view : long_view;
  args.spectra = {values.data(), width, unit};
  args.left_is_long = tall;
  args.facts = facts.data();
  bool good = cuda::finish_factors(args, nullptr) == 0;
  for (size_t b = 0; b < 3; ++b) {
    std::vector<Scalar> here_left(left[b].size()), here_sigma(found_sigma[b].size()),
        here_right(right[b].size());
    cpu::finish_factors<Scalar>(
        {long_view.data, long_side, 1, -long_side}, {short_view.data, short_side, width, 1},
        unit ? sigma.data() + b * static_cast<size_t>(width) : nullptr, args.rank[b],
        facts[2 - b].exponent, !tall, here_left.data(), here_sigma.data(), here_right.data());
    const auto same = [&](const std::vector<Scalar>& a, const std::vector<Scalar>& other) {
      for (size_t i = 0; i < a.size(); ++i) {
        const auto x = static_cast<double>(a[i]), y = static_cast<double>(other[i]);
        good &= std::abs(x - y) <= (sizeof(Scalar) == 4 ? 1e-6 : 1e-14) * (1.0 + std::abs(x));
      }
    };
    same(here_left, left[b]);
    same(here_sigma, found_sigma[b]);
    same(here_right, right[b]);
  }
  report("finish_factors " + text({rows, cols, width, sizeof(Scalar)}), good);
}

}  // namespace

void simt_cases::truncated_svd_cases() {
  scan_and_scale<float>(7, 3);
  scan_and_scale<float>(41, 33);
  scan_and_scale<double>(31, 17);
  start_rows(1, 3);
  start_rows(9, 301);
  for (const int64_t side : {1, 2, 13, 46}) {  // 46 is too much for the engine's shared memory
    cholesky_inverse(side);
    jacobi_eigh(side);
  }
  select_ranks(3, 1, StopBy::kEnergy, false, false);
  select_ranks(7, 70, StopBy::kEnergy, true, false);
  select_ranks(7, 20, StopBy::kError, false, true);
  select_ranks(7, 20, StopBy::kFloor, true, false);
  select_ranks(7, 40, StopBy::kRank, false, false);
  for (const bool unit : {false, true}) {
    finish_factors<float>(300, 5, 5, unit);
    finish_factors<double>(3, 270, 2, unit);
  }
}
