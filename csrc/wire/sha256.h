// SHA-256 (FIPS 180-4), which names the schema of a frame.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fedkd_fast::wire {

std::array<std::uint8_t, 32> sha256(const std::uint8_t* data, std::size_t size) noexcept;

}  // namespace fedkd_fast::wire
