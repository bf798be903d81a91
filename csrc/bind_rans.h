// What the halves of the rANS binding share: shapes, what is known of each row, and the ways of a
// device.
#pragma once

#include "bind_torch.h"
#include "common/rans_layout.h"

namespace fedkd_fast::bind {

// Of segments.
struct RansShapes {
  std::vector<int64_t> rows, counts;
};

// On the host, contiguous.
struct RansRows {
  Tensor factors, levels;
  float factor(int64_t row) const { return factors.const_data_ptr<float>()[row]; }
  int16_t level(int64_t row) const { return levels.const_data_ptr<int16_t>()[row]; }
};

// `pieces` are those of the layout, and point to the device. starts: of each stream in the codes,
// and their end.
struct RansEncoded {
  Tensor codes;
  std::vector<int64_t> starts;
};
struct RansCodes {
  const Tensor& bytes;
  const std::vector<int64_t>& starts;
};

// Of each stream, and their end, from the sizes of chunks.
inline std::vector<int64_t> rans_starts(const RansLayout& layout,
                                        const std::vector<int64_t>& chunk_sizes) {
  std::vector<int64_t> starts{0};
  for (const RansLayout::Stream& stream : layout.streams) {
    int64_t size = stream.head_bytes();
    for (int64_t c = stream.begin; c < stream.end; ++c) size += chunk_sizes[static_cast<size_t>(c)];
    starts.push_back(starts.back() + size);
  }
  return starts;
}

#ifdef FEDKD_FAST_HAS_CUDA
namespace on_gpu_half {
// data: a tensor of the device.
RansEncoded rans_encode(const RansLayout& layout, const std::vector<RansSource>& pieces,
                        const Tensor& data);
// Of each chunk.
std::vector<RansFault> rans_decode(const RansLayout& layout, const std::vector<RansTarget>& pieces,
                                   const RansCodes& codes);
}  // namespace on_gpu_half
#endif

}  // namespace fedkd_fast::bind
