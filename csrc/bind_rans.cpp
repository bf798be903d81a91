// rans_encode and rans_decode.

#include <cmath>
#include <cstring>

#include "bind_rans.h"

namespace fedkd_fast::bind {
namespace {

constexpr int64_t kGrain = 32768;  // symbols that pay a thread

void check_owner(const std::vector<int64_t>& owner, size_t segments) {
  STD_TORCH_CHECK(owner.size() == segments, "owner must have one entry per segment: ", segments,
                  " segments, got ", owner.size());
  int64_t last = -1;
  for (size_t m = 0; m < owner.size(); ++m) {
    STD_TORCH_CHECK(owner[m] == last + 1 || (m > 0 && owner[m] == last),
                    "owner must rise from 0 by at most 1, got ", owner[m], " for segment ", m);
    last = owner[m];
  }
}

// Of rows, a factor each, which is `name`.
void check_rows(const Tensor& data, const Tensor& factor, const char* name, const Tensor& levels,
                const RansShapes& shapes) {
  check_tensor(factor, name, 1, ScalarType::Float);
  check_tensor(levels, "levels", 1, ScalarType::Short);
  if (!factor.is_cpu()) check_same_device(data, "the data", factor, name);
  if (!levels.is_cpu()) check_same_device(data, "the data", levels, "levels");
  int64_t total = 0, values = 0;
  for (size_t m = 0; m < shapes.rows.size(); ++m) {
    const int64_t rows = shapes.rows[m], count = shapes.counts[m];
    STD_TORCH_CHECK(rows >= 0 && count >= 0, "rows and counts must be >= 0, got ", rows, " and ",
                    count, " for segment ", m);
    STD_TORCH_CHECK(rows <= kMostValues && (rows == 0 || count <= kMostValues / rows),
                    "rows times counts must be at most 2^48, got ", rows, " and ", count,
                    " for segment ", m);
    total += rows;
    values += rows * count;
    STD_TORCH_CHECK(total <= kMostValues && values <= kMostValues,
                    "a message must have at most 2^48 rows and values, got more in segment ", m);
  }
  STD_TORCH_CHECK(factor.size(0) == total, name, " must have one entry per row: ", total,
                  " rows, got ", factor.size(0));
  STD_TORCH_CHECK(levels.size(0) == total, "levels must have one entry per row: ", total,
                  " rows, got ", levels.size(0));
}

// On the host.
RansRows read_rows(const Tensor& factor, const char* name, const Tensor& levels) {
  RansRows rows{on_host(factor), on_host(levels)};
  for (int64_t row = 0; row < factor.size(0); ++row) {
    const int level = rows.level(row);
    STD_TORCH_CHECK(level <= kRansMostLevel, "levels must be at most ", kRansMostLevel, ", got ",
                    level, " in row ", row);
    STD_TORCH_CHECK(!rans_codes(level) || std::isfinite(rows.factor(row)), name,
                    " must be finite where a row is coded, got ", rows.factor(row), " in row ",
                    row);
  }
  return rows;
}

int64_t chunk_grain(const RansLayout& layout) {
  const auto chunks = static_cast<int64_t>(layout.chunks.size());
  return std::max<int64_t>(1, kGrain * chunks / std::max<int64_t>(1, layout.symbols));
}

const char* words_of(RansFault fault) {
  switch (fault) {
    case RansFault::kLength:
      return "its chunk table does not add up to its size";
    case RansFault::kOdd:
      return "a chunk must have an even size that holds its states";
    case RansFault::kStart:
      return "a state must be at least 65536";
    case RansFault::kTruncated:
      return "words are missing";
    case RansFault::kEscape:
      return "an escaped symbol must lie outside of its table and inside the range";
    case RansFault::kLargest:
      return "an integer must be at most 4194303";
    case RansFault::kPadding:
      return "bits behind low parts must be zero";
    case RansFault::kEnd:
      return "states must end at 65536";
    case RansFault::kTrailing:
      return "words are left";
    case RansFault::kNone:
      break;
  }
  return "sound";
}

// For the values of each segment; what takes no symbols is zero.
std::vector<Tensor> rooms(const Tensor& device, const std::vector<int64_t>& rows,
                          const std::vector<int64_t>& counts, const RansLayout& layout) {
  std::vector<bool> has_zeros(rows.size());
  for (const RansLayout::Zeros& zeros : layout.zeros)
    has_zeros[static_cast<size_t>(zeros.segment)] = true;
  std::vector<Tensor> values;
  for (size_t m = 0; m < rows.size(); ++m) {
    values.push_back(empty_like_device(device, {rows[m], counts[m]}, ScalarType::Float));
    if (has_zeros[m] && !device.is_cpu()) torch::stable::zero_(values.back());
  }
  if (device.is_cpu())
    for (const RansLayout::Zeros& zeros : layout.zeros)
      std::fill_n(
          values[static_cast<size_t>(zeros.segment)].mutable_data_ptr<float>() + zeros.first,
          zeros.count, 0.0f);
  return values;
}

std::vector<RansSource> sources(const RansLayout& layout, const std::vector<Tensor>& values,
                                const RansRows& rows) {
  std::vector<RansSource> found;
  found.reserve(layout.pieces.size());
  for (const RansLayout::Piece& piece : layout.pieces) {
    const Tensor& segment = values[static_cast<size_t>(piece.segment)];
    found.push_back({segment.const_data_ptr<float>() + piece.first,
                     static_cast<int32_t>(piece.count), rows.level(piece.row),
                     rows.factor(piece.row)});
  }
  return found;
}

// ---- on the CPU ---------------------------------------------------------------------------------

RansEncoded encode_on_cpu(const RansLayout& layout, const std::vector<RansSource>& pieces) {
  const auto count = static_cast<int64_t>(layout.chunks.size());
  std::vector<std::vector<uint8_t>> coded(layout.chunks.size());
  torch::stable::parallel_for(0, count, chunk_grain(layout), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch;
    for (int64_t c = begin; c < end; ++c) {
      const RansLayout::Chunk& chunk = layout.chunks[static_cast<size_t>(c)];
      const int64_t bound = rans_chunk_bound(chunk.symbols);
      if (static_cast<int64_t>(scratch.size()) < bound) scratch.resize(static_cast<size_t>(bound));
      const int64_t size =
          cpu::rans_encode_chunk(pieces.data() + chunk.begin, chunk.end - chunk.begin,
                                 rans_lanes(chunk.symbols), scratch.data(), bound);
      coded[static_cast<size_t>(c)].assign(scratch.data() + bound - size, scratch.data() + bound);
    }
  });
  std::vector<int64_t> sizes;
  for (const std::vector<uint8_t>& chunk : coded)
    sizes.push_back(static_cast<int64_t>(chunk.size()));
  std::vector<int64_t> starts = rans_starts(layout, sizes);
  Tensor codes = torch::stable::empty({starts.back()}, ScalarType::Byte);
  uint8_t* const out = codes.mutable_data_ptr<uint8_t>();
  for (size_t s = 0; s < layout.streams.size(); ++s) {
    const RansLayout::Stream& stream = layout.streams[s];
    uint8_t* table = out + starts[s] + stream.low_bytes;
    uint8_t* body = out + starts[s] + stream.head_bytes();
    for (int64_t c = stream.begin; c < stream.end; ++c) {
      const std::vector<uint8_t>& chunk = coded[static_cast<size_t>(c)];
      for (int byte = 0; byte < 4; ++byte)
        *table++ = static_cast<uint8_t>(chunk.size() >> (8 * byte));
      std::memcpy(body, chunk.data(), chunk.size());
      body += chunk.size();
    }
  }
  torch::stable::parallel_for(0, count, chunk_grain(layout), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const RansLayout::Chunk& chunk = layout.chunks[static_cast<size_t>(c)];
      for (int64_t p = chunk.begin; p < chunk.end; ++p)
        if (rans_raw_bits(pieces[static_cast<size_t>(p)].level) > 0)
          cpu::rans_pack_low(pieces[static_cast<size_t>(p)],
                             out + starts[static_cast<size_t>(chunk.stream)] +
                                 layout.pieces[static_cast<size_t>(p)].low);
    }
  });
  return {codes, std::move(starts)};
}

// Of each chunk.
std::vector<RansFault> decode_on_cpu(const RansLayout& layout,
                                     const std::vector<RansTarget>& pieces,
                                     const RansCodes& codes) {
  const auto* const in = codes.bytes.const_data_ptr<uint8_t>();
  std::vector<RansFault> faults(layout.chunks.size(), RansFault::kNone);
  std::vector<int64_t> begins(layout.chunks.size()), ends(layout.chunks.size());
  std::vector<bool> readable(layout.streams.size());
  for (size_t s = 0; s < layout.streams.size(); ++s) {
    const RansLayout::Stream& stream = layout.streams[s];
    const int64_t start = codes.starts[s];
    std::vector<int64_t> places(static_cast<size_t>(stream.end - stream.begin) + 1);
    readable[s] = rans_read_table(in + start, codes.starts[s + 1] - start, stream, places.data());
    for (int64_t c = stream.begin; c < stream.end; ++c) {
      begins[static_cast<size_t>(c)] = start + places[static_cast<size_t>(c - stream.begin)];
      ends[static_cast<size_t>(c)] = start + places[static_cast<size_t>(c - stream.begin) + 1];
    }
    if (!readable[s]) faults[static_cast<size_t>(stream.begin)] = RansFault::kLength;
  }
  const auto count = static_cast<int64_t>(layout.chunks.size());
  torch::stable::parallel_for(0, count, chunk_grain(layout), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const auto index = static_cast<size_t>(c);
      const RansLayout::Chunk& chunk = layout.chunks[index];
      if (!readable[static_cast<size_t>(chunk.stream)]) continue;
      faults[index] = cpu::rans_decode_chunk(in + begins[index], ends[index] - begins[index],
                                             pieces.data() + chunk.begin, chunk.end - chunk.begin,
                                             rans_lanes(chunk.symbols));
    }
  });
  return faults;
}

}  // namespace

std::tuple<Tensor, Tensor> rans_encode(const std::vector<Tensor>& values, const Tensor& multiplier,
                                       const Tensor& levels, const std::vector<int64_t>& owner) {
  RansShapes shapes;
  std::vector<Tensor> segments;
  for (size_t m = 0; m < values.size(); ++m) {
    const std::string name = "values[" + std::to_string(m) + "]";
    check_tensor(values[m], name.c_str(), 2, ScalarType::Float);
    check_same_device(values[0], "values[0]", values[m], name.c_str());
    shapes.rows.push_back(values[m].size(0));
    shapes.counts.push_back(values[m].size(1));
    segments.push_back(torch::stable::contiguous(values[m]));
  }
  check_owner(owner, values.size());
  const Tensor& data = values.empty() ? multiplier : values[0];
  check_rows(data, multiplier, "multiplier", levels, shapes);
  const RansRows rows = read_rows(multiplier, "multiplier", levels);
  const RansLayout layout(shapes.rows, shapes.counts, owner, rows.levels.const_data_ptr<int16_t>());
  const std::vector<RansSource> pieces = sources(layout, segments, rows);
#ifdef FEDKD_FAST_HAS_CUDA
  const RansEncoded found =
      on_gpu(data) ? on_gpu_half::rans_encode(layout, pieces, data) : encode_on_cpu(layout, pieces);
#else
  const RansEncoded found = encode_on_cpu(layout, pieces);
#endif
  const auto streams = static_cast<int64_t>(layout.streams.size());
  Tensor sizes = torch::stable::empty({streams}, ScalarType::Long);
  for (int64_t s = 0; s < streams; ++s)
    sizes.mutable_data_ptr<int64_t>()[s] =
        found.starts[static_cast<size_t>(s) + 1] - found.starts[static_cast<size_t>(s)];
  return {found.codes, sizes};
}

std::vector<Tensor> rans_decode(const Tensor& codes, const Tensor& sizes, const Tensor& scale,
                                const Tensor& levels, const std::vector<int64_t>& rows,
                                const std::vector<int64_t>& counts,
                                const std::vector<int64_t>& owner) {
  check_tensor(codes, "codes", 1, ScalarType::Byte);
  check_tensor(sizes, "sizes", 1, ScalarType::Long);
  STD_TORCH_CHECK(rows.size() == counts.size(), "rows and counts must have one entry per segment, ",
                  "got ", rows.size(), " and ", counts.size());
  check_owner(owner, rows.size());
  check_rows(codes, scale, "scale", levels, {rows, counts});
  const RansRows factors = read_rows(scale, "scale", levels);
  const RansLayout layout(rows, counts, owner, factors.levels.const_data_ptr<int16_t>());
  const auto streams = static_cast<int64_t>(layout.streams.size());
  STD_TORCH_CHECK(sizes.size(0) == streams, "sizes must have one entry per stream: ", streams,
                  " streams, got ", sizes.size(0));
  const Tensor host_sizes = on_host(sizes);
  std::vector<int64_t> starts{0};
  for (size_t s = 0; s < layout.streams.size(); ++s) {
    const int64_t size = host_sizes.const_data_ptr<int64_t>()[s];
    const int64_t left = codes.size(0) - starts.back();
    STD_TORCH_CHECK(size >= 0 && size <= left, "sizes must be >= 0 and within codes, got ", size,
                    " for stream ", s, " with ", left, " bytes left");
    const RansLayout::Stream& stream = layout.streams[s];
    STD_TORCH_CHECK(size >= stream.head_bytes(), "stream ", s, " is corrupt: it has ", size,
                    " bytes, its low bits and chunk table take ", stream.head_bytes());
    STD_TORCH_CHECK(stream.begin < stream.end || size == 0, "stream ", s,
                    " is corrupt: it has no symbols, but ", size, " bytes");
    starts.push_back(starts.back() + size);
  }
  STD_TORCH_CHECK(starts.back() == codes.size(0), "sizes must add up to the ", codes.size(0),
                  " bytes of codes, got ", starts.back());
  const Tensor bytes = torch::stable::contiguous(codes);
  std::vector<Tensor> values = rooms(codes, rows, counts, layout);
  const auto* const in = bytes.const_data_ptr<uint8_t>();
  std::vector<RansTarget> pieces;
  pieces.reserve(layout.pieces.size());
  for (const RansLayout::Chunk& chunk : layout.chunks)
    for (int64_t p = chunk.begin; p < chunk.end; ++p) {
      const RansLayout::Piece& piece = layout.pieces[static_cast<size_t>(p)];
      pieces.push_back(
          {values[static_cast<size_t>(piece.segment)].mutable_data_ptr<float>() + piece.first,
           in + starts[static_cast<size_t>(chunk.stream)] + piece.low,
           static_cast<int32_t>(piece.count), factors.level(piece.row), factors.factor(piece.row)});
    }
#ifdef FEDKD_FAST_HAS_CUDA
  const std::vector<RansFault> faults =
      on_gpu(codes) ? on_gpu_half::rans_decode(layout, pieces, {bytes, starts})
                    : decode_on_cpu(layout, pieces, {bytes, starts});
#else
  const std::vector<RansFault> faults = decode_on_cpu(layout, pieces, {bytes, starts});
#endif
  for (size_t c = 0; c < faults.size(); ++c)
    STD_TORCH_CHECK(faults[c] == RansFault::kNone, "stream ", layout.chunks[c].stream,
                    " is corrupt: ", words_of(faults[c]));
  return values;
}

}  // namespace fedkd_fast::bind
