#include "wire/directory.h"

#include <algorithm>
#include <cstring>

#include "wire/cursor.h"
#include "wire/sha256.h"

namespace fedkd_fast::wire {
namespace {

constexpr std::uint64_t kLeastSchemaLine = 4;  // every field one byte, nothing added to the name
constexpr std::uint64_t kLeastEntryLine = 3;

void append_varint(std::string* bytes, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) bytes->push_back(static_cast<char>((value & 0x7F) | 0x80));
  bytes->push_back(static_cast<char>(value));
}

std::size_t common_prefix(const std::string& a, const std::string& b) {
  const std::size_t size = std::min(a.size(), b.size());
  std::size_t at = 0;
  while (at < size && a[at] == b[at]) ++at;
  return at;
}

void write_schema(const Schema& schema, std::string* bytes) {
  const std::string none;
  const std::string* previous = &none;
  for (const Entry& entry : schema) {
    const std::size_t prefix = common_prefix(*previous, entry.name);
    append_varint(bytes, prefix);
    append_varint(bytes, entry.name.size() - prefix);
    bytes->append(entry.name, prefix, std::string::npos);
    bytes->push_back(static_cast<char>(entry.dtype));
    append_varint(bytes, entry.ndim);
    for (std::size_t dim = 0; dim < entry.ndim; ++dim) append_varint(bytes, entry.shape[dim]);
    previous = &entry.name;
  }
}

std::uint64_t hash_bytes(const std::uint8_t* data, std::size_t size) {
  const auto digest = sha256(data, size);
  std::uint64_t hash = 0;
  std::memcpy(&hash, digest.data(), sizeof(hash));
  return hash;
}

Status bad_line(std::size_t index, std::string_view field) {
  return invalid("directory is malformed: ", field, " of entry ", index,
                 " is cut short, overlong or out of range");
}

Status read_name(Cursor* cursor, std::size_t index, const std::string& previous,
                 std::string* name) {
  std::uint64_t prefix = 0;
  std::uint64_t suffix = 0;
  if (!cursor->take_varint(&prefix) || prefix > previous.size()) {
    return bad_line(index, "name prefix");
  }
  if (!cursor->take_varint(&suffix) || suffix > kMaxNameBytes - prefix) {
    return bad_line(index, "name suffix");
  }
  name->assign(previous, 0, prefix);
  if (!cursor->take_text(suffix, name)) return bad_line(index, "name suffix");
  if (prefix < previous.size() && prefix < name->size() && (*name)[prefix] == previous[prefix]) {
    return invalid("directory is malformed: name prefix of entry ", index,
                   " must be as long as it can be");
  }
  return {};
}

Status read_schema_line(Cursor* cursor, std::size_t index, const std::string& previous,
                        Entry* entry) {
  if (Status status = read_name(cursor, index, previous, &entry->name); !status.ok()) {
    return status;
  }
  if (!cursor->take_byte(&entry->dtype)) return bad_line(index, "dtype");
  std::uint64_t ndim = 0;
  if (!cursor->take_varint(&ndim) || ndim > kMaxDims) return bad_line(index, "ndim");
  entry->ndim = static_cast<std::uint8_t>(ndim);
  for (std::size_t dim = 0; dim < ndim; ++dim) {
    if (!cursor->take_varint(&entry->shape[dim])) return bad_line(index, "shape");
  }
  return {};
}

// `left` is the payload not yet given to an entry.
Status read_entry_line(Cursor* cursor, std::size_t index, std::uint64_t left, Entry* entry) {
  if (!cursor->take_byte(&entry->mode)) return bad_line(index, "mode");
  if (!cursor->take_varint(&entry->rank)) return bad_line(index, "rank");
  if (!cursor->take_varint(&entry->payload_bytes)) return bad_line(index, "payload length");
  if (entry->payload_bytes > left) {
    return invalid("payload of entry ", index, " must lie in the frame: it takes ",
                   entry->payload_bytes, " bytes of ", left, " left");
  }
  return {};
}

Status wrong_schema(std::uint64_t own, std::uint64_t wanted) {
  return invalid("schema= does not match the frame: its hash is ", own, ", the frame names ",
                 wanted);
}

Status read_own_schema(const Header& header, const Schema* wanted, Cursor* cursor,
                       std::vector<Entry>* entries) {
  const std::uint8_t* section = cursor->data();
  const std::string none;
  for (std::size_t index = 0; index < header.entry_count; ++index) {
    Entry entry;
    const std::string& previous = index == 0 ? none : entries->back().name;
    Status status = read_schema_line(cursor, index, previous, &entry);
    if (!status.ok()) return status;
    entries->push_back(std::move(entry));
  }
  const auto size = static_cast<std::size_t>(cursor->data() - section);
  if (hash_bytes(section, size) != header.schema_hash) {
    return invalid("schema hash must be that of the schema in the frame");
  }
  if (wanted != nullptr && schema_hash(*wanted) != header.schema_hash) {
    return wrong_schema(schema_hash(*wanted), header.schema_hash);
  }
  return {};
}

Status take_schema(const Header& header, const Schema* schema, std::vector<Entry>* entries) {
  if (schema == nullptr) return invalid("frame carries no schema: pass schema=");
  const std::uint64_t own = schema_hash(*schema);
  if (own != header.schema_hash) return wrong_schema(own, header.schema_hash);
  if (schema->size() != header.entry_count) {
    return invalid("entry count must be that of the schema, ", schema->size(), ", got ",
                   header.entry_count);
  }
  *entries = *schema;
  return {};
}

}  // namespace

std::uint64_t schema_hash(const Schema& schema) {
  std::string bytes;
  write_schema(schema, &bytes);
  return hash_bytes(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
}

std::uint64_t least_line_bytes(const Header& header) {
  return kLeastEntryLine + (header.has_schema ? kLeastSchemaLine : 0);
}

Status parse_directory(const Header& header, const std::uint8_t* data, std::uint64_t payload_bytes,
                       const Schema* schema, std::vector<Entry>* entries) {
  entries->clear();
  entries->reserve(header.entry_count);  // bounded by the directory that is there
  Cursor cursor(data, header.directory_bytes);
  Status status = header.has_schema ? read_own_schema(header, schema, &cursor, entries)
                                    : take_schema(header, schema, entries);
  if (!status.ok()) return status;
  std::uint64_t left = payload_bytes;
  for (std::size_t index = 0; index < entries->size(); ++index) {
    Entry& entry = (*entries)[index];
    if (status = read_entry_line(&cursor, index, left, &entry); !status.ok()) return status;
    left -= entry.payload_bytes;
  }
  if (cursor.left() != 0) {
    return invalid("directory has ", cursor.left(), " bytes after its last entry");
  }
  if (left != 0) return invalid("payload has ", left, " bytes that belong to no entry");
  return {};
}

void write_directory(const std::vector<Entry>& entries, bool with_schema, std::string* bytes) {
  if (with_schema) write_schema(entries, bytes);
  for (const Entry& entry : entries) {
    bytes->push_back(static_cast<char>(entry.mode));
    append_varint(bytes, entry.rank);
    append_varint(bytes, entry.payload_bytes);
  }
}

}  // namespace fedkd_fast::wire
