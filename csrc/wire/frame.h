// clang-format off: the tables keep their columns
// The frame: how a set of named tensors, dense or compressed, travels as bytes. Version 1.1.
//
//   frame = header (64 bytes) | directory | payload          all integers little-endian
//
// Header
//   offset  size  field
//        0     4  magic, "FKD1"
//        4     1  major version = 1
//        5     1  minor version: 1 if an entry has mode 6, else 0
//        6     2  flags; bit 0: a base digest is present; every other bit is 0
//        8     8  frame_bytes = 64 + directory_bytes + payload_bytes
//       16     4  entry_count, at most 65536
//       20     4  directory_bytes
//       24     8  payload_bytes
//       32    16  base digest: names the parameters of the base; zeros if there is none
//       48     8  reserved, zeros
//       56     4  crc32c of directory and payload
//       60     4  crc32c of header[0:60]
//
// Directory: one record an entry, without gaps. "varint" is an unsigned LEB128 number below 2^64 in
// its shortest form; a longer form of the same number is refused.
//   varint  prefix: how many leading bytes the name shares with the name before it, as many as
//           there are (0 for the first entry)
//   varint  suffix: how many bytes follow
//   bytes   the rest of the name
//   u8      dtype: 0 float32, 1 float64, 2 float16, 3 bfloat16, 4 int8, 5 int16, 6 int32, 7 int64,
//           8 uint8, 9 bool
//   u8      mode, see below
//   varint  ndim, at most 16
//   varint  shape[0] ... shape[ndim - 1]
//   varint  rank, what it counts depends on the mode
//   varint  payload_bytes of this entry
// A name has 1 to 1024 bytes of utf-8 without control characters and is unique in the frame. The
// tensor takes less than 2^63 bytes, zero extents counted as 1.
//
// Payload: the payloads of the entries in their order, without gaps and without alignment. There
// are no offsets, so that neither holes nor overlaps can be written down; the lengths must add up
// to payload_bytes. With numel the product of the shape, P = shape[0] and Q = numel / P:
//   mode  name            rank K                      payload
//      0  ZERO            0                           nothing; the tensor is all zero
//      1  RAW             0                           numel * itemsize bytes in C order; bool 0, 1
//      2  ALIAS           index of an earlier entry   nothing; the tensor equals that entry, which
//                                                     has its shape and dtype and is no ALIAS
//      3  FACTORS         1 .. min(P, Q)              sigma K f32 | left K*P f32 | right K*Q f32,
//                                                     all finite
//      4  PACKED_FACTORS  1 .. min(P, Q)              scale K f32 | bits_left K u8 |
//                                                     bits_right K u8 | codes_left | codes_right
//      5  PACKED_DENSE    rows, divides numel > 0     scale K f32 | bits K u8 | codes
//      6  ROWS            1 .. P - 1                  mode u8 | rank varint | id_bytes varint |
//                                                     ids | payload of those K rows
// Modes 3 to 5 need a floating dtype; 3, 4 and 6 need two dimensions or more, 6 also numel > 0.
// Component k of codes_left takes ceil(P * bits_left[k] / 8) bytes, of codes_right
// ceil(Q * bits_right[k] / 8), row k of codes ceil((numel / K) * bits[k] / 8). Bits lie in 1 .. 16;
// in mode 5 also 0, a row of zeros. Scales are finite. What the codes mean is the business of the
// kernels that pack them (kernels.h).
//
// In mode 6, since version 1.1, all rows of the matrix are zero but K of them. `ids` says which: a
// varint for each, how many rows are left out between the one before it, or the top, and this one.
// They take id_bytes. What follows is the payload of a tensor of shape [K, shape[1:]] in the mode
// and of the rank given here: RAW, FACTORS, PACKED_FACTORS or PACKED_DENSE, by the mode's own rules.
//
// A set of entries has exactly one encoding: what decode() accepts, encode() gives back byte for
// byte. A later writer stamps the lowest version that can say what it has to say; a reader refuses
// versions newer than its own, and flags, modes and dtypes that it does not know.
//
// Reading a stranger's bytes: sizes are checked against the bytes that are there before they are
// used, what is allocated is bounded by 65536 entries of at most 1024 bytes of name, and no tensor
// is allocated here at all. `max_bytes` bounds what a caller would allocate for the tensors: a few
// bytes in mode ZERO or ROWS may claim any shape. The checksums find damage, not forgery.
// clang-format on
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "wire/entry.h"

namespace fedkd_fast::wire {

inline constexpr std::size_t kDigestBytes = 16;

struct Frame {
  std::vector<Entry> entries;
  bool has_digest = false;
  std::array<std::uint8_t, kDigestBytes> digest{};
};

// Reads `size` bytes at `data`. On success the payloads of `frame` point into `data`; otherwise
// `frame` is unspecified. Never throws; reads no byte outside [data, data + size).
Status decode(const std::uint8_t* data, std::size_t size, std::uint64_t max_bytes,
              Frame* frame) noexcept;

// Encoding has two steps, because the caller allocates the frame. plan_encode() checks `frame` by
// the decoder's rules, fills dense_bytes, and gives header and directory, checksums still open, and
// the size of the frame. Never throws.
Status plan_encode(Frame* frame, std::string* head, std::uint64_t* frame_bytes) noexcept;

// Writes the planned frame to `out`, which holds frame_bytes bytes.
void write_frame(const Frame& frame, const std::string& head, std::uint8_t* out) noexcept;

}  // namespace fedkd_fast::wire
