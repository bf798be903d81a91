// Packing with AVX2: the steps of pack_factors_avx512.cpp on lanes of 16 bytes.
//
// A lane yields fewer bytes than it is stored with; the next store puts right what lies behind
// them, and the last ones of a row go through a buffer.

#include <array>
#include <cstring>

#include "cpu/pack_factors_parts.h"

#ifdef FEDKD_X86_VECTORS

#pragma GCC push_options
#pragma GCC target("avx2")

namespace fedkd_fast::cpu {
namespace {

constexpr int kLanes = 8;       // floats of a vector
constexpr int kByteGroup = 32;  // codes joined at a time
constexpr int kWordGroup = 16;
constexpr int kStored = 16;      // bytes
constexpr uint8_t kZero = 0x80;  // an index of no byte

struct alignas(16) Bytes {
  uint8_t at[16];
};
struct alignas(32) Words {
  uint32_t at[8];
};

FEDKD_FORMULA __m256i load(const Bytes& table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.at)));
}
FEDKD_FORMULA __m256i load(const Words& table) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(table.at));
}

FEDKD_FORMULA __m256i pair(int lower, int upper) {
  return _mm256_set1_epi64x(int64_t{upper} << 32 | lower);
}

// Both lanes, of which `bytes` each are wanted.
FEDKD_FORMULA void store_lanes(uint8_t* out, int bytes, __m256i lanes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(lanes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + bytes), _mm256_extracti128_si256(lanes, 1));
}

// ---- packing ------------------------------------------------------------------------------------

// Quadwords of `bits` bytes, without gaps.
constexpr std::array<Bytes, kByteBits + 1> byte_squeezes() {
  std::array<Bytes, kByteBits + 1> tables{};
  for (int bits = 1; bits <= kByteBits; ++bits)
    for (int byte = 0; byte < 2 * bits; ++byte)
      tables[bits].at[byte] = static_cast<uint8_t>(byte / bits * 8 + byte % bits);
  return tables;
}
constexpr std::array<Bytes, kByteBits + 1> kByteSqueezes = byte_squeezes();

// Two quadwords of `bits` / 2 bytes; where that is not whole, both have a part of the byte between.
struct WordSqueeze {
  Bytes lower, upper;
};
constexpr std::array<WordSqueeze, kMaxCodeBits + 1> word_squeezes() {
  std::array<WordSqueeze, kMaxCodeBits + 1> tables{};
  for (int bits = kByteBits + 1; bits <= kMaxCodeBits; ++bits)
    for (int byte = 0; byte < 16; ++byte) {
      const bool lower = 2 * byte < bits, upper = 2 * byte + 1 >= bits && byte < bits;
      tables[bits].lower.at[byte] = lower ? static_cast<uint8_t>(byte) : kZero;
      tables[bits].upper.at[byte] = upper ? static_cast<uint8_t>(8 + byte - bits / 2) : kZero;
    }
  return tables;
}
constexpr std::array<WordSqueeze, kMaxCodeBits + 1> kWordSqueezes = word_squeezes();

struct Quantiser {
  Quantiser(float scale, int bits)
      : inverse(_mm256_set1_ps(inverse_step(scale))),
        largest(_mm256_set1_ps(static_cast<float>((1 << (bits - 1)) - 1))) {}

  // As in pack_factors_avx512.cpp.
  FEDKD_FORMULA __m256i cells(const float* values) const {
    const __m256 cell = _mm256_mul_ps(_mm256_loadu_ps(values), inverse);
    return _mm256_cvtps_epi32(_mm256_floor_ps(_mm256_min_ps(largest, cell)));
  }

  __m256 inverse, largest;
};

struct BytePacker {
  BytePacker(float scale, int bits)
      : quantiser(scale, bits),
        bits(bits),
        half(_mm256_set1_epi8(static_cast<char>(1 << (bits - 1)))),
        smallest(_mm256_sub_epi8(_mm256_setzero_si256(), half)),
        order(_mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)),
        pairs(_mm256_set1_epi16(static_cast<int16_t>(1 | 256 << bits))),
        fours(_mm256_set1_epi32(1 | 65536 << (2 * bits % 16))),
        shifts(pair(32 - 4 * bits, 0)),
        shift(_mm_cvtsi32_si128(32 - 4 * bits)),
        squeeze(load(kByteSqueezes[bits])) {}

  FEDKD_FORMULA void group(const float* values, uint8_t* out) const {
    __m256i part[4];
    for (int k = 0; k < 4; ++k) part[k] = quantiser.cells(values + k * kLanes);
    __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                       _mm256_packs_epi32(part[2], part[3]));
    codes = _mm256_permutevar8x32_epi32(codes, order);
    codes = _mm256_add_epi8(_mm256_max_epi8(codes, smallest), half);
    if (bits < kByteBits) {
      codes = _mm256_madd_epi16(_mm256_maddubs_epi16(pairs, codes), fours);
      codes = _mm256_srl_epi64(_mm256_sllv_epi32(codes, shifts), shift);
      codes = _mm256_shuffle_epi8(codes, squeeze);
    }
    store_lanes(out, 2 * bits, codes);
  }

  Quantiser quantiser;
  int bits;
  __m256i half, smallest, order, pairs, fours, shifts;
  __m128i shift;
  __m256i squeeze;
};

struct WordPacker {
  WordPacker(float scale, int bits)
      : quantiser(scale, bits),
        bits(bits),
        half(_mm256_set1_epi16(static_cast<int16_t>(1 << (bits - 1)))),
        smallest(_mm256_sub_epi16(_mm256_setzero_si256(), half)),
        pairs(_mm256_set1_epi32(65536 | 1 << (16 - bits))),
        pair_shift(_mm_cvtsi32_si128(16 - bits)),
        fours(pair(32 - 2 * bits, 0)),
        four_shift(_mm_cvtsi32_si128(32 - 2 * bits)),
        eights(_mm256_setr_epi64x(0, 4 * bits % 8, 0, 4 * bits % 8)),
        lower(load(kWordSqueezes[bits].lower)),
        upper(load(kWordSqueezes[bits].upper)) {}

  FEDKD_FORMULA void group(const float* values, uint8_t* out) const {
    __m256i codes = _mm256_packs_epi32(quantiser.cells(values), quantiser.cells(values + kLanes));
    codes = _mm256_permute4x64_epi64(codes, 0xd8);
    codes = _mm256_add_epi16(_mm256_max_epi16(codes, smallest), half);
    // A shift of the lower words; words have none by lane here.
    codes = _mm256_srl_epi32(_mm256_mullo_epi16(codes, pairs), pair_shift);
    codes = _mm256_srl_epi64(_mm256_sllv_epi32(codes, fours), four_shift);
    codes = _mm256_sllv_epi64(codes, eights);
    codes = _mm256_or_si256(_mm256_shuffle_epi8(codes, lower), _mm256_shuffle_epi8(codes, upper));
    store_lanes(out, bits, codes);
  }

  Quantiser quantiser;
  int bits;
  __m256i half, smallest, pairs;
  __m128i pair_shift;
  __m256i fours;
  __m128i four_shift;
  __m256i eights, lower, upper;
};

template <int kGroup, typename Packer>
void pack_row(const Packer& packer, const float* values, int64_t count, uint8_t* out) {
  const int bytes = kGroup / 8 * packer.bits;
  const uint8_t* const end = out + packed_bytes(count, packer.bits);
  int64_t i = 0;
  for (; i + kGroup <= count && end - out >= bytes / 2 + kStored; i += kGroup, out += bytes)
    packer.group(values + i, out);
  for (; i < count; i += kGroup, out += bytes) {
    float last[kGroup] = {};
    uint8_t stored[2 * kStored];
    const int64_t left = count - i < kGroup ? count - i : kGroup;
    std::memcpy(last, values + i, static_cast<size_t>(left) * sizeof(float));
    packer.group(last, stored);
    const int64_t used = packed_bytes(left, packer.bits);
    // Zeros have codes as well, which begin in the last byte.
    if (const int64_t rest = left * packer.bits % 8; rest != 0)
      stored[used - 1] = static_cast<uint8_t>(stored[used - 1] & ((1 << rest) - 1));
    std::memcpy(out, stored, static_cast<size_t>(used));
  }
}

// ---- unpacking ----------------------------------------------------------------------------------

// Four bytes for each code, from the one that has the bit before it; and by how much to shift them
// right, so that it begins at bit 1.
struct Spread {
  Bytes bytes[2];
  Words shifts;
};
constexpr std::array<Spread, kMaxCodeBits + 1> spreads() {
  std::array<Spread, kMaxCodeBits + 1> tables{};
  for (int bits = 1; bits <= kMaxCodeBits; ++bits)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int before = lane * bits + 7;  // by a byte too far, so that it is not negative
      for (int byte = 0; byte < 4; ++byte) {
        const int from = before / 8 - 1 + byte;
        tables[bits].bytes[lane / 4].at[4 * (lane % 4) + byte] =
            from < 0 || from >= kStored ? kZero : static_cast<uint8_t>(from);
      }
      tables[bits].shifts.at[lane] = static_cast<uint32_t>(before % 8);
    }
  return tables;
}
constexpr std::array<Spread, kMaxCodeBits + 1> kSpreads = spreads();

struct Unpacker {
  Unpacker(float scale, int bits)
      : spread(
            _mm256_blend_epi32(load(kSpreads[bits].bytes[0]), load(kSpreads[bits].bytes[1]), 0xf0)),
        shifts(load(kSpreads[bits].shifts)),
        mask(_mm256_set1_epi32(2 * ((1 << bits) - 1))),
        magic(_mm256_set1_epi32(0x4b000000)),
        middle(_mm256_set1_ps(static_cast<float>((1 << 23) + (1 << bits) - 1))),
        scale(_mm256_set1_ps(scale)) {}

  // As in pack_factors_avx512.cpp.
  FEDKD_FORMULA void group(const uint8_t* codes, float* values) const {
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i shifted = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, spread), shifts);
    const __m256i whole = _mm256_or_si256(_mm256_and_si256(shifted, mask), magic);
    _mm256_storeu_ps(values,
                     _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_castsi256_ps(whole), middle)));
  }

  __m256i spread, shifts, mask, magic;
  __m256 middle, scale;
};

}  // namespace

void pack_row_avx2(const float* values, int64_t count, float scale, int bits, uint8_t* codes) {
  if (bits <= kByteBits)
    pack_row<kByteGroup>(BytePacker(scale, bits), values, count, codes);
  else
    pack_row<kWordGroup>(WordPacker(scale, bits), values, count, codes);
}

void unpack_row_avx2(const uint8_t* codes, const uint8_t* end, int64_t count, float scale, int bits,
                     float* values) {
  const Unpacker unpacker(scale, bits);
  int64_t i = 0;
  for (; i + kLanes <= count && end - codes >= kStored; i += kLanes, codes += bits)
    unpacker.group(codes, values + i);
  for (; i < count; i += kLanes, codes += bits) {
    uint8_t bytes[kStored] = {};
    float last[kLanes];
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    std::memcpy(bytes, codes, static_cast<size_t>(packed_bytes(left, bits)));
    unpacker.group(bytes, last);
    std::memcpy(values + i, last, static_cast<size_t>(left) * sizeof(float));
  }
}

}  // namespace fedkd_fast::cpu

#pragma GCC pop_options

namespace fedkd_fast::cpu {

bool has_avx2_packing() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}

}  // namespace fedkd_fast::cpu

#endif
