// Packing with AVX-512: codes never leave registers between fp32 and the bit stream.
//
// Neighbours are joined in pairs until a quadword holds eight codes of up to 8 bits, or four of up
// to 16; one permutation of bytes then closes the gaps between quadwords. Unpacking gathers each
// code's bytes by a permutation and reads the level as the mantissa of a float.

#include <array>
#include <cstring>

#include "cpu/pack_factors_parts.h"

#ifdef FEDKD_X86_VECTORS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma")

namespace fedkd_fast::cpu {
namespace {

constexpr int kLanes = 16;  // floats of a vector
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

// Floats: four pages, so that the first lines of the next one come in time.
constexpr int kAhead = 4096;

struct Quantiser {
  Quantiser(const float* values, float scale, int bits)
      : values(values),
        inverse(_mm512_set1_ps(inverse_step(scale))),
        largest(_mm512_set1_ps(static_cast<float>((1 << (bits - 1)) - 1))) {}

  FEDKD_FORMULA __m512 quotients(int64_t i, __mmask16 lanes) const {
    _mm_prefetch(reinterpret_cast<const char*>(values + i + kAhead), _MM_HINT_T0);
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), inverse);
  }

  // Clamped above; below, and for NaN, an integer that saturates in the packs that follow.
  FEDKD_FORMULA __m512i cells(int64_t i, __mmask16 lanes) const {
    // In this order of operands NaN stays, and no integer is the most negative one.
    return _mm512_maskz_cvt_roundps_epi32(kAll,
                                          _mm512_maskz_min_ps(kAll, largest, quotients(i, lanes)),
                                          _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }

  const float* values;
  __m512 inverse, largest;
};

// Where `packs` leave four bytes of vector k: in lane 4 · L + k, L counting lanes of 16 bytes.
constexpr int packed_lane(int four) { return four % 4 * 4 + four / 4; }

// Closes gaps: of quadwords, or, where four codes are whole bytes, of doublewords as `packs` left
// them.
template <int kBits>
constexpr Bytes byte_squeeze() {
  constexpr int kSize = kBits % 2 == 0 ? kBits / 2 : kBits;
  Bytes table{};
  for (int byte = 0; byte < 8 * kBits; ++byte) {
    const int from = byte / kSize, inside = byte % kSize;
    const int start = kBits % 2 == 0 ? 4 * packed_lane(from) : 8 * from;
    table.at[byte] = static_cast<uint8_t>(start + inside);
  }
  return table;
}

// Codes of 1 to 8 bits.
template <int kBits>
struct BytePacker {
  static constexpr int kGroup = 64;
  static constexpr int kWidth = kBits;
  static constexpr Bytes kSqueeze = byte_squeeze<kBits>();

  FEDKD_FORMULA static void group(const Quantiser& quantiser, int64_t i, int64_t left,
                                  uint8_t* out) {
    const __mmask64 stored = ones(packed_bytes(left, kBits));
    if constexpr (kBits == 1) {
      uint64_t codes = 0;
      for (int k = 0; k < 4; ++k) {
        const __mmask16 lanes = lanes_of(left - k * kLanes);
        const __m512 quotients = quantiser.quotients(i + k * kLanes, lanes);
        codes |=
            uint64_t{_mm512_mask_cmp_ps_mask(lanes, quotients, _mm512_setzero_ps(), _CMP_GE_OQ)}
            << (k * kLanes);
      }
      std::memcpy(out, &codes, static_cast<size_t>(packed_bytes(left, 1)));
      return;
    }
    const __m512i half = _mm512_set1_epi8(static_cast<char>(1 << (kBits - 1)));
    __m512i part[4];
    for (int k = 0; k < 4; ++k)
      part[k] = quantiser.cells(i + k * kLanes, lanes_of(left - k * kLanes));
    __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32(part[0], part[1]),
                                       _mm512_packs_epi32(part[2], part[3]));
    if constexpr (kBits < 8)
      codes = _mm512_max_epi8(codes, _mm512_sub_epi8(_mm512_setzero_si512(), half));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    if (kBits % 2 != 0 || kBits == 8 || left < kGroup)
      codes = _mm512_maskz_permutexvar_epi32(kAll, order, codes);
    codes = _mm512_maskz_add_epi8(ones(left), codes, half);
    if constexpr (kBits < 8) {
      const __m512i pairs = _mm512_set1_epi16(static_cast<int16_t>(1 | 256 << kBits));
      const __m512i fours = _mm512_set1_epi32(1 | 65536 << 2 * kBits);
      codes = _mm512_madd_epi16(_mm512_maddubs_epi16(pairs, codes), fours);
      if constexpr (kBits % 2 != 0)
        codes = _mm512_maskz_srli_epi64(
            0xff, _mm512_maskz_sllv_epi32(kAll, codes, pair(32 - 4 * kBits, 0)), 32 - 4 * kBits);
      else if (left < kGroup)
        codes = _mm512_maskz_permutexvar_epi32(kAll, order, codes);
      codes = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, load(kSqueeze), codes);
    }
    _mm512_mask_storeu_epi8(out, stored, codes);
  }
};

// Two quadwords of `bits` / 2 bytes; where that is not whole, both have a part of the byte between.
struct WordSqueeze {
  Bytes lower, upper;
  uint64_t lower_bytes, upper_bytes;
};
constexpr WordSqueeze word_squeeze(int bits) {
  WordSqueeze table{};
  for (int byte = 0; byte < 4 * bits; ++byte) {
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
  return table;
}

// Codes of 9 to 16 bits.
template <int kBits>
struct WordPacker {
  static constexpr int kGroup = 32;
  static constexpr int kWidth = kBits;
  static constexpr WordSqueeze kSqueeze = word_squeeze(kBits);

  FEDKD_FORMULA static void group(const Quantiser& quantiser, int64_t i, int64_t left,
                                  uint8_t* out) {
    const __m512i half = _mm512_set1_epi16(static_cast<int16_t>(1 << (kBits - 1)));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    __m512i codes = _mm512_packs_epi32(quantiser.cells(i, lanes_of(left)),
                                       quantiser.cells(i + kLanes, lanes_of(left - kLanes)));
    codes = _mm512_maskz_permutexvar_epi64(0xff, order, codes);
    if constexpr (kBits < 16)
      codes = _mm512_max_epi16(codes, _mm512_sub_epi16(_mm512_setzero_si512(), half));
    codes = _mm512_maskz_add_epi16(static_cast<__mmask32>(ones(left)), codes, half);
    if constexpr (kBits < 16) {
      codes = _mm512_maskz_srli_epi32(kAll, _mm512_sllv_epi16(codes, _mm512_set1_epi32(16 - kBits)),
                                      16 - kBits);
      codes = _mm512_maskz_srli_epi64(
          0xff, _mm512_maskz_sllv_epi32(kAll, codes, pair(32 - 2 * kBits, 0)), 32 - 2 * kBits);
      if constexpr (kBits % 2 != 0) codes = _mm512_mask_slli_epi64(codes, 0xaa, codes, 4);
      codes = _mm512_or_si512(
          _mm512_maskz_permutexvar_epi8(kSqueeze.lower_bytes, load(kSqueeze.lower), codes),
          _mm512_maskz_permutexvar_epi8(kSqueeze.upper_bytes, load(kSqueeze.upper), codes));
    }
    _mm512_mask_storeu_epi8(out, ones(packed_bytes(left, kBits)), codes);
  }
};

template <typename Packer>
void pack_row(const float* values, int64_t count, float scale, uint8_t* out) {
  constexpr int kGroup = Packer::kGroup;
  const Quantiser quantiser(values, scale, Packer::kWidth);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup, out += kGroup / 8 * Packer::kWidth)
    Packer::group(quantiser, i, kGroup, out);
  if (i < count) Packer::group(quantiser, i, count - i, out);
}

using PackRow = void (*)(const float*, int64_t, float, uint8_t*);
constexpr PackRow kPackRows[] = {
    pack_row<BytePacker<1>>,  pack_row<BytePacker<2>>,  pack_row<BytePacker<3>>,
    pack_row<BytePacker<4>>,  pack_row<BytePacker<5>>,  pack_row<BytePacker<6>>,
    pack_row<BytePacker<7>>,  pack_row<BytePacker<8>>,  pack_row<WordPacker<9>>,
    pack_row<WordPacker<10>>, pack_row<WordPacker<11>>, pack_row<WordPacker<12>>,
    pack_row<WordPacker<13>>, pack_row<WordPacker<14>>, pack_row<WordPacker<15>>,
    pack_row<WordPacker<16>>};

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
  kPackRows[bits - 1](values, count, scale, codes);
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
