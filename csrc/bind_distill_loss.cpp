// distill_loss: both losses, row statistics and both gradients in one call.

#include <memory>

#include "bind_buffers.h"

namespace fedkd_fast::bind {
namespace {

// Doubles that gradients need which wait for the mean of D: DistillMeans, then the states. The
// caller keeps them, so that kernels still in the stream read no memory that died with the call.
constexpr int64_t kMeans = sizeof(DistillMeans) / sizeof(double);
int64_t workspace_size(int64_t rows, ScalarType real) {
  return kMeans + kRowStates * rows / (real == ScalarType::Double ? 1 : 2);
}

Denominator denominator_of(const std::string& name) {
  if (name == "sample") return Denominator::kSample;
  if (name == "batch") return Denominator::kBatch;
  STD_TORCH_CHECK(name == "constant", "denominator must be sample, batch or constant, got ", name);
  return Denominator::kConstant;
}

// One value a row, in the dtype of the arithmetic.
void check_row_values(const std::optional<Tensor>& values, const char* name, const Tensor& logits) {
  if (!values) return;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == logits.size(0), name,
                  " must have one entry per row of logits, ", logits.size(0), ", got shape ",
                  shape_text(*values));
  STD_TORCH_CHECK(values->scalar_type() == real_type(logits), name,
                  " must be float64 for float64 logits and float32 otherwise");
  check_same_device(logits, "mentor_logits", *values, name);
}

void check_logits(const Tensor& mentor_logits, const Tensor& mentee_logits, const Tensor& labels) {
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

void check_mode(const DistillMode& mode) {
  STD_TORCH_CHECK(mode.temperature > 0.0 && std::isfinite(mode.temperature),
                  "temperature must be positive and finite, got ", mode.temperature);
  STD_TORCH_CHECK(mode.smoothing >= 0.0 && mode.smoothing < 1.0,
                  "smoothing must lie in [0, 1), got ", mode.smoothing);
  for (const auto& [value, name] :
       {std::pair(mode.task, "task"), std::pair(mode.divergence, "divergence")})
    STD_TORCH_CHECK(value >= 0.0 && std::isfinite(value), name,
                    " must be finite and at least 0, got ", value);
  STD_TORCH_CHECK(mode.joint || !mode.into_targets, "into_targets must be false unless joint");
}

// A gradient may lie exactly on the logits of its own model, whose rows then follow each other.
void check_gradient_out(const Tensor& out, const char* name, const Tensor& own,
                        const char* own_name, const Tensor& peer) {
  check_out(out, name, own, own_name, {own.size(0), own.size(1)}, own.scalar_type());
  const bool exactly = out.const_data_ptr() == own.const_data_ptr() && own.is_contiguous();
  STD_TORCH_CHECK(apart(out, peer) && (exactly || apart(out, own)), name,
                  " must not overlap the logits, unless it is those of its own model");
}

Tensor with_unit_columns(const Tensor& logits) {
  return logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

void run_on_cpu(DistillLossArgs args, DistillMeans* kept, const Tensor& total,
                const Tensor& summary) {
  const cpu::LabelScan scan = cpu::scan_labels(args);
  STD_TORCH_CHECK(scan.first_bad_label < 0, "labels must lie in [0, ", args.classes,
                  ") or equal ignore_index ", args.ignore_index, ", got ",
                  args.labels[scan.first_bad_label * args.label_stride], " in row ",
                  scan.first_bad_label);
  STD_TORCH_CHECK(scan.first_bad_weight < 0,
                  "sample_weight must be finite and at least 0, which it is not in row ",
                  scan.first_bad_weight);
  // float16 keeps its range: divided by many rows here, a gradient would underflow before the
  // factor of a gradient scaler reaches it in backward.
  const bool divide = args.type != FloatType::kFloat16 && scan.weight > 0.0;
  if (divide) args.gradient_scale = 1.0 / scan.weight;
  const int64_t grain = row_grain(args.classes), scratch = cpu::distill_loss_scratch(args);
  torch::stable::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kLine = 64;
    size_t room = static_cast<size_t>(scratch) * sizeof(float) + kLine;
    const std::unique_ptr<float[]> buffer(scratch ? new float[room / sizeof(float)] : nullptr);
    void* aligned = buffer.get();
    std::align(kLine, room - kLine, aligned, room);
    cpu::distill_loss(args, static_cast<float*>(aligned), begin, end);
  });
  const DistillMeans means = cpu::mean_distill_loss(args);
  if (kept != nullptr) *kept = means;
  if (args.states != nullptr)
    torch::stable::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
      cpu::distill_loss_gradients(args, means, begin, end);
    });
  const double pending_scale = divide ? 1.0 : means.inverse_weight;
  if (summary.scalar_type() == ScalarType::Double)
    store_summary(means, pending_scale, total.mutable_data_ptr<double>(),
                  summary.mutable_data_ptr<double>());
  else
    store_summary(means, pending_scale, total.mutable_data_ptr<float>(),
                  summary.mutable_data_ptr<float>());
}

}  // namespace

void distill_loss_out(const Tensor& mentor_logits, const Tensor& mentee_logits,
                      const Tensor& labels, const std::optional<Tensor>& sample_weight,
                      const std::optional<Tensor>& denominator_grad, int64_t ignore_index,
                      const std::string& denominator, bool attached, bool joint, bool into_targets,
                      double task, double divergence, double temperature, double smoothing,
                      bool gradients, const Tensor& total, const Tensor& summary,
                      const Tensor& statistics, const Tensor& grad_mentor,
                      const Tensor& grad_mentee, const std::optional<Tensor>& workspace) {
  check_logits(mentor_logits, mentee_logits, labels);
  check_row_values(sample_weight, "sample_weight", mentor_logits);
  check_row_values(denominator_grad, "denominator_grad", mentor_logits);
  const int64_t rows = mentor_logits.size(0), classes = mentor_logits.size(1);
  const ScalarType real = real_type(mentor_logits);
  check_out(total, "total", mentor_logits, "mentor_logits", {}, real);
  check_out(summary, "summary", mentor_logits, "mentor_logits", {kDistillSummary}, real);
  check_out(statistics, "statistics", mentor_logits, "mentor_logits", {5, rows}, real);
  const Denominator kind = denominator_of(denominator);
  const bool waits = kind == Denominator::kBatch && gradients;
  STD_TORCH_CHECK(!waits || workspace, "workspace is needed where D is the mean over the batch");
  if (waits)
    check_out(*workspace, "workspace", mentor_logits, "mentor_logits", {workspace_size(rows, real)},
              ScalarType::Double);
  if (gradients) {
    check_gradient_out(grad_mentor, "grad_mentor", mentor_logits, "mentor_logits", mentee_logits);
    check_gradient_out(grad_mentee, "grad_mentee", mentee_logits, "mentee_logits", mentor_logits);
    STD_TORCH_CHECK(apart(grad_mentor, grad_mentee),
                    "grad_mentor and grad_mentee must not overlap");
  }
  const Tensor mentor = with_unit_columns(mentor_logits), mentee = with_unit_columns(mentee_logits);
  const std::optional<Tensor> weights = in_order(sample_weight), pulls = in_order(denominator_grad);
  DistillLossArgs args;
  args.type = float_type(mentor_logits, "mentor_logits");
  // What is constant has no gradient, and nobody can pull at it.
  const bool moves = kind != Denominator::kConstant;
  args.mode = {kind, attached && moves, joint,       into_targets,
               task, divergence,        temperature, smoothing};
  check_mode(args.mode);
  args.mentor_logits = mentor.const_data_ptr();
  args.mentee_logits = mentee.const_data_ptr();
  args.labels = labels.const_data_ptr<int64_t>();
  args.weights = weights ? weights->const_data_ptr() : nullptr;
  args.denominator_grad = pulls && moves ? pulls->const_data_ptr() : nullptr;
  args.rows = rows;
  args.classes = classes;
  args.mentor_stride = mentor.stride(0);
  args.mentee_stride = mentee.stride(0);
  args.label_stride = labels.stride(0);
  args.ignore_index = ignore_index;
  args.gradient_scale = 1.0;
  args.statistics = statistics.mutable_data_ptr();
  auto* const means = waits ? static_cast<DistillMeans*>(workspace->mutable_data_ptr()) : nullptr;
  args.states = waits ? means + 1 : nullptr;
  args.grad_mentor = gradients ? grad_mentor.mutable_data_ptr() : nullptr;
  args.grad_mentee = gradients ? grad_mentee.mutable_data_ptr() : nullptr;
#ifdef FEDKD_FAST_HAS_CUDA
  if (on_gpu(mentor_logits)) {
    // A bad label makes its row NaN: to raise for it would stall the stream.
    const GpuScope gpu(mentor_logits);
    check_launch(cuda::distill_loss(args, means, total.mutable_data_ptr(),
                                    summary.mutable_data_ptr(), gpu.stream));
    return;
  }
#endif
  run_on_cpu(args, means, total, summary);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_loss(
    const Tensor& mentor_logits, const Tensor& mentee_logits, const Tensor& labels,
    const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& denominator_grad,
    int64_t ignore_index, const std::string& denominator, bool attached, bool joint,
    bool into_targets, double task, double divergence, double temperature, double smoothing,
    bool gradients) {
  check_logits(mentor_logits, mentee_logits, labels);
  const int64_t rows = mentor_logits.size(0), classes = mentor_logits.size(1);
  const ScalarType type = mentor_logits.scalar_type(), real = real_type(mentor_logits);
  const Tensor total = empty_like_device(mentor_logits, {}, real);
  const Tensor summary = empty_like_device(mentor_logits, {kDistillSummary}, real);
  const Tensor statistics = empty_like_device(mentor_logits, {5, rows}, real);
  const std::vector<int64_t> size{gradients ? rows : 0, classes};
  const Tensor grad_mentor = empty_like_device(mentor_logits, size, type);
  const Tensor grad_mentee = empty_like_device(mentor_logits, size, type);
  const bool waits = denominator_of(denominator) == Denominator::kBatch && gradients;
  const Tensor workspace = empty_like_device(
      mentor_logits, {waits ? workspace_size(rows, real) : 0}, ScalarType::Double);
  distill_loss_out(mentor_logits, mentee_logits, labels, sample_weight, denominator_grad,
                   ignore_index, denominator, attached, joint, into_targets, task, divergence,
                   temperature, smoothing, gradients, total, summary, statistics, grad_mentor,
                   grad_mentee, workspace);
  return {total, summary, statistics, grad_mentor, grad_mentee, workspace};
}

}  // namespace fedkd_fast::bind
