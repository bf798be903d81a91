// The one place where kernels are launched: no <<<>>> stands in a kernel file, so that the same
// text is also executed on the CPU (simt/), where FEDKD_FAST_SIMT is defined.
//
// A kernel is a template argument: launch<kernel>(grid, block, shared_bytes, stream, args...). It
// returns at once, with cudaSuccess where the launch was accepted.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fedkd_fast::cuda {

#ifdef FEDKD_FAST_SIMT

// Along each side of a grid; what is beyond, blocks do in turn. Few here, so that they have to.
constexpr int64_t kMostBlocks = 2;
// Threads of a block that has a multiprocessor to itself; few, so that small sizes need several.
constexpr int kLargeBlock = 64;
// Little, so that small matrices already do not fit.
inline int64_t most_shared_bytes() { return 16 * 1024; }

template <auto kKernel, typename... Args>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  return simt::launch<kKernel>(false, grid, block, shared_bytes, stream,
                               std::forward<Args>(args)...);
}

// Dynamic shared memory of the block, aligned to 16 bytes.
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::self->shared);
}

#else

constexpr int64_t kMostBlocks = 65535;
constexpr int kLargeBlock = 512;
constexpr size_t kPlainSharedBytes = 48 * 1024;  // more than that has to be asked for

// That a block of the current device may ask for.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    return kPlainSharedBytes;
  return bytes;
}

template <auto kKernel, typename... Args>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  // What kernels have besides, static, is less than half of that.
  if (shared_bytes > kPlainSharedBytes / 2) {
    cudaFuncAttributes facts;
    cudaError_t error = cudaFuncGetAttributes(&facts, kKernel);
    if (error != cudaSuccess) return error;
    // All there is, not what this launch takes: another thread may launch the same kernel with more
    // or less between here and there.
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(most_shared_bytes() - facts.sharedSizeBytes));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kKernel<<<grid, block, shared_bytes, stream>>>(std::forward<Args>(args)...);
  // clang-format on
  return cudaGetLastError();
}

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fedkd_fast_shared[];
  return reinterpret_cast<T*>(fedkd_fast_shared);
}

#endif

inline unsigned blocks_of(int64_t wanted) {
  return static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
}

}  // namespace fedkd_fast::cuda
