// Quantised factor packing on CUDA: codes to bit stream, back, and the fixed-order product.
//
// Mapping. pack and unpack: one thread for 8 values of a row, because 8 codes of b bits are exactly
// b bytes and so no two threads share a byte; grid.x covers the row's groups, grid.y strides over
// rows. reconstruct: one thread for one element of the product, k ascending, one __fmaf_rn per
// term: the wire format's order. No shared memory and no barrier anywhere. Formulas come from
// common/quantise.h; this file is compiled with --fmad=false, so the only fused operations are the
// written ones. Limits: rows of any length, at most 2^31-1 groups a row.

#include "common/quantise.h"
#include "cuda/launch.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kGroup = 8;  // values per thread

__global__ void pack_factors_kernel(const float* values, int64_t row_stride, int64_t rank,
                                    int64_t count, const float* scale, const uint8_t* bits,
                                    const int64_t* offsets, uint8_t* codes) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup;
  if (first >= count) return;
  const int64_t size = count - first < kGroup ? count - first : kGroup;
  for (int64_t k = blockIdx.y; k < rank; k += gridDim.y) {
    const int width = bits[k];
    if (width == 0) continue;
    const float inverse = inverse_step(scale[k]);
    uint8_t* out = codes + offsets[k] + first / kGroup * width;
    uint64_t window = 0;
    int held = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float value = values[k * row_stride + first + i];
      window |= static_cast<uint64_t>(quantise(value, inverse, width)) << held;
      for (held += width; held >= 8; held -= 8, window >>= 8) *out++ = static_cast<uint8_t>(window);
    }
    if (held > 0) *out = static_cast<uint8_t>(window);
  }
}

__global__ void unpack_factors_kernel(const uint8_t* codes, int64_t rank, int64_t count,
                                      const float* scale, const uint8_t* bits,
                                      const int64_t* offsets, float* values) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup;
  if (first >= count) return;
  const int64_t size = count - first < kGroup ? count - first : kGroup;
  for (int64_t k = blockIdx.y; k < rank; k += gridDim.y) {
    const int width = bits[k];
    float* row = values + k * count + first;
    const uint8_t* in = codes + offsets[k] + first / kGroup * width;
    uint64_t window = 0;
    int held = 0;
    for (int64_t i = 0; i < size; ++i) {
      for (; held < width; held += 8) window |= static_cast<uint64_t>(*in++) << held;
      const uint32_t code = static_cast<uint32_t>(window) & ((1u << width) - 1u);
      row[i] = width == 0 ? 0.0f : dequantise(code, scale[k], width);
      window >>= width;
      held -= width;
    }
  }
}

__global__ void reconstruct_kernel(const float* left, const float* right, int64_t rank,
                                   int64_t rows, int64_t cols, float* out) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (col >= cols) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    float sum = 0.0f;
    for (int64_t k = 0; k < rank; ++k)
      sum = __fmaf_rn(left[k * rows + row], right[k * cols + col], sum);
    out[row * cols + col] = sum;
  }
}

dim3 grid_over(int64_t columns, int64_t rows) {
  return dim3(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
              static_cast<unsigned>(rows < kMaxGridY ? rows : kMaxGridY));
}

}  // namespace

cudaError_t pack_factors(const float* values, int64_t row_stride, int64_t rank, int64_t count,
                         const float* scale, const uint8_t* bits, const int64_t* offsets,
                         uint8_t* codes, cudaStream_t stream) {
  if (rank == 0 || count == 0) return cudaSuccess;
  return launch<pack_factors_kernel>(grid_over((count + kGroup - 1) / kGroup, rank), dim3(kThreads),
                                     0, stream, values, row_stride, rank, count, scale, bits,
                                     offsets, codes);
}

cudaError_t unpack_factors(const uint8_t* codes, int64_t rank, int64_t count, const float* scale,
                           const uint8_t* bits, const int64_t* offsets, float* values,
                           cudaStream_t stream) {
  if (rank == 0 || count == 0) return cudaSuccess;
  return launch<unpack_factors_kernel>(grid_over((count + kGroup - 1) / kGroup, rank),
                                       dim3(kThreads), 0, stream, codes, rank, count, scale, bits,
                                       offsets, values);
}

cudaError_t reconstruct(const float* left, const float* right, int64_t rank, int64_t rows,
                        int64_t cols, float* out, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  return launch<reconstruct_kernel>(grid_over(cols, rows), dim3(kThreads), 0, stream, left, right,
                                    rank, rows, cols, out);
}

}  // namespace fedkd_fast::cuda
