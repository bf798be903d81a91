// fit_factors: the part of kernels.h that rounds one side of factors and fits the other to it.
//
// Between its matrix products, which are torch's, the data passes through these once each, a row of
// K at a time. Products are float, or BFloat16 where they were rounded to that; arithmetic is fp32.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace fedkd_fast {
namespace cpu {

// |v|₁² / (n·|v|₂²) of its n numbers that are not 0: 1 where all have one magnitude, 0.64 where
// they are as Gaussian noise.
double evenness(const float* values, int64_t count);

// sent = rint(near · (multiplier · shrink)), off = sent - near · multiplier; returns |sent|².
double round_vector(const float* near, int64_t count, float multiplier, float shrink, float* sent,
                    float* off);

// To the nearest, ties to even.
void narrow(const float* from, int64_t count, BFloat16* to);

// Up or down by a die of the place of each number, `place` and on, so that on average nothing is
// lost.
void narrow_by_dice(const float* from, int64_t count, uint32_t place, BFloat16* to);

// correlations = products · inverse_norms · inverse_normsᵀ (K×K), with a diagonal of zeros.
void correlate(const float* products, const float* inverse_norms, int64_t rank,
               float* correlations);
void correlate(const BFloat16* products, const float* inverse_norms, int64_t rank,
               float* correlations);

// out = product - values.
void subtract(const float* product, const float* values, int64_t count, float* out);
void subtract(const BFloat16* product, const float* values, int64_t count, float* out);

// out = product + a + b; returns its squared norm.
double add_three(const float* product, const float* a, const float* b, int64_t count, float* out);
double add_three(const BFloat16* product, const float* a, const float* b, int64_t count,
                 float* out);

// values -= product + rest.
void step_back(const float* product, const float* rest, int64_t count, float* values);
void step_back(const BFloat16* product, const float* rest, int64_t count, float* values);

// images = far · known + products · inverse_norm; narrowed also, where that is not null.
void add_images(const float* far, float known, const float* products, float inverse_norm,
                int64_t count, float* images, BFloat16* narrowed);
void add_images(const float* far, float known, const BFloat16* products, float inverse_norm,
                int64_t count, float* images, BFloat16* narrowed);

// fitted = rint((images + corrections) · factor); narrowed also, where that is not null.
void round_fit(const float* images, const float* corrections, float factor, int64_t count,
               float* fitted, BFloat16* narrowed);
void round_fit(const float* images, const BFloat16* corrections, float factor, int64_t count,
               float* fitted, BFloat16* narrowed);

// sum of X · (2 · images - X - crossed), X = fitted · back.
double sum_gains(const float* fitted, float back, const float* images, const float* crossed,
                 int64_t count);
double sum_gains(const float* fitted, float back, const float* images, const BFloat16* crossed,
                 int64_t count);

}  // namespace cpu
}  // namespace fedkd_fast
