// The kernels of rans_encode and rans_decode on the simt engine against those of the CPU.

#include <algorithm>
#include <cmath>

#include "rans_message.h"
#include "simt_cases.h"

namespace {

using namespace rans_message;
using namespace simt_cases;

void encode_and_decode(const std::string& name, const Message& message) {
  const RansLayout layout = message.layout();
  const std::vector<RansSource> pieces = message.sources(layout);
  const std::vector<Bytes> low = pack_low(pieces);
  Bytes codes;
  std::vector<int64_t> begins, starts, lows, sizes(layout.chunks.size());
  std::vector<cuda::RansEncodeChunk> chunks;
  std::vector<cuda::RansPlaces> places;
  std::vector<cuda::RansDecodeChunk> there;
  int64_t scratch_bytes = 0;
  for (const RansLayout::Piece& piece : layout.pieces) lows.push_back(piece.low);
  for (const RansLayout::Stream& stream : layout.streams) {
    const auto start = static_cast<int64_t>(codes.size());
    std::vector<Bytes> coded;
    for (int64_t c = stream.begin; c < stream.end; ++c) {
      const RansLayout::Chunk& chunk = layout.chunks[static_cast<size_t>(c)];
      for (int64_t p = chunk.begin; p < chunk.end; ++p)
        codes.insert(codes.end(), low[static_cast<size_t>(p)].begin(),
                     low[static_cast<size_t>(p)].end());
      coded.push_back(encode_chunk(chunk, pieces));
    }
    const auto table = static_cast<int64_t>(codes.size());
    for (const Bytes& chunk : coded)
      for (int byte = 0; byte < 4; ++byte)
        codes.push_back(static_cast<uint8_t>(chunk.size() >> (8 * byte)));
    const auto body = static_cast<int64_t>(codes.size());
    for (int64_t c = stream.begin; c < stream.end; ++c) {
      const RansLayout::Chunk& chunk = layout.chunks[static_cast<size_t>(c)];
      const Bytes& bytes = coded[static_cast<size_t>(c - stream.begin)];
      begins.push_back(static_cast<int64_t>(codes.size()));
      scratch_bytes += rans_chunk_bound(chunk.symbols);
      chunks.push_back({chunk.begin, chunk.end, scratch_bytes, rans_lanes(chunk.symbols)});
      places.push_back({begins.back(), table + 4 * (c - stream.begin), start});
      there.push_back({chunk.begin, chunk.end, table, body, 0, c - stream.begin,
                       c + 1 == stream.end, rans_lanes(chunk.symbols)});
      codes.insert(codes.end(), bytes.begin(), bytes.end());
    }
    for (int64_t c = stream.begin; c < stream.end; ++c)
      there[static_cast<size_t>(c)].stop = static_cast<int64_t>(codes.size());
    starts.push_back(start);
  }
  const auto count = static_cast<int64_t>(chunks.size());
  Bytes scratch(static_cast<size_t>(scratch_bytes)), found(codes.size());
  bool same = cuda::rans_encode_chunks(pieces.data(), chunks.data(), count, scratch.data(),
                                       sizes.data(), nullptr) == cudaSuccess;
  for (size_t c = 0; same && c < chunks.size(); ++c)
    same &= begins[c] + sizes[c] ==
            (c + 1 < chunks.size() && there[c].last == 0 ? begins[c + 1] : there[c].stop);
  same &= same && cuda::rans_gather_chunks(pieces.data(), lows.data(), chunks.data(), places.data(),
                                           count, scratch.data(), sizes.data(), found.data(),
                                           nullptr) == cudaSuccess;
  report("rans_encode " + name, same && found == codes);

  std::vector<std::vector<float>> here(pieces.size()), other(pieces.size());
  const auto targets = [&](std::vector<std::vector<float>>* values) {
    std::vector<RansTarget> made;
    for (const RansLayout::Chunk& chunk : layout.chunks)
      for (int64_t p = chunk.begin; p < chunk.end; ++p) {
        const auto index = static_cast<size_t>(p);
        (*values)[index].assign(static_cast<size_t>(pieces[index].count), -1.0f);
        made.push_back(
            {(*values)[index].data(),
             codes.data() + starts[static_cast<size_t>(chunk.stream)] + layout.pieces[index].low,
             pieces[index].count, pieces[index].level, 1.0f / pieces[index].multiplier});
      }
    return made;
  };
  // Sound, then with a byte changed of which the table knows nothing.
  for (const size_t change : {size_t{0}, size_t{1}, codes.size() / 2}) {
    if (change > 0) codes[static_cast<size_t>(begins[0]) + change % 14] ^= 0x41;
    const std::vector<RansTarget> ours = targets(&here), theirs = targets(&other);
    std::vector<RansFault> faults(chunks.size());
    bool right = cuda::rans_decode_chunks(codes.data(), theirs.data(), there.data(), count,
                                          faults.data(), nullptr) == cudaSuccess;
    for (size_t c = 0; c < chunks.size(); ++c) {
      const int64_t end = there[c].last != 0 ? there[c].stop : begins[c + 1];
      const RansFault fault = cpu::rans_decode_chunk(
          codes.data() + begins[c], end - begins[c], ours.data() + chunks[c].begin,
          chunks[c].end - chunks[c].begin, chunks[c].lanes);
      right &= fault == faults[c];
      for (int64_t p = chunks[c].begin; fault == RansFault::kNone && p < chunks[c].end; ++p)
        right &= here[static_cast<size_t>(p)] == other[static_cast<size_t>(p)];
    }
    report("rans_decode " + name + " " + text({static_cast<int64_t>(change)}), right);
  }
}

}  // namespace

void simt_cases::rans_cases() {
  encode_and_decode("of few lanes", {{3, 2, 5}, {7, 1, 13}, {0, 70, -48, 335, 20}, 2.0f, 1});
  encode_and_decode("of many lanes", {{2, 1}, {8200, 3}, {5, 50}, 0.5f, 2});
}
