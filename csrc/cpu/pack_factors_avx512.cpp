// Packing with AVX-512: codes never leave registers between fp32 and the bit stream.
//
// Neighbours are joined in pairs until a quadword holds eight codes of up to 8 bits, or four of up
// to 16; one permutation of bytes then closes the gaps between quadwords. Unpacking gathers each
// code's bytes by a permutation and reads the level as the mantissa of a float.

#include <array>

#include "cpu/pack_factors_parts.h"

#ifdef FEDKD_X86_VECTORS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma")

namespace fedkd_fast::cpu {
namespace {

constexpr int kLanes = 16;      // floats of a vector
constexpr int kByteGroup = 64;  // codes joined at a time
constexpr int kWordGroup = 32;
constexpr __mmask16 kAll = 0xffff;

FEDKD_FORMULA uint64_t ones(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

FEDKD_FORMULA __mmask16 lanes_of(int64_t left) {
  return static_cast<__mmask16>(left <= 0 ? 0 : ones(left));
}

struct alignas(64) Bytes {
  uint8_t at[64];
};
struct alignas(64) Words {
  uint32_t at[16];
};

FEDKD_FORMULA __m512i load(const Bytes& table) { return _mm512_load_si512(table.at); }
FEDKD_FORMULA __m512i load(const Words& table) { return _mm512_load_si512(table.at); }

// Two counts of a shift, for the lower and the upper of two neighbours.
FEDKD_FORMULA __m512i pair(int lower, int upper) {
  return _mm512_set1_epi64(int64_t{upper} << 32 | lower);
}

// ---- packing ------------------------------------------------------------------------------------

// Quadwords of `bits` bytes, without gaps.
constexpr std::array<Bytes, kByteBits> byte_squeezes() {
  std::array<Bytes, kByteBits> tables{};
  for (int bits = 1; bits < kByteBits; ++bits)
    for (int byte = 0; byte < 8 * bits; ++byte)
      tables[bits].at[byte] = static_cast<uint8_t>(byte / bits * 8 + byte % bits);
  return tables;
}
constexpr std::array<Bytes, kByteBits> kByteSqueezes = byte_squeezes();

// Two quadwords of `bits` / 2 bytes; where that is not whole, both have a part of the byte between.
struct WordSqueeze {
  Bytes lower, upper;
  uint64_t lower_bytes, upper_bytes;
};
constexpr std::array<WordSqueeze, kMaxCodeBits + 1> word_squeezes() {
  std::array<WordSqueeze, kMaxCodeBits + 1> tables{};
  for (int bits = kByteBits + 1; bits <= kMaxCodeBits; ++bits) {
    WordSqueeze& table = tables[bits];
    for (int byte = 0; byte < kWordGroup / 8 * bits; ++byte) {
      const int lane = byte / bits * 16, inside = byte % bits;
      if (2 * inside < bits) {
        table.lower.at[byte] = static_cast<uint8_t>(lane + inside);
        table.lower_bytes |= uint64_t{1} << byte;
      }
      if (2 * inside + 1 >= bits) {
        table.upper.at[byte] = static_cast<uint8_t>(lane + 8 + inside - bits / 2);
        table.upper_bytes |= uint64_t{1} << byte;
      }
    }
  }
  return tables;
}
constexpr std::array<WordSqueeze, kMaxCodeBits + 1> kWordSqueezes = word_squeezes();

struct Quantiser {
  Quantiser(const float* values, float scale, int bits)
      : values(values),
        inverse(_mm512_set1_ps(inverse_step(scale))),
        largest(_mm512_set1_ps(static_cast<float>((1 << (bits - 1)) - 1))) {}

  // Saturated above; below, and for NaN, an integer that saturates in the packs that follow.
  FEDKD_FORMULA __m512i cells(int64_t i, __mmask16 lanes) const {
    const __m512 cell = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), inverse);
    // In this order of operands NaN stays, and no integer is the most negative one.
    return _mm512_maskz_cvt_roundps_epi32(kAll, _mm512_maskz_min_ps(kAll, largest, cell),
                                          _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }

  const float* values;
  __m512 inverse, largest;
};

struct BytePacker {
  BytePacker(const float* values, float scale, int bits)
      : quantiser(values, scale, bits),
        bits(bits),
        half(_mm512_set1_epi8(static_cast<char>(1 << (bits - 1)))),
        smallest(_mm512_sub_epi8(_mm512_setzero_si512(), half)),
        order(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)),
        pairs(_mm512_set1_epi16(static_cast<int16_t>(1 | 256 << bits))),
        fours(_mm512_set1_epi32(1 | 65536 << (2 * bits % 16))),
        shifts(pair(32 - 4 * bits, 0)),
        shift(_mm_cvtsi32_si128(32 - 4 * bits)),
        squeeze(load(kByteSqueezes[bits % kByteBits])) {}

  FEDKD_FORMULA void group(int64_t i, int64_t left, uint8_t* out) const {
    __m512i part[4];
    for (int k = 0; k < 4; ++k)
      part[k] = quantiser.cells(i + k * kLanes, lanes_of(left - k * kLanes));
    __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32(part[0], part[1]),
                                       _mm512_packs_epi32(part[2], part[3]));
    codes = _mm512_maskz_permutexvar_epi32(kAll, order, codes);
    codes = _mm512_maskz_add_epi8(ones(left), _mm512_max_epi8(codes, smallest), half);
    if (bits < kByteBits) {
      codes = _mm512_madd_epi16(_mm512_maddubs_epi16(pairs, codes), fours);
      codes = _mm512_maskz_srl_epi64(0xff, _mm512_maskz_sllv_epi32(kAll, codes, shifts), shift);
      codes = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, squeeze, codes);
    }
    _mm512_mask_storeu_epi8(out, ones(packed_bytes(left, bits)), codes);
  }

  Quantiser quantiser;
  int bits;
  __m512i half, smallest, order, pairs, fours, shifts;
  __m128i shift;
  __m512i squeeze;
};

struct WordPacker {
  WordPacker(const float* values, float scale, int bits)
      : quantiser(values, scale, bits),
        bits(bits),
        half(_mm512_set1_epi16(static_cast<int16_t>(1 << (bits - 1)))),
        smallest(_mm512_sub_epi16(_mm512_setzero_si512(), half)),
        order(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7)),
        pairs(_mm512_set1_epi32(16 - bits)),
        pair_shift(_mm_cvtsi32_si128(16 - bits)),
        fours(pair(32 - 2 * bits, 0)),
        four_shift(_mm_cvtsi32_si128(32 - 2 * bits)),
        eights(_mm512_maskz_set1_epi64(0xaa, 4 * bits % 8)),
        squeeze(kWordSqueezes[bits]),
        lower(load(squeeze.lower)),
        upper(load(squeeze.upper)) {}

  FEDKD_FORMULA void group(int64_t i, int64_t left, uint8_t* out) const {
    __m512i codes = _mm512_packs_epi32(quantiser.cells(i, lanes_of(left)),
                                       quantiser.cells(i + kLanes, lanes_of(left - kLanes)));
    codes = _mm512_maskz_permutexvar_epi64(0xff, order, codes);
    codes = _mm512_maskz_add_epi16(static_cast<__mmask32>(ones(left)),
                                   _mm512_max_epi16(codes, smallest), half);
    codes = _mm512_maskz_srl_epi32(kAll, _mm512_sllv_epi16(codes, pairs), pair_shift);
    codes = _mm512_maskz_srl_epi64(0xff, _mm512_maskz_sllv_epi32(kAll, codes, fours), four_shift);
    codes = _mm512_maskz_sllv_epi64(0xff, codes, eights);
    codes = _mm512_or_si512(_mm512_maskz_permutexvar_epi8(squeeze.lower_bytes, lower, codes),
                            _mm512_maskz_permutexvar_epi8(squeeze.upper_bytes, upper, codes));
    _mm512_mask_storeu_epi8(out, ones(packed_bytes(left, bits)), codes);
  }

  Quantiser quantiser;
  int bits;
  __m512i half, smallest, order, pairs;
  __m128i pair_shift;
  __m512i fours;
  __m128i four_shift;
  __m512i eights;
  const WordSqueeze& squeeze;
  __m512i lower, upper;
};

template <int kGroup, typename Packer>
void pack_row(const Packer& packer, int64_t count, uint8_t* out) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup, out += kGroup / 8 * packer.bits)
    packer.group(i, kGroup, out);
  if (i < count) packer.group(i, count - i, out);
}

// ---- unpacking ----------------------------------------------------------------------------------

// Four bytes for each code, from the one where it begins; and by how much to turn them right, so
// that it begins at bit 1.
struct Spread {
  Bytes bytes;
  Words turns;
};
constexpr std::array<Spread, kMaxCodeBits + 1> spreads() {
  std::array<Spread, kMaxCodeBits + 1> tables{};
  for (int bits = 1; bits <= kMaxCodeBits; ++bits)
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int byte = 0; byte < 4; ++byte)
        tables[bits].bytes.at[4 * lane + byte] = static_cast<uint8_t>(lane * bits / 8 + byte);
      tables[bits].turns.at[lane] = static_cast<uint32_t>((lane * bits % 8 + 31) % 32);
    }
  return tables;
}
constexpr std::array<Spread, kMaxCodeBits + 1> kSpreads = spreads();

struct Unpacker {
  Unpacker(float scale, int bits)
      : spread(load(kSpreads[bits].bytes)),
        turns(load(kSpreads[bits].turns)),
        mask(_mm512_set1_epi32(2 * ((1 << bits) - 1))),
        magic(_mm512_set1_epi32(0x4b000000)),
        middle(_mm512_set1_ps(static_cast<float>((1 << 23) + (1 << bits) - 1))),
        scale(_mm512_set1_ps(scale)) {}

  // 2^23 + 2 · code is a float whose lowest bit is 1: it is put together and not rounded.
  FEDKD_FORMULA __m512 values(__m512i bytes) const {
    const __m512i turned = _mm512_maskz_rorv_epi32(
        kAll, _mm512_maskz_permutexvar_epi8(~uint64_t{0}, spread, bytes), turns);
    const __m512i whole = _mm512_ternarylogic_epi32(turned, mask, magic, 0xea);  // and, or
    return _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_castsi512_ps(whole), middle));
  }

  __m512i spread, turns, mask, magic;
  __m512 middle, scale;
};

}  // namespace

void pack_row_avx512(const float* values, int64_t count, float scale, int bits, uint8_t* codes) {
  if (bits <= kByteBits)
    pack_row<kByteGroup>(BytePacker(values, scale, bits), count, codes);
  else
    pack_row<kWordGroup>(WordPacker(values, scale, bits), count, codes);
}

void unpack_row_avx512(const uint8_t* codes, const uint8_t* end, int64_t count, float scale,
                       int bits, float* values) {
  const Unpacker unpacker(scale, bits);
  int64_t i = 0;
  for (; i + kLanes <= count && end - codes >= 64; i += kLanes, codes += 2 * bits)
    _mm512_storeu_ps(values + i, unpacker.values(_mm512_loadu_si512(codes)));
  for (; i < count; i += kLanes, codes += 2 * bits)
    _mm512_mask_storeu_ps(values + i, lanes_of(count - i),
                          unpacker.values(_mm512_maskz_loadu_epi8(ones(end - codes), codes)));
}

}  // namespace fedkd_fast::cpu

#pragma GCC pop_options

namespace fedkd_fast::cpu {

bool has_avx512_packing() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vbmi");
  return has;
}

}  // namespace fedkd_fast::cpu

#endif
