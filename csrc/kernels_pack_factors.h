// pack_factors, unpack_factors, reconstruct: the part of kernels.h that packs quantised factors.
//
// Row k of `values` (K×n, row stride `row_stride`) is quantised with bits[k] in 0..16 (see
// common/quantise.h) and written as a little-endian bit stream, lowest bit first, that starts on a
// byte: codes[offsets[k] .. offsets[k+1]). offsets has K+1 entries, offsets[k+1] - offsets[k] =
// ceil(n · bits[k] / 8). Unused high bits of a row's last byte are zero. A row with bits[k] = 0
// takes no bytes and decodes to zeros.
#pragma once

#include <cstdint>

#include "common/instructions.h"

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace fedkd_fast {
namespace cpu {

void pack_factors(const float* values, int64_t row_stride, int64_t count, const float* scale,
                  const uint8_t* bits, const int64_t* offsets, uint8_t* codes, int64_t begin,
                  int64_t end, Instructions most = Instructions::kAvx512);

// values[k, i] = scale[k] · level; contiguous K×n.
void unpack_factors(const uint8_t* codes, int64_t count, const float* scale, const uint8_t* bits,
                    const int64_t* offsets, float* values, int64_t begin, int64_t end,
                    Instructions most = Instructions::kAvx512);

// out (P×Q) = sum_k left[k, i] · right[k, j]: fp32, one fma per term, k ascending from zero. This
// order is part of the wire format: every decoder yields the same bits. Rows [begin, end) of out.
void reconstruct(const float* left, const float* right, int64_t rank, int64_t rows, int64_t cols,
                 float* out, int64_t begin, int64_t end, Instructions most = Instructions::kAvx512);

}  // namespace cpu

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
namespace cuda {

// Contracts as above. Data are device pointers; scale, bits and offsets are host pointers, read
// before the call returns.
cudaError_t pack_factors(const float* values, int64_t row_stride, int64_t rank, int64_t count,
                         const float* scale, const uint8_t* bits, const int64_t* offsets,
                         uint8_t* codes, cudaStream_t stream);
cudaError_t unpack_factors(const uint8_t* codes, int64_t rank, int64_t count, const float* scale,
                           const uint8_t* bits, const int64_t* offsets, float* values,
                           cudaStream_t stream);
cudaError_t reconstruct(const float* left, const float* right, int64_t rank, int64_t rows,
                        int64_t cols, float* out, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace fedkd_fast
