// What can be known of entries without their payloads: names, dtypes, shapes, modes, aliases.
//
// Everything here may come from a stranger. Products are formed by multiply(), so that no claimed
// size wraps into a small one.
#include "wire/entry.h"

#include <algorithm>

namespace fedkd_fast::wire {
namespace {

// Strict utf-8 (no overlong forms, no surrogates, nothing above U+10FFFF) without control
// characters, which could write into the terminal of whoever lists a frame.
bool is_clean_utf8(const std::string& text) {
  const auto byte_at = [&text](std::size_t at) {
    return at < text.size() ? static_cast<std::uint8_t>(text[at]) : std::uint8_t{0};
  };
  for (std::size_t at = 0; at < text.size();) {
    const std::uint8_t lead = byte_at(at);
    if (lead < 0x80) {
      if (lead < 0x20 || lead == 0x7F) return false;
      ++at;
      continue;
    }
    std::size_t more = 0;
    std::uint8_t low = 0x80;  // bounds of the second byte
    std::uint8_t high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
      more = 1;
      if (lead == 0xC2) low = 0xA0;  // C2 80 .. C2 9F are control characters
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      more = 2;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      more = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (byte_at(at + 1) < low || byte_at(at + 1) > high) return false;
    for (std::size_t next = 2; next <= more; ++next) {
      if ((byte_at(at + next) & 0xC0) != 0x80) return false;
    }
    at += 1 + more;
  }
  return true;
}

Status check_name(const Entry& entry, std::size_t index) {
  if (entry.name.empty() || entry.name.size() > kMaxNameBytes) {
    return invalid("entry ", index, ": name must have 1 to ", kMaxNameBytes, " bytes, got ",
                   entry.name.size());
  }
  if (!is_clean_utf8(entry.name)) {
    return invalid("entry ", index, ": name must be utf-8 without control characters");
  }
  return {};
}

// Fills dense_bytes. Zero extents do not hide an overflow of the others: a reader that computes
// strides would meet it.
Status check_shape(const std::string& where, Entry* entry) {
  if (entry->ndim > kMaxDims) {
    return invalid(where, ": at most 16 dimensions, got ", std::uint64_t{entry->ndim});
  }
  const std::uint64_t itemsize = kDTypes[entry->dtype].itemsize;
  std::uint64_t extent = itemsize;
  bool empty = false;
  for (std::size_t dim = 0; dim < entry->ndim; ++dim) {
    empty = empty || entry->shape[dim] == 0;
    if (!multiply(extent, std::max<std::uint64_t>(entry->shape[dim], 1), &extent) ||
        extent > kMaxSize) {
      return invalid(where, ": shape must take less than 2**63 bytes");
    }
  }
  entry->dense_bytes = empty ? 0 : extent;
  return {};
}

Status check_alias(const std::string& where, const std::vector<Entry>& entries, std::size_t index) {
  const Entry& entry = entries[index];
  if (entry.rank >= index) {
    return invalid(where, ": an alias must name an earlier entry, got entry ", entry.rank);
  }
  const Entry& target = entries[entry.rank];
  if (target.mode == static_cast<std::uint8_t>(Mode::kAlias)) {
    return invalid(where, ": an alias must not name another alias, got entry ", entry.rank);
  }
  if (target.dtype != entry.dtype || target.ndim != entry.ndim || target.shape != entry.shape) {
    return invalid(where, ": an alias must have the shape and dtype of entry ", entry.rank);
  }
  return {};
}

Status check_head(std::vector<Entry>* entries, std::size_t index) {
  Entry& entry = (*entries)[index];
  if (Status status = check_name(entry, index); !status.ok()) return status;
  const std::string where = place(entry, index);
  if (entry.dtype >= kDTypes.size()) {
    return invalid(where, ": unknown dtype code ", std::uint64_t{entry.dtype});
  }
  if (entry.mode >= kModes) {
    return invalid(where, ": unknown mode ", std::uint64_t{entry.mode});
  }
  if (Status status = check_shape(where, &entry); !status.ok()) return status;
  if (static_cast<Mode>(entry.mode) == Mode::kAlias) return check_alias(where, *entries, index);
  return {};
}

// By sorting, not by hashing: a stranger can choose names that fall into one bucket.
Status check_unique(const std::vector<Entry>& entries) {
  std::vector<std::string_view> names;
  names.reserve(entries.size());
  for (const Entry& entry : entries) names.emplace_back(entry.name);
  std::sort(names.begin(), names.end());
  const auto twin = std::adjacent_find(names.begin(), names.end());
  if (twin != names.end()) return invalid("name \"", *twin, "\" must be unique in the frame");
  return {};
}

Status check_all(std::vector<Entry>* entries, std::uint64_t max_bytes) {
  std::uint64_t total = 0;
  for (std::size_t index = 0; index < entries->size(); ++index) {
    if (Status status = check_head(entries, index); !status.ok()) return status;
    const Entry& entry = (*entries)[index];
    if (!add(total, entry.dense_bytes, &total) || total > max_bytes) {
      return invalid("tensors must take at most max_bytes = ", max_bytes, " bytes, ",
                     place(entry, index), " goes beyond it with ", entry.dense_bytes);
    }
  }
  return check_unique(*entries);
}

}  // namespace

std::string place(const Entry& entry, std::size_t index) {
  return "entry " + std::to_string(index) + " (\"" + entry.name + "\")";
}

Status check_directory(std::vector<Entry>* entries, std::uint64_t max_bytes) noexcept {
  return guarded([=] { return check_all(entries, max_bytes); });
}

}  // namespace fedkd_fast::wire
