// Quantised factor packing on CUDA: codes to bit stream, back, and the fixed-order product.
//
// Mapping. pack and unpack: one thread for 8 values of a row, two 16-byte accesses, because 8 codes
// of b bits are exactly b bytes and so no two threads share a byte; grid.x covers the row's groups,
// grid.y the rows. What a row needs (scale, width, place) travels as a kernel argument, 256 rows a
// launch: nothing is copied to the device, so launches are asynchronous and a CUDA graph can hold
// them. reconstruct: a block for a tile of the product, both sides' part of it in shared memory, a
// thread for 4 x 4 of its values, k ascending, one __fmaf_rn per term: the wire format's order, so
// the bits do not depend on the tiles. Formulas come from common/quantise.h; this file is compiled
// with --fmad=false, so the only fused operations are the written ones. Limits: rows of any length,
// at most 2^31-1 groups a row.

#include <cstring>

#include "common/quantise.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace fedkd_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 8;  // values per thread

// reconstruct: a block makes a tile, of as many rows as columns, from so many components at once.
constexpr int kTile = 64, kDepth = 16;
constexpr int kTileVectors = kTile / Vector<float>::kSize;
static_assert(kDepth * kTileVectors == kTileVectors * kTileVectors);  // a thread for each vector

constexpr int kBatch = 256;  // rows a launch: 3.3 KiB of the 4 KiB that arguments may take

struct Rows {
  int64_t offset[kBatch];
  float scale[kBatch];
  uint8_t bits[kBatch];
};

__device__ int64_t first_of_group() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup;
}

__global__ void pack_factors_kernel(const float* values, int64_t row_stride, int64_t count,
                                    Rows rows, uint8_t* codes) {
  const int64_t first = first_of_group();
  const int width = rows.bits[blockIdx.y];
  if (first >= count || width == 0) return;
  const float* const row = values + blockIdx.y * row_stride + first;
  const bool full = first + kGroup <= count;
  const int size = full ? kGroup : static_cast<int>(count - first);
  Vector<float> low{}, high{};
  if (full) {
    low = load_vector(row, is_aligned(row));
    high = load_vector(row + 4, is_aligned(row));
  } else {
    for (int i = 0; i < size; ++i) (i < 4 ? low : high).at[i % 4] = row[i];
  }
  const float inverse = inverse_step(rows.scale[blockIdx.y]);
  uint8_t* out = codes + rows.offset[blockIdx.y] + first / kGroup * width;
  uint64_t window = 0;
  int held = 0;
  for (int i = 0; i < size; ++i) {
    const float value = (i < 4 ? low : high).at[i % 4];
    window |= static_cast<uint64_t>(quantise(value, inverse, width)) << held;
    for (held += width; held >= 8; held -= 8, window >>= 8) *out++ = static_cast<uint8_t>(window);
  }
  if (held > 0) *out = static_cast<uint8_t>(window);
}

__global__ void unpack_factors_kernel(const uint8_t* codes, int64_t count, Rows rows,
                                      float* values) {
  const int64_t first = first_of_group();
  if (first >= count) return;
  const int width = rows.bits[blockIdx.y];
  const bool full = first + kGroup <= count;
  const int size = full ? kGroup : static_cast<int>(count - first);
  const uint8_t* in = codes + rows.offset[blockIdx.y] + first / kGroup * width;
  Vector<float> low{}, high{};  // a row without bits stays zero
  uint64_t window = 0;
  int held = 0;
  for (int i = 0; i < size && width > 0; ++i) {
    for (; held < width; held += 8) window |= static_cast<uint64_t>(*in++) << held;
    const uint32_t code = static_cast<uint32_t>(window) & ((1u << width) - 1u);
    (i < 4 ? low : high).at[i % 4] = dequantise(code, rows.scale[blockIdx.y], width);
    window >>= width;
    held -= width;
  }
  float* const row = values + blockIdx.y * count + first;
  if (full) {
    store_vector(row, low, is_aligned(row));
    store_vector(row + 4, high, is_aligned(row));
  } else {
    for (int i = 0; i < size; ++i) row[i] = (i < 4 ? low : high).at[i % 4];
  }
}

FEDKD_HD int64_t tiles_of(int64_t length) { return (length + kTile - 1) / kTile; }

// Brings a tile's part of one side, `depth` components of it, into shared memory: a vector a
// thread.
__device__ void stage(const float* side, int64_t length, int64_t first, int depth,
                      Vector<float> (*part)[kTileVectors]) {
  const int k = static_cast<int>(threadIdx.x) / kTileVectors;
  const int vector = static_cast<int>(threadIdx.x) % kTileVectors;
  const int64_t at = first + vector * Vector<float>::kSize;
  if (k >= depth) return;
  const float* const place = side + k * length + at;
  Vector<float> values{};  // what lies beyond the edge is never stored
  if (at + Vector<float>::kSize <= length) {
    values = load_vector(place, is_aligned(place));
  } else {
    for (int i = 0; i < Vector<float>::kSize; ++i)
      if (at + i < length) values.at[i] = place[i];
  }
  part[k][vector] = values;
}

__global__ void reconstruct_kernel(const float* left, const float* right, int64_t rank,
                                   int64_t rows, int64_t cols, float* out) {
  constexpr int kStep = Vector<float>::kSize;
  __shared__ Vector<float> of_left[kDepth][kTileVectors], of_right[kDepth][kTileVectors];
  const int my_row = static_cast<int>(threadIdx.x) / kTileVectors;
  const int my_col = static_cast<int>(threadIdx.x) % kTileVectors;
  const int64_t across = tiles_of(cols), tiles = tiles_of(rows) * across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t top = tile / across * kTile, start = tile % across * kTile;
    Vector<float> sums[kStep] = {};
    for (int64_t begin = 0; begin < rank; begin += kDepth) {
      const int depth = rank - begin < kDepth ? static_cast<int>(rank - begin) : kDepth;
      __syncthreads();  // all have read what lies there
      stage(left + begin * rows, rows, top, depth, of_left);
      stage(right + begin * cols, cols, start, depth, of_right);
      __syncthreads();
      // Not beyond the last component: a sum of -0 plus 0 would be +0.
      for (int k = 0; k < depth; ++k) {
        const Vector<float> factors = of_left[k][my_row], terms = of_right[k][my_col];
        for (int i = 0; i < kStep; ++i)
          for (int c = 0; c < kStep; ++c)
            sums[i].at[c] = __fmaf_rn(factors.at[i], terms.at[c], sums[i].at[c]);
      }
    }
    const int64_t row = top + my_row * kStep, col = start + my_col * kStep;
    for (int i = 0; i < kStep; ++i) {
      if (row + i >= rows) continue;
      float* const place = out + (row + i) * cols + col;
      if (col + kStep <= cols) {
        store_vector(place, sums[i], is_aligned(place));
      } else {
        for (int c = 0; c < kStep; ++c)
          if (col + c < cols) place[c] = sums[i].at[c];
      }
    }
  }
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// Calls `launch_rows(first, count, rows)` for every batch of rows.
template <typename Launch>
cudaError_t for_each_batch(int64_t rank, const float* scale, const uint8_t* bits,
                           const int64_t* offsets, const Launch& launch_rows) {
  for (int64_t first = 0; first < rank; first += kBatch) {
    const auto size = static_cast<size_t>(rank - first < kBatch ? rank - first : kBatch);
    Rows rows{};
    memcpy(rows.offset, offsets + first, size * sizeof(*offsets));
    memcpy(rows.scale, scale + first, size * sizeof(*scale));
    memcpy(rows.bits, bits + first, size * sizeof(*bits));
    const cudaError_t error = launch_rows(first, static_cast<unsigned>(size), rows);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t pack_factors(const float* values, int64_t row_stride, int64_t rank, int64_t count,
                         const float* scale, const uint8_t* bits, const int64_t* offsets,
                         uint8_t* codes, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const unsigned blocks = blocks_for((count + kGroup - 1) / kGroup);
  return for_each_batch(rank, scale, bits, offsets,
                        [&](int64_t first, unsigned size, const Rows& rows) {
                          return launch<pack_factors_kernel>(dim3(blocks, size), dim3(kThreads), 0,
                                                             stream, values + first * row_stride,
                                                             row_stride, count, rows, codes);
                        });
}

cudaError_t unpack_factors(const uint8_t* codes, int64_t rank, int64_t count, const float* scale,
                           const uint8_t* bits, const int64_t* offsets, float* values,
                           cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const unsigned blocks = blocks_for((count + kGroup - 1) / kGroup);
  return for_each_batch(
      rank, scale, bits, offsets, [&](int64_t first, unsigned size, const Rows& rows) {
        return launch<unpack_factors_kernel>(dim3(blocks, size), dim3(kThreads), 0, stream, codes,
                                             count, rows, values + first * count);
      });
}

cudaError_t reconstruct(const float* left, const float* right, int64_t rank, int64_t rows,
                        int64_t cols, float* out, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  return launch<reconstruct_kernel>(dim3(blocks_of(tiles_of(rows) * tiles_of(cols))),
                                    dim3(kTileVectors * kTileVectors), 0, stream, left, right, rank,
                                    rows, cols, out);
}

}  // namespace fedkd_fast::cuda
