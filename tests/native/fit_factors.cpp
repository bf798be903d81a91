// The passes of fit_factors, round_rows and dense_step under sanitizers: each does what its formula
// says, in rows of all lengths, and touches nothing out of bounds.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "common/levels.h"
#include "kernels_fit_factors.h"
#include "kernels_round_rows.h"

namespace {

using namespace fedkd_fast;

using Floats = std::vector<float>;
using Halves = std::vector<BFloat16>;

void check(bool right, const char* what, size_t count) {
  if (right) return;
  std::printf("%s: %zu numbers\n", what, count);
  std::exit(1);
}

Floats sample(size_t count, std::mt19937* generator) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  Floats values(count);
  for (float& value : values) value = normal(*generator);
  return values;
}

Halves rounded(const Floats& values) {
  Halves out(values.size());
  cpu::narrow(values.data(), static_cast<int64_t>(values.size()), out.data());
  for (size_t i = 0; i < values.size(); ++i) {
    BFloat16 wanted;
    store_value(&wanted, values[i]);
    check(out[i].bits == wanted.bits, "narrow", values.size());
  }
  return out;
}

bool near(double found, double wanted) {
  return std::abs(found - wanted) <= 1e-4 * (1.0 + std::abs(wanted));
}

template <typename Product>
void try_products(const Floats& a, const Floats& b, const std::vector<Product>& product) {
  const size_t count = a.size();
  const auto length = static_cast<int64_t>(count);
  Floats out(count), other(b);
  Halves narrowed(count);
  double sum = 0.0, wanted = 0.0;

  cpu::subtract(product.data(), a.data(), length, out.data());
  for (size_t i = 0; i < count; ++i)
    check(out[i] == load_value(product[i]) - a[i], "subtract", count);

  sum = cpu::add_three(product.data(), a.data(), b.data(), length, out.data());
  for (size_t i = 0; i < count; ++i) {
    check(out[i] == load_value(product[i]) + a[i] + b[i], "add_three", count);
    wanted += static_cast<double>(out[i]) * static_cast<double>(out[i]);
  }
  check(near(sum, wanted), "squares of add_three", count);

  cpu::step_back(product.data(), a.data(), length, other.data());
  for (size_t i = 0; i < count; ++i)
    check(other[i] == b[i] - (load_value(product[i]) + a[i]), "step_back", count);

  for (BFloat16* narrow : {static_cast<BFloat16*>(nullptr), narrowed.data()}) {
    cpu::add_images(a.data(), 0.5f, product.data(), 0.25f, length, out.data(), narrow);
    for (size_t i = 0; i < count; ++i)
      check(out[i] == a[i] * 0.5f + load_value(product[i]) * 0.25f, "add_images", count);
    cpu::round_fit(a.data(), product.data(), 1.5f, length, out.data(), narrow);
    for (size_t i = 0; i < count; ++i) {
      check(out[i] == std::rint((a[i] + load_value(product[i])) * 1.5f), "round_fit", count);
      // Small integers stay as they are.
      check(!narrow || load_value(narrowed[i]) == out[i], "narrowed integers", count);
    }
  }

  wanted = 0.0;
  for (size_t i = 0; i < count; ++i) {
    const double value = static_cast<double>(out[i]) * 0.75;
    wanted += value * (2.0 * static_cast<double>(b[i]) - value -
                       static_cast<double>(load_value(product[i])));
  }
  sum = cpu::sum_gains(out.data(), 0.75f, b.data(), product.data(), length);
  check(near(sum, wanted), "sum_gains", count);
}

void try_rows(size_t count, std::mt19937* generator) {
  const auto length = static_cast<int64_t>(count);
  const Floats values = sample(count, generator);
  float largest = -1.0f, most = 0.0f;
  double wanted_squares = 0.0;
  const double squares = cpu::measure_row(values.data(), length, &largest);
  for (const float value : values) {
    wanted_squares += static_cast<double>(value) * static_cast<double>(value);
    most = std::max(most, std::abs(value));
  }
  check(near(squares, wanted_squares) && largest == most, "measure_row", count);
  for (const float multiplier : {0.0f, 3.0f, 1e9f}) {
    const float step = multiplier == 0.0f ? 0.3f : 1.0f / multiplier;
    double lost = 0.0;
    for (const float value : values) {
      const float whole = std::rint(value * multiplier);
      const float sent = std::min(std::max(whole, -kLargestInteger), kLargestInteger);
      const double off = static_cast<double>(value - sent * step);
      lost += off * off;
    }
    check(near(cpu::rounding_loss(values.data(), length, multiplier, step), lost), "rounding_loss",
          count);
  }
  if (squares > 0.0) {
    const int step = cpu::dense_step(values.data(), &squares, 1, length, 0.05 * squares, false);
    const double height = cpu::row_height(squares, length);
    int16_t level = 0;
    float multiplier = 0.0f;
    const int top = cpu::row_levels(&height, 1, step, &level, &multiplier);
    check(top == level, "row_levels", count);
    const double lost =
        cpu::rounding_loss(values.data(), length, multiplier, static_cast<float>(exp2_fixed(step)));
    check(lost <= 0.05 * squares, "dense_step", count);
  }
}

// Many rows, of which some are looked at.
void try_many_rows(std::mt19937* generator) {
  const size_t rows = 700, count = 300;
  Floats values = sample(rows * count, generator);
  std::vector<double> squares(rows);
  double total = 0.0;
  for (size_t row = 0; row < rows; ++row) {
    float* const from = values.data() + row * count;
    for (size_t i = 0; i < count; ++i) from[i] *= static_cast<float>(row % 7) * 0.3f;
    float largest = 0.0f;
    squares[row] = cpu::measure_row(from, static_cast<int64_t>(count), &largest);
    total += squares[row];
  }
  const int step = cpu::dense_step(values.data(), squares.data(), static_cast<int64_t>(rows),
                                   static_cast<int64_t>(count), 0.1 * total, false);
  std::vector<double> heights(rows);
  std::vector<int16_t> levels(rows);
  std::vector<float> multipliers(rows);
  for (size_t row = 0; row < rows; ++row)
    heights[row] = cpu::row_height(squares[row], static_cast<int64_t>(count));
  cpu::row_levels(heights.data(), static_cast<int64_t>(rows), step, levels.data(),
                  multipliers.data());
  double lost = 0.0;
  for (size_t row = 0; row < rows; ++row)
    lost += cpu::rounding_loss(values.data() + row * count, static_cast<int64_t>(count),
                               multipliers[row], static_cast<float>(exp2_fixed(step)));
  check(lost > 0.09 * total && lost < 0.105 * total, "dense_step of many rows", rows * count);
}

void try_count(size_t count, std::mt19937* generator) {
  const auto length = static_cast<int64_t>(count);
  const Floats a = sample(count, generator), b = sample(count, generator);
  Floats sent(count), off(count);
  const double squares = cpu::round_vector(a.data(), length, 2.0f, 0.75f, sent.data(), off.data());
  double wanted = 0.0;
  for (size_t i = 0; i < count; ++i) {
    check(sent[i] == std::rint(a[i] * 1.5f), "round_vector", count);
    check(off[i] == sent[i] - a[i] * 2.0f, "what round_vector rounds off", count);
    wanted += static_cast<double>(sent[i]) * static_cast<double>(sent[i]);
  }
  check(squares == wanted, "squares of round_vector", count);

  // Up or down, and the same for the same place.
  Halves diced(count), again(count);
  cpu::narrow_by_dice(a.data(), length, 4294967200u, diced.data());
  for (size_t i = 0; i < count; ++i) {
    cpu::narrow_by_dice(&a[i], 1, 4294967200u + static_cast<uint32_t>(i), &again[i]);
    const uint32_t bits = bits_from_float(a[i]) >> 16;
    check(diced[i].bits == again[i].bits, "places of dice", count);
    check(diced[i].bits == bits || diced[i].bits == bits + 1, "narrow_by_dice", count);
  }
  try_rows(count, generator);
  const Floats products = sample(count, generator);
  try_products(a, b, products);
  try_products(a, b, rounded(products));
}

template <typename Product>
void try_correlations(int64_t rank, const std::vector<Product>& products, const Floats& norms) {
  Floats found(products.size());
  cpu::correlate(products.data(), norms.data(), rank, found.data());
  for (size_t i = 0; i < norms.size(); ++i)
    for (size_t j = 0; j < norms.size(); ++j) {
      const size_t at = i * norms.size() + j;
      check(found[at] == (i == j ? 0.0f : load_value(products[at]) * (norms[i] * norms[j])),
            "correlate", norms.size());
    }
}

}  // namespace

int main() {
  std::mt19937 generator(7);
  int64_t tried = 0;
  for (size_t count = 0; count <= 70; ++count, ++tried) try_count(count, &generator);
  // Blocks of sums, and parts of them.
  for (const size_t count : {1023, 1024, 1025, 2048, 2051}) try_count(count, &generator), ++tried;
  for (size_t rank = 0; rank <= 35; ++rank, ++tried) {
    const Floats products = sample(rank * rank, &generator), norms = sample(rank, &generator);
    try_correlations(static_cast<int64_t>(rank), products, norms);
    try_correlations(static_cast<int64_t>(rank), rounded(products), norms);
  }
  // On average, nothing is lost, and of a number that is short in eight bits nothing at all.
  double sum = 0.0;
  const Floats alike(1 << 16, 1.001f), whole(1 << 10, -1.5f);
  Halves diced(alike.size());
  cpu::narrow_by_dice(alike.data(), static_cast<int64_t>(alike.size()), 0, diced.data());
  for (const BFloat16 value : diced) sum += static_cast<double>(load_value(value)) - 1.001;
  check(std::abs(sum) < 4.0 * 0.0078125 * 0.5 * 256.0, "the mean of dice", alike.size());
  cpu::narrow_by_dice(whole.data(), static_cast<int64_t>(whole.size()), 5, diced.data());
  for (size_t i = 0; i < whole.size(); ++i)
    check(load_value(diced[i]) == -1.5f, "dice of short numbers", whole.size());
  for (const size_t count : {1, 2, 77}) {
    Floats even(count, -0.3f);
    even.push_back(0.0f);
    check(near(cpu::evenness(even.data(), static_cast<int64_t>(even.size())), 1.0), "even", count);
  }
  try_many_rows(&generator);
  const Floats noise = sample(1 << 16, &generator);
  check(std::abs(cpu::evenness(noise.data(), 1 << 16) - 0.6366) < 0.01, "noise", noise.size());
  check(cpu::evenness(noise.data(), 0) == 1.0, "evenness of nothing", 0);
  std::printf("%lld cases\n", static_cast<long long>(tried));
  return 0;
}
