// The one place where kernels are launched: no <<<>>> stands in a kernel file, so that the same
// text can later be executed without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace fedkd_fast::cuda {

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(std::forward<Args>(args))...);
  return cudaGetLastError();
}

}  // namespace fedkd_fast::cuda
