// What the halves of the rANS binding share: shapes, and what is known of each row.
#pragma once

#include "bind_torch.h"
#include "common/rans_layout.h"

namespace fedkd_fast::bind {

// Of segments.
struct RansShapes {
  std::vector<int64_t> rows, counts;
};

// On the host, contiguous.
struct RansRows {
  Tensor factors, levels;
  float factor(int64_t row) const { return factors.const_data_ptr<float>()[row]; }
  int16_t level(int64_t row) const { return levels.const_data_ptr<int16_t>()[row]; }
};

}  // namespace fedkd_fast::bind
