// CUDA's header where kernels are compiled as C++ (engine.h): the words that our kernels use.
#pragma once

#include <cmath>

#include "simt/engine.h"

#define __global__
#define __device__
// Blocks run one after another, so one copy serves them all; kernels that are launched
// cooperatively take dynamic shared memory instead.
#define __shared__ static
using dim3 = simt::Extent;
#define threadIdx (simt::self->thread)
#define blockIdx (simt::self->block)
#define blockDim (simt::self->block_size)
#define gridDim (simt::self->grid_size)
// clang-format off
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9,
                   cudaErrorLaunchFailure = 719 };
// clang-format on
using cudaStream_t = struct CUstream_st*;
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return simt::last_report.c_str();
  return error == cudaSuccess ? "no error" : "invalid argument or launch configuration";
}

using simt_place = std::source_location;
inline void __syncthreads(simt_place where = simt_place::current()) {
  simt::self->launch->arrive(*simt::self->block_team, where);
}
constexpr unsigned kSimtAllLanes = 0xffffffffu;

inline void __syncwarp(unsigned mask = kSimtAllLanes, simt_place where = simt_place::current()) {
  simt::Context& me = *simt::self;
  const bool all = mask == kSimtAllLanes && me.warp_team->size == simt::kWarp;
  me.launch->arrive(*me.warp_team, where,
                    all ? nullptr : "uses a warp operation without all 32 lanes");
}

// Hands this lane's value to the warp and returns that of lane `source`.
template <typename T>
T simt_exchange(unsigned mask, T value, unsigned source, simt_place where) {
  static_assert(sizeof(T) <= simt::kSlotBytes);
  simt::Context& me = *simt::self;
  const auto& slots = me.warp_team->slots[me.side];
  std::memcpy(me.warp_team->slots[me.side][me.lane], &value, sizeof(T));
  me.side ^= 1;
  __syncwarp(mask, where);
  std::memcpy(&value, slots[source], sizeof(T));
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              simt_place where = simt_place::current()) {
  const unsigned lane = simt::self->lane, span = static_cast<unsigned>(width);
  return simt_exchange(mask, value, lane / span * span + static_cast<unsigned>(source) % span,
                       where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32,
                   simt_place where = simt_place::current()) {
  const unsigned lane = simt::self->lane, span = static_cast<unsigned>(width);
  return simt_exchange(mask, value, lane % span + offset < span ? lane + offset : lane, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt_place where = simt_place::current()) {
  return simt_exchange(mask, value, simt::self->lane ^ static_cast<unsigned>(lanes), where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt_place where = simt_place::current()) {
  unsigned votes = (predicate != 0 ? 1u : 0u) << simt::self->lane;
  for (unsigned lanes = 16; lanes > 0; lanes /= 2)
    votes |= simt_exchange(mask, votes, simt::self->lane ^ lanes, where);
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, simt_place where = simt_place::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt_place where = simt_place::current()) {
  return __ballot_sync(mask, predicate, where) == kSimtAllLanes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
namespace cooperative_groups {
struct grid_group {
  void sync(simt_place where = simt_place::current()) const {
    simt::self->launch->arrive(*simt::self->grid_team, where);
  }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

template <typename T>
T atomicAdd(T* place, T value) {
  return std::atomic_ref<T>(*place).fetch_add(value, std::memory_order_relaxed);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

namespace simt {
// A test sets these; elsewhere torch knows the stream, and CUDA the device.
inline cudaStream_t current_stream = nullptr;
inline int current_device = 0;

// A launch that was accepted. It holds copies of its arguments and nothing that they point to.
struct Launched {
  std::string kernel;
  cudaStream_t stream;
  int device;
  std::function<bool()> run;  // false where it was reported
};
// Where launches go. A test may put a queue here, to run them later and again, as CUDA may.
inline bool (*submit)(const Launched&) = [](const Launched& launched) { return launched.run(); };

template <auto kKernel>
std::string kernel_name() {
  // "std::string simt::kernel_name() [with auto kKernel = NAME; std::string = ...]"
  const std::string text = __PRETTY_FUNCTION__, key = "kKernel = ";
  const std::size_t first = text.find(key) + key.size();
  return text.substr(first, text.rfind("; std::string") - first);
}
template <auto kKernel, typename... Args>
cudaError_t launch(bool cooperative, Extent grid, Extent block, std::size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  if (grid.count() == 0 || block.count() == 0 || block.count() > kMostThreads ||
      grid.y > kMostGridYZ || grid.z > kMostGridYZ || shared_bytes > kMostSharedBytes ||
      (cooperative && grid.count() > kMostCooperativeBlocks))
    return cudaErrorInvalidConfiguration;
  const auto run = [=] {
    Launch one(kernel_name<kKernel>(), grid, block, shared_bytes, cooperative);
    return one.run([&] { kKernel(args...); });
  };
  const bool sound = submit({kernel_name<kKernel>(), stream, current_device, run});
  return sound ? cudaSuccess : cudaErrorLaunchFailure;
}
}  // namespace simt
