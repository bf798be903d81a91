// 16 bytes at once: neighbouring values of a row as one load or store.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace fedkd_fast::cuda {

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T at[kSize];
};

template <typename T>
__device__ bool is_aligned(const T* place) {
  return reinterpret_cast<uintptr_t>(place) % 16 == 0;
}

// `whole` says that the place is aligned. The values are the same otherwise, one by one, so that
// results do not depend on where a tensor begins.
template <typename T>
__device__ Vector<T> load_vector(const T* place, bool whole) {
  if (whole) return *reinterpret_cast<const Vector<T>*>(place);
  Vector<T> loaded;
  for (int i = 0; i < Vector<T>::kSize; ++i) loaded.at[i] = place[i];
  return loaded;
}

template <typename T>
__device__ void store_vector(T* place, const Vector<T>& values, bool whole) {
  if (whole) {
#ifdef __CUDA_ARCH__
    // In so many words: of values that were computed, the compiler makes four stores.
    uint4 words;
    memcpy(&words, &values, sizeof(words));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
#else
    *reinterpret_cast<Vector<T>*>(place) = values;
#endif
    return;
  }
  for (int i = 0; i < Vector<T>::kSize; ++i) place[i] = values.at[i];
}

}  // namespace fedkd_fast::cuda
