// The fixed-order product of factors on the CPU, 2·P·Q·K operations.
//
// A panel of `right` stays in L1, and a tile of the result in registers. Splitting K into chunks
// stores and reloads fp32 accumulators, which is exact, so the order of additions stays k
// ascending: every tile, on every instruction set, gives the same bits.

#include <algorithm>
#include <cstring>

#include "cpu/streaming.h"
#include "kernels_pack_factors.h"

#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace fedkd_fast::cpu {
namespace {

constexpr int64_t kChunk = 128;  // components: 24 KiB of the widest panel

}  // namespace
}  // namespace fedkd_fast::cpu

// As many accumulators as there are registers for.
#ifdef FEDKD_X86_VECTORS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define FEDKD_ISA avx512
#define FEDKD_LANES 16
#define FEDKD_TILE_ROWS 8
#define FEDKD_TILE_VECTORS 3
#define FEDKD_FMA(a, b, c) (Vector) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#include "cpu/reconstruct_tiles.inc"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FEDKD_ISA avx2
#define FEDKD_LANES 8
#define FEDKD_TILE_ROWS 6
#define FEDKD_TILE_VECTORS 2
#define FEDKD_FMA(a, b, c) (Vector) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#include "cpu/reconstruct_tiles.inc"
#pragma GCC pop_options
#endif

#define FEDKD_ISA portable
#define FEDKD_LANES 4
#define FEDKD_TILE_ROWS 6
#define FEDKD_TILE_VECTORS 4
#ifdef __aarch64__
#define FEDKD_FMA(a, b, c) (Vector) vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b))
#else
#define FEDKD_FMA(a, b, c) \
  Vector { fma(a, b, c, 0), fma(a, b, c, 1), fma(a, b, c, 2), fma(a, b, c, 3) }
#endif
#include "cpu/reconstruct_tiles.inc"

namespace fedkd_fast::cpu {

void reconstruct(const float* left, const float* right, int64_t rank, int64_t rows, int64_t cols,
                 float* out, int64_t begin, int64_t end, [[maybe_unused]] Instructions most) {
#ifdef FEDKD_X86_VECTORS
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (most >= Instructions::kAvx512 && has_avx512)
    return avx512::multiply(left, right, rank, rows, cols, out, begin, end);
  if (most >= Instructions::kAvx2 && has_avx2)
    return avx2::multiply(left, right, rank, rows, cols, out, begin, end);
#endif
  portable::multiply(left, right, rank, rows, cols, out, begin, end);
}

}  // namespace fedkd_fast::cpu
