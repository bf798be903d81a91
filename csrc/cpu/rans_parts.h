// What the paths of the rANS coder share: tables, words in memory, escaped symbols.
#pragma once

#include <cstring>

#include "cpu/streaming.h"
#include "kernels_rans.h"

namespace fedkd_fast::cpu {

// By table and symbol index. Encoders divide a state by a frequency f, floor(x / f), as
//   ((x + increment) · reciprocal >> 32) >> shift,
// which is exact for x < f · 2^20, beyond which a state sends a word first. Proof: with s = shift =
// floor(log2 f) and m = 2^(32+s) / f rounded up by e / f (or down by e / f and x by one up), the
// result is exact where e · x < 2^(32+s) (e · (x + 1) <= 2^(32+s)). Of both roundings one has
// e <= f / 2, and f / 2 · f · 2^20 <= 2^(32+s), because f < 2^12 and f < 2^(s+1). Powers of two
// take s - 1, and f = 1 is rounded down.
struct RansTables {
  int support[kRansTables];
  uint32_t reciprocal[kRansTables][kRansSymbols];
  uint32_t packed[kRansTables][kRansSymbols];  // as pack_code
  uint32_t slots[kRansTables][kRansTotal];     // as pack_slot
};

// Built at the first call.
const RansTables& rans_tables();

FEDKD_FORMULA uint32_t pack_code(uint32_t frequency, uint32_t before, uint32_t increment,
                                 uint32_t shift) {
  return frequency << 20 | before << 8 | increment << 4 | shift;
}

// A state x becomes frequency · (x >> 12) + offset.
FEDKD_FORMULA uint32_t pack_slot(uint32_t frequency, uint32_t offset, uint32_t symbol) {
  return frequency << 20 | offset << 8 | symbol;
}

FEDKD_FORMULA uint32_t load_word(const uint8_t* at) {
  return static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8;
}

FEDKD_FORMULA void store_word(uint8_t* at, uint32_t word) {
  at[0] = static_cast<uint8_t>(word);
  at[1] = static_cast<uint8_t>(word >> 8);
}

// Writes the words of an escaped symbol before `at`; returns where they start.
inline uint8_t* write_escape(int32_t high, uint8_t* at) {
  const uint32_t zigzag = rans_zigzag(high), more = zigzag >> 15;
  if (more != 0) store_word(at -= 2, more);
  store_word(at -= 2, (zigzag & 0x7fffu) | (more != 0 ? 0x8000u : 0u));
  return at;
}

// Where decoded symbols go: where low bits are to come, their values wait as integers.
struct RansPlace {
  explicit RansPlace(const RansTarget& target)
      : values(target.values),
        scale(target.scale),
        raw_bits(rans_raw_bits(target.level)),
        table(rans_table(target.level)) {}
  FEDKD_FORMULA void put(int64_t i, int32_t high) const {
    if (raw_bits > 0)
      std::memcpy(values + i, &high, sizeof(high));
    else
      values[i] = scale * static_cast<float>(high);
  }
  float* values;
  float scale;
  int raw_bits, table;
};

// Reads the words of the escaped symbols among 32 (bit l of `lanes`: value first + l) from *at on.
inline RansFault read_escapes(uint32_t lanes, int64_t first, const RansPlace& place, int support,
                              const uint8_t** at, const uint8_t* end) {
  for (; lanes != 0; lanes &= lanes - 1) {
    if (end - *at < 2) return RansFault::kTruncated;
    uint32_t zigzag = load_word(*at);
    *at += 2;
    if ((zigzag & 0x8000u) != 0) {
      if (end - *at < 2) return RansFault::kTruncated;
      const uint32_t more = load_word(*at);
      *at += 2;
      if (more == 0 || (more & 0x8000u) != 0) return RansFault::kEscape;
      zigzag = (zigzag & 0x7fffu) | more << 15;
    }
    const int32_t high = rans_unzigzag(zigzag);
    if (!rans_escapes(high, support, place.raw_bits)) return RansFault::kEscape;
    place.put(first + __builtin_ctz(lanes), high);
  }
  return RansFault::kNone;
}

// Adds the low bits to a piece whose high parts are there.
RansFault add_low_bits(const RansTarget& target);

// The portable path over a piece, or the end of one, in kRansManyLanes: for groups of fewer lanes.
uint8_t* encode_piece_portable(const RansSource& source, uint32_t* states, uint8_t* at);

// Without low bits.
RansFault decode_symbols_portable(const RansTarget& target, uint32_t* states, const uint8_t** at,
                                  const uint8_t* end);

// Chunks of kRansManyLanes; states and their check are in `bytes`, whose size is even and holds
// them.
#ifdef FEDKD_X86_VECTORS
bool has_avx2_rans();
uint8_t* encode_avx2(const RansSource* pieces, int64_t count, uint8_t* end);
RansFault decode_avx2(const uint8_t* bytes, int64_t size, const RansTarget* pieces, int64_t count);
bool has_avx512_rans();
uint8_t* encode_avx512(const RansSource* pieces, int64_t count, uint8_t* end);
RansFault decode_avx512(const uint8_t* bytes, int64_t size, const RansTarget* pieces,
                        int64_t count);
#endif

}  // namespace fedkd_fast::cpu
