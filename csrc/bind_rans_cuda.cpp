// rans_encode and rans_decode on a GPU: plans go there, sizes and faults come back.
//
// The host waits once for an encoder, which then knows where each chunk goes, and once for a
// decoder, which then knows whether to refuse.

#include <cstring>
#include <tuple>
#include <utility>

#include "bind_rans.h"

namespace fedkd_fast::bind::on_gpu_half {
namespace {

// Lists that a kernel reads, in one piece of the device's memory.
template <typename... Items>
struct Plan {
  Tensor memory;
  std::tuple<const Items*...> lists;
};

template <typename... Items>
Plan<Items...> upload(const Tensor& data, const std::vector<Items>&... lists) {
  int64_t bytes = 0;
  const auto place = [&bytes](size_t size) {
    constexpr int64_t kAligned = 16;
    return std::exchange(bytes,
                         (bytes + static_cast<int64_t>(size) + kAligned - 1) / kAligned * kAligned);
  };
  const int64_t starts[] = {place(lists.size() * sizeof(Items))...};
  Tensor host = empty_on_host({bytes}, ScalarType::Byte);
  const int64_t* start = starts;
  const auto put = [&](const auto& list) {
    uint8_t* const to = host.mutable_data_ptr<uint8_t>() + *start++;
    if (!list.empty()) std::memcpy(to, list.data(), list.size() * sizeof(list[0]));
  };
  (put(lists), ...);
  // Memory that is not pinned is read before the call returns, and nothing has to be waited for.
  Tensor there = torch::stable::to(host, data.device(), /*non_blocking=*/true);
  const uint8_t* const memory = there.const_data_ptr<uint8_t>();
  start = starts;
  return {there, {reinterpret_cast<const Items*>(memory + *start++)...}};
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
  const auto plan = upload(data, pieces, chunks, lows);
  const auto [device_pieces, device_chunks, device_lows] = plan.lists;
  Tensor scratch = empty_like_device(data, {scratch_bytes}, ScalarType::Byte);
  Tensor sizes = empty_like_device(data, {count}, ScalarType::Long);
  check_launch(cuda::rans_encode_chunks(device_pieces, device_chunks, count,
                                        scratch.mutable_data_ptr<uint8_t>(),
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
  const auto rest = upload(data, places);
  Tensor codes = empty_like_device(data, {starts.back()}, ScalarType::Byte);
  check_launch(cuda::rans_gather_chunks(
      device_pieces, device_lows, device_chunks, std::get<0>(rest.lists), count,
      scratch.const_data_ptr<uint8_t>(), sizes.const_data_ptr<int64_t>(),
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
  const auto plan = upload(codes.bytes, pieces, chunks);
  const auto [device_pieces, device_chunks] = plan.lists;
  Tensor faults = empty_like_device(codes.bytes, {count}, ScalarType::Int);
  check_launch(cuda::rans_decode_chunks(
      codes.bytes.const_data_ptr<uint8_t>(), device_pieces, device_chunks, count,
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
