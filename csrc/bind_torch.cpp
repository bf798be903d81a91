// Schemas of the ops library, and which function serves which device.

#include "bind_torch.h"

namespace bind = fedkd_fast::bind;

// The build for tests without a GPU has a namespace of its own.
#ifndef FEDKD_FAST_OPS
#define FEDKD_FAST_OPS fedkd_fast
#endif
// The name has to be expanded before torch's macros turn it into text.
#define FEDKD_FAST_DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FEDKD_FAST_IMPLEMENT(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

FEDKD_FAST_DEFINE(FEDKD_FAST_OPS, m) {
  m.def(
      "truncated_svd(Tensor[] matrices, str stop, float[] limits, Tensor[] bases, Tensor[] shares, "
      "int[] budgets_bytes, int seed) -> (Tensor[] left, Tensor[] sigma, Tensor[] right, "
      "Tensor[] shares, Tensor ranks, Tensor energies)");
#define FEDKD_FAST_DISTILL_ARGUMENTS                                                         \
  "Tensor mentor_logits, Tensor mentee_logits, Tensor labels, Tensor? sample_weight, "       \
  "Tensor? denominator_grad, int ignore_index, str denominator, bool attached, bool joint, " \
  "bool into_targets, float task, float divergence, float temperature, float smoothing, "    \
  "bool gradients"
  m.def("distill_loss(" FEDKD_FAST_DISTILL_ARGUMENTS
        ") -> (Tensor total, Tensor summary, Tensor statistics, Tensor grad_mentor, Tensor "
        "grad_mentee, "
        "Tensor workspace)");
  m.def("distill_loss_out(" FEDKD_FAST_DISTILL_ARGUMENTS
        ", Tensor(a!) total, Tensor(b!) summary, Tensor(c!) statistics, Tensor(d!) grad_mentor, "
        "Tensor(e!) grad_mentee, Tensor(f!)? workspace) -> ()");
#undef FEDKD_FAST_DISTILL_ARGUMENTS
#define FEDKD_FAST_LAYER_ARGUMENTS \
  "Tensor mentor, Tensor mentee, Tensor scale, Tensor? mask, bool masks_values, "
  m.def("layer_mse(" FEDKD_FAST_LAYER_ARGUMENTS
        "bool mentor_gradient, bool mentee_gradient) -> (Tensor total, Tensor errors, Tensor "
        "grad_mentor, "
        "Tensor grad_mentee, Tensor sums)");
  m.def("layer_mse_out(" FEDKD_FAST_LAYER_ARGUMENTS
        "Tensor(a!) total, Tensor(b!) errors, Tensor(c!)? grad_mentor, Tensor(d!)? grad_mentee, "
        "Tensor(e!) sums) "
        "-> ()");
#undef FEDKD_FAST_LAYER_ARGUMENTS
  m.def(
      "fit_factors(Tensor matrix, Tensor? through, Tensor near, Tensor far, Tensor sigma, Tensor "
      "multiplier, Tensor near_shrink, Tensor far_shrink, Tensor scale) -> (Tensor near, Tensor "
      "far, Tensor gain)");
  m.def("pack_factors(Tensor values, Tensor scale, Tensor bits) -> Tensor");
  m.def("unpack_factors(Tensor codes, Tensor scale, Tensor bits, int count) -> Tensor");
  m.def("measure_rows(Tensor values) -> (Tensor squares, Tensor largest)");
  m.def(
      "round_rows(Tensor values, Tensor squares, int step) -> (Tensor multiplier, Tensor levels, "
      "Tensor lost)");
  m.def("dense_step(Tensor values, Tensor squares, float most_lost, bool whole) -> Tensor");
  m.def("reconstruct(Tensor left, Tensor right) -> Tensor");
  m.def(
      "rans_encode(Tensor[] values, Tensor multiplier, Tensor levels, int[] owner) -> (Tensor "
      "codes, Tensor sizes)");
  m.def(
      "rans_decode(Tensor codes, Tensor sizes, Tensor scale, Tensor levels, int[] rows, int[] "
      "counts, int[] owner) -> Tensor[] values");
}

FEDKD_FAST_IMPLEMENT(FEDKD_FAST_OPS, CPU, m) {
  m.impl("truncated_svd", TORCH_BOX(&bind::truncated_svd));
  m.impl("distill_loss", TORCH_BOX(&bind::distill_loss));
  m.impl("distill_loss_out", TORCH_BOX(&bind::distill_loss_out));
  m.impl("layer_mse", TORCH_BOX(&bind::layer_mse));
  m.impl("layer_mse_out", TORCH_BOX(&bind::layer_mse_out));
  m.impl("fit_factors", TORCH_BOX(&bind::fit_factors));
  m.impl("pack_factors", TORCH_BOX(&bind::pack_factors));
  m.impl("unpack_factors", TORCH_BOX(&bind::unpack_factors));
  m.impl("measure_rows", TORCH_BOX(&bind::measure_rows));
  m.impl("round_rows", TORCH_BOX(&bind::round_rows));
  m.impl("dense_step", TORCH_BOX(&bind::dense_step));
  m.impl("reconstruct", TORCH_BOX(&bind::reconstruct));
  m.impl("rans_encode", TORCH_BOX(&bind::rans_encode));
  m.impl("rans_decode", TORCH_BOX(&bind::rans_decode));
}

#if defined(FEDKD_FAST_HAS_CUDA) && !defined(FEDKD_FAST_SIMT)
FEDKD_FAST_IMPLEMENT(FEDKD_FAST_OPS, CUDA, m) {
  m.impl("truncated_svd", TORCH_BOX(&bind::truncated_svd));
  m.impl("distill_loss", TORCH_BOX(&bind::distill_loss));
  m.impl("distill_loss_out", TORCH_BOX(&bind::distill_loss_out));
  m.impl("layer_mse", TORCH_BOX(&bind::layer_mse));
  m.impl("layer_mse_out", TORCH_BOX(&bind::layer_mse_out));
  m.impl("pack_factors", TORCH_BOX(&bind::pack_factors));
  m.impl("unpack_factors", TORCH_BOX(&bind::unpack_factors));
  m.impl("reconstruct", TORCH_BOX(&bind::reconstruct));
  m.impl("rans_encode", TORCH_BOX(&bind::rans_encode));
  m.impl("rans_decode", TORCH_BOX(&bind::rans_decode));
}
#endif
