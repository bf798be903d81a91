// Header, directory and checksums of a frame; the rules of the entries are in entry.cpp.
#include "wire/frame.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>

#include "wire/crc32c.h"
#include "wire/cursor.h"

namespace fedkd_fast::wire {
namespace {

constexpr std::string_view kMagic = "FKD1";
constexpr std::uint8_t kMajor = 1;
constexpr std::uint8_t kMinor = 1;
constexpr std::uint16_t kFlagDigest = 1;
constexpr std::size_t kHeaderBytes = 64;
constexpr std::size_t kMinRecordBytes = 7;  // every field one byte, nothing added to the name

// Offsets of the header's fields.
constexpr std::size_t kMajorAt = 4;
constexpr std::size_t kMinorAt = 5;
constexpr std::size_t kFlagsAt = 6;
constexpr std::size_t kFrameBytesAt = 8;
constexpr std::size_t kEntryCountAt = 16;
constexpr std::size_t kDirectoryBytesAt = 20;
constexpr std::size_t kPayloadBytesAt = 24;
constexpr std::size_t kDigestAt = 32;
constexpr std::size_t kReservedAt = 48;
constexpr std::size_t kBodyCrcAt = 56;
constexpr std::size_t kHeaderCrcAt = 60;

template <typename Integer>
Integer load(const std::uint8_t* data, std::size_t at) {
  Integer value = 0;
  std::memcpy(&value, data + at, sizeof(value));
  return value;
}

template <typename Integer>
void store(void* data, std::size_t at, Integer value) {
  std::memcpy(static_cast<std::uint8_t*>(data) + at, &value, sizeof(value));
}

bool all_zero(const std::uint8_t* data, std::size_t size) {
  return std::all_of(data, data + size, [](std::uint8_t byte) { return byte == 0; });
}

void append_varint(std::string* bytes, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) bytes->push_back(static_cast<char>((value & 0x7F) | 0x80));
  bytes->push_back(static_cast<char>(value));
}

struct Header {
  std::uint32_t entry_count = 0;
  std::uint32_t directory_bytes = 0;
  std::uint64_t payload_bytes = 0;
};

// The lowest minor version that can say what the entries have to say.
std::uint8_t minor_version(const Frame& frame) {
  return std::any_of(frame.entries.begin(), frame.entries.end(), [](const Entry& entry) {
    return entry.mode == static_cast<std::uint8_t>(Mode::kRows);
  });
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

Status read_header(const std::uint8_t* data, std::size_t size, Header* header, Frame* frame) {
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
  const auto frame_bytes = load<std::uint64_t>(data, kFrameBytesAt);
  if (frame_bytes > size) {
    return invalid("frame is truncated: header says ", frame_bytes, " bytes, got ", size);
  }
  if (frame_bytes < size) {
    return invalid("frame has trailing bytes: header says ", frame_bytes, " bytes, got ", size);
  }
  const auto flags = load<std::uint16_t>(data, kFlagsAt);
  if ((flags & ~kFlagDigest) != 0) {
    return invalid("frame has unknown flags ", std::uint64_t{flags}, ": upgrade fedkd_fast");
  }
  frame->has_digest = (flags & kFlagDigest) != 0;
  std::memcpy(frame->digest.data(), data + kDigestAt, kDigestBytes);
  if (!frame->has_digest && !all_zero(data + kDigestAt, kDigestBytes)) {
    return invalid("base digest must be zero where the flags say that there is none");
  }
  if (!all_zero(data + kReservedAt, kBodyCrcAt - kReservedAt)) {
    return invalid("reserved bytes of the header must be zero");
  }
  header->entry_count = load<std::uint32_t>(data, kEntryCountAt);
  header->directory_bytes = load<std::uint32_t>(data, kDirectoryBytesAt);
  header->payload_bytes = load<std::uint64_t>(data, kPayloadBytesAt);
  std::uint64_t sum = 0;
  if (!add(kHeaderBytes + std::uint64_t{header->directory_bytes}, header->payload_bytes, &sum) ||
      sum != frame_bytes) {
    return invalid("sizes of directory (", header->directory_bytes, ") and payload (",
                   header->payload_bytes, ") must add up to the ", frame_bytes,
                   " bytes of the frame");
  }
  if (header->entry_count > kMaxEntries ||
      header->entry_count > header->directory_bytes / kMinRecordBytes) {
    return invalid("entry count must be at most ", kMaxEntries, " and fit the directory of ",
                   header->directory_bytes, " bytes, got ", header->entry_count);
  }
  if (load<std::uint32_t>(data, kBodyCrcAt) != crc32c(data + kHeaderBytes, size - kHeaderBytes)) {
    return invalid("checksum of directory and payload does not match: the frame is corrupted");
  }
  return {};
}

Status bad_record(std::size_t index, std::string_view field) {
  return invalid("directory is malformed: ", field, " of entry ", index,
                 " is cut short, overlong or out of range");
}

Status read_name(Cursor* cursor, std::size_t index, const std::string& previous,
                 std::string* name) {
  std::uint64_t prefix = 0;
  std::uint64_t suffix = 0;
  if (!cursor->take_varint(&prefix) || prefix > previous.size()) {
    return bad_record(index, "name prefix");
  }
  if (!cursor->take_varint(&suffix) || suffix > kMaxNameBytes - prefix) {
    return bad_record(index, "name suffix");
  }
  name->assign(previous, 0, prefix);
  if (!cursor->take_text(suffix, name)) return bad_record(index, "name suffix");
  if (prefix < previous.size() && prefix < name->size() && (*name)[prefix] == previous[prefix]) {
    return invalid("directory is malformed: name prefix of entry ", index,
                   " must be as long as it can be");
  }
  return {};
}

// Reads one record. `left` is the payload not yet given to an entry.
Status read_record(Cursor* cursor, std::size_t index, std::uint64_t left, Entry* entry) {
  if (!cursor->take_byte(&entry->dtype)) return bad_record(index, "dtype");
  if (!cursor->take_byte(&entry->mode)) return bad_record(index, "mode");
  std::uint64_t ndim = 0;
  if (!cursor->take_varint(&ndim) || ndim > kMaxDims) return bad_record(index, "ndim");
  entry->ndim = static_cast<std::uint8_t>(ndim);
  for (std::size_t dim = 0; dim < ndim; ++dim) {
    if (!cursor->take_varint(&entry->shape[dim])) return bad_record(index, "shape");
  }
  if (!cursor->take_varint(&entry->rank)) return bad_record(index, "rank");
  if (!cursor->take_varint(&entry->payload_bytes)) return bad_record(index, "payload length");
  if (entry->payload_bytes > left) {
    return invalid("payload of entry ", index, " must lie in the frame: it takes ",
                   entry->payload_bytes, " bytes of ", left, " left");
  }
  return {};
}

Status decode_throwing(const std::uint8_t* data, std::size_t size, std::uint64_t max_bytes,
                       Frame* frame) {
  Header header;
  *frame = Frame{};
  if (Status status = read_header(data, size, &header, frame); !status.ok()) return status;
  Cursor cursor(data + kHeaderBytes, header.directory_bytes);
  const std::uint8_t* payload = data + kHeaderBytes + header.directory_bytes;
  std::uint64_t left = header.payload_bytes;
  frame->entries.reserve(header.entry_count);  // bounded by the directory that is there
  const std::string none;
  for (std::size_t index = 0; index < header.entry_count; ++index) {
    const std::string& previous = index == 0 ? none : frame->entries.back().name;
    Entry entry;
    Status status = read_name(&cursor, index, previous, &entry.name);
    if (status.ok()) status = read_record(&cursor, index, left, &entry);
    if (!status.ok()) return status;
    entry.payload = payload;
    payload += entry.payload_bytes;
    left -= entry.payload_bytes;
    frame->entries.push_back(std::move(entry));
  }
  if (cursor.left() != 0) {
    return invalid("directory has ", cursor.left(), " bytes after its last entry");
  }
  if (left != 0) return invalid("payload has ", left, " bytes that belong to no entry");
  const std::uint64_t minor = minor_version(*frame);
  if (data[kMinorAt] != minor) {
    return invalid("minor version must be ", minor, ", the lowest with the frame's modes, got ",
                   std::uint64_t{data[kMinorAt]});
  }
  return check_entries(&frame->entries, max_bytes);
}

std::size_t common_prefix(const std::string& a, const std::string& b) {
  const std::size_t size = std::min(a.size(), b.size());
  std::size_t at = 0;
  while (at < size && a[at] == b[at]) ++at;
  return at;
}

Status plan_throwing(Frame* frame, std::string* head, std::uint64_t* frame_bytes) {
  if (frame->entries.size() > kMaxEntries) {
    return invalid("a frame must have at most ", kMaxEntries, " entries, got ",
                   frame->entries.size());
  }
  if (Status status = check_entries(&frame->entries, kMaxSize); !status.ok()) return status;
  head->assign(kHeaderBytes, '\0');
  std::uint64_t payload_bytes = 0;
  const std::string none;
  const std::string* previous = &none;
  for (const Entry& entry : frame->entries) {
    const std::size_t prefix = common_prefix(*previous, entry.name);
    append_varint(head, prefix);
    append_varint(head, entry.name.size() - prefix);
    head->append(entry.name, prefix, std::string::npos);
    head->push_back(static_cast<char>(entry.dtype));
    head->push_back(static_cast<char>(entry.mode));
    append_varint(head, entry.ndim);
    for (std::size_t dim = 0; dim < entry.ndim; ++dim) append_varint(head, entry.shape[dim]);
    append_varint(head, entry.rank);
    append_varint(head, entry.payload_bytes);
    previous = &entry.name;
    if (!add(payload_bytes, entry.payload_bytes, &payload_bytes)) {
      return invalid("a frame must take less than 2**63 bytes");
    }
  }
  if (!add(head->size(), payload_bytes, frame_bytes) || *frame_bytes > kMaxSize) {
    return invalid("a frame must take less than 2**63 bytes");
  }
  std::memcpy(head->data(), kMagic.data(), kMagic.size());
  store(head->data(), kMajorAt, kMajor);
  store(head->data(), kMinorAt, minor_version(*frame));
  store(head->data(), kFlagsAt, frame->has_digest ? kFlagDigest : std::uint16_t{0});
  store(head->data(), kFrameBytesAt, *frame_bytes);
  store(head->data(), kEntryCountAt, static_cast<std::uint32_t>(frame->entries.size()));
  // 65536 records of at most 1024 + 215 bytes stay far below 2^32.
  store(head->data(), kDirectoryBytesAt, static_cast<std::uint32_t>(head->size() - kHeaderBytes));
  store(head->data(), kPayloadBytesAt, payload_bytes);
  if (frame->has_digest) {
    std::memcpy(head->data() + kDigestAt, frame->digest.data(), kDigestBytes);
  }
  return {};
}

// Turns what the standard library throws into a status; its only cause here is memory.
template <typename Call>
Status guarded(const Call& call) noexcept {
  try {
    return call();
  } catch (const std::exception&) {
    return Status{Status::Code::kNoMemory, "out of memory"};  // short enough to need no allocation
  }
}

}  // namespace

Status decode(const std::uint8_t* data, std::size_t size, std::uint64_t max_bytes,
              Frame* frame) noexcept {
  return guarded([=] { return decode_throwing(data, size, max_bytes, frame); });
}

Status plan_encode(Frame* frame, std::string* head, std::uint64_t* frame_bytes) noexcept {
  return guarded([=] { return plan_throwing(frame, head, frame_bytes); });
}

void write_frame(const Frame& frame, const std::string& head, std::uint8_t* out) noexcept {
  std::memcpy(out, head.data(), head.size());
  std::size_t at = head.size();
  for (const Entry& entry : frame.entries) {
    if (entry.payload_bytes == 0) continue;  // its pointer may be null
    std::memcpy(out + at, entry.payload, entry.payload_bytes);
    at += entry.payload_bytes;
  }
  store(out, kBodyCrcAt, crc32c(out + kHeaderBytes, at - kHeaderBytes));
  store(out, kHeaderCrcAt, crc32c(out, kHeaderCrcAt));
}

}  // namespace fedkd_fast::wire
