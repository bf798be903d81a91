// rANS coding under sanitizers: the paths of the CPU make the same bytes and take them back, and of
// mutated chunks they say the same, reading and writing nothing out of bounds. `rans_address
// SEED COUNT` runs COUNT mutations of each message.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cpu/rans_parts.h"
#include "rans_message.h"

namespace {

using namespace rans_message;
using cpu::Instructions;

constexpr Instructions kVectors[] = {Instructions::kAvx2, Instructions::kAvx512};

[[noreturn]] void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

// Exactly as large as they are: the red zone begins behind the last byte, or value.
struct Decoded {
  RansFault fault;
  std::vector<std::vector<float>> values;
};

Decoded decode(const RansLayout::Chunk& chunk, const std::vector<RansSource>& pieces,
               const std::vector<Bytes>& low, const Bytes& code, Instructions most) {
  Decoded found;
  std::vector<RansTarget> targets;
  for (int64_t p = chunk.begin; p < chunk.end; ++p) {
    const RansSource& piece = pieces[static_cast<size_t>(p)];
    found.values.emplace_back(static_cast<size_t>(piece.count));
    targets.push_back({nullptr, low[static_cast<size_t>(p)].data(), piece.count, piece.level,
                       1.0f / piece.multiplier});
  }
  for (size_t i = 0; i < targets.size(); ++i) targets[i].values = found.values[i].data();
  found.fault =
      cpu::rans_decode_chunk(code.data(), static_cast<int64_t>(code.size()), targets.data(),
                             static_cast<int64_t>(targets.size()), rans_lanes(chunk.symbols), most);
  return found;
}

void mutate(Bytes* code, std::mt19937* generator) {
  const auto below = [&](size_t limit) { return (*generator)() % limit; };
  for (size_t left = 1 + below(3); left > 0 && !code->empty(); --left) {
    // Often among the states or the last words, where the ends are near.
    const size_t reach = below(2) == 0 ? code->size() : std::min<size_t>(code->size(), 200);
    const size_t from_end = below(reach);
    const size_t at = below(2) == 0 ? from_end : code->size() - 1 - from_end;
    switch (below(4)) {
      case 0:
        (*code)[at] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        (*code)[at] = static_cast<uint8_t>(below(256));
        break;
      case 2:
        code->resize(at);
        break;
      default:
        code->insert(code->begin() + static_cast<std::ptrdiff_t>(at),
                     {static_cast<uint8_t>(below(256)), static_cast<uint8_t>(below(256))});
    }
  }
}

// Returns how many mutations were refused.
unsigned long try_message(const Message& message, unsigned long count, std::mt19937* generator) {
  const RansLayout layout = message.layout();
  const std::vector<RansSource> pieces = message.sources(layout);
  const std::vector<Bytes> low = pack_low(pieces);
  unsigned long refused = 0;
  for (const RansLayout::Chunk& chunk : layout.chunks) {
    const Bytes code = encode_chunk(chunk, pieces, Instructions::kPortable);
    for (const Instructions path : kVectors)
      if (code != encode_chunk(chunk, pieces, path)) fail("the paths make other bytes");
    for (unsigned long i = 0; i <= count; ++i) {
      Bytes changed = code;
      std::vector<Bytes> beside = low;
      if (i > 0) mutate(&changed, generator);
      Bytes& bits =
          beside[static_cast<size_t>(chunk.begin) +
                 (*generator)() % beside.size() % static_cast<size_t>(chunk.end - chunk.begin)];
      if (i % 5 == 4 && !bits.empty()) bits.back() ^= 0x80;
      const Bytes exact(changed.begin(), changed.end());
      const Decoded ours = decode(chunk, pieces, beside, exact, Instructions::kPortable);
      if (i == 0 && ours.fault != RansFault::kNone) fail("a sound chunk was refused");
      for (const Instructions path : kVectors) {
        const Decoded other = decode(chunk, pieces, beside, exact, path);
        if (ours.fault != other.fault) fail("the paths find other faults");
        if (ours.fault == RansFault::kNone && ours.values != other.values)
          fail("the paths decode other values");
      }
      refused += ours.fault == RansFault::kNone ? 0 : 1;
    }
  }
  return refused;
}

// The quotients that an encoder takes by multiplication, at the edges of each.
void check_divisions() {
  const cpu::RansTables& tables = cpu::rans_tables();
  for (int table = 0; table < kRansTables; ++table)
    for (int symbol = 0; symbol < kRansSymbols; ++symbol) {
      const uint32_t packed = tables.packed[table][symbol], frequency = packed >> 20;
      if (frequency == 0) continue;
      const auto check = [&](uint64_t x) {
        const uint64_t product = (x + (packed >> 4 & 1u)) * tables.reciprocal[table][symbol];
        if ((product >> 32) >> (packed & 15u) != x / frequency) fail("a quotient is wrong");
      };
      for (uint64_t quotient = 1; quotient <= 1u << 20; quotient += quotient < 999 ? 1 : 997) {
        check(quotient * frequency - 1);
        if (quotient < 1u << 20) check(quotient * frequency);
      }
      for (uint64_t back = 1; back <= 2 * frequency; ++back)
        check((uint64_t{frequency} << 20) - back);
    }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::printf("usage: rans_address SEED COUNT\n");
    return 2;
  }
  check_divisions();
  const auto seed = static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10));
  const unsigned long count = std::strtoul(argv[2], nullptr, 10);
  std::mt19937 generator(seed);
  const std::vector<Message> messages{
      // Few lanes and many, with and without escapes and low bits, short rows and cut ones.
      {{3, 1, 5}, {7, 1, 33}, {0, 70, -48, 335, 20}, 2.0f, seed},
      {{1, 2}, {16384, 9000}, {5}, 0.0f, seed + 1},
      {{700}, {33}, {40, 60, -20}, 1.0f, seed + 2},
      {{2, 1}, {16384, 70001}, {-48, 250, 18}, 0.5f, seed + 3},
  };
  unsigned long refused = 0;
  for (const Message& message : messages) refused += try_message(message, count, &generator);
  std::printf("%lu refused, paths:%s%s portable\n", refused,
#ifdef FEDKD_X86_VECTORS
              cpu::has_avx512_rans() ? " avx512" : "", cpu::has_avx2_rans() ? " avx2" : "");
#else
              "", "");
#endif
  return 0;
}
