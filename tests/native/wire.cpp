// The wire codec under sanitizers: frames from files come back byte for byte, and mutations of them
// are refused or decoded, never read out of bounds. `wire_address SEED COUNT FILE...` runs COUNT
// mutations; the same input goes through `make fuzz`.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <random>

#include "wire_target.h"

namespace {

using fedkd_fast::wire::Bytes;

class Mutator {
 public:
  explicit Mutator(unsigned seed) : generator_(seed) {}

  Bytes operator()(const std::vector<Bytes>& seeds) {
    static constexpr std::uint8_t kTelling[] = {0, 1, 2, 7, 9, 0x10, 0x7f, 0x80, 0xff};
    Bytes frame = seeds[below(seeds.size())];
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
          frame.insert(frame.begin() + static_cast<std::ptrdiff_t>(at), kTelling[below(9)]);
          break;
        case 4:
          frame.erase(frame.begin() + static_cast<std::ptrdiff_t>(at));
          break;
        default: {  // a number of the header
          const std::size_t number = 8 + below(48);
          if (number < frame.size()) frame[number] = static_cast<std::uint8_t>(below(256));
        }
      }
    }
    const bool mended = below(8) != 0;
    frame.insert(frame.begin(), static_cast<std::uint8_t>(mended + 2 * below(2)));
    return frame;
  }

 private:
  std::size_t below(std::size_t limit) { return generator_() % limit; }
  std::mt19937_64 generator_;
};

// Decoded as it is, or with the known schema, since some golden frames carry none.
bool comes_back(const Bytes& frame) {
  for (const std::uint8_t control : {std::uint8_t{0}, fedkd_fast::wire::kWithSchema}) {
    Bytes input = frame;
    input.insert(input.begin(), control);
    if (fedkd_fast::wire::exercise(input.data(), input.size())) return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::printf("usage: wire_address SEED COUNT FILE...\n");
    return 2;
  }
  std::vector<Bytes> seeds;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    if (!comes_back(seeds.back())) {
      std::printf("%s does not come back\n", argv[i]);
      return 1;
    }
  }
  Mutator mutate(static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)));
  const unsigned long count = std::strtoul(argv[2], nullptr, 10);
  unsigned long accepted = 0;
  for (unsigned long i = 0; i < count; ++i) {
    const Bytes input = mutate(seeds);
    accepted += fedkd_fast::wire::exercise(input.data(), input.size()) ? 1 : 0;
  }
  std::printf("%lu mutations, %lu accepted\n", count, accepted);
  return 0;
}
