// What the bindings of the ops share: the only sources of the ops library that see torch. Each
// bind_<op>.cpp checks, allocates, splits the work over threads and branches by device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef FEDKD_FAST_HAS_CUDA
// With target 2.10 this symbol lives in libtorch_cuda: weak, so that the library also loads where
// torch was built for the CPU alone.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace fedkd_fast::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef FEDKD_FAST_HAS_CUDA
#ifdef FEDKD_FAST_SIMT
// For tests, kernels run on the CPU (simt/): every tensor counts as one of a GPU, and the
// engine stands in for torch's guard and stream.
inline bool on_gpu(const Tensor&) { return true; }

struct DeviceGuard {
  explicit DeviceGuard(int32_t device) : outer(std::exchange(simt::current_device, device)) {}
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() { simt::current_device = outer; }
  const int outer;
};

inline cudaStream_t current_stream(int32_t) { return simt::current_stream; }
#else
using torch::stable::accelerator::DeviceGuard;

inline bool on_gpu(const Tensor& tensor) { return !tensor.is_cpu(); }

inline cudaStream_t current_stream(int32_t device) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  return static_cast<cudaStream_t>(current);
}
#endif

// Makes the tensor's device the current one, and names torch's current stream there.
struct GpuScope {
  explicit GpuScope(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
  DeviceGuard guard;
  cudaStream_t stream;
};

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
}
#endif

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    text += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  return text + ")";
}

inline void check_tensor(const Tensor& tensor, const char* name, int64_t dim, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ",
                  shape_text(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
}

inline void check_same_device(const Tensor& a, const char* a_name, const Tensor& b,
                              const char* b_name) {
  STD_TORCH_CHECK(a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index(), a_name,
                  " and ", b_name, " must be on one device");
}

// Without the dispatcher, which is asked by name and takes longer than a small op.
inline Tensor empty_on_host(const std::vector<int64_t>& size, ScalarType type) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t dim = size.size(); dim-- > 0; stride *= std::max<int64_t>(1, size[dim]))
    strides[dim] = stride;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(size.size()), size.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor empty_like_device(const Tensor& device, std::vector<int64_t> size, ScalarType type) {
  if (device.is_cpu()) return empty_on_host(size, type);
  return torch::stable::new_empty(device, size, type);
}

inline Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Small control arrays are read on the host; on CUDA this waits for the stream.
inline Tensor on_host(const Tensor& tensor) {
  if (tensor.is_cpu()) return in_order(tensor);
  return in_order(
      torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

// Rows per thread so that a thread gets at least 16 Ki values.
inline int64_t row_grain(int64_t count) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, count));
}

// Of what a caller claims to be coded: the bytes of as many can be counted.
constexpr int64_t kMostValues = int64_t{1} << 48;

// ---- the ops, each in the file of its name ------------------------------------------------------

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
           Tensor, Tensor>
truncated_svd(const std::vector<Tensor>& matrices, const std::string& stop,
              const std::vector<double>& limits, const std::vector<Tensor>& bases,
              const std::vector<Tensor>& shares, const std::vector<int64_t>& budgets_bytes,
              int64_t seed);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_loss(
    const Tensor& mentor_logits, const Tensor& mentee_logits, const Tensor& labels,
    const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& denominator_grad,
    int64_t ignore_index, const std::string& denominator, bool attached, bool joint,
    bool into_targets, double task, double divergence, double temperature, double smoothing,
    bool gradients);
void distill_loss_out(const Tensor& mentor_logits, const Tensor& mentee_logits,
                      const Tensor& labels, const std::optional<Tensor>& sample_weight,
                      const std::optional<Tensor>& denominator_grad, int64_t ignore_index,
                      const std::string& denominator, bool attached, bool joint, bool into_targets,
                      double task, double divergence, double temperature, double smoothing,
                      bool gradients, const Tensor& total, const Tensor& summary,
                      const Tensor& statistics, const Tensor& grad_mentor,
                      const Tensor& grad_mentee, const std::optional<Tensor>& workspace);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_mse(
    const Tensor& mentor, const Tensor& mentee, const Tensor& scale,
    const std::optional<Tensor>& mask, bool masks_values, bool mentor_gradient,
    bool mentee_gradient);
void layer_mse_out(const Tensor& mentor, const Tensor& mentee, const Tensor& scale,
                   const std::optional<Tensor>& mask, bool masks_values, const Tensor& total,
                   const Tensor& errors, const std::optional<Tensor>& grad_mentor,
                   const std::optional<Tensor>& grad_mentee, const Tensor& sums);

std::tuple<Tensor, Tensor, Tensor> fit_factors(const Tensor& matrix,
                                               const std::optional<Tensor>& through,
                                               const Tensor& near, const Tensor& far,
                                               const Tensor& sigma, const Tensor& multiplier,
                                               const Tensor& near_shrink, const Tensor& far_shrink,
                                               const Tensor& scale);
Tensor pack_factors(const Tensor& values, const Tensor& scale, const Tensor& bits);
Tensor unpack_factors(const Tensor& codes, const Tensor& scale, const Tensor& bits, int64_t count);
std::tuple<Tensor, Tensor> measure_rows(const Tensor& values);
std::tuple<Tensor, Tensor, Tensor> round_rows(const Tensor& values, const Tensor& squares,
                                              int64_t step);
Tensor dense_step(const Tensor& values, const Tensor& squares, double most_lost, bool whole);
Tensor reconstruct(const Tensor& left, const Tensor& right);

std::tuple<Tensor, Tensor> rans_encode(const std::vector<Tensor>& values, const Tensor& multiplier,
                                       const Tensor& levels, const std::vector<int64_t>& owner);
std::vector<Tensor> rans_decode(const Tensor& codes, const Tensor& sizes, const Tensor& scale,
                                const Tensor& levels, const std::vector<int64_t>& rows,
                                const std::vector<int64_t>& counts,
                                const std::vector<int64_t>& owner);

}  // namespace fedkd_fast::bind
