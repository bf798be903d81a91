// What bindings check of tensors of several types, and of buffers that the caller brings.
#pragma once

#include "bind_torch.h"

namespace fedkd_fast::bind {

inline FloatType float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return FloatType::kFloat64;
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// Of the arithmetic on a tensor's values.
inline ScalarType real_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::optional<Tensor> in_order(const std::optional<Tensor>& values) {
  return values ? std::optional(in_order(*values)) : std::nullopt;
}

// From the first element of a tensor to behind its last one in memory.
inline int64_t span_bytes(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return (last + 1) * tensor.element_size();
}

inline bool apart(const Tensor& left, const Tensor& right) {
  const auto* const a = static_cast<const char*>(left.const_data_ptr());
  const auto* const b = static_cast<const char*>(right.const_data_ptr());
  return a + span_bytes(left) <= b || b + span_bytes(right) <= a;
}

// `of` is the input that the buffer belongs to.
inline void check_out(const Tensor& out, const char* name, const Tensor& of, const char* of_name,
                      const std::vector<int64_t>& size, ScalarType type) {
  bool fits = out.dim() == static_cast<int64_t>(size.size()) && out.scalar_type() == type &&
              out.is_contiguous();
  for (size_t dim = 0; fits && dim < size.size(); ++dim)
    fits = out.size(static_cast<int64_t>(dim)) == size[dim];
  std::string wanted;
  for (const int64_t length : size) wanted += (wanted.empty() ? "" : ", ") + std::to_string(length);
  STD_TORCH_CHECK(fits, name, " must be a contiguous tensor of shape (", wanted,
                  ") and of the dtype that belongs to ", of_name, ", got ", shape_text(out),
                  " or another dtype");
  check_same_device(of, of_name, out, name);
}

}  // namespace fedkd_fast::bind
