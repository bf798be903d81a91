// Squared errors between layers of two models, and their gradients: what CPU and CUDA share.
//
// Samples of G groups of P positions × K values each: attention maps (G heads, K = P), or hidden
// states (G = 1). The error of sample n is the mean of (mentor - mentee)² over its groups and
// over the values that count, and the gradients are those of sum_n scale[n] · error[n]: they
// differ in sign. A position counts where mask[n][position] is not 0; with `masks_values`, K = P
// and value k of a position counts only where position k does. What does not count is not looked
// at, may be NaN, and gets the gradient 0; a sample of which nothing counts has the error 0.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/macros.h"

namespace fedkd_fast {

struct LayerMseArgs {
  FloatType type;       // of values and gradients
  const void* mentor;   // (N, G, P, K), contiguous
  const void* mentee;   // likewise
  const void* scale;    // (N,) of Real
  const uint8_t* mask;  // (N, P), or null where all positions count
  bool masks_values;
  int64_t samples, groups, positions, values;
  double* sums;  // (N, G · blocks) workspace, blocks as by layer_mse_blocks
  void* total;   // (1,) of Real: sum_n scale[n] · error[n]
  void* errors;  // (N,) of Real
  // (N, G, P, K), contiguous; null where not wanted. Each may be mentor or mentee themselves.
  void* grad_mentor;
  void* grad_mentee;
};

// Blocks of positions, each summed by itself, in one group: about kLayerMseBlock values each.
constexpr int64_t kLayerMseBlock = 16384;
FEDKD_HD inline int64_t layer_mse_positions(const LayerMseArgs& args) {
  const int64_t fitting = kLayerMseBlock / (args.values > 0 ? args.values : 1);
  return fitting > 1 ? fitting : 1;
}
FEDKD_HD inline int64_t layer_mse_blocks(const LayerMseArgs& args) {
  const int64_t each = layer_mse_positions(args);
  return (args.positions + each - 1) / each;
}

// 1 / the values of one sample that count, whose mean its error is; 0 where none does.
template <typename Real>
FEDKD_FORMULA Real layer_mse_weight(const LayerMseArgs& args, int64_t counted) {
  const int64_t values = args.groups * counted * (args.masks_values ? counted : args.values);
  return values > 0 ? Real(1) / static_cast<Real>(values) : Real(0);
}

}  // namespace fedkd_fast
