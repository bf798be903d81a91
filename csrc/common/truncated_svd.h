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

// float32 matrices with a shorter side of no more than this, or with less of the energy to lose,
// get the optimal rank.
constexpr int64_t kSmallSide = 24;
constexpr double kFinestShare = 1e-3;

// An energy that exceeds what is wanted by less may be equal to it: of the total, in fp64 and of
// factors that are rounded to fp32.
constexpr double kTie = 1e-15, kTieOfRounded = 1e-12;

enum class StopBy : int { kEnergy, kRank, kError, kFloor };

// What ends the components of a matrix, in the units of its squares after scaling by 2^-exponent.
struct Stop {
  StopBy by;            // kError has become kEnergy
  double energy = 1.0;  // wanted share of the total
  int64_t rank = 0;     // wanted by rank
  double floor = 0.0;   // least σ² that is kept

  FEDKD_HD Stop(StopBy stop, double limit, double total, int exponent, int64_t side)
      : by(stop == StopBy::kError ? StopBy::kEnergy : stop) {
    if (stop == StopBy::kEnergy) energy = limit;
    if (stop == StopBy::kRank)
      rank = limit < static_cast<double>(side) ? static_cast<int64_t>(limit) : side;
    // Scaled before it is squared: the square of a float64 may be out of range.
    const double scaled = ldexp(limit, -exponent);
    if (stop == StopBy::kError) energy = 1.0 - scaled * scaled / total;
    if (stop == StopBy::kFloor) floor = scaled * scaled;
  }

  // Whether a float32 matrix may be iterated on, which may take more than the optimal rank.
  FEDKD_HD bool leaves_room(double total, int64_t side) const {
    if (side <= kSmallSide || by == StopBy::kRank) return false;
    if (by == StopBy::kFloor) return floor > kFinestShare / static_cast<double>(side) * total;
    return energy > 0.0 && 1.0 - energy >= kFinestShare;
  }

  // How many of the `count` leading energies (descending) are wanted; -1 where it takes more of
  // the `side` that there are. `slack` of the total is what they may be off by.
  template <typename EnergyAt>
  FEDKD_HD int64_t choose_rank(const EnergyAt& energy_at, int64_t count, double total, int64_t side,
                               double slack = 0.0) const {
    if (by == StopBy::kRank) return rank <= count ? rank : -1;
    if (by == StopBy::kFloor) {
      int64_t kept = 0;
      while (kept < count && energy_at(kept) >= floor) ++kept;
      return kept < count || count == side ? kept : -1;
    }
    if (energy <= 0.0) return 0;
    const double wanted = energy < 1.0 && energy + slack < 1.0 ? energy + slack : 1.0;
    return select_rank(energy_at, count, total, wanted);
  }
};

// The step of levels in -127..127 for values up to this magnitude; 0 where its inverse is beyond
// fp32: next to other values that much is nothing.
constexpr float kMostLevel = 127.0f, kLeastStep = 0x1p-120f;
FEDKD_HD inline float level_step(float largest) {
  const float step = largest / kMostLevel;
  return step >= kLeastStep ? step : 0.0f;
}

// A pseudo-random sign for each index, the same for the same seed: splitmix64 (Steele, Lea, Flood
// 2014).
FEDKD_HD inline float random_sign(uint64_t seed, int64_t index) {
  uint64_t bits = seed + static_cast<uint64_t>(index + 1) * 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return (bits ^ (bits >> 31)) >> 63 ? -1.0f : 1.0f;
}

// value · 2^-exponent, exact, by two factors: 2^-exponent overflows for a subnormal double.
struct ScaleDown {
  double first, second;
  FEDKD_HD explicit ScaleDown(int exponent)
      : first(ldexp(1.0, -(exponent / 2))), second(ldexp(1.0, -(exponent - exponent / 2))) {}
  FEDKD_HD double operator()(double value) const { return value * first * second; }
};

}  // namespace fedkd_fast
