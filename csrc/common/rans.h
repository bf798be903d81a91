// The rANS code of the wire: what CPU and CUDA share to the bit, and how a message is cut.
//
// A row of level l is coded in integers q = rint(value · multiplier). l is the ratio of standard
// deviation and step in 1/16 octaves, as a logarithm: up to 47 it names a Gaussian table, and each
// 16 beyond leave one more low bit to travel raw. Below -48 the row is all zeros and takes nothing.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/macros.h"

namespace fedkd_fast {

constexpr int kRansTables = 96, kRansFirstLevel = -48, kRansMostLevel = 335;
constexpr int kRansPrecision = 12;
constexpr uint32_t kRansTotal = 1u << kRansPrecision;  // of the frequencies of a table
constexpr int kRansReach = 31;                         // symbols are -31..31, then the escape
constexpr int kRansSymbols = 2 * kRansReach + 2, kRansEscape = kRansSymbols - 1;
constexpr int kRansStored = kRansReach + 2;  // of a table: frequencies of 0..31 and of the escape
constexpr int kRansLargest = (1 << 22) - 1;  // |q|
constexpr uint32_t kRansRest = 1u << 16;     // a state before the first symbol

constexpr int64_t kRansChunk = 65536;  // symbols
constexpr int64_t kRansManyLanes = 32, kRansFewLanes = 4, kRansFewSymbols = 16384;

FEDKD_HD inline int rans_lanes(int64_t symbols) {
  return static_cast<int>(symbols < kRansFewSymbols ? kRansFewLanes : kRansManyLanes);
}

FEDKD_HD inline bool rans_codes(int level) { return level >= kRansFirstLevel; }

// Low bits of a row that travel raw, of a row that is coded.
FEDKD_HD inline int rans_raw_bits(int level) { return level < 48 ? 0 : (level - 48) / 16 + 1; }

FEDKD_HD inline int rans_table(int level) {
  return level - 16 * rans_raw_bits(level) - kRansFirstLevel;
}

FEDKD_HD inline int64_t rans_raw_bytes(int64_t count, int raw_bits) {
  return (count * raw_bits + 7) / 8;
}

// Of the stored frequencies of a table: the largest symbol that has one.
FEDKD_HD inline int rans_support(const uint16_t* stored) {
  int support = kRansReach;
  while (stored[support] == 0) --support;
  return support;
}

// Of the stored frequencies of a table: that of a symbol by its index.
FEDKD_HD inline uint32_t rans_frequency(const uint16_t* stored, int index) {
  if (index == kRansEscape) return stored[kRansStored - 1];
  return stored[index < kRansReach ? kRansReach - index : index - kRansReach];
}

// In steps, without those beyond the smallest, which NaN becomes; the caller checks for NaN.
FEDKD_FORMULA float rans_scaled(float value, float multiplier) {
  constexpr float kLeast = -static_cast<float>(kRansLargest);
  const float scaled = value * multiplier;
  return scaled > kLeast ? scaled : kLeast;
}

FEDKD_FORMULA float rans_clamped(float scaled) {
  constexpr float kMost = static_cast<float>(kRansLargest);
  return scaled < kMost ? scaled : kMost;
}

FEDKD_FORMULA int32_t rans_rounded(float clamped) {
  // Where a float's last digit is that of 1, the adder rounds to the nearest even integer.
  constexpr float kUnits = 12582912.0f;
  return static_cast<int32_t>(bits_from_float(clamped + kUnits) - bits_from_float(kUnits));
}

FEDKD_FORMULA int32_t rans_quantise(float value, float multiplier) {
  return rans_rounded(rans_clamped(rans_scaled(value, multiplier)));
}

// q in two parts, high · 2^raw_bits + low - half, with half = rans_half(raw_bits).
FEDKD_HD inline int32_t rans_half(int raw_bits) {
  return raw_bits == 0 ? 0 : int32_t{1} << (raw_bits - 1);
}

FEDKD_HD inline int32_t rans_high(int32_t q, int raw_bits) {
  return (q + rans_half(raw_bits)) >> raw_bits;
}

FEDKD_HD inline uint32_t rans_low(int32_t q, int raw_bits) {
  return static_cast<uint32_t>(q + rans_half(raw_bits)) & ((1u << raw_bits) - 1u);
}

// An escaped symbol's words: 15 bits of a zigzag number each, the last word without bit 15.
FEDKD_HD inline uint32_t rans_zigzag(int32_t high) {
  return (static_cast<uint32_t>(high) << 1) ^ (high < 0 ? ~0u : 0u);
}

FEDKD_HD inline int32_t rans_unzigzag(uint32_t zigzag) {
  return static_cast<int32_t>((zigzag >> 1) ^ (~(zigzag & 1u) + 1u));
}

// Whether an escaped symbol had to be escaped, and can be the high part of a q.
FEDKD_HD inline bool rans_escapes(int32_t high, int support, int raw_bits) {
  return (high > support || high < -support) && high <= rans_high(kRansLargest, raw_bits) &&
         high >= rans_high(-kRansLargest, raw_bits);
}

// What a decoder finds wrong. The least of a stream's chunks is reported.
enum class RansFault : int32_t {
  kNone = 0,
  kLength,     // the chunk table does not add up to the stream
  kOdd,        // a chunk of an odd length, or too short for its states
  kStart,      // a state that no encoder ends with
  kTruncated,  // words are missing
  kEscape,     // an escaped symbol with a code that no encoder writes
  kLargest,    // a q beyond kRansLargest
  kPadding,    // bits behind the low parts of a row
  kEnd,        // a state that no encoder starts with
  kTrailing,   // words are left
};

}  // namespace fedkd_fast
