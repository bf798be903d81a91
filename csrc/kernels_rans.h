// rans_encode, rans_decode: the part of kernels.h that codes integers with Gaussian tables.
//
// The stream, the tables and every formula stand in common/rans.h and reference_rans.py. A chunk is
// coded on its own: `lanes` states, then 16-bit words, little-endian. Bytes to decode are hostile:
// a decoder reads only them, writes only the values that it is given places for, and takes time by
// the two sizes, whatever they say.
#pragma once

#include <cstdint>

#include "common/instructions.h"
#include "common/rans.h"

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace fedkd_fast {

// At most kRansChunk consecutive values of a row.
struct RansSource {
  const float* values;
  int32_t count;
  int32_t level;  // in kRansFirstLevel..kRansMostLevel
  float multiplier;
};

struct RansTarget {
  float* values;
  const uint8_t* low;  // rans_raw_bytes(count, raw bits) bytes
  int32_t count;
  int32_t level;
  float scale;
};

// That a chunk may take: a symbol takes at most a word, and as an escape two more.
constexpr int64_t rans_chunk_bound(int64_t symbols) { return 4 * kRansManyLanes + 6 * symbols; }

namespace cpu {

// Writes a chunk to the end of scratch, which holds rans_chunk_bound(its symbols) bytes, and
// returns its size.
int64_t rans_encode_chunk(const RansSource* pieces, int64_t count, int lanes, uint8_t* scratch,
                          int64_t scratch_bytes, Instructions most = Instructions::kAvx512);

// rans_raw_bytes(source.count, raw bits) bytes.
void rans_pack_low(const RansSource& source, uint8_t* low);

// The values of a fault are undefined.
RansFault rans_decode_chunk(const uint8_t* bytes, int64_t size, const RansTarget* pieces,
                            int64_t count, int lanes, Instructions most = Instructions::kAvx512);

}  // namespace cpu

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
namespace cuda {

// Everything lies on the device, what the pieces point to as well. Chunks are many at once; each
// takes pieces [begin, end).

struct RansEncodeChunk {
  int64_t begin, end;
  int64_t scratch_end;  // it is written to the end of its rans_chunk_bound bytes of scratch
  int32_t lanes;
};

// sizes (count): bytes of each chunk.
cudaError_t rans_encode_chunks(const RansSource* pieces, const RansEncodeChunk* chunks,
                               int64_t count, uint8_t* scratch, int64_t* sizes,
                               cudaStream_t stream);

// Where an encoded chunk goes in the codes: its bytes, its entry of the chunk table, and what the
// places of low bits count from.
struct RansPlaces {
  int64_t bytes, table, stream;
};

// lows: of each piece, where in its stream the low bits go.
cudaError_t rans_gather_chunks(const RansSource* pieces, const int64_t* lows,
                               const RansEncodeChunk* chunks, const RansPlaces* places,
                               int64_t count, const uint8_t* scratch, const int64_t* sizes,
                               uint8_t* codes, cudaStream_t stream);

struct RansDecodeChunk {
  int64_t begin, end;
  int64_t table, body, stop;  // of its stream in the codes: chunk table, chunks, end
  int64_t index;              // in its stream
  int32_t last;               // whether it is the last one there
  int32_t lanes;
};

// faults (count): kLength too where the chunk table up to this chunk does not fit the stream.
cudaError_t rans_decode_chunks(const uint8_t* codes, const RansTarget* pieces,
                               const RansDecodeChunk* chunks, int64_t count, RansFault* faults,
                               cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace fedkd_fast
