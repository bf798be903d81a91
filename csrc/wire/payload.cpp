// The rules of payloads, mode by mode.
//
// Everything here may come from a stranger. A length is compared before it is used as one, and
// products are formed by multiply(), so that no claimed size wraps into a small one.
#include <algorithm>
#include <cstring>

#include "wire/coded.h"
#include "wire/cursor.h"
#include "wire/entry.h"

namespace fedkd_fast::wire {
namespace {

constexpr std::uint64_t kFloatBytes = 4;
constexpr std::uint64_t kHalfBytes = 2;
constexpr int kMaxExponent = 126;
constexpr std::uint8_t kMaxBits = 16;

bool is_coded(Mode mode) {
  return mode == Mode::kCodedFactors || mode == Mode::kCodedDense || mode == Mode::kCodedHybrid;
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

// Like all_finite(), of float16 values.
bool all_finite_halves(const std::uint8_t* data, std::uint64_t count) {
  constexpr std::uint16_t kExponent = 0x7C00u;
  std::uint16_t special = 0;
  for (std::uint64_t at = 0; at < count; ++at) {
    std::uint16_t word = 0;
    std::memcpy(&word, data + kHalfBytes * at, sizeof(word));
    special |= static_cast<std::uint16_t>((word & kExponent) == kExponent);
  }
  return special == 0;
}

// Adds the bytes of rows of `length` codes, row k at bits[k] bits, to `total`, which is where the
// first of them begins. A sum above the real payload is wrong whatever follows, so it ends there.
Status add_codes(const std::string& where, const Entry& entry, const std::uint8_t* bits,
                 std::uint8_t least, std::uint64_t length, std::uint64_t* total) {
  for (std::uint64_t row = 0; row < entry.rank; ++row) {
    if (bits[row] < least || bits[row] > kMaxBits) {
      return invalid(where, ": bits must lie in [", std::uint64_t{least}, ", 16], got ",
                     std::uint64_t{bits[row]});
    }
    std::uint64_t row_bits = 0;
    const bool fits = multiply(length, bits[row], &row_bits);
    const std::uint64_t used = row_bits % 8;  // bits of the row's last byte; 0 stands for all
    const std::uint64_t row_bytes = row_bits / 8 + (used != 0 ? 1 : 0);
    if (!fits || !add(*total, row_bytes, total) || *total > entry.payload_bytes) {
      return invalid(where, ": its codes take more than the ", entry.payload_bytes,
                     " bytes of its payload");
    }
    if (used != 0 && entry.payload[*total - 1] >> used != 0) {
      return invalid(where, ": bits after the last code of a row must be zero");
    }
  }
  return {};
}

Status wrong_payload(const std::string& where, std::uint64_t want, std::uint64_t got) {
  return invalid(where, ": payload must take ", want, " bytes, got ", got);
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
  Status status = add_codes(where, entry, bits, 1, matrix.rows, &want);
  if (status.ok()) {
    status = add_codes(where, entry, bits + entry.rank, 1, matrix.columns, &want);
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
  const std::uint8_t* bits = entry.payload + kFloatBytes * entry.rank;
  const Status status = add_codes(where, entry, bits, 0, numel / entry.rank, &want);
  if (!status.ok()) return status;
  if (entry.payload_bytes != want) return wrong_payload(where, want, entry.payload_bytes);
  return {};
}

Status check_half(const std::string& where, const Entry& entry, std::uint64_t numel) {
  if (entry.rank != 0) return invalid(where, ": rank must be 0 here, got ", entry.rank);
  if (!kDTypes[entry.dtype].floating) {
    return invalid(where, ": halves need a floating dtype, got ", kDTypes[entry.dtype].name);
  }
  const std::uint64_t want = kHalfBytes * (1 + numel);  // numel is below 2^62: two bytes or more
  if (entry.payload_bytes != want) return wrong_payload(where, want, entry.payload_bytes);
  std::int16_t exponent = 0;
  std::memcpy(&exponent, entry.payload, sizeof(exponent));
  if (exponent < -kMaxExponent || exponent > kMaxExponent) {
    return invalid(where, ": exponent must lie in [-126, 126], got ", std::to_string(exponent));
  }
  if (!all_finite_halves(entry.payload + kHalfBytes, numel)) {
    return invalid(where, ": halves must be finite");
  }
  return {};
}

// The modes whose payload stands for the tensor by itself.
Status check_mode(const std::string& where, const Entry& entry, std::uint64_t numel) {
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
      Status status = read_matrix(where, entry, numel, &matrix);
      if (!status.ok()) return status;
      return mode == Mode::kFactors ? check_factors(where, entry, matrix)
                                    : check_packed_factors(where, entry, matrix);
    }
    case Mode::kPackedDense:
      return check_packed_dense(where, entry, numel);
    case Mode::kCodedFactors:
    case Mode::kCodedDense:
    case Mode::kCodedHybrid: {
      Coded coded;
      return read_coded(where, entry, numel, &coded);
    }
    case Mode::kHalf:
      return check_half(where, entry, numel);
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

Status check_rows(const std::string& where, const Entry& entry, std::uint64_t numel, bool* coded) {
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
  *coded = is_coded(mode);
  return check_mode(where + ", its rows", rows, numel / height * entry.rank);
}

Status check_any(Entry* entry, std::size_t index) {
  const std::string where = place(*entry, index);
  const std::uint64_t numel = entry->dense_bytes / kDTypes[entry->dtype].itemsize;
  const auto mode = static_cast<Mode>(entry->mode);
  if (mode == Mode::kAlias) {
    if (entry->payload_bytes != 0) return wrong_payload(where, 0, entry->payload_bytes);
    return {};
  }
  if (mode == Mode::kRows) return check_rows(where, *entry, numel, &entry->coded);
  entry->coded = is_coded(mode);
  return check_mode(where, *entry, numel);
}

}  // namespace

Status check_payload(Entry* entry, std::size_t index) noexcept {
  return guarded([=] { return check_any(entry, index); });
}

}  // namespace fedkd_fast::wire
