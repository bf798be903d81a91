// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of the wire frames.
//
// It finds damage, not attackers: every single bit flip and every burst of up to 32 bits changes
// it, but anybody can compute a matching one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedkd_fast::wire {

// Returns the CRC-32C of `size` bytes at `data`, which may have any alignment. `crc` is the
// checksum of the bytes before them (0: none), so that crc32c(b, crc32c(a)) == crc32c(a followed by
// b). Uses the crc32 instruction where the machine has SSE 4.2 and tables elsewhere; the value is
// the same.
std::uint32_t crc32c(const std::uint8_t* data, std::size_t size, std::uint32_t crc = 0) noexcept;

// The same by tables alone; the tests hold the two against each other.
std::uint32_t crc32c_portable(const std::uint8_t* data, std::size_t size,
                              std::uint32_t crc = 0) noexcept;

}  // namespace fedkd_fast::wire
