// The frame: how a set of named tensors, dense or compressed, travels as bytes. Every byte of it is
// specified in docs/wire-format.md; names here are those of the specification.
//
//   frame = header (64 bytes) | base digest (16 bytes, if there is one) | payload | directory
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "wire/entry.h"

namespace fedkd_fast::wire {

inline constexpr std::size_t kHeaderBytes = 64;
inline constexpr std::size_t kDigestBytes = 16;

// What the writer was asked for; position = the code on the wire.
inline constexpr std::array<std::string_view, 4> kCodecs = {"raw", "factors-fp32", "wf0", "wf1"};

// What the tensors of a frame are relative to.
struct Base {
  bool has_digest = false;
  bool has_version = false;
  std::array<std::uint8_t, kDigestBytes> digest{};
  std::uint64_t run = 0;
  std::uint32_t round = 0;
};

// The header's fields; `base.digest` is filled by decode() alone, since it lies behind the header.
struct Header {
  Base base;
  bool has_schema = true;
  std::uint8_t codec = 0;
  bool needs_tables = false;
  std::uint64_t frame_bytes = 0;
  std::uint64_t schema_hash = 0;
  std::uint32_t entry_count = 0;
  std::uint64_t directory_bytes = 0;
  std::uint32_t body_crc = 0;
};

struct Frame {
  Header header;
  std::vector<Entry> entries;
};

// The tensors that a receiver expects, as entries of which only name, dtype and shape count.
using Schema = std::vector<Entry>;

// Checks a schema and gives the number that names it. Never throws.
Status hash_schema(Schema* schema, std::uint64_t* hash) noexcept;

// Reads a whole frame, `size` bytes at `data`. `schema` may be null where the frame carries its
// own. On success the payloads of `frame` point into `data`; otherwise `frame` is unspecified.
// Never throws; reads no byte outside [data, data + size).
Status decode(const std::uint8_t* data, std::size_t size, const Schema* schema,
              std::uint64_t max_bytes, Frame* frame) noexcept;

// The steps of decode(), for a reader that never holds the whole frame. The first takes as much of
// the front as is there and the size of the frame; the caller compares the checksum of the body.
// The second takes the directory_bytes at the end; payloads stay null, payload_bytes are set and
// follow each other. check_payload() and `needs_tables` are left to the caller.
Status read_header(const std::uint8_t* data, std::size_t size, std::uint64_t frame_bytes,
                   Header* header) noexcept;
Status read_directory(const Header& header, const std::uint8_t* data, const Schema* schema,
                      std::uint64_t max_bytes, std::vector<Entry>* entries) noexcept;

// Encoding has two steps, because the caller allocates the frame. plan_encode() checks `frame` by
// the decoder's rules, takes base, codec and has_schema from its header and fills the rest but the
// checksum, and gives the bytes of the directory. Never throws.
Status plan_encode(Frame* frame, std::string* directory) noexcept;

// The same without a look at payloads, which the caller has checked, along with needs_tables.
Status plan_directory(Frame* frame, std::string* directory) noexcept;

// Writes the planned frame to `out`, which holds frame_bytes bytes.
void write_frame(Frame* frame, const std::string& directory, std::uint8_t* out) noexcept;

// Writes the kHeaderBytes of a planned frame whose body_crc is known.
void write_header(const Header& header, std::uint8_t* out) noexcept;

}  // namespace fedkd_fast::wire
