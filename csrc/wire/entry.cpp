// The rules of one entry: name, dtype, shape, rank, and the layout of its payload.
//
// Everything here may come from a stranger. A length is compared before it is used as one, and
// products are formed by multiply(), so that no claimed size wraps into a small one.
#include "wire/entry.h"

#include <algorithm>
#include <cstring>

#include "wire/cursor.h"

namespace fedkd_fast::wire {
namespace {

constexpr std::uint64_t kFloatBytes = 4;
constexpr std::uint8_t kMaxBits = 16;

struct Matrix {
  std::uint64_t rows = 0;
  std::uint64_t columns = 0;
};

// Where an entry is refused: `entry 3 ("encoder.weight")`.
std::string place(const Entry& entry, std::size_t index) {
  return "entry " + std::to_string(index) + " (\"" + entry.name + "\")";
}

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

// True where none of `count` little-endian float32 values is an infinity or not a number.
bool all_finite(const std::uint8_t* data, std::uint64_t count) {
  constexpr std::uint32_t kExponent = 0x7F800000u;
  std::uint32_t special = 0;  // branch-free, so that it runs at the speed of memory
  for (std::uint64_t at = 0; at < count; ++at) {
    std::uint32_t word = 0;
    std::memcpy(&word, data + kFloatBytes * at, sizeof(word));
    special |= static_cast<std::uint32_t>((word & kExponent) == kExponent);
  }
  return special == 0;
}

// Adds the bytes of rows of `length` codes, row k at bits[k] bits, to `total`. `limit` is the real
// payload: a sum above it is wrong whatever follows, so it ends there.
Status add_codes(const std::string& where, const std::uint8_t* bits, std::uint64_t count,
                 std::uint8_t least, std::uint64_t length, std::uint64_t limit,
                 std::uint64_t* total) {
  for (std::uint64_t row = 0; row < count; ++row) {
    if (bits[row] < least || bits[row] > kMaxBits) {
      return invalid(where, ": bits must lie in [", std::uint64_t{least}, ", 16], got ",
                     std::uint64_t{bits[row]});
    }
    std::uint64_t row_bits = 0;
    const bool fits = multiply(length, bits[row], &row_bits);
    const std::uint64_t row_bytes = row_bits / 8 + (row_bits % 8 != 0 ? 1 : 0);
    if (!fits || !add(*total, row_bytes, total) || *total > limit) {
      return invalid(where, ": its codes take more than the ", limit, " bytes of its payload");
    }
  }
  return {};
}

Status wrong_payload(const std::string& where, std::uint64_t want, std::uint64_t got) {
  return invalid(where, ": payload must take ", want, " bytes, got ", got);
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
Status check_shape(const std::string& where, Entry* entry, std::uint64_t* numel) {
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
  *numel = empty ? 0 : extent / itemsize;
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
  if (entry.payload_bytes != 0) return wrong_payload(where, 0, entry.payload_bytes);
  return {};
}

Status check_raw(const std::string& where, const Entry& entry) {
  if (entry.payload_bytes != entry.dense_bytes) {
    return wrong_payload(where, entry.dense_bytes, entry.payload_bytes);
  }
  // Another value than 0 or 1 in a bool is undefined behaviour in whatever reads it.
  if (entry.dtype == kBool && std::any_of(entry.payload, entry.payload + entry.payload_bytes,
                                          [](std::uint8_t byte) { return byte > 1; })) {
    return invalid(where, ": a bool must be 0 or 1");
  }
  return {};
}

Status check_factor_shape(const std::string& where, const Entry& entry, std::uint64_t numel,
                          Matrix* matrix) {
  if (!kDTypes[entry.dtype].floating) {
    return invalid(where, ": factors need a floating dtype, got ", kDTypes[entry.dtype].name);
  }
  if (entry.ndim < 2) {
    return invalid(where, ": factors need at least 2 dimensions, got ", std::uint64_t{entry.ndim});
  }
  matrix->rows = entry.shape[0];
  matrix->columns = matrix->rows == 0 ? 0 : numel / matrix->rows;
  const std::uint64_t full = std::min(matrix->rows, matrix->columns);
  if (entry.rank < 1 || entry.rank > full) {
    return invalid(where, ": rank must lie in [1, min(P, Q)] = [1, ", full, "], got ", entry.rank);
  }
  return {};
}

Status check_factors(const std::string& where, const Entry& entry, const Matrix& matrix) {
  std::uint64_t floats = 0;  // rows and columns are below 2^63, so that this sum fits
  std::uint64_t want = 0;
  if (!multiply(entry.rank, 1 + matrix.rows + matrix.columns, &floats) ||
      !multiply(floats, kFloatBytes, &want)) {
    return invalid(where, ": its factors take more than 2**64 bytes");
  }
  if (entry.payload_bytes != want) return wrong_payload(where, want, entry.payload_bytes);
  if (!all_finite(entry.payload, floats)) return invalid(where, ": factors must be finite");
  return {};
}

// The part before the codes: `rank` float32 scales, then `tables` arrays of `rank` bit counts.
Status check_scales(const std::string& where, const Entry& entry, std::uint64_t tables,
                    std::uint64_t* bytes) {
  if (!multiply(entry.rank, kFloatBytes + tables, bytes) || *bytes > entry.payload_bytes) {
    return invalid(where, ": payload of ", entry.payload_bytes,
                   " bytes is too short for the scales of rank ", entry.rank);
  }
  if (!all_finite(entry.payload, entry.rank)) return invalid(where, ": scale must be finite");
  return {};
}

Status check_packed_factors(const std::string& where, const Entry& entry, const Matrix& matrix) {
  std::uint64_t want = 0;
  if (Status status = check_scales(where, entry, 2, &want); !status.ok()) return status;
  const std::uint8_t* bits = entry.payload + kFloatBytes * entry.rank;
  Status status = add_codes(where, bits, entry.rank, 1, matrix.rows, entry.payload_bytes, &want);
  if (status.ok()) {
    status = add_codes(where, bits + entry.rank, entry.rank, 1, matrix.columns, entry.payload_bytes,
                       &want);
  }
  if (!status.ok()) return status;
  if (entry.payload_bytes != want) return wrong_payload(where, want, entry.payload_bytes);
  return {};
}

Status check_packed_dense(const std::string& where, const Entry& entry, std::uint64_t numel) {
  if (!kDTypes[entry.dtype].floating) {
    return invalid(where, ": packed rows need a floating dtype, got ", kDTypes[entry.dtype].name);
  }
  if (numel == 0 || entry.rank < 1 || numel % entry.rank != 0) {
    return invalid(where, ": the number of rows must divide the ", numel, " elements, got ",
                   entry.rank);
  }
  std::uint64_t want = 0;
  if (Status status = check_scales(where, entry, 1, &want); !status.ok()) return status;
  const Status status = add_codes(where, entry.payload + kFloatBytes * entry.rank, entry.rank, 0,
                                  numel / entry.rank, entry.payload_bytes, &want);
  if (!status.ok()) return status;
  if (entry.payload_bytes != want) return wrong_payload(where, want, entry.payload_bytes);
  return {};
}

// The modes whose payload stands for the tensor by itself.
Status check_payload(const std::string& where, const Entry& entry, std::uint64_t numel) {
  const auto mode = static_cast<Mode>(entry.mode);
  switch (mode) {
    case Mode::kZero:
    case Mode::kRaw:
      if (entry.rank != 0) return invalid(where, ": rank must be 0 here, got ", entry.rank);
      if (mode == Mode::kRaw) return check_raw(where, entry);
      if (entry.payload_bytes != 0) return wrong_payload(where, 0, entry.payload_bytes);
      return {};
    case Mode::kFactors:
    case Mode::kPackedFactors: {
      Matrix matrix;
      Status status = check_factor_shape(where, entry, numel, &matrix);
      if (!status.ok()) return status;
      return mode == Mode::kFactors ? check_factors(where, entry, matrix)
                                    : check_packed_factors(where, entry, matrix);
    }
    case Mode::kPackedDense:
      return check_packed_dense(where, entry, numel);
    case Mode::kAlias:
    case Mode::kRows:
      break;
  }
  return invalid(where, ": unknown mode ", std::uint64_t{entry.mode});
}

// `count` row ids below `height`, as the first of them and the gaps between neighbours.
Status check_row_ids(const std::string& where, Cursor ids, std::uint64_t count,
                     std::uint64_t height) {
  std::uint64_t next = 0;  // the least id that may follow
  for (std::uint64_t row = 0; row < count; ++row) {
    std::uint64_t gap = 0;
    if (!ids.take_varint(&gap)) {
      return invalid(where, ": id of row ", row, " of ", count, " is cut short or overlong");
    }
    if (gap >= height - next) {
      return invalid(where, ": row ids must be below P = ", height, ", row ", row, " of ", count,
                     " goes beyond it");
    }
    next += gap + 1;
  }
  if (ids.left() != 0) return invalid(where, ": ", ids.left(), " bytes follow the last row id");
  return {};
}

Status check_rows(const std::string& where, const Entry& entry, std::uint64_t numel) {
  if (entry.ndim < 2 || numel == 0) {
    return invalid(where, ": rows need at least 2 dimensions and an element");
  }
  const std::uint64_t height = entry.shape[0];
  if (entry.rank < 1 || entry.rank >= height) {
    return invalid(where, ": rows must lie in [1, P - 1] = [1, ", height - 1, "], got ",
                   entry.rank);
  }
  Cursor cursor(entry.payload, entry.payload_bytes);
  Entry rows = entry;
  rows.shape[0] = entry.rank;
  rows.dense_bytes = entry.dense_bytes / height * entry.rank;
  std::uint64_t id_bytes = 0;
  if (!cursor.take_byte(&rows.mode) || !cursor.take_varint(&rows.rank) ||
      !cursor.take_varint(&id_bytes) || id_bytes > cursor.left()) {
    return invalid(where, ": mode, rank or ids of its rows are cut short or overlong");
  }
  const std::uint8_t* ids = cursor.data();
  if (Status status = check_row_ids(where, Cursor(ids, id_bytes), entry.rank, height);
      !status.ok()) {
    return status;
  }
  const auto mode = static_cast<Mode>(rows.mode);
  if (mode == Mode::kZero || mode == Mode::kAlias || mode == Mode::kRows) {
    return invalid(where, ": rows must have a payload of their own, got mode ",
                   std::uint64_t{rows.mode});
  }
  rows.payload = ids + id_bytes;
  rows.payload_bytes = cursor.left() - id_bytes;
  return check_payload(where + ", its rows", rows, numel / height * entry.rank);
}

Status check_entry(std::vector<Entry>* entries, std::size_t index) {
  Entry& entry = (*entries)[index];
  if (Status status = check_name(entry, index); !status.ok()) return status;
  const std::string where = place(entry, index);
  if (entry.dtype >= kDTypes.size()) {
    return invalid(where, ": unknown dtype code ", std::uint64_t{entry.dtype});
  }
  std::uint64_t numel = 0;
  if (Status status = check_shape(where, &entry, &numel); !status.ok()) return status;
  switch (static_cast<Mode>(entry.mode)) {
    case Mode::kAlias:
      return check_alias(where, *entries, index);
    case Mode::kRows:
      return check_rows(where, entry, numel);
    default:
      return check_payload(where, entry, numel);
  }
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

}  // namespace

Status check_entries(std::vector<Entry>* entries, std::uint64_t max_bytes) {
  std::uint64_t total = 0;
  for (std::size_t index = 0; index < entries->size(); ++index) {
    if (Status status = check_entry(entries, index); !status.ok()) return status;
    const Entry& entry = (*entries)[index];
    if (!add(total, entry.dense_bytes, &total) || total > max_bytes) {
      return invalid("tensors must take at most max_bytes = ", max_bytes, " bytes, ",
                     place(entry, index), " goes beyond it with ", entry.dense_bytes);
    }
  }
  return check_unique(*entries);
}

}  // namespace fedkd_fast::wire
