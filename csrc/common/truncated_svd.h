// What the CPU and the CUDA half of truncated_svd decide alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fedkd_fast {

// U = X V / sigma loses orthogonality like eps64 · (sigma_1 / sigma_K)². Below this share of the
// first eigenvalue (sigma_K < 1e-4 sigma_1) that would show in fp32, and a full SVD takes over.
constexpr double kGramFloor = 1e-8;

// The smallest K with sum_{k<K} energy_at(k) > energy · total; FedKD eq (8), strict. 0 for total =
// 0, `count` for energy >= 1, -1 where all `count` do not reach it. Energies descend and are >= 0.
template <typename EnergyAt>
FEDKD_HD inline int64_t select_rank(const EnergyAt& energy_at, int64_t count, double total,
                                    double energy) {
  if (energy >= 1.0) return count;
  if (total == 0.0) return 0;
  const double wanted = energy * total;
  double captured = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    captured += energy_at(k);
    if (captured > wanted) return k + 1;
  }
  return -1;
}

// value · 2^-exponent, exact, by two factors: 2^-exponent overflows for a subnormal double.
struct ScaleDown {
  double first, second;
  FEDKD_HD explicit ScaleDown(int exponent)
      : first(ldexp(1.0, -(exponent / 2))), second(ldexp(1.0, -(exponent - exponent / 2))) {}
  FEDKD_HD double operator()(double value) const { return value * first * second; }
};

}  // namespace fedkd_fast
