// The directory at the end of a frame: what the tensors are (schema), and how each travels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "wire/frame.h"

namespace fedkd_fast::wire {

// The most bytes of a directory an entry: prefix and suffix of the name, the name, dtype, ndim,
// extents, mode, rank, payload length. A reader of files need not load more.
inline constexpr std::uint64_t kMostLineBytes =
    2 + 2 + kMaxNameBytes + 1 + 1 + kMaxDims * 10 + 1 + 10 + 10;

// The fewest bytes of a directory an entry.
std::uint64_t least_line_bytes(const Header& header);

// Names the tensors: the first 8 bytes of the SHA-256 of their schema section.
std::uint64_t schema_hash(const Schema& schema);

// Reads the directory of a frame whose header is read and whose payloads take `payload_bytes`.
// Fields that depend on each other are left to check_directory().
Status parse_directory(const Header& header, const std::uint8_t* data, std::uint64_t payload_bytes,
                       const Schema* schema, std::vector<Entry>* entries);

// Appends the directory of entries that obey check_directory().
void write_directory(const std::vector<Entry>& entries, bool with_schema, std::string* bytes);

}  // namespace fedkd_fast::wire
