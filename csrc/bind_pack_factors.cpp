// pack_factors, unpack_factors and reconstruct.

#include <cmath>
#include <limits>

#include "bind_torch.h"
#include "common/quantise.h"

namespace fedkd_fast::bind {
namespace {

// What the kernels need to know of each row, on the host.
struct CodeLayout {
  Tensor scale, bits;            // (K,) contiguous
  std::vector<int64_t> offsets;  // K+1, where each row's codes start
};

// Rows' scales and widths may lie on the host while the data are on a GPU: nothing waits then.
void check_place(const Tensor& data, const Tensor& control, const char* name) {
  if (!control.is_cpu()) check_same_device(data, "the data", control, name);
}

CodeLayout lay_out_codes(const Tensor& data, const Tensor& scale, const Tensor& bits, int64_t count,
                         float smallest) {
  check_tensor(scale, "scale", 1, ScalarType::Float);
  check_tensor(bits, "bits", 1, ScalarType::Byte);
  check_place(data, scale, "scale");
  check_place(data, bits, "bits");
  const int64_t rank = bits.size(0);
  STD_TORCH_CHECK(scale.size(0) == rank, "scale must have one entry per row: ", rank, " rows, got ",
                  scale.size(0));
  STD_TORCH_CHECK(rank == 0 || count <= kMostValues / rank,
                  "rows times count must be at most 2^48, got ", rank, " and ", count);
  CodeLayout layout{on_host(scale), on_host(bits),
                    std::vector<int64_t>(static_cast<size_t>(rank) + 1, 0)};
  const float* scales = layout.scale.const_data_ptr<float>();
  const uint8_t* widths = layout.bits.const_data_ptr<uint8_t>();
  for (int64_t k = 0; k < rank; ++k) {
    STD_TORCH_CHECK(widths[k] <= kMaxCodeBits, "bits must lie in 0..16, got ", int{widths[k]},
                    " in row ", k);
    STD_TORCH_CHECK(widths[k] == 0 || (std::isfinite(scales[k]) && scales[k] >= smallest),
                    "scale must be finite and at least ", smallest, " where bits > 0, got ",
                    scales[k], " in row ", k);
    layout.offsets[static_cast<size_t>(k) + 1] =
        layout.offsets[static_cast<size_t>(k)] + packed_bytes(count, widths[k]);
  }
  return layout;
}

}  // namespace

Tensor pack_factors(const Tensor& values, const Tensor& scale, const Tensor& bits) {
  check_tensor(values, "values", 2, ScalarType::Float);
  const int64_t rank = values.size(0), count = values.size(1);
  const CodeLayout layout = lay_out_codes(values, scale, bits, count, kMinScale);
  STD_TORCH_CHECK(bits.size(0) == rank, "bits must have one entry per row: ", rank, " rows, got ",
                  bits.size(0));
  const Tensor rows = in_order(values);
  Tensor codes = empty_like_device(values, {layout.offsets.back()}, ScalarType::Byte);
  const float* in = rows.const_data_ptr<float>();
  const float* scales = layout.scale.const_data_ptr<float>();
  const uint8_t* widths = layout.bits.const_data_ptr<uint8_t>();
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
#ifdef FEDKD_FAST_HAS_CUDA
  if (on_gpu(values)) {
    const GpuScope gpu(values);
    check_launch(cuda::pack_factors(in, count, rank, count, scales, widths, layout.offsets.data(),
                                    out, gpu.stream));
    return codes;
  }
#endif
  torch::stable::parallel_for(0, rank, row_grain(count), [&](int64_t begin, int64_t end) {
    cpu::pack_factors(in, count, count, scales, widths, layout.offsets.data(), out, begin, end);
  });
  return codes;
}

Tensor unpack_factors(const Tensor& codes, const Tensor& scale, const Tensor& bits, int64_t count) {
  check_tensor(codes, "codes", 1, ScalarType::Byte);
  STD_TORCH_CHECK(count >= 0, "count must be >= 0, got ", count);
  const CodeLayout layout =
      lay_out_codes(codes, scale, bits, count, std::numeric_limits<float>::lowest());
  const int64_t rank = bits.size(0);
  const Tensor stream = in_order(codes);
  STD_TORCH_CHECK(stream.size(0) == layout.offsets.back(), "codes must hold ",
                  layout.offsets.back(), " bytes, got ", stream.size(0));
  Tensor values = empty_like_device(codes, {rank, count}, ScalarType::Float);
  const uint8_t* in = stream.const_data_ptr<uint8_t>();
  const float* scales = layout.scale.const_data_ptr<float>();
  const uint8_t* widths = layout.bits.const_data_ptr<uint8_t>();
  float* out = values.mutable_data_ptr<float>();
#ifdef FEDKD_FAST_HAS_CUDA
  if (on_gpu(codes)) {
    const GpuScope gpu(codes);
    check_launch(cuda::unpack_factors(in, rank, count, scales, widths, layout.offsets.data(), out,
                                      gpu.stream));
    return values;
  }
#endif
  torch::stable::parallel_for(0, rank, row_grain(count), [&](int64_t begin, int64_t end) {
    cpu::unpack_factors(in, count, scales, widths, layout.offsets.data(), out, begin, end);
  });
  return values;
}

Tensor reconstruct(const Tensor& left, const Tensor& right) {
  check_tensor(left, "left", 2, ScalarType::Float);
  check_tensor(right, "right", 2, ScalarType::Float);
  check_same_device(left, "left", right, "right");
  STD_TORCH_CHECK(left.size(0) == right.size(0),
                  "left and right must have the same number of rows (the rank), got ", left.size(0),
                  " and ", right.size(0));
  const int64_t rank = left.size(0), rows = left.size(1), cols = right.size(1);
  const Tensor left_rows = in_order(left);
  const Tensor right_rows = in_order(right);
  Tensor product = empty_like_device(left, {rows, cols}, ScalarType::Float);
  const float* left_data = left_rows.const_data_ptr<float>();
  const float* right_data = right_rows.const_data_ptr<float>();
  float* out = product.mutable_data_ptr<float>();
#ifdef FEDKD_FAST_HAS_CUDA
  if (on_gpu(left)) {
    const GpuScope gpu(left);
    check_launch(cuda::reconstruct(left_data, right_data, rank, rows, cols, out, gpu.stream));
    return product;
  }
#endif
  // Each thread copies its own panels of `right`, so give it enough rows to pay for that.
  const int64_t grain = std::max<int64_t>(24, 65536 / std::max<int64_t>(1, rank * cols));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    cpu::reconstruct(left_data, right_data, rank, rows, cols, out, begin, end);
  });
  return product;
}

}  // namespace fedkd_fast::bind
