// Header and checksums of a frame; the directory is in directory.cpp, the rules of the entries in
// entry.cpp and payload.cpp.
#include "wire/frame.h"

#include <algorithm>
#include <cstring>

#include "wire/crc32c.h"
#include "wire/directory.h"

namespace fedkd_fast::wire {
namespace {

constexpr std::string_view kMagic = "FKD1";
constexpr std::uint8_t kMajor = 1;
constexpr std::uint8_t kMinor = 0;
constexpr std::uint8_t kTables = 1;
constexpr std::uint16_t kFlagDigest = 1;
constexpr std::uint16_t kFlagVersion = 2;
constexpr std::uint16_t kFlagSchema = 4;
constexpr std::uint16_t kFlags = kFlagDigest | kFlagVersion | kFlagSchema;

// Offsets of the header's fields.
constexpr std::size_t kMajorAt = 4;
constexpr std::size_t kMinorAt = 5;
constexpr std::size_t kFlagsAt = 6;
constexpr std::size_t kFrameBytesAt = 8;
constexpr std::size_t kSchemaHashAt = 16;
constexpr std::size_t kRunAt = 24;
constexpr std::size_t kRoundAt = 32;
constexpr std::size_t kEntryCountAt = 36;
constexpr std::size_t kDirectoryBytesAt = 40;
constexpr std::size_t kCodecAt = 48;
constexpr std::size_t kTablesAt = 49;
constexpr std::size_t kReservedAt = 50;
constexpr std::size_t kBodyCrcAt = 56;
constexpr std::size_t kHeaderCrcAt = 60;

template <typename Integer>
Integer load(const std::uint8_t* data, std::size_t at) {
  Integer value = 0;
  std::memcpy(&value, data + at, sizeof(value));
  return value;
}

template <typename Integer>
void store(std::uint8_t* data, std::size_t at, Integer value) {
  std::memcpy(data + at, &value, sizeof(value));
}

bool all_zero(const std::uint8_t* data, std::size_t size) {
  return std::all_of(data, data + size, [](std::uint8_t byte) { return byte == 0; });
}

Status check_version(const std::uint8_t* data) {
  const std::uint8_t major = data[kMajorAt];
  const std::uint8_t minor = data[kMinorAt];
  if (major == kMajor && minor <= kMinor) return {};
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  const std::string reader = std::to_string(kMajor) + "." + std::to_string(kMinor);
  if (major < kMajor) return invalid("frame version ", version, " was never written: bad frame");
  return invalid("frame version ", version, " is newer than this reader (", reader,
                 "): upgrade fedkd_fast");
}

// The fields that say what the frame is, and that none says what this reader does not know.
Status read_kind(const std::uint8_t* data, Header* header) {
  const auto flags = load<std::uint16_t>(data, kFlagsAt);
  if ((flags & ~kFlags) != 0) {
    return invalid("frame has unknown flags ", std::uint64_t{flags}, ": upgrade fedkd_fast");
  }
  header->base.has_digest = (flags & kFlagDigest) != 0;
  header->base.has_version = (flags & kFlagVersion) != 0;
  header->has_schema = (flags & kFlagSchema) != 0;
  header->codec = data[kCodecAt];
  if (header->codec >= kCodecs.size()) {
    return invalid("frame has unknown codec ", std::uint64_t{header->codec},
                   ": upgrade fedkd_fast");
  }
  if (data[kTablesAt] > kTables) {
    return invalid("frame needs entropy tables ", std::uint64_t{data[kTablesAt]},
                   ", which this reader lacks: upgrade fedkd_fast");
  }
  header->needs_tables = data[kTablesAt] != 0;
  header->base.run = load<std::uint64_t>(data, kRunAt);
  header->base.round = load<std::uint32_t>(data, kRoundAt);
  if (!header->base.has_version && (header->base.run != 0 || header->base.round != 0)) {
    return invalid("run and round must be zero where the flags say that there are none");
  }
  if (!all_zero(data + kReservedAt, kBodyCrcAt - kReservedAt)) {
    return invalid("reserved bytes of the header must be zero");
  }
  return {};
}

std::uint64_t digest_bytes(const Header& header) {
  return header.base.has_digest ? kDigestBytes : 0;
}

Status read_header_throwing(const std::uint8_t* data, std::size_t size, std::uint64_t frame_bytes,
                            Header* header) {
  *header = Header{};
  if (size >= kMagic.size() && std::memcmp(data, kMagic.data(), kMagic.size()) != 0) {
    return invalid("frame must start with ", kMagic, ": these bytes are something else");
  }
  if (size < kHeaderBytes) {
    return invalid("frame is truncated: its header takes ", kHeaderBytes, " bytes, got ", size);
  }
  // Before the checksum: a newer header may keep it elsewhere.
  if (Status status = check_version(data); !status.ok()) return status;
  if (load<std::uint32_t>(data, kHeaderCrcAt) != crc32c(data, kHeaderCrcAt)) {
    return invalid("checksum of header does not match: the frame is corrupted");
  }
  header->frame_bytes = load<std::uint64_t>(data, kFrameBytesAt);
  if (header->frame_bytes > frame_bytes) {
    return invalid("frame is truncated: header says ", header->frame_bytes, " bytes, got ",
                   frame_bytes);
  }
  if (header->frame_bytes < frame_bytes) {
    return invalid("frame has trailing bytes: header says ", header->frame_bytes, " bytes, got ",
                   frame_bytes);
  }
  if (Status status = read_kind(data, header); !status.ok()) return status;
  header->schema_hash = load<std::uint64_t>(data, kSchemaHashAt);
  header->entry_count = load<std::uint32_t>(data, kEntryCountAt);
  header->directory_bytes = load<std::uint64_t>(data, kDirectoryBytesAt);
  header->body_crc = load<std::uint32_t>(data, kBodyCrcAt);
  const std::uint64_t front = kHeaderBytes + digest_bytes(*header);
  if (frame_bytes < front || header->directory_bytes > frame_bytes - front) {
    return invalid("directory of ", header->directory_bytes, " bytes must fit the ", frame_bytes,
                   " bytes of the frame");
  }
  if (header->entry_count > kMaxEntries ||
      header->entry_count > header->directory_bytes / least_line_bytes(*header)) {
    return invalid("entry count must be at most ", kMaxEntries, " and fit the directory of ",
                   header->directory_bytes, " bytes, got ", header->entry_count);
  }
  if (header->directory_bytes > header->entry_count * kMostLineBytes) {
    return invalid("directory of ", header->directory_bytes, " bytes is more than ",
                   header->entry_count, " entries can take");
  }
  return {};
}

Status decode_throwing(const std::uint8_t* data, std::size_t size, const Schema* schema,
                       std::uint64_t max_bytes, Frame* frame) {
  Header& header = frame->header;
  frame->entries.clear();
  if (Status status = read_header(data, size, size, &header); !status.ok()) return status;
  if (header.body_crc != crc32c(data + kHeaderBytes, size - kHeaderBytes)) {
    return invalid("checksum of the body does not match: the frame is corrupted");
  }
  const std::uint8_t* payload = data + kHeaderBytes + digest_bytes(header);
  if (header.base.has_digest) {
    std::memcpy(header.base.digest.data(), data + kHeaderBytes, kDigestBytes);
  }
  Status status = read_directory(header, data + (size - header.directory_bytes), schema, max_bytes,
                                 &frame->entries);
  if (!status.ok()) return status;
  bool needs_tables = false;
  for (std::size_t index = 0; index < frame->entries.size(); ++index) {
    Entry& entry = frame->entries[index];
    entry.payload = payload;
    payload += entry.payload_bytes;
    if (status = check_payload(&entry, index); !status.ok()) return status;
    needs_tables = needs_tables || entry.coded;
  }
  if (needs_tables != header.needs_tables) {
    return invalid("frame must name its entropy tables exactly if an entry is entropy-coded");
  }
  return {};
}

Status plan_throwing(Frame* frame, std::string* directory) {
  Header& header = frame->header;
  if (header.codec >= kCodecs.size()) {
    return invalid("unknown codec ", std::uint64_t{header.codec});
  }
  if (frame->entries.size() > kMaxEntries) {
    return invalid("a frame must have at most ", kMaxEntries, " entries, got ",
                   frame->entries.size());
  }
  if (Status status = check_directory(&frame->entries, kMaxSize); !status.ok()) return status;
  write_directory(frame->entries, header.has_schema, directory);
  std::uint64_t size = kHeaderBytes + digest_bytes(header) + directory->size();
  for (const Entry& entry : frame->entries) {
    if (!add(size, entry.payload_bytes, &size) || size > kMaxSize) {
      return invalid("a frame must take less than 2**63 bytes");
    }
  }
  header.frame_bytes = size;
  header.directory_bytes = directory->size();
  header.entry_count = static_cast<std::uint32_t>(frame->entries.size());
  header.schema_hash = schema_hash(frame->entries);
  return {};
}

Status plan_encode_throwing(Frame* frame, std::string* directory) {
  if (Status status = plan_throwing(frame, directory); !status.ok()) return status;
  frame->header.needs_tables = false;
  for (std::size_t index = 0; index < frame->entries.size(); ++index) {
    Entry& entry = frame->entries[index];
    if (Status status = check_payload(&entry, index); !status.ok()) return status;
    frame->header.needs_tables = frame->header.needs_tables || entry.coded;
  }
  return {};
}

}  // namespace

Status decode(const std::uint8_t* data, std::size_t size, const Schema* schema,
              std::uint64_t max_bytes, Frame* frame) noexcept {
  return guarded([=] { return decode_throwing(data, size, schema, max_bytes, frame); });
}

Status read_header(const std::uint8_t* data, std::size_t size, std::uint64_t frame_bytes,
                   Header* header) noexcept {
  return guarded([=] { return read_header_throwing(data, size, frame_bytes, header); });
}

Status read_directory(const Header& header, const std::uint8_t* data, const Schema* schema,
                      std::uint64_t max_bytes, std::vector<Entry>* entries) noexcept {
  return guarded([&] {
    const std::uint64_t payload_bytes =
        header.frame_bytes - kHeaderBytes - digest_bytes(header) - header.directory_bytes;
    Status status = parse_directory(header, data, payload_bytes, schema, entries);
    return status.ok() ? check_directory(entries, max_bytes) : status;
  });
}

Status hash_schema(Schema* schema, std::uint64_t* hash) noexcept {
  return guarded([=] {
    if (Status status = check_directory(schema, kMaxSize); !status.ok()) return status;
    *hash = schema_hash(*schema);
    return Status{};
  });
}

Status plan_encode(Frame* frame, std::string* directory) noexcept {
  return guarded([=] { return plan_encode_throwing(frame, directory); });
}

Status plan_directory(Frame* frame, std::string* directory) noexcept {
  return guarded([=] { return plan_throwing(frame, directory); });
}

void write_header(const Header& header, std::uint8_t* out) noexcept {
  std::memset(out, 0, kHeaderBytes);
  std::memcpy(out, kMagic.data(), kMagic.size());
  store(out, kMajorAt, kMajor);
  store(out, kMinorAt, kMinor);
  const unsigned flags = (header.base.has_digest ? kFlagDigest : 0u) |
                         (header.base.has_version ? kFlagVersion : 0u) |
                         (header.has_schema ? kFlagSchema : 0u);
  store(out, kFlagsAt, static_cast<std::uint16_t>(flags));
  store(out, kFrameBytesAt, header.frame_bytes);
  store(out, kSchemaHashAt, header.schema_hash);
  store(out, kRunAt, header.base.run);
  store(out, kRoundAt, header.base.round);
  store(out, kEntryCountAt, header.entry_count);
  store(out, kDirectoryBytesAt, header.directory_bytes);
  store(out, kCodecAt, header.codec);
  store(out, kTablesAt, header.needs_tables ? kTables : std::uint8_t{0});
  store(out, kBodyCrcAt, header.body_crc);
  store(out, kHeaderCrcAt, crc32c(out, kHeaderCrcAt));
}

void write_frame(Frame* frame, const std::string& directory, std::uint8_t* out) noexcept {
  const Header& header = frame->header;
  std::size_t at = kHeaderBytes;
  if (header.base.has_digest) {
    std::memcpy(out + at, header.base.digest.data(), kDigestBytes);
    at += kDigestBytes;
  }
  for (const Entry& entry : frame->entries) {
    if (entry.payload_bytes == 0) continue;  // its pointer may be null
    std::memcpy(out + at, entry.payload, entry.payload_bytes);
    at += entry.payload_bytes;
  }
  std::memcpy(out + at, directory.data(), directory.size());
  at += directory.size();
  frame->header.body_crc = crc32c(out + kHeaderBytes, at - kHeaderBytes);
  write_header(header, out);
}

}  // namespace fedkd_fast::wire
