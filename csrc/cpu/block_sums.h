// Sums of terms in loops that vectorise, in an order of their own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/macros.h"

namespace fedkd_fast::cpu {

constexpr int kSumLanes = 16;
constexpr int64_t kSumBlock = 1024;  // terms that are summed in fp32

// The sum of term(0) to term(count - 1): in sixteen partial sums of a block in fp32, beyond in
// fp64.
template <typename Term>
FEDKD_FORMULA double sum_in_blocks(int64_t count, const Term& term) {
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kSumBlock) {
    const int64_t end = std::min(count, first + kSumBlock);
    float parts[kSumLanes] = {};
    int64_t i = first;
    for (; i + kSumLanes <= end; i += kSumLanes)
      for (int lane = 0; lane < kSumLanes; ++lane) parts[lane] += term(i + lane);
    for (; i < end; ++i) parts[0] += term(i);
    for (const float part : parts) total += static_cast<double>(part);
  }
  return total;
}

}  // namespace fedkd_fast::cpu
