// rANS coding with AVX2: the steps of rans_avx512.cpp on four vectors of eight lanes.
//
// Words of the lanes that have one are moved together, and apart, by a table of byte orders. Groups
// of fewer lanes take the portable path. The last words are decoded from a copy, zeros behind them.

#include <array>

#include "cpu/rans_parts.h"

#ifdef FEDKD_X86_VECTORS

#pragma GCC push_options
#pragma GCC target("avx2,popcnt")

namespace fedkd_fast::cpu {
namespace {

constexpr int kLanes = 8;  // of a vector
constexpr int kVectors = static_cast<int>(kRansManyLanes) / kLanes;
constexpr int kVectorBytes = 2 * kLanes;                 // words of a vector
constexpr int64_t kMostBytes = kVectors * kVectorBytes;  // words of a group without escapes
constexpr uint8_t kZero = 0x80;                          // an index of no byte

struct alignas(16) Bytes {
  uint8_t at[kVectorBytes];
};

// By lanes: where each word of eight comes from. `together`: words of these lanes, at the end;
// else the next word for each of these lanes, zero for others.
constexpr std::array<Bytes, 1 << kLanes> orders(bool together) {
  std::array<Bytes, 1 << kLanes> tables{};
  for (int lanes = 0; lanes < 1 << kLanes; ++lanes) {
    int words = 0;
    for (int lane = 0; lane < kLanes; ++lane) words += lanes >> lane & 1;
    int next = together ? kLanes - words : 0;
    for (uint8_t& byte : tables[lanes].at) byte = kZero;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      const int to = together ? next : lane, from = together ? lane : next;
      tables[lanes].at[2 * to] = static_cast<uint8_t>(2 * from);
      tables[lanes].at[2 * to + 1] = static_cast<uint8_t>(2 * from + 1);
      ++next;
    }
  }
  return tables;
}
constexpr std::array<Bytes, 1 << kLanes> kTogether = orders(true), kApart = orders(false);

FEDKD_FORMULA __m128i load(const Bytes& order) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(order.at));
}

FEDKD_FORMULA __m256i load(const uint32_t* entries) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
}

FEDKD_FORMULA __m256i set(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }

// Of a vector of masks.
FEDKD_FORMULA uint32_t lanes_of(__m256i mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}

FEDKD_FORMULA int count(uint32_t lanes) { return __builtin_popcount(lanes); }

FEDKD_FORMULA __m256i at_most(__m256i x, __m256i most) {  // unsigned
  return _mm256_cmpeq_epi32(_mm256_max_epu32(x, most), most);
}

struct States {
  explicit States(const uint32_t* states) {
    for (int v = 0; v < kVectors; ++v) at[v] = load(states + v * kLanes);
  }
  FEDKD_FORMULA void store(uint32_t* states) const {
    for (int v = 0; v < kVectors; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(states + v * kLanes), at[v]);
  }
  __m256i at[kVectors];
};

// ---- encoding -----------------------------------------------------------------------------------

// Entries of a table by symbol + kReach; the one behind them is the escape's.
template <int kReach>
struct Lookup {
  explicit Lookup(const uint32_t* entries) {
    for (int i = 0; i <= 2 * kReach; ++i) part[i] = entries[kRansReach - kReach + i];
    part[2 * kReach + 1] = entries[kRansEscape];
  }
  // The sign of `bits << k` chooses by bit 31 - k.
  FEDKD_FORMULA __m256i at(__m256i symbols) const {
    constexpr int kParts = (2 * kReach + 2) / kLanes;
    __m256i found[kParts];
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i)
      found[i] = _mm256_permutevar8x32_epi32(load(part + i * kLanes), symbols);
    __m256i bits = _mm256_slli_epi32(symbols, 28);
#pragma GCC unroll 8
    for (int size = kParts / 2; size > 0; size /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < size; ++i)
        found[i] = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(found[2 * i]),
                                                        _mm256_castsi256_ps(found[2 * i + 1]),
                                                        _mm256_castsi256_ps(bits)));
      bits = _mm256_slli_epi32(symbols, size == kParts / 2 ? 27 : 26);
    }
    return found[0];
  }
  alignas(32) uint32_t part[2 * kReach + 2];
};

template <int kReach>
struct Encoder {
  Encoder(const RansSource& source, const RansTables& tables)
      : reciprocals(tables.reciprocal[rans_table(source.level)]),
        codes(tables.packed[rans_table(source.level)]),
        values(source.values),
        multiplier(_mm256_set1_ps(source.multiplier)),
        half(_mm256_set1_epi32(rans_half(rans_raw_bits(source.level)))),
        raw_bits(_mm_cvtsi32_si128(rans_raw_bits(source.level))),
        support(_mm256_set1_epi32(tables.support[rans_table(source.level)])),
        width(_mm256_add_epi32(support, support)) {}

  FEDKD_FORMULA __m256i high_parts(int64_t i) const {
    constexpr float kMost = static_cast<float>(kRansLargest);
    __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(values + i), multiplier);
    // In this order of operands NaN becomes the smallest.
    scaled = _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(-kMost)), _mm256_set1_ps(kMost));
    return _mm256_sra_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(scaled), half), raw_bits);
  }

  FEDKD_FORMULA __m256i step(__m256i x, __m256i high, __m256i inside, uint8_t** at) const {
    const __m256i symbols =
        _mm256_blendv_epi8(set(2 * kReach + 1), _mm256_add_epi32(high, set(kReach)), inside);
    const __m256i code = codes.at(symbols), reciprocal = reciprocals.at(symbols);
    const __m256i full = at_most(_mm256_and_si256(code, set(0xfff00000u)), x);
    const uint32_t lanes = lanes_of(full);
    // Low halves of the lanes, each 128 bits on their own, then next to each other.
    const __m256i low = _mm256_shuffle_epi8(
        x, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5, 8,
                            9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i words = _mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08));
    // What is written beyond the words, the next ones replace.
    _mm_storeu_si128(reinterpret_cast<__m128i*>(*at - kVectorBytes),
                     _mm_shuffle_epi8(words, load(kTogether[lanes])));
    *at -= 2 * count(lanes);
    x = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), full);
    const __m256i raised =
        _mm256_add_epi32(x, _mm256_and_si256(_mm256_srli_epi32(code, 4), set(1)));
    const __m256i even = _mm256_mul_epu32(raised, reciprocal);
    const __m256i odd =
        _mm256_mul_epu32(_mm256_srli_epi64(raised, 32), _mm256_srli_epi64(reciprocal, 32));
    __m256i quotient = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    quotient = _mm256_srlv_epi32(quotient, _mm256_and_si256(code, set(15)));
    const __m256i before = _mm256_and_si256(_mm256_srli_epi32(code, 8), set(0xfff));
    const __m256i others = _mm256_sub_epi32(set(kRansTotal), _mm256_srli_epi32(code, 20));
    return _mm256_add_epi32(_mm256_add_epi32(x, before), _mm256_mullo_epi32(quotient, others));
  }

  FEDKD_FORMULA void group(int64_t i, States* states, uint8_t** at) const {
    __m256i high[kVectors], inside[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      high[v] = high_parts(i + v * kLanes);
      inside[v] = at_most(_mm256_add_epi32(high[v], support), width);
    }
    const __m256i all = _mm256_and_si256(_mm256_and_si256(inside[0], inside[1]),
                                         _mm256_and_si256(inside[2], inside[3]));
    if (__builtin_expect(lanes_of(all) != 0xff, 0)) *at = escapes(high, inside, *at);
#pragma GCC unroll 4
    for (int v = kVectors - 1; v >= 0; --v)
      states->at[v] = step(states->at[v], high[v], inside[v], at);
  }

  static uint8_t* escapes(const __m256i* high, const __m256i* inside, uint8_t* at) {
    for (int v = kVectors - 1; v >= 0; --v) {
      alignas(32) int32_t parts[kLanes];
      _mm256_store_si256(reinterpret_cast<__m256i*>(parts), high[v]);
      for (uint32_t lanes = lanes_of(inside[v]) ^ 0xffu; lanes != 0;) {
        const int lane = 31 - __builtin_clz(lanes);
        lanes ^= 1u << lane;
        at = write_escape(parts[lane], at);
      }
    }
    return at;
  }

  Lookup<kReach> reciprocals, codes;
  const float* values;
  __m256 multiplier;
  __m256i half;
  __m128i raw_bits;
  __m256i support, width;
};

template <int kReach>
uint8_t* encode_piece(const RansSource& source, const RansTables& tables, uint32_t* states,
                      uint8_t* at) {
  const int64_t left = source.count % kRansManyLanes;
  int64_t i = source.count - left;
  if (left > 0)
    at = encode_piece_portable(
        {source.values + i, static_cast<int32_t>(left), source.level, source.multiplier}, states,
        at);
  const Encoder<kReach> encoder(source, tables);
  States held(states);
  for (i -= kRansManyLanes; i >= 0; i -= kRansManyLanes) encoder.group(i, &held, &at);
  held.store(states);
  return at;
}

// ---- decoding -----------------------------------------------------------------------------------

struct Decoder {
  Decoder(const RansTarget& target, const RansTables& tables)
      : place(target), slots(tables.slots[place.table]), scale(_mm256_set1_ps(target.scale)) {}

  FEDKD_FORMULA __m256i look_up(__m256i x) const {
    return _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), reinterpret_cast<const int*>(slots),
                                       _mm256_and_si256(x, set(kRansTotal - 1)),
                                       _mm256_set1_epi32(-1), 4);
  }

  FEDKD_FORMULA __m256i advance(__m256i x, __m256i slot, const uint8_t** at) const {
    x = _mm256_add_epi32(
        _mm256_mullo_epi32(_mm256_srli_epi32(slot, 20), _mm256_srli_epi32(x, kRansPrecision)),
        _mm256_and_si256(_mm256_srli_epi32(slot, 8), set(0xfff)));
    const __m256i low = at_most(x, set(kRansRest - 1));
    const uint32_t lanes = lanes_of(low);
    const __m128i words = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(*at)),
                                           load(kApart[lanes]));
    *at += 2 * count(lanes);
    const __m256i longer = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_cvtepu16_epi32(words));
    return _mm256_blendv_epi8(x, longer, low);
  }

  // Returns which lanes are escaped.
  FEDKD_FORMULA uint32_t put(int64_t i, __m256i slot) const {
    const __m256i symbols = _mm256_and_si256(slot, set(0xff));
    const __m256i high = _mm256_sub_epi32(symbols, set(kRansReach));
    if (place.raw_bits > 0)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(place.values + i), high);
    else
      _mm256_storeu_ps(place.values + i, _mm256_mul_ps(_mm256_cvtepi32_ps(high), scale));
    return lanes_of(_mm256_cmpeq_epi32(symbols, set(kRansEscape)));
  }

  RansPlace place;
  const uint32_t* slots;
  __m256 scale;
};

// Words of a chunk, of which those of a group can be read wherever `at` is not beyond `end`.
struct Words {
  Words(const uint8_t* at, const uint8_t* end) : at(at), end(end) { extend(); }
  FEDKD_FORMULA void extend() {
    if (__builtin_expect(!copied && end - at < kMostBytes, 0)) copy();
  }
  void copy() {
    const auto left = static_cast<size_t>(end - at);
    std::memcpy(rest, at, left);
    at = rest;
    end = rest + left;
    copied = true;
  }
  const uint8_t *at, *end;
  bool copied = false;
  uint8_t rest[2 * kMostBytes] = {};
};

RansFault decode_piece(const RansTarget& target, const RansTables& tables, uint32_t* states,
                       Words* words) {
  const Decoder decoder(target, tables);
  const int support = tables.support[decoder.place.table];
  States held(states);
  int64_t i = 0;
  for (; target.count - i >= kRansManyLanes; i += kRansManyLanes) {
    words->extend();
    const uint8_t* at = words->at;
    uint32_t escapes = 0;
    __m256i slot[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) slot[v] = decoder.look_up(held.at[v]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      held.at[v] = decoder.advance(held.at[v], slot[v], &at);
      escapes |= decoder.put(i + v * kLanes, slot[v]) << (v * kLanes);
    }
    if (at > words->end) return RansFault::kTruncated;
    words->at = at;
    if (__builtin_expect(escapes == 0, 1)) continue;
    const RansFault fault =
        read_escapes(escapes, i, decoder.place, support, &words->at, words->end);
    if (fault != RansFault::kNone) return fault;
  }
  held.store(states);
  return decode_symbols_portable(
      {target.values + i, nullptr, target.count - static_cast<int32_t>(i), target.level,
       target.scale},
      states, &words->at, words->end);
}

}  // namespace

uint8_t* encode_avx2(const RansSource* pieces, int64_t count, uint8_t* end) {
  const RansTables& tables = rans_tables();
  uint32_t states[kRansManyLanes];
  for (uint32_t& state : states) state = kRansRest;
  uint8_t* at = end;
  for (int64_t piece = count - 1; piece >= 0; --piece) {
    const RansSource& source = pieces[piece];
    const int support = tables.support[rans_table(source.level)];
    at = support <= 7    ? encode_piece<7>(source, tables, states, at)
         : support <= 15 ? encode_piece<15>(source, tables, states, at)
                         : encode_piece<kRansReach>(source, tables, states, at);
  }
  at -= sizeof(states);
  std::memcpy(at, states, sizeof(states));
  return at;
}

RansFault decode_avx2(const uint8_t* bytes, int64_t size, const RansTarget* pieces, int64_t count) {
  const RansTables& tables = rans_tables();
  uint32_t states[kRansManyLanes];
  std::memcpy(states, bytes, sizeof(states));
  Words words(bytes + sizeof(states), bytes + size);
  for (int64_t piece = 0; piece < count; ++piece) {
    RansFault fault = decode_piece(pieces[piece], tables, states, &words);
    if (fault == RansFault::kNone) fault = add_low_bits(pieces[piece]);
    if (fault != RansFault::kNone) return fault;
  }
  for (const uint32_t state : states)
    if (state != kRansRest) return RansFault::kEnd;
  return words.at == words.end ? RansFault::kNone : RansFault::kTrailing;
}

}  // namespace fedkd_fast::cpu

#pragma GCC pop_options

namespace fedkd_fast::cpu {

bool has_avx2_rans() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
  return has;
}

}  // namespace fedkd_fast::cpu

#endif
