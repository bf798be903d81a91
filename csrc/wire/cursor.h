// Reads bytes that may come from a stranger, front to back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fedkd_fast::wire {

// Takes fields off the front of some bytes; false where they are not there or not canonical.
class Cursor {
 public:
  Cursor(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

  const std::uint8_t* data() const { return data_; }
  std::size_t left() const { return left_; }

  bool take_byte(std::uint8_t* value) {
    if (left_ == 0) return false;
    *value = *data_;
    skip(1);
    return true;
  }

  bool take_varint(std::uint64_t* value) {
    std::uint64_t result = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      std::uint8_t byte = 0;
      if (!take_byte(&byte)) return false;
      if (shift == 63 && byte > 1) return false;  // does not fit 64 bits
      if (shift > 0 && byte == 0) return false;   // a shorter form exists
      result |= std::uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) {
        *value = result;
        return true;
      }
    }
    return false;
  }

  bool take_text(std::size_t size, std::string* text) {
    const auto* bytes = reinterpret_cast<const char*>(data_);
    if (!skip_bytes(size)) return false;
    text->append(bytes, size);
    return true;
  }

  bool skip_bytes(std::uint64_t size) {
    if (size > left_) return false;
    skip(static_cast<std::size_t>(size));
    return true;
  }

 private:
  void skip(std::size_t size) {
    data_ += size;
    left_ -= size;
  }

  const std::uint8_t* data_;
  std::size_t left_;
};

}  // namespace fedkd_fast::wire
