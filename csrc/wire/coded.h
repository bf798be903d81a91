// Entropy-coded payloads, modes 7 to 9: what stands before the stream.
//
// The stream itself is the business of its own decoder, which takes any bytes.
#pragma once

#include <cstdint>
#include <string>

#include "wire/entry.h"

namespace fedkd_fast::wire {

// What levels() gives for a row of zeros, far below every real one.
inline constexpr std::int16_t kZeroRow = INT16_MIN;

struct Matrix {
  std::uint64_t rows = 0;
  std::uint64_t columns = 0;
};

// The sections of a payload of mode 7, 8 or 9; pointers are into it. A mode that lacks a section
// leaves its fields at zero.
struct Coded {
  Matrix matrix;
  std::uint64_t rank = 0;  // of the factors
  std::int16_t step = 0;
  std::int16_t top = 0;
  const std::uint8_t* gaps = nullptr;
  std::uint64_t rows = 0;  // coded directly, of `row_entries` each
  std::uint64_t row_entries = 0;
  std::int16_t base = 0;
  std::uint8_t width = 0;
  const std::uint8_t* codes = nullptr;
  std::uint64_t head_bytes = 0;  // where the stream begins
};

// P and Q of an entry that holds factors, whose rank must suit them.
Status read_matrix(const std::string& where, const Entry& entry, std::uint64_t numel,
                   Matrix* matrix);

// Checks and splits a payload. Allocates nothing but a message; the work is linear in the payload.
// Never throws.
Status read_coded(const std::string& where, const Entry& entry, std::uint64_t numel,
                  Coded* coded) noexcept;

// The logarithms of the singular values, largest first; `out` holds `rank`.
void unpack_sigmas(const Coded& coded, std::int16_t* out);

// The code of each direct row, 1 for all of them where the width is 0; `out` holds `rows`.
void unpack_codes(const Coded& coded, std::uint8_t* out);

// The level of each row of the stream in its order: left, right, direct; kZeroRow for rows of
// zeros. `sigmas` and `codes` are as unpacked; `out` holds 2 * rank + rows.
void unpack_levels(const Coded& coded, const std::int16_t* sigmas, const std::uint8_t* codes,
                   std::int16_t* out);

// The inverses, for encoders. Falling sigmas give gaps; codes below 2^width give their bit stream.
// Never throw.
Status pack_gaps(const std::int16_t* sigmas, std::size_t count, std::string* out) noexcept;
Status pack_codes(const std::uint8_t* codes, std::size_t count, unsigned width,
                  std::string* out) noexcept;

}  // namespace fedkd_fast::wire
