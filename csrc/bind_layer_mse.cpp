// layer_mse: squared errors between layers of two models, and both gradients, in one call.

#include "bind_buffers.h"

namespace fedkd_fast::bind {
namespace {

void check_layers(const Tensor& mentor, const Tensor& mentee, const Tensor& scale,
                  const std::optional<Tensor>& mask, bool masks_values) {
  STD_TORCH_CHECK(mentor.dim() == 4, "mentor must have shape (N, G, P, K), got ",
                  shape_text(mentor));
  bool alike = mentee.dim() == 4;
  for (int64_t dim = 0; alike && dim < 4; ++dim) alike = mentee.size(dim) == mentor.size(dim);
  STD_TORCH_CHECK(alike, "mentee must have the shape of mentor, ", shape_text(mentor), ", got ",
                  shape_text(mentee));
  for (int64_t dim = 1; dim < 4; ++dim)
    STD_TORCH_CHECK(mentor.size(dim) > 0, "mentor must have values in every sample, got shape ",
                    shape_text(mentor));
  STD_TORCH_CHECK(mentor.size(3) < (int64_t{1} << 31), "mentor has too many values in a position, ",
                  mentor.size(3));
  STD_TORCH_CHECK(mentee.scalar_type() == mentor.scalar_type(),
                  "mentor and mentee must have one dtype");
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == mentor.size(0),
                  "scale must have one entry per sample, ", mentor.size(0), ", got shape ",
                  shape_text(scale));
  STD_TORCH_CHECK(scale.scalar_type() == real_type(mentor),
                  "scale must be float64 for float64 values and float32 otherwise");
  check_same_device(mentor, "mentor", mentee, "mentee");
  check_same_device(mentor, "mentor", scale, "scale");
  STD_TORCH_CHECK(!masks_values || mentor.size(2) == mentor.size(3),
                  "a mask of values needs as many of them as positions, got shape ",
                  shape_text(mentor));
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(
      mask->dim() == 2 && mask->size(0) == mentor.size(0) && mask->size(1) == mentor.size(2),
      "mask must have shape (", mentor.size(0), ", ", mentor.size(2), "), got ", shape_text(*mask));
  check_same_device(mentor, "mentor", *mask, "mask");
}

// A gradient may lie exactly on one of the models' values.
void check_gradient_out(const std::optional<Tensor>& out, const char* name, const Tensor& mentor,
                        const Tensor& mentee) {
  if (!out) return;
  check_out(*out, name, mentor, "mentor",
            {mentor.size(0), mentor.size(1), mentor.size(2), mentor.size(3)}, mentor.scalar_type());
  for (const Tensor& values : {mentor, mentee})
    STD_TORCH_CHECK(apart(*out, values) || (out->const_data_ptr() == values.const_data_ptr() &&
                                            values.is_contiguous()),
                    name, " must not overlap mentor or mentee, unless it is one of them");
}

LayerMseArgs shape_of(const Tensor& mentor) {
  LayerMseArgs args{};
  args.samples = mentor.size(0);
  args.groups = mentor.size(1);
  args.positions = mentor.size(2);
  args.values = mentor.size(3);
  return args;
}

std::vector<int64_t> sums_size(const LayerMseArgs& args) {
  return {args.samples, args.groups * layer_mse_blocks(args)};
}

void run_on_cpu(const LayerMseArgs& args) {
  const int64_t count = args.samples * args.groups * layer_mse_blocks(args);
  const int64_t values =
      std::min(layer_mse_positions(args), args.positions) * args.values;  // of a block
  torch::stable::parallel_for(0, count, row_grain(values), [&](int64_t begin, int64_t end) {
    cpu::layer_mse(args, begin, end);
  });
  cpu::mean_layer_mse(args);
}

}  // namespace

void layer_mse_out(const Tensor& mentor, const Tensor& mentee, const Tensor& scale,
                   const std::optional<Tensor>& mask, bool masks_values, const Tensor& total,
                   const Tensor& errors, const std::optional<Tensor>& grad_mentor,
                   const std::optional<Tensor>& grad_mentee, const Tensor& sums) {
  check_layers(mentor, mentee, scale, mask, masks_values);
  LayerMseArgs args = shape_of(mentor);
  check_out(total, "total", mentor, "mentor", {}, real_type(mentor));
  check_out(errors, "errors", mentor, "mentor", {args.samples}, real_type(mentor));
  check_out(sums, "sums", mentor, "mentor", sums_size(args), ScalarType::Double);
  check_gradient_out(grad_mentor, "grad_mentor", mentor, mentee);
  check_gradient_out(grad_mentee, "grad_mentee", mentor, mentee);
  STD_TORCH_CHECK(!grad_mentor || !grad_mentee || apart(*grad_mentor, *grad_mentee),
                  "grad_mentor and grad_mentee must not overlap");
  const Tensor left = torch::stable::contiguous(mentor), right = torch::stable::contiguous(mentee);
  const Tensor factors = torch::stable::contiguous(scale);
  const std::optional<Tensor> counts = in_order(mask);
  args.type = float_type(mentor, "mentor");
  args.mentor = left.const_data_ptr();
  args.mentee = right.const_data_ptr();
  args.scale = factors.const_data_ptr();
  args.mask = counts ? static_cast<const uint8_t*>(counts->const_data_ptr()) : nullptr;
  args.masks_values = masks_values && counts;
  args.sums = sums.mutable_data_ptr<double>();
  args.total = total.mutable_data_ptr();
  args.errors = errors.mutable_data_ptr();
  args.grad_mentor = grad_mentor ? grad_mentor->mutable_data_ptr() : nullptr;
  args.grad_mentee = grad_mentee ? grad_mentee->mutable_data_ptr() : nullptr;
#ifdef FEDKD_FAST_HAS_CUDA
  if (on_gpu(mentor)) {
    const GpuScope gpu(mentor);
    check_launch(cuda::layer_mse(args, gpu.stream));
    return;
  }
#endif
  run_on_cpu(args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_mse(
    const Tensor& mentor, const Tensor& mentee, const Tensor& scale,
    const std::optional<Tensor>& mask, bool masks_values, bool mentor_gradient,
    bool mentee_gradient) {
  check_layers(mentor, mentee, scale, mask, masks_values);
  const LayerMseArgs args = shape_of(mentor);
  const Tensor total = empty_like_device(mentor, {}, real_type(mentor));
  const Tensor errors = empty_like_device(mentor, {args.samples}, real_type(mentor));
  const Tensor sums = empty_like_device(mentor, sums_size(args), ScalarType::Double);
  const auto gradient = [&](bool wanted) {
    return empty_like_device(mentor,
                             {wanted ? args.samples : 0, args.groups, args.positions, args.values},
                             mentor.scalar_type());
  };
  const Tensor grad_mentor = gradient(mentor_gradient), grad_mentee = gradient(mentee_gradient);
  const auto given = [](const Tensor& tensor, bool wanted) {
    return wanted ? std::optional(tensor) : std::nullopt;
  };
  layer_mse_out(mentor, mentee, scale, mask, masks_values, total, errors,
                given(grad_mentor, mentor_gradient), given(grad_mentee, mentee_gradient), sums);
  return {total, errors, grad_mentor, grad_mentee, sums};
}

}  // namespace fedkd_fast::bind
