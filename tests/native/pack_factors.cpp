// Instructions under sanitizers: every path of the CPU makes the bytes of the formula and takes
// them back, for all widths, ragged rows and values at the edges, and touches nothing out of
// bounds.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/pack_factors_parts.h"

namespace {

using namespace fedkd_fast;
using cpu::Instructions;

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

constexpr Instructions kPaths[] = {Instructions::kPortable, Instructions::kAvx2,
                                   Instructions::kAvx512};

[[noreturn]] void fail(const char* what, int bits, int64_t count, int path) {
  std::printf("%s: %d bits, %lld values, path %d\n", what, bits, static_cast<long long>(count),
              path);
  std::exit(1);
}

// Values in all cells, on their borders and beside them, beyond both ends, and of odd kinds.
Floats sample(int64_t count, float scale, int bits, std::mt19937* generator) {
  using Limits = std::numeric_limits<float>;
  const float odd[] = {0.0f,
                       -0.0f,
                       Limits::denorm_min(),
                       -Limits::denorm_min(),
                       Limits::min(),
                       -Limits::min(),
                       Limits::max(),
                       Limits::lowest(),
                       Limits::infinity(),
                       -Limits::infinity(),
                       Limits::quiet_NaN()};
  Floats values(static_cast<size_t>(count));
  const float reach = 2.2f * static_cast<float>(1 << bits) / 2.0f;
  std::uniform_real_distribution<float> uniform(-reach, reach);
  for (float& value : values) {
    const float cell = uniform(*generator);
    const float edge = std::round(cell) * 2.0f * scale;
    switch ((*generator)() % 8) {
      case 0:
        value = odd[(*generator)() % std::size(odd)];
        break;
      case 1:
        value = edge;
        break;
      case 2:
        value = std::nextafter(edge, -Limits::max());
        break;
      case 3:
        value = std::nextafter(edge, Limits::max());
        break;
      default:
        value = cell * 2.0f * scale;
    }
  }
  return values;
}

// By the formula, a bit at a time.
Bytes formula(const Floats& values, float scale, int bits) {
  Bytes bytes(static_cast<size_t>(packed_bytes(static_cast<int64_t>(values.size()), bits)));
  size_t at = 0;
  for (const float value : values) {
    const uint32_t code = quantise(value, inverse_step(scale), bits);
    for (int bit = 0; bit < bits; ++bit, ++at)
      bytes[at / 8] = static_cast<uint8_t>(bytes[at / 8] | (code >> bit & 1u) << at % 8);
  }
  return bytes;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Three rows of one width: the second one begins where the first one ends, and a row of no bits
// lies between. Buffers are exactly as large as they are.
void try_rows(int bits, int64_t count, float scale, std::mt19937* generator) {
  const auto width = static_cast<uint8_t>(bits);
  const uint8_t widths[] = {width, 0, width};
  const float scales[] = {scale, 0.0f, 1.5f * scale};
  const int64_t size = packed_bytes(count, bits);
  const int64_t offsets[] = {0, size, size, 2 * size};
  Floats values, back;
  Bytes wanted;
  for (int row = 0; row < 3; ++row) {
    const Floats one = sample(count, scale, bits, generator);
    values.insert(values.end(), one.begin(), one.end());
    const Bytes bytes = widths[row] == 0 ? Bytes{} : formula(one, scales[row], bits);
    wanted.insert(wanted.end(), bytes.begin(), bytes.end());
    size_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t code = 0;
      for (int bit = 0; bit < widths[row]; ++bit, ++at)
        code |= (bytes[at / 8] >> at % 8 & 1u) << bit;
      back.push_back(widths[row] == 0 ? 0.0f : dequantise(code, scales[row], bits));
    }
  }
  for (const Instructions path : kPaths) {
    Bytes codes(wanted.size(), 0xee);
    codes.shrink_to_fit();
    // The last row first: a row may not touch what follows it.
    for (int64_t row = 2; row >= 0; --row)
      cpu::pack_factors(values.data(), count, count, scales, widths, offsets, codes.data(), row,
                        row + 1, path);
    if (codes != wanted) fail("other bytes", bits, count, static_cast<int>(path));
    Floats found(back.size(), 7.0f);
    for (int64_t row = 2; row >= 0; --row)
      cpu::unpack_factors(codes.data(), count, scales, widths, offsets, found.data(), row, row + 1,
                          path);
    if (!same_bits(found, back)) fail("other values", bits, count, static_cast<int>(path));
    // All at once, which may read ahead.
    found.assign(back.size(), 7.0f);
    cpu::unpack_factors(codes.data(), count, scales, widths, offsets, found.data(), 0, 3, path);
    if (!same_bits(found, back)) fail("other values ahead", bits, count, static_cast<int>(path));
  }
}

void try_product(int64_t rank, int64_t rows, int64_t cols, std::mt19937* generator) {
  std::normal_distribution<float> normal;
  Floats left(static_cast<size_t>(rank * rows)), right(static_cast<size_t>(rank * cols));
  for (Floats* side : {&left, &right})
    for (float& value : *side) value = normal(*generator);
  Floats wanted;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < rank; ++k)
        sum = std::fma(left[static_cast<size_t>(k * rows + i)],
                       right[static_cast<size_t>(k * cols + j)], sum);
      wanted.push_back(sum);
    }
  for (const Instructions path : kPaths) {
    Floats found(wanted.size(), 7.0f);
    const int64_t middle = rows / 3;
    cpu::reconstruct(left.data(), right.data(), rank, rows, cols, found.data(), middle, rows, path);
    cpu::reconstruct(left.data(), right.data(), rank, rows, cols, found.data(), 0, middle, path);
    if (!same_bits(found, wanted)) {
      std::printf("other product: %d x %d x %d, path %d\n", static_cast<int>(rank),
                  static_cast<int>(rows), static_cast<int>(cols), static_cast<int>(path));
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 generator(7);
  int64_t tried = 0;
  // A chunk and a part of one; all remainders of rows; of columns, those of vectors and tiles.
  for (const int64_t rank : {0, 1, 50, 129})
    for (const int64_t cols : {0, 1, 7, 16, 31, 48, 49, 81, 200})
      for (int64_t rows = 0; rows <= 17; ++rows, ++tried) try_product(rank, rows, cols, &generator);
  for (int bits = 1; bits <= kMaxCodeBits; ++bits) {
    for (const float scale : {0.03f, kMinScale, 1e30f}) {
      for (int64_t count = 0; count <= 140; ++count, ++tried)
        try_rows(bits, count, scale, &generator);
      for (const int64_t count : {511, 512, 513, 1000, 4097})
        try_rows(bits, count, scale, &generator), ++tried;
    }
  }
  std::printf("%lld cases, paths:%s%s portable\n", static_cast<long long>(tried),
#ifdef FEDKD_X86_VECTORS
              cpu::has_avx512_packing() ? " avx512" : "", cpu::has_avx2_packing() ? " avx2" : "");
#else
              "", "");
#endif
  return 0;
}
