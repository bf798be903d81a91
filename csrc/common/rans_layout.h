// How a message is cut into streams, chunks and pieces: by the shapes and levels alone, so both
// ends know it. For hosts; kernels are handed the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/rans.h"

namespace fedkd_fast {

struct RansLayout {
  // At most kRansChunk consecutive values of a row.
  struct Piece {
    int64_t segment, row;  // the row among all rows
    int64_t first;         // value of the segment
    int64_t count;
    int64_t low;  // where in the stream the low bits start
  };
  struct Chunk {
    int64_t stream;
    int64_t begin, end;  // pieces
    int64_t symbols;
  };
  struct Stream {
    int64_t begin, end;  // chunks
    int64_t low_bytes;
    // What precedes the chunks: low bits and chunk table.
    int64_t head_bytes() const { return low_bytes + 4 * (end - begin); }
  };
  struct Zeros {
    int64_t segment, first, count;
  };

  std::vector<Piece> pieces;
  std::vector<Chunk> chunks;
  std::vector<Stream> streams;
  std::vector<Zeros> zeros;  // rows that take no symbols
  int64_t symbols = 0;

  // owner rises from 0 by at most 1; levels are of all rows, and none is beyond kRansMostLevel.
  RansLayout(const std::vector<int64_t>& rows, const std::vector<int64_t>& counts,
             const std::vector<int64_t>& owner, const int16_t* levels) {
    int64_t row = 0;
    for (size_t segment = 0; segment < rows.size(); ++segment) {
      if (static_cast<size_t>(owner[segment]) == streams.size()) {
        const auto first = static_cast<int64_t>(chunks.size());
        streams.push_back({first, first, 0});
      }
      for (int64_t i = 0; i < rows[segment]; ++i, ++row)
        add_row(static_cast<int64_t>(segment), row, i * counts[segment], counts[segment],
                levels[row]);
    }
  }

 private:
  void add_row(int64_t segment, int64_t row, int64_t first, int64_t count, int level) {
    if (count == 0) return;
    if (!rans_codes(level)) {
      zeros.push_back({segment, first, count});
      return;
    }
    Stream& stream = streams.back();
    const int raw_bits = rans_raw_bits(level);
    symbols += count;
    for (int64_t done = 0; done < count; done += kRansChunk) {
      const int64_t size = std::min(kRansChunk, count - done);
      if (stream.begin == stream.end || chunks.back().symbols + size > kRansChunk) {
        const auto piece = static_cast<int64_t>(pieces.size());
        chunks.push_back({static_cast<int64_t>(streams.size()) - 1, piece, piece, 0});
        ++stream.end;
      }
      // kRansChunk values end on a byte.
      pieces.push_back({segment, row, first + done, size, stream.low_bytes});
      stream.low_bytes += rans_raw_bytes(size, raw_bits);
      ++chunks.back().end;
      chunks.back().symbols += size;
    }
  }
};

// Where each chunk of a stream begins, and where the last one ends; false where its chunk table
// does not add up to its size, which is at least head_bytes. `begins` holds a place more than
// chunks.
inline bool rans_read_table(const uint8_t* bytes, int64_t size, const RansLayout::Stream& stream,
                            int64_t* begins) {
  const uint8_t* table = bytes + stream.low_bytes;
  int64_t at = stream.head_bytes();
  for (int64_t c = stream.begin; c < stream.end; ++c, table += 4) {
    *begins++ = at;
    for (int byte = 0; byte < 4; ++byte) at += int64_t{table[byte]} << (8 * byte);
    if (at > size) return false;
  }
  *begins = at;
  return at == size;
}

}  // namespace fedkd_fast
