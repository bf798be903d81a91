#include "wire/coded.h"

#include <algorithm>
#include <cstring>

#include "common/levels.h"
#include "wire/cursor.h"

namespace fedkd_fast::wire {
namespace {

constexpr unsigned kMaxWidth = 6;
// Levels of direct rows fall in steps of a quarter of an octave.
constexpr int kCodeStep = 4;

// For appending to messages, whose numbers are unsigned otherwise.
std::string text(int value) { return std::to_string(value); }

bool take_i16(Cursor* cursor, std::int16_t* value) {
  std::uint8_t low = 0;
  std::uint8_t high = 0;
  if (!cursor->take_byte(&low) || !cursor->take_byte(&high)) return false;
  *value = static_cast<std::int16_t>(low | high << 8);
  return true;
}

Status check_scale(const std::string& where, int log2_scale) {
  if (log2_scale >= -kScaleLimit && log2_scale <= kScaleLimit) return {};
  return invalid(where, ": scales must lie in 2**[-126, 126], got 2**(", text(log2_scale), "/256)");
}

Status check_level(const std::string& where, int level) {
  if (level <= kMaxLevel) return {};
  return invalid(where, ": levels must be at most ", text(kMaxLevel), ", got ", text(level));
}

// top | gaps. The sum of the gaps is bounded by the least sigma, and each gap of zero takes a bit,
// so that a claimed rank costs no more than the bytes that are there.
Status read_sigmas(const std::string& where, Cursor* cursor, Coded* coded) {
  if (!take_i16(cursor, &coded->top)) return invalid(where, ": its sigmas are cut short");
  if (coded->top < -kSigmaLimit || coded->top > kSigmaLimit) {
    return invalid(where, ": top must lie in [-2016, 2016], got ", text(coded->top));
  }
  const int half_logs[] = {half_log2(coded->matrix.rows), half_log2(coded->matrix.columns)};
  for (const int half_log : half_logs) {  // sigmas fall, and levels with them
    const Status status = check_level(where, factor_level(coded->top, coded->step, half_log));
    if (!status.ok()) return status;
  }
  coded->gaps = cursor->data();
  int sigma = coded->top;
  std::uint64_t found = 0;
  while (found < coded->rank) {
    std::uint8_t bits = 0;
    if (!cursor->take_byte(&bits)) {
      return invalid(where, ": gap of sigma ", found, " of ", coded->rank, " is cut short");
    }
    for (unsigned bit = 0; bit < 8; ++bit) {
      const bool one = (bits >> bit & 1u) != 0;
      if (found == coded->rank) {
        if (one) return invalid(where, ": bits after the last gap must be zero");
        continue;
      }
      if (!one) {
        if (found == 0) return invalid(where, ": the first gap must be 0");
        if (--sigma < -kSigmaLimit) return invalid(where, ": sigmas must be at least -2016");
        continue;
      }
      const Status status = check_scale(where, left_scale_log2(sigma, coded->step));
      if (!status.ok()) return status;
      ++found;
    }
  }
  return {};
}

// base | width | row codes, of coded->rows rows.
Status read_rows(const std::string& where, Cursor* cursor, std::uint64_t numel, Coded* coded) {
  if (numel == 0 || coded->rows < 1 || numel % coded->rows != 0) {
    return invalid(where, ": the number of rows must divide the ", numel, " elements, got ",
                   coded->rows);
  }
  coded->row_entries = numel / coded->rows;
  if (Status status = check_scale(where, coded->step); !status.ok()) return status;
  if (!take_i16(cursor, &coded->base) || !cursor->take_byte(&coded->width)) {
    return invalid(where, ": levels of its rows are cut short");
  }
  if (Status status = check_level(where, coded->base); !status.ok()) return status;
  if (coded->base < kMinLevel) {
    return invalid(where, ": base must be at least ", text(kMinLevel), ", got ", text(coded->base));
  }
  if (coded->width > kMaxWidth) {
    return invalid(where, ": width of row codes must lie in [0, 6], got ",
                   std::uint64_t{coded->width});
  }
  std::uint64_t bits = 0;
  const bool fits = multiply(coded->rows, coded->width, &bits);
  const std::uint64_t bytes = bits / 8 + (bits % 8 != 0 ? 1 : 0);
  coded->codes = cursor->data();
  if (!fits || !cursor->skip_bytes(bytes)) {
    return invalid(where, ": codes of ", coded->rows, " rows are cut short");
  }
  if (bits % 8 != 0 && coded->codes[bytes - 1] >> bits % 8 != 0) {
    return invalid(where, ": bits after the last row code must be zero");
  }
  return {};
}

Status read_sections(const std::string& where, const Entry& entry, std::uint64_t numel,
                     Coded* coded) {
  const auto mode = static_cast<Mode>(entry.mode);
  *coded = Coded{};
  if (mode == Mode::kCodedDense) {
    if (!kDTypes[entry.dtype].floating) {
      return invalid(where, ": coded rows need a floating dtype, got ", kDTypes[entry.dtype].name);
    }
    coded->rows = entry.rank;
  } else {
    Status status = read_matrix(where, entry, numel, &coded->matrix);
    if (!status.ok()) return status;
    coded->rank = entry.rank;
  }
  Cursor cursor(entry.payload, entry.payload_bytes);
  if (!take_i16(&cursor, &coded->step)) return invalid(where, ": its step is cut short");
  if (mode != Mode::kCodedDense) {
    if (Status status = read_sigmas(where, &cursor, coded); !status.ok()) return status;
  }
  if (mode == Mode::kCodedHybrid && !cursor.take_varint(&coded->rows)) {
    return invalid(where, ": number of rows is cut short or overlong");
  }
  if (mode != Mode::kCodedFactors) {
    if (Status status = read_rows(where, &cursor, numel, coded); !status.ok()) return status;
  }
  coded->head_bytes = entry.payload_bytes - cursor.left();
  return {};
}

Status write_gaps(const std::int16_t* sigmas, std::size_t count, std::string* out) {
  std::uint64_t bit = 0;
  for (std::size_t k = 0; k < count; ++k) {
    const int gap = k == 0 ? 0 : sigmas[k - 1] - sigmas[k];
    if (gap < 0) return invalid("sigmas must not rise, got ", text(sigmas[k]), " at ", k);
    bit += static_cast<std::uint64_t>(gap);
    out->resize(bit / 8 + 1, '\0');
    (*out)[bit / 8] = static_cast<char>((*out)[bit / 8] | 1 << bit % 8);
    ++bit;
  }
  return {};
}

Status write_codes(const std::uint8_t* codes, std::size_t count, unsigned width, std::string* out) {
  if (width > kMaxWidth) {
    return invalid("width of row codes must lie in [0, 6], got ", std::uint64_t{width});
  }
  unsigned held = 0;
  unsigned bits = 0;
  for (std::size_t row = 0; row < count; ++row) {
    if (width == 0 ? codes[row] != 1 : codes[row] >> width != 0) {
      return invalid("row codes of ", std::uint64_t{width}, " bits cannot say ",
                     std::uint64_t{codes[row]}, " at ", row);
    }
    if (width == 0) continue;
    held |= static_cast<unsigned>(codes[row]) << bits;
    bits += width;
    if (bits >= 8) {
      out->push_back(static_cast<char>(held & 0xFF));
      held >>= 8;
      bits -= 8;
    }
  }
  if (bits > 0) out->push_back(static_cast<char>(held));
  return {};
}

}  // namespace

Status read_matrix(const std::string& where, const Entry& entry, std::uint64_t numel,
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

Status read_coded(const std::string& where, const Entry& entry, std::uint64_t numel,
                  Coded* coded) noexcept {
  return guarded([&] { return read_sections(where, entry, numel, coded); });
}

void unpack_sigmas(const Coded& coded, std::int16_t* out) {
  int sigma = coded.top;
  std::uint64_t found = 0;
  for (std::uint64_t bit = 0; found < coded.rank; ++bit) {
    if ((coded.gaps[bit / 8] >> bit % 8 & 1) != 0) {
      out[found++] = static_cast<std::int16_t>(sigma);
    } else {
      --sigma;
    }
  }
}

void unpack_codes(const Coded& coded, std::uint8_t* out) {
  if (coded.width == 0) {
    std::fill(out, out + coded.rows, std::uint8_t{1});
    return;
  }
  unsigned held = 0;
  unsigned bits = 0;
  const std::uint8_t* next = coded.codes;
  for (std::uint64_t row = 0; row < coded.rows; ++row) {
    if (bits < coded.width) {
      held |= static_cast<unsigned>(*next++) << bits;
      bits += 8;
    }
    out[row] = static_cast<std::uint8_t>(held & ((1u << coded.width) - 1));
    held >>= coded.width;
    bits -= coded.width;
  }
}

void unpack_levels(const Coded& coded, const std::int16_t* sigmas, const std::uint8_t* codes,
                   std::int16_t* out) {
  for (const std::uint64_t entries : {coded.matrix.rows, coded.matrix.columns}) {
    if (coded.rank == 0) break;
    const int half_log = half_log2(entries);
    for (std::uint64_t k = 0; k < coded.rank; ++k) {
      *out++ = static_cast<std::int16_t>(factor_level(sigmas[k], coded.step, half_log));
    }
  }
  for (std::uint64_t row = 0; row < coded.rows; ++row) {
    const int level = coded.base - kCodeStep * (codes[row] - 1);
    *out++ = codes[row] == 0 ? kZeroRow : static_cast<std::int16_t>(level);
  }
}

Status pack_gaps(const std::int16_t* sigmas, std::size_t count, std::string* out) noexcept {
  return guarded([=] { return write_gaps(sigmas, count, out); });
}

Status pack_codes(const std::uint8_t* codes, std::size_t count, unsigned width,
                  std::string* out) noexcept {
  return guarded([=] { return write_codes(codes, count, width, out); });
}

}  // namespace fedkd_fast::wire
