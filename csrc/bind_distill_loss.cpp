// distill_loss: both losses, row statistics and both gradients in one call.

#include "bind_torch.h"

namespace fedkd_fast::bind {
namespace {

LogitType logit_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return LogitType::kFloat64;
    case ScalarType::Float:
      return LogitType::kFloat32;
    case ScalarType::BFloat16:
      return LogitType::kBFloat16;
    case ScalarType::Half:
      return LogitType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "mentor_logits must be float32, float64, bfloat16 or float16");
  }
}

void check_distill_loss(const Tensor& mentor_logits, const Tensor& mentee_logits,
                        const Tensor& labels) {
  STD_TORCH_CHECK(mentor_logits.dim() == 2, "mentor_logits must have shape (R, C), got ",
                  shape_text(mentor_logits));
  STD_TORCH_CHECK(mentee_logits.dim() == 2 && mentee_logits.size(0) == mentor_logits.size(0) &&
                      mentee_logits.size(1) == mentor_logits.size(1),
                  "mentee_logits must have the shape of mentor_logits, ", shape_text(mentor_logits),
                  ", got ", shape_text(mentee_logits));
  STD_TORCH_CHECK(mentor_logits.size(1) > 0, "mentor_logits must have at least one class, got ",
                  shape_text(mentor_logits));
  STD_TORCH_CHECK(mentee_logits.scalar_type() == mentor_logits.scalar_type(),
                  "mentor_logits and mentee_logits must have one dtype");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == mentor_logits.size(0),
                  "labels must have one entry per row of logits, ", mentor_logits.size(0),
                  ", got shape ", shape_text(labels));
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  check_same_device(mentor_logits, "mentor_logits", mentee_logits, "mentee_logits");
  check_same_device(mentor_logits, "mentor_logits", labels, "labels");
}

Tensor with_unit_columns(const Tensor& logits) {
  return logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

void store_mean(const Tensor& scalar, double value) {
  if (scalar.scalar_type() == ScalarType::Double)
    *scalar.mutable_data_ptr<double>() = value;
  else
    *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_loss(const Tensor& mentor_logits,
                                                                        const Tensor& mentee_logits,
                                                                        const Tensor& labels,
                                                                        int64_t ignore_index) {
  check_distill_loss(mentor_logits, mentee_logits, labels);
  const int64_t rows = mentor_logits.size(0), classes = mentor_logits.size(1);
  const ScalarType type = mentor_logits.scalar_type();
  const ScalarType real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor mentor = with_unit_columns(mentor_logits), mentee = with_unit_columns(mentee_logits);
  const Tensor mentor_loss = empty_like_device(mentor_logits, {}, real);
  const Tensor mentee_loss = empty_like_device(mentor_logits, {}, real);
  const Tensor pending_scale = empty_like_device(mentor_logits, {}, real);
  const Tensor statistics = empty_like_device(mentor_logits, {5, rows}, real);
  const Tensor grad_mentor = empty_like_device(mentor_logits, {rows, classes}, type);
  const Tensor grad_mentee = empty_like_device(mentor_logits, {rows, classes}, type);
  DistillLossArgs args;
  args.type = logit_type(mentor_logits);
  args.mentor_logits = mentor.const_data_ptr();
  args.mentee_logits = mentee.const_data_ptr();
  args.labels = labels.const_data_ptr<int64_t>();
  args.rows = rows;
  args.classes = classes;
  args.mentor_stride = mentor.stride(0);
  args.mentee_stride = mentee.stride(0);
  args.label_stride = labels.stride(0);
  args.ignore_index = ignore_index;
  args.gradient_scale = 1.0;
  args.statistics = statistics.mutable_data_ptr();
  args.grad_mentor = grad_mentor.mutable_data_ptr();
  args.grad_mentee = grad_mentee.mutable_data_ptr();
#ifdef FEDKD_FAST_HAS_CUDA
  if (on_gpu(mentor_logits)) {
    // A bad label makes its row NaN: to raise for it would stall the stream.
    const GpuScope gpu(mentor_logits);
    check_launch(cuda::distill_loss(args, mentor_loss.mutable_data_ptr(),
                                    mentee_loss.mutable_data_ptr(),
                                    pending_scale.mutable_data_ptr(), gpu.stream));
    return {mentor_loss, mentee_loss, pending_scale, statistics, grad_mentor, grad_mentee};
  }
#endif
  const cpu::LabelScan scan = cpu::scan_labels(args);
  STD_TORCH_CHECK(scan.first_bad < 0, "labels must lie in [0, ", classes,
                  ") or equal ignore_index ", ignore_index, ", got ",
                  args.labels[scan.first_bad * args.label_stride], " in row ", scan.first_bad);
  // float16 keeps its range: divided by many rows here, a gradient would underflow before the
  // factor of a gradient scaler reaches it in backward.
  const bool divide = type != ScalarType::Half && scan.counted > 0;
  if (divide) args.gradient_scale = 1.0 / static_cast<double>(scan.counted);
  torch::stable::parallel_for(0, rows, row_grain(classes), [&](int64_t begin, int64_t end) {
    cpu::distill_loss(args, begin, end);
  });
  double means[3];
  cpu::mean_distill_loss(args, means);
  store_mean(mentor_loss, means[0]);
  store_mean(mentee_loss, means[1]);
  store_mean(pending_scale, divide ? 1.0 : means[2]);
  return {mentor_loss, mentee_loss, pending_scale, statistics, grad_mentor, grad_mentee};
}

}  // namespace fedkd_fast::bind
