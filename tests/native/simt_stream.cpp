// What tests/test_simt_stream.py needs of the ops on the simt engine: a note of every launch, a
// stream that it may hold, and an op that breaks one rule at a time.

#include <malloc.h>

#include <optional>

#include "bind_torch.h"
#include "cuda/launch.cuh"

namespace {

using fedkd_fast::bind::GpuScope;
using fedkd_fast::bind::Tensor;

constexpr int kDead = 0xff;  // NaN in every floating format, as the engine's poison

std::vector<simt::Launched> noted;
bool held = false;

bool note(const simt::Launched& launched) {
  noted.push_back(launched);
  return held || launched.run();
}

// Takes the place of the frames of calls that have returned.
__attribute__((noinline)) void overwrite_stack() {
  volatile unsigned char frames[256 * 1024];
  for (volatile unsigned char& byte : frames) byte = kDead;
}

float factor_of(float value) { return value; }
float factor_of(const float* place) { return *place; }

template <typename Factor>
__global__ void planted_kernel(const float* values, int64_t count, Factor factor, float* out) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = values[i] * factor_of(factor);
}

// values · values[0], with the fault that is named, or with none.
Tensor planted(const Tensor& values, std::string fault) {
  std::optional<GpuScope> gpu;
  if (fault == "lasting guard") new GpuScope(values);
  if (fault != "no guard") gpu.emplace(values);
  const cudaStream_t stream = fault == "default stream" ? nullptr : simt::current_stream;
  const float* const data = values.const_data_ptr<float>();
  const int64_t count = values.size(0);
  Tensor result = fedkd_fast::bind::empty_like_device(values, {count}, values.scalar_type());
  float* const out = result.mutable_data_ptr<float>();
  const auto scale_by = [&](auto factor) {
    fedkd_fast::bind::check_launch(fedkd_fast::cuda::launch<planted_kernel<decltype(factor)>>(
        dim3(1), dim3(simt::kWarp), 0, stream, data, count, factor, out));
  };
  if (fault == "early read") {
    scale_by(data[0]);
  } else if (fault == "dead heap") {
    const std::vector<float> copy(1, data[0]);
    scale_by(copy.data());
  } else if (fault == "dead stack") {
    const float copy = data[0];
    scale_by(&copy);
  } else if (fault == "dead tensor") {
    const Tensor copy = torch::stable::clone(values);
    scale_by(copy.const_data_ptr<float>());
  } else {
    scale_by(data);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fedkd_fast_simt, m) {
  m.def("planted(Tensor values, str fault) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fedkd_fast_simt, CPU, m) { m.impl("planted", TORCH_BOX(&planted)); }

extern "C" {

// From here on `stream` is the current one and launches are noted. Where they are held, they wait
// for simt_run, and freed memory is overwritten: large blocks whole, small ones at their start.
void simt_listen(cudaStream_t stream, bool hold) {
  simt::current_stream = stream;
  simt::submit = note;
  held = hold;
  noted.clear();
  if (hold) mallopt(M_PERTURB, kDead);
}

// Runs what is held, in order, once more; false where a launch was reported.
bool simt_run() {
  overwrite_stack();
  return std::all_of(noted.begin(), noted.end(), [](const auto& one) { return one.run(); });
}

// The kernel of a noted launch, its stream and device; null behind the last.
const char* simt_noted(size_t index, cudaStream_t* stream, int* device) {
  if (index >= noted.size()) return nullptr;
  *stream = noted[index].stream;
  *device = noted[index].device;
  return noted[index].kernel.c_str();
}

int simt_current_device() { return simt::current_device; }

// Everything as it was before the first simt_listen.
void simt_ignore() {
  simt::current_stream = nullptr;
  simt::current_device = 0;
  simt::submit = [](const simt::Launched& launched) { return launched.run(); };
  held = false;
  noted.clear();
  mallopt(M_PERTURB, 0);
}

}  // extern "C"
