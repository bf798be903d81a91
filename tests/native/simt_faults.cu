// Kernels with one fault each, and sound ones beside them: what the simt engine and the sanitizers
// must report, or let pass. `simt_faults NAME` runs one and exits with 1 where the launch failed.

#include <cooperative_groups.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/launch.cuh"

namespace {

using fedkd_fast::cuda::dynamic_shared;
using fedkd_fast::cuda::launch;

constexpr unsigned kThreads = 64;

// Reads its neighbour's value, which a barrier must have made visible.
template <bool kBarrier>
__global__ void rotate_kernel(const int* in, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

// The second round overwrites what slow threads may still be reading.
template <bool kBarrier>
__global__ void reuse_kernel(int* out) {
  int* values = dynamic_shared<int>();
  for (int round = 0; round < 2; ++round) {
    if (kBarrier || round == 0) __syncthreads();
    values[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
    __syncthreads();
    out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  }
}

template <bool kAtomic>
__global__ void count_kernel(int* total) {
  if (kAtomic)
    atomicAdd(total, 1);
  else
    *total += 1;
}

__global__ void divergent_kernel() {
  if (threadIdx.x < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void early_return_kernel() {
  if (blockIdx.x == 1 && threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    cooperative_groups::this_grid().sync();
}

// One block parts in two that wait for each other; the other block returns, perhaps later.
__global__ void parted_block_kernel() {
  if (blockIdx.x == 0) return;
  if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    __syncthreads();
}

__global__ void partial_warp_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);
}

__global__ void overrun_static_kernel(int* out, unsigned past) {
  __shared__ int values[kThreads];
  values[threadIdx.x + past] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void overrun_dynamic_kernel(int* out, unsigned past) {
  int* values = dynamic_shared<int>();
  values[threadIdx.x + past] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// Beside a thread's own array, behind a barrier: its stack is watched also when it goes on.
__global__ void overrun_local_kernel(int* out, unsigned past) {
  int values[kThreads] = {};
  __syncthreads();
  values[threadIdx.x + past] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// Sound: every warp operation against what it must return.
__global__ void warp_kernel(int* wrong) {
  const int lane = static_cast<int>((threadIdx.y * blockDim.x + threadIdx.x) % 32);
  constexpr unsigned kAll = 0xffffffffu;
  int bad = 0;
  bad += __shfl_sync(kAll, lane, 7) != 7;
  bad += __shfl_sync(kAll, lane, 3, 8) != lane / 8 * 8 + 3;
  bad += __shfl_down_sync(kAll, lane, 4) != (lane < 28 ? lane + 4 : lane);
  bad += __shfl_xor_sync(kAll, 1.5 * lane, 16) != 1.5 * (lane ^ 16);
  bad += __ballot_sync(kAll, lane % 2) != 0xaaaaaaaau;
  bad += __any_sync(kAll, lane == 9) != 1;
  bad += __all_sync(kAll, lane < 31) != 0;
  __syncwarp();
  if (bad) atomicAdd(wrong, bad);
}

// Sound: blocks of a cooperative launch see each other's writes across the grid's barrier.
__global__ void grid_kernel(int* values, int* out) {
  values[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(blockIdx.x);
  cooperative_groups::this_grid().sync();
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[next * blockDim.x + threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> in(256, 3), out(256, 0);
  int total = 0;
  const auto run = [&](const char* name) {
    const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
    const dim3 one(1), two(2), block(kThreads);
    constexpr size_t kBytes = kThreads * sizeof(int);
    if (is("rotate"))
      return launch<rotate_kernel<true>>(two, block, 0, nullptr, in.data(), out.data());
    if (is("rotate-without-barrier"))
      return launch<rotate_kernel<false>>(two, block, 0, nullptr, in.data(), out.data());
    if (is("reuse")) return launch<reuse_kernel<true>>(one, block, kBytes, nullptr, out.data());
    if (is("reuse-without-barrier"))
      return launch<reuse_kernel<false>>(one, block, kBytes, nullptr, out.data());
    if (is("count")) return launch<count_kernel<true>>(two, block, 0, nullptr, &total);
    if (is("count-without-atomic"))
      return launch<count_kernel<false>>(two, block, 0, nullptr, &total);
    if (is("divergent")) return launch<divergent_kernel>(two, block, 0, nullptr);
    if (is("early-return")) return launch<early_return_kernel>(two, block, 0, nullptr);
    if (is("deadlock")) return simt::launch<deadlock_kernel>(true, two, block, 0, nullptr);
    if (is("parted-block")) return simt::launch<parted_block_kernel>(true, two, block, 0, nullptr);
    if (is("partial-warp")) return launch<partial_warp_kernel>(one, block, 0, nullptr, out.data());
    if (is("overrun-static"))
      return launch<overrun_static_kernel>(one, block, 0, nullptr, out.data(), 1u);
    if (is("overrun-dynamic"))
      return launch<overrun_dynamic_kernel>(one, block, kBytes, nullptr, out.data(), 1u);
    if (is("overrun-local"))
      return launch<overrun_local_kernel>(one, block, 0, nullptr, out.data(), 1u);
    if (is("warp")) return launch<warp_kernel>(two, dim3(16, 4), 0, nullptr, &total);
    if (is("grid"))
      return simt::launch<grid_kernel>(true, dim3(4), block, 0, nullptr, in.data(), out.data());
    if (is("too-many-threads")) return launch<divergent_kernel>(one, dim3(1025), 0, nullptr);
    if (is("too-many-blocks"))
      return simt::launch<divergent_kernel>(true, dim3(5), block, 0, nullptr);
    return cudaErrorInvalidValue;
  };
  const cudaError_t error = run(argc == 2 ? argv[1] : "");
  long sum = 0;
  for (int value : out) sum += value;
  std::printf("error %d, total %d, sum %ld\n", static_cast<int>(error), total, sum);
  return error == cudaSuccess ? 0 : 1;
}
