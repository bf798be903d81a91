// rANS coding on the CPU: tables, the portable path, raw low bits, and the choice of a path.
//
// Encoding runs backwards, so that decoding, which is what every receiver does, runs forwards. A
// division by a frequency is a multiplication (rans_parts.h), and decoding looks a slot up in 16
// KiB that stay in L1. Few lanes are for short chunks, whose states would otherwise cost more than
// their words.

#include <algorithm>

#include "cpu/rans_parts.h"

namespace fedkd_fast::cpu {
namespace {

constexpr uint16_t kStored[kRansTables][kRansStored] = {
#include "common/gaussian_tables.inc"
};

void build_code(uint32_t frequency, uint32_t before, uint32_t* reciprocal, uint32_t* packed) {
  uint32_t shift = 31 - static_cast<uint32_t>(__builtin_clz(frequency)), increment = 0;
  if (frequency == 1) {
    *reciprocal = ~0u;
    increment = 1;
  } else if ((frequency & (frequency - 1)) == 0) {
    *reciprocal = 1u << 31;
    --shift;
  } else {
    const uint64_t power = uint64_t{1} << (32 + shift), rest = power % frequency;
    increment = rest <= frequency / 2 ? 1 : 0;
    *reciprocal = static_cast<uint32_t>(power / frequency + (1 - increment));
  }
  *packed = pack_code(frequency, before, increment, shift);
}

void build_table(const uint16_t* stored, int index, RansTables* tables) {
  tables->support[index] = rans_support(stored);
  uint32_t before = 0;
  for (int symbol = 0; symbol < kRansSymbols; ++symbol) {
    const uint32_t frequency = rans_frequency(stored, symbol);
    if (frequency == 0) continue;
    build_code(frequency, before, &tables->reciprocal[index][symbol],
               &tables->packed[index][symbol]);
    for (uint32_t i = 0; i < frequency; ++i)
      tables->slots[index][before + i] = pack_slot(frequency, i, static_cast<uint32_t>(symbol));
    before += frequency;
  }
}

// ---- the portable path --------------------------------------------------------------------------

FEDKD_FORMULA uint32_t encode_symbol(uint32_t state, uint32_t reciprocal, uint32_t packed,
                                     uint8_t** at) {
  const uint32_t frequency = packed >> 20;
  if (state >= frequency << 20) {
    store_word(*at -= 2, state);
    state >>= 16;
  }
  const uint64_t product = uint64_t{state + (packed >> 4 & 1u)} * reciprocal;
  const uint32_t quotient = static_cast<uint32_t>(product >> 32) >> (packed & 15u);
  return state + (packed >> 8 & 0xfffu) + quotient * (kRansTotal - frequency);
}

template <int kLanes>
uint8_t* encode_piece(const RansSource& source, const RansTables& tables, uint32_t* states,
                      uint8_t* at) {
  const int raw_bits = rans_raw_bits(source.level), table = rans_table(source.level);
  const int support = tables.support[table];
  const uint32_t *reciprocal = tables.reciprocal[table], *packed = tables.packed[table];
  const int64_t groups = (source.count + kLanes - 1) / kLanes;
  for (int64_t first = (groups - 1) * kLanes; first >= 0; first -= kLanes) {
    const int active = static_cast<int>(std::min<int64_t>(kLanes, source.count - first));
    int32_t high[kLanes];
    for (int lane = 0; lane < active; ++lane)
      high[lane] =
          rans_high(rans_quantise(source.values[first + lane], source.multiplier), raw_bits);
    int symbols[kLanes];
    for (int lane = active - 1; lane >= 0; --lane) {
      const bool inside = high[lane] <= support && high[lane] >= -support;
      symbols[lane] = inside ? high[lane] + kRansReach : kRansEscape;
      if (!inside) at = write_escape(high[lane], at);
    }
    for (int lane = active - 1; lane >= 0; --lane)
      states[lane] =
          encode_symbol(states[lane], reciprocal[symbols[lane]], packed[symbols[lane]], &at);
  }
  return at;
}

template <int kLanes>
uint8_t* encode_portable(const RansSource* pieces, int64_t count, uint8_t* at) {
  const RansTables& tables = rans_tables();
  uint32_t states[kLanes];
  std::fill_n(states, kLanes, kRansRest);
  for (int64_t piece = count - 1; piece >= 0; --piece)
    at = encode_piece<kLanes>(pieces[piece], tables, states, at);
  for (int lane = kLanes - 1; lane >= 0; --lane) {
    store_word(at -= 2, states[lane] >> 16);
    store_word(at -= 2, states[lane]);
  }
  return at;
}

template <int kLanes>
RansFault decode_symbols(const RansTarget& target, const RansTables& tables, uint32_t* states,
                         const uint8_t** at, const uint8_t* end) {
  const RansPlace place(target);
  const uint32_t* slots = tables.slots[place.table];
  for (int64_t first = 0; first < target.count; first += kLanes) {
    const int active = static_cast<int>(std::min<int64_t>(kLanes, target.count - first));
    uint32_t escapes = 0;
    for (int lane = 0; lane < active; ++lane) {
      const uint32_t slot = slots[states[lane] & (kRansTotal - 1)];
      states[lane] = (slot >> 20) * (states[lane] >> kRansPrecision) + (slot >> 8 & 0xfffu);
      const int symbol = static_cast<int>(slot & 0xffu);
      place.put(first + lane, symbol - kRansReach);
      escapes |= (symbol == kRansEscape ? 1u : 0u) << lane;
    }
    const uint8_t* word = *at;
    if (end - word >= 2 * kLanes) {
      for (int lane = 0; lane < active; ++lane) {
        const bool low = states[lane] < kRansRest;
        const uint32_t longer = states[lane] << 16 | load_word(word);
        states[lane] = low ? longer : states[lane];
        word += low ? 2 : 0;
      }
    } else {
      for (int lane = 0; lane < active; ++lane) {
        if (states[lane] >= kRansRest) continue;
        if (end - word < 2) return RansFault::kTruncated;
        states[lane] = states[lane] << 16 | load_word(word);
        word += 2;
      }
    }
    *at = word;
    if (escapes == 0) continue;
    const RansFault fault =
        read_escapes(escapes, first, place, tables.support[place.table], at, end);
    if (fault != RansFault::kNone) return fault;
  }
  return RansFault::kNone;
}

template <int kLanes>
RansFault decode_portable(const uint8_t* bytes, int64_t size, const RansTarget* pieces,
                          int64_t count) {
  const RansTables& tables = rans_tables();
  const uint8_t *at = bytes + 4 * kLanes, *const end = bytes + size;
  uint32_t states[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    states[lane] = load_word(bytes + 4 * lane) | load_word(bytes + 4 * lane + 2) << 16;
  for (int64_t piece = 0; piece < count; ++piece) {
    RansFault fault = decode_symbols<kLanes>(pieces[piece], tables, states, &at, end);
    if (fault == RansFault::kNone) fault = add_low_bits(pieces[piece]);
    if (fault != RansFault::kNone) return fault;
  }
  if (std::any_of(states, states + kLanes, [](uint32_t state) { return state != kRansRest; }))
    return RansFault::kEnd;
  return at == end ? RansFault::kNone : RansFault::kTrailing;
}

// ---- low bits -----------------------------------------------------------------------------------

constexpr int64_t kBlock = 512;  // values; a multiple of 8, so blocks end on whole bytes

// Of at most kBlock values. In one loop, a compiler branches between the ends instead of computing
// vectors.
FEDKD_CLONES
void low_parts(const float* values, int64_t count, float multiplier, int raw_bits, uint32_t* out) {
  float scaled[kBlock];
  for (int64_t i = 0; i < count; ++i) scaled[i] = rans_scaled(values[i], multiplier);
  for (int64_t i = 0; i < count; ++i) scaled[i] = rans_clamped(scaled[i]);
  for (int64_t i = 0; i < count; ++i) out[i] = rans_low(rans_rounded(scaled[i]), raw_bits);
}

// Appends to a bit stream, which ends at `end`; returns where it goes on.
uint8_t* write_bits(const uint32_t* values, int64_t count, int raw_bits, uint8_t* out,
                    const uint8_t* end) {
  int64_t i = 0;
  // Eight values are whole bytes, and groups do not wait for each other. What a group writes beyond
  // its bytes, the next one writes again.
  for (; raw_bits <= 8 && i + 8 <= count && end - out >= 8; i += 8, out += raw_bits) {
    uint64_t group = 0;
    for (int value = 0; value < 8; ++value)
      group |= uint64_t{values[i + value]} << (value * raw_bits);
    for (int byte = 0; byte < 8; ++byte) out[byte] = static_cast<uint8_t>(group >> (8 * byte));
  }
  uint64_t window = 0;
  int held = 0;
  for (; i < count; ++i) {
    window |= uint64_t{values[i]} << held;
    for (held += raw_bits; held >= 8; held -= 8, window >>= 8)
      *out++ = static_cast<uint8_t>(window);
  }
  if (held > 0) *out++ = static_cast<uint8_t>(window);
  return out;
}

// `left` bytes may be read.
FEDKD_CLONES
void read_bits(const uint8_t* in, int64_t left, int64_t count, int raw_bits, uint32_t* values) {
  const uint32_t mask = (1u << raw_bits) - 1u;
  const auto step = static_cast<uint64_t>(raw_bits);
  int64_t i = 0;
  for (; raw_bits <= 8 && i + 8 <= count && left - i / 8 * raw_bits >= 8; i += 8) {
    const uint8_t* const at = in + i / 8 * raw_bits;
    const uint64_t upper = load_word(at + 4) | load_word(at + 6) << 16;
    const uint64_t group = load_word(at) | load_word(at + 2) << 16 | upper << 32;
    for (uint64_t value = 0; value < 8; ++value)
      values[static_cast<uint64_t>(i) + value] =
          static_cast<uint32_t>(group >> value * step) & mask;
  }
  // A value lies in four bytes, which at the end there may not be.
  const int64_t whole = left < 4 ? 0 : std::min(count, ((left - 4) * 8 + 7) / raw_bits + 1);
  uint64_t bit = static_cast<uint64_t>(i) * step;
  for (; i < whole; ++i, bit += step) {
    const uint8_t* const at = in + bit / 8;
    values[i] = (load_word(at) | load_word(at + 2) << 16) >> bit % 8 & mask;
  }
  for (; i < count; ++i, bit += step) {
    uint32_t window = 0;
    for (uint64_t byte = (bit + step + 7) / 8; byte-- > bit / 8;) window = window << 8 | in[byte];
    values[i] = window >> bit % 8 & mask;
  }
}

FEDKD_CLONES
int32_t join_parts(const uint32_t* low, int64_t count, float scale, int raw_bits, float* values) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t high;
    std::memcpy(&high, values + i, sizeof(high));
    const int32_t q = high * (1 << raw_bits) + static_cast<int32_t>(low[i]) - rans_half(raw_bits);
    largest = std::max(largest, q < 0 ? -q : q);
    values[i] = scale * static_cast<float>(q);
  }
  return largest;
}

}  // namespace

const RansTables& rans_tables() {
  static RansTables tables;
  [[maybe_unused]] static const bool built = [] {
    for (int table = 0; table < kRansTables; ++table) build_table(kStored[table], table, &tables);
    return true;
  }();
  return tables;
}

uint8_t* encode_piece_portable(const RansSource& source, uint32_t* states, uint8_t* at) {
  return encode_piece<kRansManyLanes>(source, rans_tables(), states, at);
}

RansFault decode_symbols_portable(const RansTarget& target, uint32_t* states, const uint8_t** at,
                                  const uint8_t* end) {
  return decode_symbols<kRansManyLanes>(target, rans_tables(), states, at, end);
}

void rans_pack_low(const RansSource& source, uint8_t* low) {
  const int raw_bits = rans_raw_bits(source.level);
  const uint8_t* const end = low + rans_raw_bytes(source.count, raw_bits);
  uint32_t block[kBlock];
  for (int64_t first = 0; first < source.count; first += kBlock) {
    const int64_t size = std::min<int64_t>(kBlock, source.count - first);
    low_parts(source.values + first, size, source.multiplier, raw_bits, block);
    low = write_bits(block, size, raw_bits, low, end);
  }
}

RansFault add_low_bits(const RansTarget& target) {
  const int raw_bits = rans_raw_bits(target.level);
  if (raw_bits == 0) return RansFault::kNone;
  const int64_t bits = int64_t{target.count} * raw_bits;
  if (bits % 8 != 0 && target.low[bits / 8] >> bits % 8 != 0) return RansFault::kPadding;
  const uint8_t* in = target.low;
  int64_t left = rans_raw_bytes(target.count, raw_bits);
  uint32_t block[kBlock];
  int32_t largest = 0;
  for (int64_t first = 0; first < target.count; first += kBlock) {
    const int64_t size = std::min<int64_t>(kBlock, target.count - first);
    read_bits(in, left, size, raw_bits, block);
    in += kBlock / 8 * raw_bits;
    left -= kBlock / 8 * raw_bits;
    largest =
        std::max(largest, join_parts(block, size, target.scale, raw_bits, target.values + first));
  }
  return largest <= kRansLargest ? RansFault::kNone : RansFault::kLargest;
}

int64_t rans_encode_chunk(const RansSource* pieces, int64_t count, int lanes, uint8_t* scratch,
                          int64_t scratch_bytes, [[maybe_unused]] Instructions most) {
  uint8_t* const end = scratch + scratch_bytes;
  if (lanes == kRansFewLanes) return end - encode_portable<kRansFewLanes>(pieces, count, end);
#ifdef FEDKD_X86_VECTORS
  if (most >= Instructions::kAvx512 && has_avx512_rans())
    return end - encode_avx512(pieces, count, end);
  if (most >= Instructions::kAvx2 && has_avx2_rans()) return end - encode_avx2(pieces, count, end);
#endif
  return end - encode_portable<kRansManyLanes>(pieces, count, end);
}

RansFault rans_decode_chunk(const uint8_t* bytes, int64_t size, const RansTarget* pieces,
                            int64_t count, int lanes, [[maybe_unused]] Instructions most) {
  if (size % 2 != 0 || size < 4 * lanes) return RansFault::kOdd;
  for (int lane = 0; lane < lanes; ++lane)
    if (load_word(bytes + 4 * lane + 2) == 0) return RansFault::kStart;
  if (lanes == kRansFewLanes) return decode_portable<kRansFewLanes>(bytes, size, pieces, count);
#ifdef FEDKD_X86_VECTORS
  if (most >= Instructions::kAvx512 && has_avx512_rans())
    return decode_avx512(bytes, size, pieces, count);
  if (most >= Instructions::kAvx2 && has_avx2_rans())
    return decode_avx2(bytes, size, pieces, count);
#endif
  return decode_portable<kRansManyLanes>(bytes, size, pieces, count);
}

}  // namespace fedkd_fast::cpu
