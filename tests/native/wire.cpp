// The wire codec under sanitizers: sound frames come back byte for byte, and mutated ones, with
// checksums mended so that the checks behind them are reached, are refused or decoded, never read
// out of bounds. `wire_address SEED COUNT` runs COUNT mutations.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "wire/crc32c.h"
#include "wire/frame.h"

namespace {

using namespace fedkd_fast::wire;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kHeader = 64, kBodyCrc = 56, kHeaderCrc = 60;
constexpr std::uint64_t kMaxBytes = 1 << 20;

// Payloads have to outlive the entries that borrow them.
struct Tensor {
  std::string name;
  std::uint8_t dtype;
  Mode mode;
  std::vector<std::uint64_t> shape;
  std::uint64_t rank;
  Bytes payload;
};

Bytes floats(std::size_t count, float value) {
  Bytes bytes(count * sizeof(float));
  for (std::size_t i = 0; i < count; ++i)
    std::memcpy(bytes.data() + i * sizeof(float), &value, sizeof(float));
  return bytes;
}

Bytes operator+(Bytes left, const Bytes& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

Bytes encode(const std::vector<Tensor>& tensors) {
  Frame frame;
  for (const Tensor& tensor : tensors) {
    Entry entry;
    entry.name = tensor.name;
    entry.dtype = tensor.dtype;
    entry.mode = static_cast<std::uint8_t>(tensor.mode);
    entry.ndim = static_cast<std::uint8_t>(tensor.shape.size());
    std::copy(tensor.shape.begin(), tensor.shape.end(), entry.shape.begin());
    entry.rank = tensor.rank;
    entry.payload = tensor.payload.data();
    entry.payload_bytes = tensor.payload.size();
    frame.entries.push_back(entry);
  }
  frame.has_digest = true;
  frame.digest.fill(7);
  std::string head;
  std::uint64_t size = 0;
  const Status status = plan_encode(&frame, &head, &size);
  if (!status.ok()) {
    std::printf("the sample frame was refused: %s\n", status.message.c_str());
    std::exit(1);
  }
  Bytes bytes(size);
  write_frame(frame, head, bytes.data());
  return bytes;
}

Bytes encode_again(const Frame& decoded) {
  Frame frame = decoded;
  std::string head;
  std::uint64_t size = 0;
  if (!plan_encode(&frame, &head, &size).ok()) return {};
  Bytes bytes(size);
  write_frame(frame, head, bytes.data());
  return bytes;
}

Bytes sample() {
  const Bytes widths{1, 3};
  return encode({
      {"encoder.bias", 0, Mode::kRaw, {6}, 0, floats(6, 1.5f)},
      {"encoder.weight", 0, Mode::kFactors, {6, 4}, 2, floats(2 + 2 * 6 + 2 * 4, 0.5f)},
      {"encoder.zero", 3, Mode::kZero, {40, 40}, 0, {}},
      {"head.flags", kBool, Mode::kRaw, {3}, 0, {1, 0, 1}},
      // ceil(16·1/8) + ceil(16·3/8) bytes on the left, ceil(8·1/8) + ceil(8·3/8) on the right.
      {"head.packed",
       0,
       Mode::kPackedFactors,
       {16, 8},
       2,
       floats(2, 0.1f) + widths + widths + Bytes(2 + 6 + 1 + 3, 0x5a)},
      {"head.rows",
       2,
       Mode::kPackedDense,
       {2, 8},
       2,
       floats(2, 0.1f) + widths + Bytes(1 + 3, 0xa5)},
      {"head.tied", 0, Mode::kAlias, {6, 4}, 1, {}},
      // Rows 130 and 132 of 140: mode, rank, bytes of the ids, ids.
      {"table.factors",
       0,
       Mode::kRows,
       {140, 3},
       2,
       Bytes{3, 1, 3, 0x82, 0x01, 1} + floats(1 + 2 + 3, 0.5f)},
      {"table.flags", kBool, Mode::kRows, {9, 2}, 1, {1, 0, 1, 4, 1, 0}},
      {"table.packed",
       0,
       Mode::kRows,
       {9, 8},
       2,
       Bytes{4, 1, 2, 1, 2} + floats(1, 0.1f) + Bytes{3, 1, 0x5a, 0x5a}},
      {"table.rows",
       0,
       Mode::kRows,
       {9, 8},
       2,
       Bytes{5, 2, 2, 1, 2} + floats(2, 0.1f) + Bytes{0, 3, 0x5a, 0x5a, 0x5a}},
  });
}

void store32(Bytes* frame, std::size_t at, std::uint32_t value) {
  for (int shift = 0; shift < 32; shift += 8)
    (*frame)[at++] = static_cast<std::uint8_t>(value >> shift);
}

void mend_checksums(Bytes* frame) {
  if (frame->size() < kHeader) return;
  store32(frame, kBodyCrc, crc32c(frame->data() + kHeader, frame->size() - kHeader));
  store32(frame, kHeaderCrc, crc32c(frame->data(), kHeaderCrc));
}

class Mutator {
 public:
  explicit Mutator(unsigned seed) : generator_(seed) {}

  Bytes operator()(Bytes frame) {
    static constexpr std::uint8_t kTelling[] = {0, 1, 2, 0x10, 0x7f, 0x80, 0xff};
    for (std::size_t left = 1 + below(4); left > 0 && !frame.empty(); --left) {
      const std::size_t at = below(frame.size());
      switch (below(6)) {
        case 0:
          frame[at] ^= static_cast<std::uint8_t>(1u << below(8));
          break;
        case 1:
          frame[at] = kTelling[below(sizeof(kTelling))];
          break;
        case 2:
          frame.resize(at);
          break;
        case 3:
          frame.insert(frame.begin() + static_cast<std::ptrdiff_t>(at), kTelling[below(7)]);
          break;
        case 4:
          frame.erase(frame.begin() + static_cast<std::ptrdiff_t>(at));
          break;
        default: {  // a number of the header
          const std::size_t number = 8 + below(24);
          if (number < frame.size()) frame[number] = static_cast<std::uint8_t>(below(256));
        }
      }
    }
    if (below(8) != 0) {
      // A length that agrees lets the checks behind it be reached.
      if (frame.size() >= kHeader && below(2) != 0) {
        std::uint64_t size = frame.size();
        for (std::size_t i = 8; i < 16; ++i, size >>= 8) frame[i] = static_cast<std::uint8_t>(size);
      }
      mend_checksums(&frame);
    }
    return frame;
  }

 private:
  std::size_t below(std::size_t limit) { return generator_() % limit; }
  std::mt19937_64 generator_;
};

// Every byte of a payload is read: AddressSanitizer sees one that points out of the frame.
std::uint64_t touch(const Frame& frame) {
  std::uint64_t sum = 0;
  for (const Entry& entry : frame.entries)
    for (std::uint64_t i = 0; i < entry.payload_bytes; ++i) sum += entry.payload[i];
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::printf("usage: wire_address SEED COUNT\n");
    return 2;
  }
  Mutator mutate(static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)));
  const unsigned long count = std::strtoul(argv[2], nullptr, 10);
  const Bytes sound = sample();
  Frame frame;
  if (!decode(sound.data(), sound.size(), kMaxBytes, &frame).ok() || encode_again(frame) != sound) {
    std::printf("the sample frame does not come back\n");
    return 1;
  }
  unsigned long accepted = 0;
  std::uint64_t sum = 0;
  for (unsigned long i = 0; i < count; ++i) {
    // Exactly as large as it is: the red zone begins behind the last byte.
    const Bytes bytes = mutate(sound);
    const Bytes exact(bytes.begin(), bytes.end());
    Frame decoded;
    const Status status = decode(exact.data(), exact.size(), kMaxBytes, &decoded);
    if (!status.ok()) {
      if (status.message.empty()) std::abort();
      continue;
    }
    ++accepted;
    sum += touch(decoded);
    if (encode_again(decoded) != exact) {
      std::printf("a frame was accepted that has another encoding\n");
      return 1;
    }
  }
  std::printf("%lu mutations, %lu accepted, checksum %llu\n", count, accepted,
              static_cast<unsigned long long>(sum));
  return 0;
}
