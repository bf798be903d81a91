// rans_encode and rans_decode on a GPU: plans go there, sizes and faults come back.
//
// The host waits once for an encoder, which then knows where each chunk goes, and once for a
// decoder, which then knows whether to refuse.

#include <cstring>

#include "bind_rans.h"

namespace fedkd_fast::bind::on_gpu_half {
namespace {

template <typename Item>
Tensor upload(const std::vector<Item>& items, const Tensor& data) {
  const size_t bytes = items.size() * sizeof(Item);
  Tensor host = torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
  if (bytes > 0) std::memcpy(host.mutable_data_ptr<uint8_t>(), items.data(), bytes);
  // Memory that is not pinned is read before the call returns, and nothing has to be waited for.
  return torch::stable::to(host, data.device(), /*non_blocking=*/true);
}

template <typename Item>
const Item* items_in(const Tensor& uploaded) {
  return reinterpret_cast<const Item*>(uploaded.const_data_ptr<uint8_t>());
}

}  // namespace

RansEncoded rans_encode(const RansLayout& layout, const std::vector<RansSource>& pieces,
                        const Tensor& data) {
  const GpuScope gpu(data);
  const auto count = static_cast<int64_t>(layout.chunks.size());
  int64_t scratch_bytes = 0;
  std::vector<cuda::RansEncodeChunk> chunks;
  for (const RansLayout::Chunk& chunk : layout.chunks) {
    scratch_bytes += rans_chunk_bound(chunk.symbols);
    chunks.push_back({chunk.begin, chunk.end, scratch_bytes, rans_lanes(chunk.symbols)});
  }
  std::vector<int64_t> lows;
  for (const RansLayout::Piece& piece : layout.pieces) lows.push_back(piece.low);
  const Tensor device_pieces = upload(pieces, data), device_chunks = upload(chunks, data);
  const Tensor device_lows = upload(lows, data);
  Tensor scratch = empty_like_device(data, {scratch_bytes}, ScalarType::Byte);
  Tensor sizes = empty_like_device(data, {count}, ScalarType::Long);
  const auto* const sources = items_in<RansSource>(device_pieces);
  const auto* const plan = items_in<cuda::RansEncodeChunk>(device_chunks);
  check_launch(cuda::rans_encode_chunks(sources, plan, count, scratch.mutable_data_ptr<uint8_t>(),
                                        sizes.mutable_data_ptr<int64_t>(), gpu.stream));
  const Tensor known = on_host(sizes);
  const int64_t* const size = known.const_data_ptr<int64_t>();
  std::vector<int64_t> starts = rans_starts(layout, {size, size + count});
  std::vector<cuda::RansPlaces> places;
  for (size_t s = 0; s < layout.streams.size(); ++s) {
    const RansLayout::Stream& stream = layout.streams[s];
    int64_t bytes = starts[s] + stream.head_bytes(), table = starts[s] + stream.low_bytes;
    for (int64_t c = stream.begin; c < stream.end; bytes += size[c], table += 4, ++c)
      places.push_back({bytes, table, starts[s]});
  }
  const Tensor device_places = upload(places, data);
  Tensor codes = empty_like_device(data, {starts.back()}, ScalarType::Byte);
  check_launch(cuda::rans_gather_chunks(
      sources, items_in<int64_t>(device_lows), plan, items_in<cuda::RansPlaces>(device_places),
      count, scratch.const_data_ptr<uint8_t>(), sizes.const_data_ptr<int64_t>(),
      codes.mutable_data_ptr<uint8_t>(), gpu.stream));
  return {codes, std::move(starts)};
}

std::vector<RansFault> rans_decode(const RansLayout& layout, const std::vector<RansTarget>& pieces,
                                   const RansCodes& codes) {
  static_assert(sizeof(RansFault) == sizeof(int32_t));
  const GpuScope gpu(codes.bytes);
  const auto count = static_cast<int64_t>(layout.chunks.size());
  std::vector<cuda::RansDecodeChunk> chunks;
  for (size_t s = 0; s < layout.streams.size(); ++s) {
    const RansLayout::Stream& stream = layout.streams[s];
    for (int64_t c = stream.begin; c < stream.end; ++c) {
      const RansLayout::Chunk& chunk = layout.chunks[static_cast<size_t>(c)];
      chunks.push_back({chunk.begin, chunk.end, codes.starts[s] + stream.low_bytes,
                        codes.starts[s] + stream.head_bytes(), codes.starts[s + 1],
                        c - stream.begin, c + 1 == stream.end, rans_lanes(chunk.symbols)});
    }
  }
  const Tensor device_pieces = upload(pieces, codes.bytes);
  const Tensor device_chunks = upload(chunks, codes.bytes);
  Tensor faults = empty_like_device(codes.bytes, {count}, ScalarType::Int);
  check_launch(cuda::rans_decode_chunks(
      codes.bytes.const_data_ptr<uint8_t>(), items_in<RansTarget>(device_pieces),
      items_in<cuda::RansDecodeChunk>(device_chunks), count,
      reinterpret_cast<RansFault*>(faults.mutable_data_ptr<int32_t>()), gpu.stream));
  const Tensor known = on_host(faults);
  std::vector<RansFault> found;
  for (int64_t c = 0; c < count; ++c)
    found.push_back(static_cast<RansFault>(known.const_data_ptr<int32_t>()[c]));
  // Chunks before the one where the table is found wrong may have read wrong bytes.
  for (size_t c = found.size(); c-- > 1;)
    if (found[c] == RansFault::kLength && layout.chunks[c - 1].stream == layout.chunks[c].stream)
      found[c - 1] = RansFault::kLength;
  return found;
}

}  // namespace fedkd_fast::bind::on_gpu_half
