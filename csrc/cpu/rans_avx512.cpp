// rANS coding with AVX-512: 32 lanes in two vectors, which hide each other's latencies.
//
// An encoder finds a symbol's numbers in registers: 64 symbols are two permutations of two
// registers, 32 are one. A decoder gathers slots from L1. Words are compressed out of and expanded
// into the lanes that have one; masked stores and loads touch no byte beyond them.

#include "cpu/rans_parts.h"

#ifdef FEDKD_X86_VECTORS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")

namespace fedkd_fast::cpu {
namespace {

constexpr int kHalf = 16;                  // lanes of a vector
constexpr int kNarrowReach = 15;           // largest symbol of tables in two registers
constexpr int64_t kMostBytes = 4 * kHalf;  // words of a group without escapes
constexpr __mmask16 kAll = 0xffff;

FEDKD_FORMULA __m512i set(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }

FEDKD_FORMULA uint32_t ones(unsigned count) {
  return static_cast<uint32_t>((uint64_t{1} << count) - 1);
}

FEDKD_FORMULA unsigned count_lanes(__mmask16 lanes) {
  return static_cast<unsigned>(__builtin_popcount(lanes));
}

// Lanes of the first and the second half where `left` values are left.
FEDKD_FORMULA __mmask16 lanes_of(int64_t left, int half) {
  const int64_t own = left - half * kHalf;
  return own >= kHalf ? kAll : own <= 0 ? __mmask16{0} : static_cast<__mmask16>(ones(own));
}

// ---- encoding -----------------------------------------------------------------------------------

// Entries of a table by symbol; a narrow one has -15..15 and, at 31, the escape.
template <bool kWide>
struct Lookup {
  explicit Lookup(const uint32_t* entries) {
    constexpr int kFirst = kWide ? 0 : kRansReach - kNarrowReach;
    for (int i = 0; i < (kWide ? 4 : 2); ++i)
      part[i] = _mm512_loadu_si512(entries + kFirst + i * kHalf);
    if (!kWide) part[1] = _mm512_mask_mov_epi32(part[1], 0x8000, set(entries[kRansEscape]));
  }
  FEDKD_FORMULA __m512i at(__m512i symbols, __mmask16 upper) const {
    const __m512i low = _mm512_permutex2var_epi32(part[0], symbols, part[1]);
    if (!kWide) return low;
    return _mm512_mask_mov_epi32(low, upper, _mm512_permutex2var_epi32(part[2], symbols, part[3]));
  }
  __m512i part[kWide ? 4 : 2];
};

template <bool kWide>
struct Encoder {
  Encoder(const RansSource& source, const RansTables& tables)
      : reciprocals(tables.reciprocal[rans_table(source.level)]),
        codes(tables.packed[rans_table(source.level)]),
        values(source.values),
        multiplier(_mm512_set1_ps(source.multiplier)),
        half(_mm512_set1_epi32(rans_half(rans_raw_bits(source.level)))),
        raw_bits(_mm_cvtsi32_si128(rans_raw_bits(source.level))),
        support(_mm512_set1_epi32(tables.support[rans_table(source.level)])),
        width(_mm512_add_epi32(support, support)) {}

  FEDKD_FORMULA __m512i high_parts(int64_t i, __mmask16 lanes) const {
    constexpr float kMost = static_cast<float>(kRansLargest);
    __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), multiplier);
    // In this order of operands NaN becomes the smallest.
    scaled = _mm512_maskz_max_ps(kAll, scaled, _mm512_set1_ps(-kMost));
    scaled = _mm512_maskz_min_ps(kAll, scaled, _mm512_set1_ps(kMost));
    const __m512i q = _mm512_maskz_cvtps_epi32(kAll, scaled);
    return _mm512_maskz_sra_epi32(kAll, _mm512_add_epi32(q, half), raw_bits);
  }

  FEDKD_FORMULA __mmask16 escapes(__m512i high, __mmask16 lanes) const {
    return _mm512_mask_cmpgt_epu32_mask(lanes, _mm512_add_epi32(high, support), width);
  }

  FEDKD_FORMULA __m512i step(__m512i x, __m512i high, __mmask16 escaped, __mmask16 lanes,
                             uint8_t** at) const {
    constexpr int kBias = kWide ? kRansReach : kNarrowReach;
    const __m512i symbols = _mm512_mask_mov_epi32(_mm512_add_epi32(high, _mm512_set1_epi32(kBias)),
                                                  escaped, _mm512_set1_epi32(2 * kBias + 1));
    const __mmask16 upper = kWide ? _mm512_test_epi32_mask(symbols, set(32)) : __mmask16{0};
    const __m512i code = codes.at(symbols, upper), reciprocal = reciprocals.at(symbols, upper);
    const __mmask16 full =
        _mm512_mask_cmpge_epu32_mask(lanes, x, _mm512_and_si512(code, set(0xfff00000u)));
    const unsigned words = count_lanes(full);
    *at -= 2 * words;
    _mm512_mask_cvtepi32_storeu_epi16(*at, static_cast<__mmask16>(ones(words)),
                                      _mm512_maskz_compress_epi32(full, x));
    x = _mm512_mask_srli_epi32(x, full, x, 16);
    const __m512i raised =
        _mm512_add_epi32(x, _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, code, 4), set(1)));
    const __m512i even = _mm512_maskz_mul_epu32(0xff, raised, reciprocal);
    const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, raised, 32),
                                               _mm512_maskz_srli_epi64(0xff, reciprocal, 32));
    __m512i quotient = _mm512_mask_mov_epi32(_mm512_maskz_srli_epi64(0xff, even, 32), 0xaaaa, odd);
    quotient = _mm512_maskz_srlv_epi32(kAll, quotient, _mm512_and_si512(code, set(15)));
    const __m512i before = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, code, 8), set(0xfff));
    const __m512i others =
        _mm512_sub_epi32(set(kRansTotal), _mm512_maskz_srli_epi32(kAll, code, 20));
    return _mm512_mask_add_epi32(x, lanes, _mm512_add_epi32(x, before),
                                 _mm512_mullo_epi32(quotient, others));
  }

  FEDKD_FORMULA uint8_t* group(int64_t i, __mmask16 first, __mmask16 second, __m512i* states,
                               uint8_t* at) const {
    const __m512i low = high_parts(i, first), high = high_parts(i + kHalf, second);
    const __mmask16 low_escapes = escapes(low, first), high_escapes = escapes(high, second);
    if (__builtin_expect((low_escapes | high_escapes) != 0, 0)) {
      alignas(64) int32_t parts[2 * kHalf];
      _mm512_store_si512(parts, low);
      _mm512_store_si512(parts + kHalf, high);
      uint32_t lanes = static_cast<uint32_t>(low_escapes) | uint32_t{high_escapes} << kHalf;
      for (; lanes != 0;) {
        const int lane = 31 - __builtin_clz(lanes);
        lanes ^= 1u << lane;
        at = write_escape(parts[lane], at);
      }
    }
    states[1] = step(states[1], high, high_escapes, second, &at);
    states[0] = step(states[0], low, low_escapes, first, &at);
    return at;
  }

  Lookup<kWide> reciprocals, codes;
  const float* values;
  __m512 multiplier;
  __m512i half;
  __m128i raw_bits;
  __m512i support, width;
};

template <bool kWide>
uint8_t* encode_piece(const RansSource& source, const RansTables& tables, __m512i* states,
                      uint8_t* at) {
  const Encoder<kWide> encoder(source, tables);
  __m512i held[2] = {states[0], states[1]};
  const int64_t left = source.count % kRansManyLanes;
  int64_t i = source.count - left;
  if (left > 0) at = encoder.group(i, lanes_of(left, 0), lanes_of(left, 1), held, at);
  for (i -= kRansManyLanes; i >= 0; i -= kRansManyLanes)
    at = encoder.group(i, kAll, kAll, held, at);
  states[0] = held[0];
  states[1] = held[1];
  return at;
}

// ---- decoding -----------------------------------------------------------------------------------

struct Decoder {
  Decoder(const RansTarget& target, const RansTables& tables)
      : place(target),
        support(tables.support[place.table]),
        slots(tables.slots[place.table]),
        scale(_mm512_set1_ps(target.scale)) {}

  FEDKD_FORMULA __m512i look_up(__m512i x) const {
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), kAll,
                                       _mm512_and_si512(x, set(kRansTotal - 1)), slots, 4);
  }

  FEDKD_FORMULA __m512i advance(__m512i x, __m512i slot) const {
    return _mm512_add_epi32(_mm512_mullo_epi32(_mm512_maskz_srli_epi32(kAll, slot, 20),
                                               _mm512_maskz_srli_epi32(kAll, x, kRansPrecision)),
                            _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, slot, 8), set(0xfff)));
  }

  FEDKD_FORMULA __m512i refill(__m512i x, __mmask16 low, __m256i words) const {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAll, words);
    return _mm512_mask_or_epi32(x, low, _mm512_maskz_slli_epi32(kAll, x, 16),
                                _mm512_maskz_expand_epi32(low, wide));
  }

  // Returns which lanes are escaped.
  FEDKD_FORMULA __mmask16 put(int64_t i, __m512i slot, __mmask16 lanes) const {
    const __m512i symbols = _mm512_and_si512(slot, set(0xff));
    const __m512i high = _mm512_sub_epi32(symbols, set(kRansReach));
    if (place.raw_bits > 0)
      _mm512_mask_storeu_epi32(place.values + i, lanes, high);
    else
      _mm512_mask_storeu_ps(place.values + i, lanes,
                            _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(kAll, high), scale));
    return _mm512_mask_cmpeq_epi32_mask(lanes, symbols, set(kRansEscape));
  }

  RansPlace place;
  int support;
  const uint32_t* slots;
  __m512 scale;
};

// A group of fewer lanes, or with few bytes left.
RansFault decode_carefully(const Decoder& decoder, int64_t i, int64_t left, __m512i* states,
                           const uint8_t** at, const uint8_t* end, uint32_t* escapes) {
  *escapes = 0;
  for (int half = 0; half < 2; ++half) {
    const __mmask16 lanes = lanes_of(left, half);
    const __m512i slot = decoder.look_up(states[half]);
    __m512i x = _mm512_mask_mov_epi32(states[half], lanes, decoder.advance(states[half], slot));
    const __mmask16 low = _mm512_mask_cmplt_epu32_mask(lanes, x, set(kRansRest));
    const unsigned words = count_lanes(low);
    if (end - *at < 2 * static_cast<int64_t>(words)) return RansFault::kTruncated;
    x = decoder.refill(x, low, _mm256_maskz_loadu_epi16(static_cast<__mmask16>(ones(words)), *at));
    *at += 2 * words;
    states[half] = x;
    *escapes |= uint32_t{decoder.put(i + half * kHalf, slot, lanes)} << (half * kHalf);
  }
  return RansFault::kNone;
}

// As add_low_bits: low bits of 16 values lie in 4 bytes each, at offsets that are always the same.
RansFault join_low_bits(const RansTarget& target) {
  const int raw_bits = rans_raw_bits(target.level);
  if (raw_bits == 0) return RansFault::kNone;
  const int64_t bytes = rans_raw_bytes(target.count, raw_bits);
  const int last = (kHalf - 1) * raw_bits / 8 + 4;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i bit = _mm512_mullo_epi32(lane, _mm512_set1_epi32(raw_bits));
  const __m512i offset = _mm512_maskz_srli_epi32(kAll, bit, 3),
                shift = _mm512_and_si512(bit, set(7));
  const __m512i mask = set((1u << raw_bits) - 1u), half = _mm512_set1_epi32(rans_half(raw_bits));
  const __m128i raised = _mm_cvtsi32_si128(raw_bits);
  const uint8_t* low = target.low;
  __mmask16 beyond = 0;
  int64_t i = 0;
  for (; i + kHalf <= target.count && target.low + bytes - low >= last;
       i += kHalf, low += 2 * raw_bits) {
    const __m512i windows =
        _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), kAll, offset, low, 1);
    const __m512i part = _mm512_and_si512(_mm512_maskz_srlv_epi32(kAll, windows, shift), mask);
    const __m512i high = _mm512_loadu_si512(target.values + i);
    const __m512i q =
        _mm512_sub_epi32(_mm512_add_epi32(_mm512_maskz_sll_epi32(kAll, high, raised), part), half);
    beyond |= _mm512_cmpgt_epi32_mask(_mm512_maskz_abs_epi32(kAll, q), set(kRansLargest));
    _mm512_storeu_ps(target.values + i, _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(kAll, q),
                                                      _mm512_set1_ps(target.scale)));
  }
  const RansFault fault = add_low_bits(
      {target.values + i, low, target.count - static_cast<int32_t>(i), target.level, target.scale});
  return fault == RansFault::kNone && beyond != 0 ? RansFault::kLargest : fault;
}

RansFault decode_piece(const RansTarget& target, const RansTables& tables, __m512i* states,
                       const uint8_t** from, const uint8_t* end) {
  const Decoder decoder(target, tables);
  const uint8_t* at = *from;
  __m512i first = states[0], second = states[1];
  for (int64_t i = 0; i < target.count; i += kRansManyLanes) {
    uint32_t escapes = 0;
    if (target.count - i >= kRansManyLanes && end - at >= kMostBytes) {
      const __m512i first_slot = decoder.look_up(first), second_slot = decoder.look_up(second);
      first = decoder.advance(first, first_slot);
      second = decoder.advance(second, second_slot);
      const __mmask16 low = _mm512_cmplt_epu32_mask(first, set(kRansRest));
      const __mmask16 other = _mm512_cmplt_epu32_mask(second, set(kRansRest));
      const uint8_t* const next = at + 2 * count_lanes(low);
      first = decoder.refill(first, low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      second =
          decoder.refill(second, other, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)));
      at = next + 2 * count_lanes(other);
      escapes = decoder.put(i, first_slot, kAll);
      escapes |= uint32_t{decoder.put(i + kHalf, second_slot, kAll)} << kHalf;
    } else {
      __m512i held[2] = {first, second};
      const RansFault fault =
          decode_carefully(decoder, i, target.count - i, held, &at, end, &escapes);
      if (fault != RansFault::kNone) return fault;
      first = held[0];
      second = held[1];
    }
    if (__builtin_expect(escapes != 0, 0)) {
      const RansFault fault = read_escapes(escapes, i, decoder.place, decoder.support, &at, end);
      if (fault != RansFault::kNone) return fault;
    }
  }
  states[0] = first;
  states[1] = second;
  *from = at;
  return join_low_bits(target);
}

}  // namespace

uint8_t* encode_avx512(const RansSource* pieces, int64_t count, uint8_t* end) {
  const RansTables& tables = rans_tables();
  __m512i states[2] = {set(kRansRest), set(kRansRest)};
  uint8_t* at = end;
  for (int64_t piece = count - 1; piece >= 0; --piece) {
    const bool narrow = tables.support[rans_table(pieces[piece].level)] <= kNarrowReach;
    at = narrow ? encode_piece<false>(pieces[piece], tables, states, at)
                : encode_piece<true>(pieces[piece], tables, states, at);
  }
  for (int half = 1; half >= 0; --half) _mm512_storeu_si512(at -= 4 * kHalf, states[half]);
  return at;
}

RansFault decode_avx512(const uint8_t* bytes, int64_t size, const RansTarget* pieces,
                        int64_t count) {
  const RansTables& tables = rans_tables();
  const uint8_t *at = bytes + 4 * kRansManyLanes, *const end = bytes + size;
  __m512i states[2] = {_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes + 4 * kHalf)};
  for (int64_t piece = 0; piece < count; ++piece) {
    const RansFault fault = decode_piece(pieces[piece], tables, states, &at, end);
    if (fault != RansFault::kNone) return fault;
  }
  for (const __m512i& state : states)
    if (_mm512_cmpneq_epu32_mask(state, set(kRansRest)) != 0) return RansFault::kEnd;
  return at == end ? RansFault::kNone : RansFault::kTrailing;
}

}  // namespace fedkd_fast::cpu

#pragma GCC pop_options

namespace fedkd_fast::cpu {

bool has_avx512_rans() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

}  // namespace fedkd_fast::cpu

#endif
