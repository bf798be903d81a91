// The entropy-coded stream of an entry, as the fuzzers of the wire codec exercise it. Whatever its
// bytes, both paths of the decoder refuse it with the same fault, or decode the same integers; and
// the coder makes these bytes of those integers again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/rans_layout.h"
#include "kernels_rans.h"
#include "wire/coded.h"

namespace fedkd_fast::wire {

using Bytes = std::vector<std::uint8_t>;

[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

// One stream; its bytes are copied in parts exactly as large as they are, so that the red zone
// begins behind the last byte of each.
class Stream {
 public:
  Stream(const Coded& coded, const std::vector<std::int16_t>& levels, const std::uint8_t* bytes,
         std::int64_t size)
      : levels_(levels), bytes_(bytes), size_(size) {
    if (coded.rank > 0) {
      add(coded.rank, coded.matrix.rows);
      add(coded.rank, coded.matrix.columns);
    }
    if (coded.rows > 0) add(coded.rows, coded.row_entries);
  }

  void exercise() {
    const RansLayout layout(rows_, counts_, std::vector<std::int64_t>(rows_.size(), 0),
                            levels_.data());
    const RansLayout::Stream& stream = layout.streams.front();
    // Thousands of short rows are like hundreds of them, and take long under sanitizers.
    constexpr std::size_t kMostPieces = 2000;
    if (size_ < stream.head_bytes() || layout.pieces.size() > kMostPieces) return;
    std::vector<std::int64_t> begins(layout.chunks.size() + 1);
    if (!rans_read_table(bytes_, size_, stream, begins.data())) return;
    const Bytes low(bytes_, bytes_ + stream.low_bytes);
    for (std::size_t c = 0; c < layout.chunks.size(); ++c) {
      const Bytes code(bytes_ + begins[c], bytes_ + begins[c + 1]);
      exercise_chunk(layout, layout.chunks[c], low, code);
    }
  }

 private:
  struct Decoded {
    RansFault fault;
    std::vector<std::vector<float>> values;  // of each piece
  };

  void add(std::uint64_t rows, std::uint64_t count) {
    rows_.push_back(static_cast<std::int64_t>(rows));
    counts_.push_back(static_cast<std::int64_t>(count));
  }

  int level(const RansLayout::Piece& piece) const {
    return levels_[static_cast<std::size_t>(piece.row)];
  }

  // With a scale of one, values are the integers.
  Decoded decode(const RansLayout& layout, const RansLayout::Chunk& chunk, const Bytes& low,
                 const Bytes& code, cpu::Instructions most) const {
    Decoded found;
    std::vector<RansTarget> targets;
    for (std::int64_t p = chunk.begin; p < chunk.end; ++p) {
      const RansLayout::Piece& piece = layout.pieces[static_cast<std::size_t>(p)];
      found.values.emplace_back(static_cast<std::size_t>(piece.count));
      targets.push_back({found.values.back().data(), low.data() + piece.low,
                         static_cast<std::int32_t>(piece.count), level(piece), 1.0f});
    }
    found.fault = cpu::rans_decode_chunk(code.data(), static_cast<std::int64_t>(code.size()),
                                         targets.data(), static_cast<std::int64_t>(targets.size()),
                                         rans_lanes(chunk.symbols), most);
    return found;
  }

  void exercise_chunk(const RansLayout& layout, const RansLayout::Chunk& chunk, const Bytes& low,
                      const Bytes& code) const {
    const Decoded ours = decode(layout, chunk, low, code, cpu::Instructions::kPortable);
    for (const auto path : {cpu::Instructions::kAvx2, cpu::Instructions::kAvx512}) {
      if (rans_lanes(chunk.symbols) != kRansManyLanes) break;  // few lanes have one path
      const Decoded other = decode(layout, chunk, low, code, path);
      if (ours.fault != other.fault) broken("the paths find other faults");
      if (ours.fault == RansFault::kNone && ours.values != other.values) {
        broken("the paths decode other values");
      }
    }
    if (ours.fault != RansFault::kNone) return;
    std::vector<RansSource> sources;
    for (std::int64_t p = chunk.begin; p < chunk.end; ++p) {
      const RansLayout::Piece& piece = layout.pieces[static_cast<std::size_t>(p)];
      const std::vector<float>& values = ours.values[static_cast<std::size_t>(p - chunk.begin)];
      sources.push_back(
          {values.data(), static_cast<std::int32_t>(piece.count), level(piece), 1.0f});
      check_low(sources.back(), low.data() + piece.low);
    }
    Bytes scratch(static_cast<std::size_t>(rans_chunk_bound(chunk.symbols)));
    const auto room = static_cast<std::int64_t>(scratch.size());
    const std::int64_t size =
        cpu::rans_encode_chunk(sources.data(), static_cast<std::int64_t>(sources.size()),
                               rans_lanes(chunk.symbols), scratch.data(), room);
    if (Bytes(scratch.end() - size, scratch.end()) != code) broken("a chunk has another encoding");
  }

  static void check_low(const RansSource& source, const std::uint8_t* low) {
    const int raw_bits = rans_raw_bits(source.level);
    if (raw_bits == 0) return;
    Bytes again(static_cast<std::size_t>(rans_raw_bytes(source.count, raw_bits)));
    cpu::rans_pack_low(source, again.data());
    if (!std::equal(again.begin(), again.end(), low)) broken("low bits have another encoding");
  }

  std::vector<std::int64_t> rows_, counts_;
  const std::vector<std::int16_t>& levels_;
  const std::uint8_t* bytes_;
  std::int64_t size_;
};

}  // namespace fedkd_fast::wire
