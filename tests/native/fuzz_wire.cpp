// The libFuzzer target: `make fuzz`.
#include <cstddef>
#include <cstdint>

#include "wire_target.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fedkd_fast::wire::exercise(data, size);
  return 0;
}
