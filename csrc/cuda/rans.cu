// rANS coding on CUDA, and the gathering of encoded chunks.
//
// Mapping: a warp for each chunk, a lane of the warp for each lane of the code. Which lanes have a
// word is a ballot, and where it lies is how many of them come before. The words of escaped
// symbols, which are few, are read in turn by the whole warp. A table's cumulative frequencies lie
// in shared memory, made when a row has another table than the one before; a slot is looked up in
// six halvings. The second launch of an encoder knows where each chunk goes, and brings low bits
// too: there a block has a chunk, and a thread takes 8 values of a row at once, whose low bits are
// whole bytes. Of the bytes to decode, none is read that has not been compared with the end before.

#include "common/rans.h"
#include "cuda/launch.cuh"
#include "kernels_rans.h"

namespace fedkd_fast::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kGatherThreads = 128;
constexpr int kGroup = 8;  // values whose low bits a thread takes

__device__ const uint16_t kStored[kRansTables][kRansStored] = {
#include "common/gaussian_tables.inc"
};

struct Table {
  uint32_t before[kRansSymbols + 1];
};

__device__ int lane_of_warp() { return static_cast<int>(threadIdx.x); }

__device__ unsigned earlier_lanes() { return (1u << threadIdx.x) - 1u; }

// By the whole warp: two symbols a lane, and a sum over the lanes before.
__device__ void make_table(int index, Table* table) {
  __syncwarp();  // nobody reads the table before
  const int lane = lane_of_warp();
  const uint32_t first = rans_frequency(kStored[index], 2 * lane);
  const uint32_t second = rans_frequency(kStored[index], 2 * lane + 1);
  uint32_t sum = first + second;
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_sync(kAllLanes, sum, lane >= step ? lane - step : lane);
    if (lane >= step) sum += other;
  }
  table->before[2 * lane + 1] = sum - second;
  table->before[2 * lane + 2] = sum;
  if (lane == 0) table->before[0] = 0;
  __syncwarp();
}

__device__ uint32_t word_at(const uint8_t* at) {
  return static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8;
}

__device__ void put_word(uint8_t* at, uint32_t word) {
  at[0] = static_cast<uint8_t>(word);
  at[1] = static_cast<uint8_t>(word >> 8);
}

// ---- encoding -----------------------------------------------------------------------------------

struct Writer {
  uint8_t* at;

  // Writes the words of the lanes that have one, in the order of lanes.
  __device__ void put(bool has, uint32_t word) {
    const unsigned votes = __ballot_sync(kAllLanes, has);
    at -= 2 * __popc(votes);
    if (has) put_word(at + 2 * __popc(votes & earlier_lanes()), word);
  }

  __device__ void put_escapes(bool escaped, uint32_t zigzag) {
    const uint32_t more = zigzag >> 15;
    const unsigned votes = __ballot_sync(kAllLanes, escaped);
    if (votes == 0) return;
    const unsigned longer = __ballot_sync(kAllLanes, escaped && more != 0);
    at -= 2 * (__popc(votes) + __popc(longer));
    if (!escaped) return;
    uint8_t* const place =
        at + 2 * (__popc(votes & earlier_lanes()) + __popc(longer & earlier_lanes()));
    put_word(place, (zigzag & 0x7fffu) | (more != 0 ? 0x8000u : 0u));
    if (more != 0) put_word(place + 2, more);
  }
};

// The source by value: bytes that are written might be its own, for all that the compiler knows.
__device__ uint32_t encode_piece(RansSource source, const Table& table, int lanes, uint32_t state,
                                 Writer* writer) {
  const int raw_bits = rans_raw_bits(source.level), lane = lane_of_warp();
  const int support = rans_support(kStored[rans_table(source.level)]);
  const auto is_active = [&](int first) { return lane < lanes && first + lane < source.count; };
  int first = (source.count - 1) / lanes * lanes;
  float next = is_active(first) ? source.values[first + lane] : 0.0f;
  for (; first >= 0; first -= lanes) {
    const bool active = is_active(first);
    const float value = next;
    // On its way while this one is coded.
    if (lane < lanes && first > 0) next = source.values[first - lanes + lane];
    int32_t high = 0;
    if (active) high = rans_high(rans_quantise(value, source.multiplier), raw_bits);
    const bool escaped = high > support || high < -support;
    writer->put_escapes(escaped, rans_zigzag(high));
    const int symbol = escaped ? kRansEscape : high + kRansReach;
    const uint32_t before = table.before[symbol], frequency = table.before[symbol + 1] - before;
    const bool full = active && state >= frequency << 20;
    writer->put(full, state);
    if (full) state >>= 16;
    if (active) state = (state / frequency << kRansPrecision) + state % frequency + before;
  }
  return state;
}

__global__ void rans_encode_kernel(const RansSource* pieces, const RansEncodeChunk* chunks,
                                   int64_t count, uint8_t* scratch, int64_t* sizes) {
  __shared__ Table table;
  const int lane = lane_of_warp();
  for (int64_t c = blockIdx.x; c < count; c += gridDim.x) {
    const RansEncodeChunk chunk = chunks[c];
    uint8_t* const end = scratch + chunk.scratch_end;
    Writer writer{end};
    uint32_t state = kRansRest;
    int made = -1;
    for (int64_t piece = chunk.end - 1; piece >= chunk.begin; --piece) {
      const int wanted = rans_table(pieces[piece].level);
      if (wanted != made) make_table(made = wanted, &table);
      state = encode_piece(pieces[piece], table, chunk.lanes, state, &writer);
    }
    writer.at -= 4 * chunk.lanes;
    if (lane < chunk.lanes) {
      put_word(writer.at + 4 * lane, state);
      put_word(writer.at + 4 * lane + 2, state >> 16);
    }
    if (lane == 0) sizes[c] = end - writer.at;
  }
}

__device__ void pack_low(RansSource source, uint8_t* low) {
  const int raw_bits = rans_raw_bits(source.level);
  if (raw_bits == 0) return;
  const int stride = static_cast<int>(blockDim.x) * kGroup;
  for (int first = static_cast<int>(threadIdx.x) * kGroup; first < source.count; first += stride) {
    const int size = source.count - first < kGroup ? source.count - first : kGroup;
    uint8_t* out = low + static_cast<int64_t>(first / kGroup) * raw_bits;
    uint64_t window = 0;
    int held = 0;
    for (int i = 0; i < size; ++i) {
      const int32_t q = rans_quantise(source.values[first + i], source.multiplier);
      window |= static_cast<uint64_t>(rans_low(q, raw_bits)) << held;
      for (held += raw_bits; held >= 8; held -= 8, window >>= 8)
        *out++ = static_cast<uint8_t>(window);
    }
    if (held > 0) *out = static_cast<uint8_t>(window);
  }
}

__global__ void rans_gather_kernel(const RansSource* pieces, const int64_t* lows,
                                   const RansEncodeChunk* chunks, const RansPlaces* places,
                                   int64_t count, const uint8_t* scratch, const int64_t* sizes,
                                   uint8_t* codes) {
  for (int64_t c = blockIdx.x; c < count; c += gridDim.x) {
    const RansEncodeChunk chunk = chunks[c];
    const RansPlaces place = places[c];
    const int64_t size = sizes[c];
    const uint8_t* const from = scratch + chunk.scratch_end - size;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) codes[place.bytes + i] = from[i];
    if (threadIdx.x < 4)
      codes[place.table + threadIdx.x] = static_cast<uint8_t>(size >> (8 * threadIdx.x));
    for (int64_t piece = chunk.begin; piece < chunk.end; ++piece)
      pack_low(pieces[piece], codes + place.stream + lows[piece]);
  }
}

// ---- decoding -----------------------------------------------------------------------------------

// A chunk's words. Each lane holds one of 32 and one of the 32 behind these, so that what is wanted
// comes from a lane and not from memory; 32 more are on their way, as bytes, because to make a word
// of them would be to wait for them. All else is the same in all lanes.
struct Reader {
  const uint8_t* words;
  uint32_t count, next;  // they are fewer than 2^31
  uint32_t now, soon, later[2];

  __device__ Reader(const uint8_t* from, int64_t size)
      : words(from), count(static_cast<uint32_t>(size / 2)), next(0) {
    load(0);
    now = later[0] | later[1] << 8;
    load(1);
    soon = later[0] | later[1] << 8;
    load(2);
  }

  // Of so many times 32, the lane's one; nothing beyond the end is read.
  __device__ void load(uint32_t group) {
    const uint32_t index = kWarp * group + threadIdx.x;
    for (uint32_t i = 0; i < 2; ++i)
      later[i] = index < count ? words[2 * static_cast<int64_t>(index) + i] : 0;
  }

  __device__ bool has(int wanted) const { return count - next >= static_cast<uint32_t>(wanted); }

  // By the whole warp: what is so many words ahead, at most 31. It lies in the lane of its index,
  // and each lane has one of these 32.
  __device__ uint32_t word(int ahead) const {
    const uint32_t mine = threadIdx.x >= next % kWarp ? now : soon;
    return __shfl_sync(kAllLanes, mine,
                       static_cast<int>((next + static_cast<uint32_t>(ahead)) % kWarp));
  }

  // At most 32 words.
  __device__ void skip(int read) {
    const uint32_t group = next / kWarp;
    next += static_cast<uint32_t>(read);
    if (next / kWarp == group) return;
    now = soon;
    soon = later[0] | later[1] << 8;
    load(group + 3);
  }

  // A state each for the lanes that want a word.
  __device__ bool refill(bool wants, uint32_t* state) {
    const unsigned votes = __ballot_sync(kAllLanes, wants);
    if (!has(__popc(votes))) return false;
    const uint32_t found = word(__popc(votes & earlier_lanes()));
    if (wants) *state = *state << 16 | found;
    skip(__popc(votes));
    return true;
  }

  // The words of the escaped symbols, in turn.
  __device__ RansFault read_escapes(bool escaped, int support, int raw_bits, int32_t* high) {
    const unsigned votes = __ballot_sync(kAllLanes, escaped);
    for (unsigned rest = votes; rest != 0; rest &= rest - 1) {
      if (!has(1)) return RansFault::kTruncated;
      uint32_t zigzag = word(0);
      skip(1);
      if ((zigzag & 0x8000u) != 0) {
        if (!has(1)) return RansFault::kTruncated;
        const uint32_t more = word(0);
        skip(1);
        if (more == 0 || (more & 0x8000u) != 0) return RansFault::kEscape;
        zigzag = (zigzag & 0x7fffu) | more << 15;
      }
      const int32_t found = rans_unzigzag(zigzag);
      if (!rans_escapes(found, support, raw_bits)) return RansFault::kEscape;
      if (__popc((rest & (~rest + 1u)) - 1u) == lane_of_warp()) *high = found;
    }
    return RansFault::kNone;
  }
};

__device__ int find_symbol(const Table& table, uint32_t slot) {
  int symbol = 0;
  for (int step = kRansSymbols / 2; step > 0; step /= 2)
    if (table.before[symbol + step] <= slot) symbol += step;
  return symbol;
}

// The low part of a value: its bytes, loaded before they are wanted.
struct Low {
  uint32_t first;     // bit
  uint32_t bytes[4];  // of 18 bits at most

  __device__ Low(const uint8_t* low, int begin, int bits) : first(static_cast<uint32_t>(begin)) {
    for (uint32_t i = 0; i < 4; ++i)
      bytes[i] = 8 * (first / 8 + i) < first + static_cast<uint32_t>(bits) ? low[first / 8 + i] : 0;
  }

  __device__ int32_t value(int bits) const {
    const uint32_t window = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
    return static_cast<int32_t>(window >> first % 8 & ((1u << bits) - 1u));
  }
};

__device__ bool has_padding(const RansTarget& target, int raw_bits) {
  const int64_t bits = static_cast<int64_t>(target.count) * raw_bits;
  return bits % 8 != 0 && target.low[bits / 8] >> bits % 8 != 0;
}

__device__ RansFault decode_piece(RansTarget target, const Table& table, int lanes, uint32_t* state,
                                  Reader* reader) {
  const int raw_bits = rans_raw_bits(target.level), lane = lane_of_warp();
  const int support = rans_support(kStored[rans_table(target.level)]);
  bool beyond = false;
  for (int first = 0; first < target.count; first += lanes) {
    const bool active = lane < lanes && first + lane < target.count;
    const Low low(target.low, (first + lane) * raw_bits, active ? raw_bits : 0);
    const uint32_t slot = *state & (kRansTotal - 1);
    const int symbol = find_symbol(table, slot);
    const uint32_t before = table.before[symbol];
    if (active)
      *state = (table.before[symbol + 1] - before) * (*state >> kRansPrecision) + slot - before;
    if (!reader->refill(active && *state < kRansRest, state)) return RansFault::kTruncated;
    int32_t high = symbol - kRansReach;
    const RansFault fault =
        reader->read_escapes(active && symbol == kRansEscape, support, raw_bits, &high);
    if (fault != RansFault::kNone) return fault;
    if (!active) continue;
    const int32_t q = high * (1 << raw_bits) + low.value(raw_bits) - rans_half(raw_bits);
    beyond |= q > kRansLargest || q < -kRansLargest;
    target.values[first + lane] = target.scale * static_cast<float>(q);
  }
  if (raw_bits > 0 && has_padding(target, raw_bits)) return RansFault::kPadding;
  return __any_sync(kAllLanes, beyond) ? RansFault::kLargest : RansFault::kNone;
}

// Finds the chunk by the lengths of those before it.
__device__ RansFault find_chunk(const uint8_t* codes, const RansDecodeChunk& chunk,
                                const uint8_t** bytes, int64_t* size) {
  const auto length = [&](int64_t index) {
    const uint8_t* const entry = codes + chunk.table + 4 * index;
    return static_cast<int64_t>(word_at(entry) | word_at(entry + 2) << 16);
  };
  int64_t start = 0;
  for (int64_t i = lane_of_warp(); i < chunk.index; i += kWarp) start += length(i);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    start += __shfl_xor_sync(kAllLanes, start, lanes);
  start += chunk.body;
  *size = length(chunk.index);
  const int64_t end = start + *size;
  if (end > chunk.stop || (chunk.last != 0 && end != chunk.stop)) return RansFault::kLength;
  *bytes = codes + start;
  return RansFault::kNone;
}

__device__ RansFault decode_chunk(const uint8_t* codes, const RansTarget* pieces,
                                  const RansDecodeChunk& chunk, Table* table) {
  const uint8_t* bytes = nullptr;
  int64_t size = 0;
  RansFault fault = find_chunk(codes, chunk, &bytes, &size);
  if (fault != RansFault::kNone) return fault;
  if (size % 2 != 0 || size < 4 * chunk.lanes) return RansFault::kOdd;
  const int lane = lane_of_warp();
  uint32_t state = kRansRest;
  if (lane < chunk.lanes) state = word_at(bytes + 4 * lane) | word_at(bytes + 4 * lane + 2) << 16;
  if (__any_sync(kAllLanes, state < kRansRest)) return RansFault::kStart;
  Reader reader(bytes + 4 * chunk.lanes, size - 4 * chunk.lanes);
  int made = -1;
  for (int64_t piece = chunk.begin; piece < chunk.end; ++piece) {
    const int wanted = rans_table(pieces[piece].level);
    if (wanted != made) make_table(made = wanted, table);
    fault = decode_piece(pieces[piece], *table, chunk.lanes, &state, &reader);
    if (fault != RansFault::kNone) return fault;
  }
  if (__any_sync(kAllLanes, state != kRansRest)) return RansFault::kEnd;
  return !reader.has(1) ? RansFault::kNone : RansFault::kTrailing;
}

__global__ void rans_decode_kernel(const uint8_t* codes, const RansTarget* pieces,
                                   const RansDecodeChunk* chunks, int64_t count,
                                   RansFault* faults) {
  __shared__ Table table;
  for (int64_t c = blockIdx.x; c < count; c += gridDim.x) {
    const RansFault fault = decode_chunk(codes, pieces, chunks[c], &table);
    if (lane_of_warp() == 0) faults[c] = fault;
  }
}

}  // namespace

cudaError_t rans_encode_chunks(const RansSource* pieces, const RansEncodeChunk* chunks,
                               int64_t count, uint8_t* scratch, int64_t* sizes,
                               cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch<rans_encode_kernel>(dim3(blocks_of(count)), dim3(kWarp), 0, stream, pieces, chunks,
                                    count, scratch, sizes);
}

cudaError_t rans_gather_chunks(const RansSource* pieces, const int64_t* lows,
                               const RansEncodeChunk* chunks, const RansPlaces* places,
                               int64_t count, const uint8_t* scratch, const int64_t* sizes,
                               uint8_t* codes, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch<rans_gather_kernel>(dim3(blocks_of(count)), dim3(kGatherThreads), 0, stream, pieces,
                                    lows, chunks, places, count, scratch, sizes, codes);
}

cudaError_t rans_decode_chunks(const uint8_t* codes, const RansTarget* pieces,
                               const RansDecodeChunk* chunks, int64_t count, RansFault* faults,
                               cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch<rans_decode_kernel>(dim3(blocks_of(count)), dim3(kWarp), 0, stream, codes, pieces,
                                    chunks, count, faults);
}

}  // namespace fedkd_fast::cuda
