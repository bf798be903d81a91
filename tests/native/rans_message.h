// A message for native tests of rANS coding, and its streams as the CPU's kernels make them.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "common/rans_layout.h"
#include "kernels_rans.h"

namespace rans_message {

using namespace fedkd_fast;

struct Message {
  // One segment a stream. `tails` widens rows beyond what their levels say.
  Message(std::vector<int64_t> rows_of, std::vector<int64_t> counts_of,
          const std::vector<int16_t>& cycle, float tails, unsigned seed)
      : rows(std::move(rows_of)), counts(std::move(counts_of)) {
    for (size_t m = 0; m < rows.size(); ++m) owner.push_back(static_cast<int64_t>(m));
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (size_t m = 0; m < rows.size(); ++m) {
      values.emplace_back();
      for (int64_t row = 0; row < rows[m]; ++row) {
        levels.push_back(cycle[levels.size() % cycle.size()]);
        factors.push_back(std::exp2(static_cast<float>(levels.back()) / 16));
        for (int64_t i = 0; i < counts[m]; ++i) {
          const float value = normal(generator);
          values[m].push_back(value * std::exp(tails * normal(generator)));
        }
      }
    }
  }

  RansLayout layout() const { return {rows, counts, owner, levels.data()}; }

  std::vector<RansSource> sources(const RansLayout& layout) const {
    std::vector<RansSource> found;
    for (const RansLayout::Piece& piece : layout.pieces) {
      const auto row = static_cast<size_t>(piece.row);
      found.push_back({values[static_cast<size_t>(piece.segment)].data() + piece.first,
                       static_cast<int32_t>(piece.count), levels[row], factors[row]});
    }
    return found;
  }

  std::vector<int64_t> rows, counts, owner;
  std::vector<std::vector<float>> values;
  std::vector<int16_t> levels;
  std::vector<float> factors;
};

using Bytes = std::vector<uint8_t>;

inline Bytes encode_chunk(const RansLayout::Chunk& chunk, const std::vector<RansSource>& pieces,
                          cpu::Instructions most = cpu::Instructions::kAvx512) {
  Bytes scratch(static_cast<size_t>(rans_chunk_bound(chunk.symbols)));
  const auto bytes = static_cast<int64_t>(scratch.size());
  const int64_t size =
      cpu::rans_encode_chunk(pieces.data() + chunk.begin, chunk.end - chunk.begin,
                             rans_lanes(chunk.symbols), scratch.data(), bytes, most);
  return {scratch.end() - size, scratch.end()};
}

// Low bits of each piece.
inline std::vector<Bytes> pack_low(const std::vector<RansSource>& pieces) {
  std::vector<Bytes> found;
  for (const RansSource& piece : pieces) {
    const int raw_bits = rans_raw_bits(piece.level);
    found.emplace_back(static_cast<size_t>(rans_raw_bytes(piece.count, raw_bits)));
    if (raw_bits > 0) cpu::rans_pack_low(piece, found.back().data());
  }
  return found;
}

}  // namespace rans_message
