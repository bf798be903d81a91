// What the paths of pack_factors and unpack_factors share: one row of one width at a time.
#pragma once

#include "common/quantise.h"
#include "cpu/streaming.h"
#include "kernels_pack_factors.h"

namespace fedkd_fast::cpu {

// Up to this width a code is packed as a byte, beyond it as a word.
constexpr int kByteBits = 8;

#ifdef FEDKD_X86_VECTORS

bool has_avx512_packing();
void pack_row_avx512(const float* values, int64_t count, float scale, int bits, uint8_t* codes);
// Bytes up to `end` may be read, used or not.
void unpack_row_avx512(const uint8_t* codes, const uint8_t* end, int64_t count, float scale,
                       int bits, float* values);

bool has_avx2_packing();
void pack_row_avx2(const float* values, int64_t count, float scale, int bits, uint8_t* codes);
void unpack_row_avx2(const uint8_t* codes, const uint8_t* end, int64_t count, float scale, int bits,
                     float* values);

#endif

}  // namespace fedkd_fast::cpu
