// CRC-32C in two ways: by tables, eight bytes a step ("slicing by 8", Kounavis and Berry 2005), and
// by the crc32 instruction of SSE 4.2 in three interleaved streams.
//
// The instruction takes 3 cycles but one can start every cycle, so one stream would run at a third
// of the speed. Three neighbouring blocks of n bytes are therefore summed at once, and joined by
// crc(A|B|C) = shift(shift(crc(A)) ^ crc(B)) ^ crc(C), where shift() is the linear map "append n
// zero bytes", kept as four tables of 256 words. All tables are computed by the compiler.
#include "wire/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire codec reads little-endian words in place and needs a little-endian machine"
#endif

namespace fedkd_fast::wire {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78u;

using Table = std::array<std::uint32_t, 256>;

constexpr std::array<Table, 8> make_slicing_tables() {
  std::array<Table, 8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? kPolynomial : 0u);
    tables[0][byte] = crc;
  }
  for (std::size_t slice = 1; slice < 8; ++slice) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t crc = tables[slice - 1][byte];
      tables[slice][byte] = (crc >> 8) ^ tables[0][crc & 0xFFu];
    }
  }
  return tables;
}

constexpr std::array<Table, 8> kSlicing = make_slicing_tables();

inline std::uint64_t load_word(const std::uint8_t* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

#if defined(__x86_64__)

// A linear map on 32-bit registers over GF(2): element i is the image of bit i.
using Matrix = std::array<std::uint32_t, 32>;

constexpr std::uint32_t apply(const Matrix& matrix, std::uint32_t vector) {
  std::uint32_t image = 0;
  for (std::size_t bit = 0; vector != 0; ++bit, vector >>= 1) {
    if ((vector & 1u) != 0) image ^= matrix[bit];
  }
  return image;
}

// The map "append 2^log2_bytes zero bytes", as tables by byte of the register.
constexpr std::array<Table, 4> make_shift_tables(int log2_bytes) {
  Matrix matrix{};  // first: one zero byte
  for (std::size_t bit = 0; bit < 32; ++bit) {
    const std::uint32_t crc = std::uint32_t{1} << bit;
    matrix[bit] = (crc >> 8) ^ kSlicing[0][crc & 0xFFu];
  }
  for (int doubling = 0; doubling < log2_bytes; ++doubling) {
    Matrix square{};
    for (std::size_t bit = 0; bit < 32; ++bit) square[bit] = apply(matrix, matrix[bit]);
    matrix = square;
  }
  std::array<Table, 4> tables{};
  for (std::size_t position = 0; position < 4; ++position) {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      tables[position][byte] = apply(matrix, byte << (8 * position));
    }
  }
  return tables;
}

// Long blocks make the joins cheap; short ones keep three streams busy in small frames.
constexpr int kLongLog2 = 12;
constexpr int kShortLog2 = 8;
constexpr std::array<Table, 4> kLongShift = make_shift_tables(kLongLog2);
constexpr std::array<Table, 4> kShortShift = make_shift_tables(kShortLog2);

inline std::uint32_t shift(const std::array<Table, 4>& tables, std::uint32_t crc) {
  return tables[0][crc & 0xFFu] ^ tables[1][(crc >> 8) & 0xFFu] ^ tables[2][(crc >> 16) & 0xFFu] ^
         tables[3][crc >> 24];
}

// Three blocks of `block` bytes each; returns the register after them.
__attribute__((target("sse4.2"))) inline std::uint32_t three_blocks(
    const std::uint8_t* data, std::size_t block, const std::array<Table, 4>& tables,
    std::uint32_t state) {
  std::uint64_t first = state;
  std::uint64_t second = 0;
  std::uint64_t third = 0;
  for (std::size_t at = 0; at < block; at += 8) {
    first = _mm_crc32_u64(first, load_word(data + at));
    second = _mm_crc32_u64(second, load_word(data + block + at));
    third = _mm_crc32_u64(third, load_word(data + 2 * block + at));
  }
  const std::uint32_t joined =
      shift(tables, static_cast<std::uint32_t>(first)) ^ static_cast<std::uint32_t>(second);
  return shift(tables, joined) ^ static_cast<std::uint32_t>(third);
}

__attribute__((target("sse4.2"))) std::uint32_t crc32c_sse42(const std::uint8_t* data,
                                                             std::size_t size, std::uint32_t crc) {
  constexpr std::size_t kLong = std::size_t{1} << kLongLog2;
  constexpr std::size_t kShort = std::size_t{1} << kShortLog2;
  std::uint32_t state = ~crc;
  for (; size >= 3 * kLong; data += 3 * kLong, size -= 3 * kLong) {
    state = three_blocks(data, kLong, kLongShift, state);
  }
  for (; size >= 3 * kShort; data += 3 * kShort, size -= 3 * kShort) {
    state = three_blocks(data, kShort, kShortShift, state);
  }
  for (; size >= 8; data += 8, size -= 8) {
    state = static_cast<std::uint32_t>(_mm_crc32_u64(state, load_word(data)));
  }
  for (; size > 0; ++data, --size) state = _mm_crc32_u8(state, *data);
  return ~state;
}

#endif  // defined(__x86_64__)

}  // namespace

std::uint32_t crc32c_portable(const std::uint8_t* data, std::size_t size,
                              std::uint32_t crc) noexcept {
  std::uint32_t state = ~crc;
  for (; size >= 8; data += 8, size -= 8) {
    const std::uint64_t word = load_word(data) ^ state;
    state = kSlicing[7][word & 0xFFu] ^ kSlicing[6][(word >> 8) & 0xFFu] ^
            kSlicing[5][(word >> 16) & 0xFFu] ^ kSlicing[4][(word >> 24) & 0xFFu] ^
            kSlicing[3][(word >> 32) & 0xFFu] ^ kSlicing[2][(word >> 40) & 0xFFu] ^
            kSlicing[1][(word >> 48) & 0xFFu] ^ kSlicing[0][word >> 56];
  }
  for (; size > 0; ++data, --size) state = (state >> 8) ^ kSlicing[0][(state ^ *data) & 0xFFu];
  return ~state;
}

std::uint32_t crc32c(const std::uint8_t* data, std::size_t size, std::uint32_t crc) noexcept {
#if defined(__x86_64__)
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2") != 0;
  if (has_sse42) return crc32c_sse42(data, size, crc);
#endif
  return crc32c_portable(data, size, crc);
}

}  // namespace fedkd_fast::wire
