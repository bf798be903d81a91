// The one place where kernels are launched: no <<<>>> stands in a kernel file, so that the same
// text is also executed on CPU threads (simt/), where FEDKD_FAST_SIMT is defined.
//
// A kernel is a template argument: launch<kernel>(grid, block, shared_bytes, stream, args...). It
// returns at once, with cudaSuccess where the launch was accepted.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace fedkd_fast::cuda {

#ifdef FEDKD_FAST_SIMT

template <auto kKernel, typename... Args>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args&&... args) {
  return simt::launch<kKernel>(false, grid, block, shared_bytes, std::forward<Args>(args)...);
}

// Dynamic shared memory of the block, aligned to 16 bytes.
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::self->shared);
}

#else

template <auto kKernel, typename... Args>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
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

}  // namespace fedkd_fast::cuda
