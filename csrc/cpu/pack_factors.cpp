// Quantised factor packing on the CPU: the portable path, and the choice of a path.

#include <algorithm>

#include "cpu/pack_factors_parts.h"

namespace fedkd_fast::cpu {
namespace {

constexpr int64_t kBlock = 512;  // values per block; a multiple of 8, so blocks end on whole bytes

FEDKD_CLONES
void quantise_block(const float* values, int64_t count, float inverse, int bits, uint32_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = quantise(values[i], inverse, bits);
}

FEDKD_CLONES
void dequantise_block(const uint32_t* codes, int64_t count, float scale, int bits, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = dequantise(codes[i], scale, bits);
}

// Appends `count` codes to a stream that starts on a byte; returns the bytes written.
int64_t write_bits(const uint32_t* codes, int64_t count, int bits, uint8_t* out) {
  uint8_t* const start = out;
  uint64_t window = 0;
  int held = 0;
  for (int64_t i = 0; i < count; ++i) {
    window |= static_cast<uint64_t>(codes[i]) << held;
    held += bits;
    if (held >= 32) {
      for (int byte = 0; byte < 4; ++byte) out[byte] = static_cast<uint8_t>(window >> (8 * byte));
      out += 4;
      window >>= 32;
      held -= 32;
    }
  }
  for (; held > 0; held -= 8, window >>= 8) *out++ = static_cast<uint8_t>(window);
  return out - start;
}

void read_bits(const uint8_t* in, int64_t count, int bits, uint32_t* codes) {
  const uint32_t mask = (1u << bits) - 1u;
  uint64_t window = 0;
  int held = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (; held < bits; held += 8) window |= static_cast<uint64_t>(*in++) << held;
    codes[i] = static_cast<uint32_t>(window) & mask;
    window >>= bits;
    held -= bits;
  }
}

void pack_row_portable(const float* values, int64_t count, float scale, int bits, uint8_t* codes) {
  uint32_t block[kBlock];
  const float inverse = inverse_step(scale);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    quantise_block(values + first, size, inverse, bits, block);
    codes += write_bits(block, size, bits, codes);
  }
}

void unpack_row_portable(const uint8_t* codes, const uint8_t*, int64_t count, float scale, int bits,
                         float* values) {
  uint32_t block[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    read_bits(codes, size, bits, block);
    dequantise_block(block, size, scale, bits, values + first);
    codes += packed_bytes(size, bits);
  }
}

using PackRow = void (*)(const float*, int64_t, float, int, uint8_t*);
using UnpackRow = void (*)(const uint8_t*, const uint8_t*, int64_t, float, int, float*);

struct Path {
  PackRow pack;
  UnpackRow unpack;
};

Path choose_path([[maybe_unused]] Instructions most) {
#ifdef FEDKD_X86_VECTORS
  if (most >= Instructions::kAvx512 && has_avx512_packing())
    return {pack_row_avx512, unpack_row_avx512};
  if (most >= Instructions::kAvx2 && has_avx2_packing()) return {pack_row_avx2, unpack_row_avx2};
#endif
  return {pack_row_portable, unpack_row_portable};
}

}  // namespace

void pack_factors(const float* values, int64_t row_stride, int64_t count, const float* scale,
                  const uint8_t* bits, const int64_t* offsets, uint8_t* codes, int64_t begin,
                  int64_t end, Instructions most) {
  const PackRow pack = choose_path(most).pack;
  for (int64_t k = begin; k < end; ++k)
    if (bits[k] != 0) pack(values + k * row_stride, count, scale[k], bits[k], codes + offsets[k]);
}

void unpack_factors(const uint8_t* codes, int64_t count, const float* scale, const uint8_t* bits,
                    const int64_t* offsets, float* values, int64_t begin, int64_t end,
                    Instructions most) {
  const UnpackRow unpack = choose_path(most).unpack;
  for (int64_t k = begin; k < end; ++k) {
    float* row = values + k * count;
    if (bits[k] == 0)
      std::fill_n(row, count, 0.0f);
    else
      unpack(codes + offsets[k], codes + offsets[end], count, scale[k], bits[k], row);
  }
}

}  // namespace fedkd_fast::cpu
