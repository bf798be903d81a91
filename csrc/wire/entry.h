// One tensor of a frame, and the rules that it must obey, the same for encoder and decoder. Every
// byte is specified in docs/wire-format.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace fedkd_fast::wire {

inline constexpr std::size_t kMaxDims = 16;
inline constexpr std::size_t kMaxNameBytes = 1024;
inline constexpr std::size_t kMaxEntries = 65536;
inline constexpr std::uint64_t kMaxSize = std::numeric_limits<std::int64_t>::max();

enum class Mode : std::uint8_t {
  kZero = 0,
  kRaw = 1,
  kAlias = 2,
  kFactors = 3,
  kPackedFactors = 4,
  kPackedDense = 5,
  kRows = 6,
  kCodedFactors = 7,
  kCodedDense = 8,
  kCodedHybrid = 9,
  kHalf = 10,
};
inline constexpr std::uint8_t kModes = 11;

struct DType {
  std::string_view name;
  std::uint8_t itemsize;
  bool floating;
};

// Position = the code on the wire; the order is part of the format.
inline constexpr std::array<DType, 10> kDTypes = {{{"float32", 4, true},
                                                   {"float64", 8, true},
                                                   {"float16", 2, true},
                                                   {"bfloat16", 2, true},
                                                   {"int8", 1, false},
                                                   {"int16", 2, false},
                                                   {"int32", 4, false},
                                                   {"int64", 8, false},
                                                   {"uint8", 1, false},
                                                   {"bool", 1, false}}};
inline constexpr std::uint8_t kBool = 9;

// The outcome of a call; no exception leaves the codec.
struct Status {
  enum class Code : std::uint8_t { kOk, kInvalid, kNoMemory };
  Code code = Code::kOk;
  std::string message;  // one line for a person; empty when ok

  bool ok() const noexcept { return code == Code::kOk; }
};

inline void append(std::string& text, std::string_view part) { text.append(part); }
inline void append(std::string& text, std::uint64_t part) { text.append(std::to_string(part)); }

// A refusal whose message is the parts (texts and unsigned integers) in a row.
template <typename... Parts>
Status invalid(const Parts&... parts) {
  Status status{Status::Code::kInvalid, {}};
  (append(status.message, parts), ...);
  return status;
}

// Turns what the standard library throws into a status; its only cause here is memory.
template <typename Call>
Status guarded(const Call& call) noexcept {
  try {
    return call();
  } catch (const std::exception&) {
    return Status{Status::Code::kNoMemory, "out of memory"};  // short enough to need no allocation
  }
}

// `product` = a * b and `sum` = a + b; false, and no result, where it does not fit 64 bits.
inline bool multiply(std::uint64_t a, std::uint64_t b, std::uint64_t* product) noexcept {
  if (b != 0 && a > std::numeric_limits<std::uint64_t>::max() / b) return false;
  *product = a * b;
  return true;
}
inline bool add(std::uint64_t a, std::uint64_t b, std::uint64_t* sum) noexcept {
  if (a > std::numeric_limits<std::uint64_t>::max() - b) return false;
  *sum = a + b;
  return true;
}

struct Entry {
  std::string name;        // utf-8
  std::uint8_t dtype = 0;  // index into kDTypes
  std::uint8_t mode = 0;   // a Mode, once checked
  std::uint8_t ndim = 0;   // how many elements of `shape` count
  std::array<std::uint64_t, kMaxDims> shape{};
  std::uint64_t rank = 0;
  const std::uint8_t* payload = nullptr;  // borrowed from the caller
  std::uint64_t payload_bytes = 0;
  std::uint64_t dense_bytes = 0;  // numel * itemsize; filled by check_directory
  bool coded = false;             // has an entropy-coded stream; filled by check_payload
};

// How messages name an entry: `entry 3 ("encoder.weight")`.
std::string place(const Entry& entry, std::size_t index);

// Checks all that can be known without the payloads: names, also that they are unique, dtypes,
// shapes, modes, aliases, and that the dense bytes of all entries together are at most `max_bytes`;
// fills `dense_bytes`. Allocates one index a name. Never throws.
Status check_directory(std::vector<Entry>* entries, std::uint64_t max_bytes) noexcept;

// Checks rank and payload of an entry that obeys check_directory; fills `coded`. Never
// throws.
Status check_payload(Entry* entry, std::size_t index) noexcept;

}  // namespace fedkd_fast::wire
