// Factors to integers: one side rounded, the other fitted to it by least squares, then rounded.
//
// A (N×Q) has the near vectors u and the far ones v, A·u_k = σ_k·v_k. What is sent of the near side
// is s = rint(m·a·u); with s scaled to unit length, correlations I + E and images B = A·s, the best
// X of |A - Xᵀ·s| is (I + E)⁻¹·B, and any X gains |A|² - |A - Xᵀ·s|² = <X, 2B - X - E·X>. So what
// is lost follows from X, whatever was rounded on the way to it, and A is read once.
//
// Of the exact vectors the images are known. Only those of what was rounded off take a product with
// A, and eight bits of both do, if they are rounded by dice: 2·N·Q·K operations, and 4·N·K² for the
// fit and the gain. Vectors of zeros fill the rank up: torch's library makes a program for each
// shape of a bfloat16 product, which takes longer than to run it, and ranks are of all sizes.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "bind_linalg.h"
#include "bind_share.h"
#include "kernels.h"

namespace fedkd_fast::bind {
namespace {

// Numbers of a side that are too few for what is rounded in eight bits to cancel: in what is sent,
// and in the gain.
constexpr int64_t kFew = 1 << 16, kFewMeasured = 1 << 17;
// Entries of the far side at a time, at most: they stay in a cache, and a product takes a while to
// begin.
constexpr int64_t kTile = 512;
// Products of fewer numbers than these are little work.
constexpr int64_t kLittle = 1 << 24;
// Where vectors are as even as this, what comes out of a product has few values, and eight bits
// round all of them alike. A look at so many numbers of each will do.
constexpr double kEven = 0.9;
constexpr int64_t kLook = 2048;
constexpr int64_t kRankStep = 32;
constexpr uint32_t kNearDice = 0x9e3779b9u;  // far from those of the matrix
// Steps of Newton's method at most, by what residuals have to shrink, and the one that the last
// step may start from: it is squared.
constexpr int kNewtonSteps = 8;
constexpr double kFalling = 0.7, kClose = 0.05;
// The diagonal of (I + E)⁻¹: how much less of a vector is its own than all of it. Beyond, what
// eight bits leave of E would count for more than the fit.
constexpr float kMostInflation = 16.0f;

// Of vectors, by the share that each has of the matrix.
double evenness_of(const Tensor& vectors, const float* sigma) {
  const int64_t rank = vectors.size(0), length = vectors.size(1);
  double total = 0.0, weight = 0.0;
  for (int64_t k = 0; k < rank; ++k) {
    const double energy = static_cast<double>(sigma[k]) * static_cast<double>(sigma[k]);
    total += energy *
             cpu::evenness(vectors.const_data_ptr<float>() + k * length, std::min(length, kLook));
    weight += energy;
  }
  return weight > 0.0 ? total / weight : 1.0;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool able = __builtin_cpu_supports("avx512bf16") != 0;
#else
  constexpr bool able = false;
#endif
  return able;
}

Tensor floats(int64_t rows, int64_t cols) { return empty_on_host({rows, cols}, ScalarType::Float); }

// Rows beyond `used` are zeros.
Tensor halves(int64_t rows, int64_t cols, int64_t used) {
  Tensor made = empty_on_host({rows, cols}, ScalarType::BFloat16);
  std::memset(static_cast<BFloat16*>(made.mutable_data_ptr()) + used * cols, 0,
              static_cast<size_t>((rows - used) * cols) * sizeof(BFloat16));
  return made;
}

Tensor part(const Tensor& tensor, int64_t dim, int64_t begin, int64_t length) {
  return torch::stable::narrow(const_cast<Tensor&>(tensor), dim, begin, length);
}

float* data_of(Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
const float* data_of(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }
BFloat16* halves_of(Tensor& tensor) { return static_cast<BFloat16*>(tensor.mutable_data_ptr()); }

// Calls with the numbers of a product, whichever type they have.
template <typename Call>
auto with_numbers(const Tensor& product, const Call& call) {
  if (product.scalar_type() == ScalarType::Float) return call(data_of(product));
  return call(static_cast<const BFloat16*>(product.const_data_ptr()));
}

// The tensor, or what it is rounded to, with so many rows.
Tensor rounded(const Tensor& tensor, bool narrow, int64_t rows) {
  if (!narrow) return tensor;
  Tensor out = halves(rows, tensor.size(1), tensor.size(0));
  cpu::narrow(data_of(tensor), tensor.numel(), halves_of(out));
  return out;
}

// F of (I + E)⁻¹ = I + F, for the correlations E of vectors that were orthogonal: Newton's
// F ← F - (I + F)·R, with R = (I + E)·(I + F) - I, multiplies small numbers alone, so that a few
// bits of each do, and its bits do not depend on the number of threads as those of LAPACK's blocked
// factorisations do. Nothing where I + E is singular.
std::optional<Tensor> inverse_of(const Tensor& correlations, bool narrow) {
  const int64_t rank = correlations.size(0), count = correlations.numel();
  const float* const beside = data_of(correlations);
  const Tensor left = rounded(correlations, narrow, rank);
  Tensor inverse = floats(rank, rank), rest = floats(rank, rank);
  with_numbers(mm(left, left), [&](const auto* product) {
    cpu::subtract(product, beside, count, data_of(inverse));
  });
  double before = std::numeric_limits<double>::infinity();
  for (int step = 0; step < kNewtonSteps; ++step) {
    const Tensor right = rounded(inverse, narrow, rank);
    const double size = std::sqrt(with_numbers(mm(left, right), [&](const auto* product) {
      return cpu::add_three(product, beside, data_of(inverse), count, data_of(rest));
    }));
    if (!(size < kFalling * before)) break;
    with_numbers(mm(right, rounded(rest, narrow, rank)), [&](const auto* product) {
      cpu::step_back(product, data_of(rest), count, data_of(inverse));
    });
    if (size < kClose) return inverse;
    before = size;
  }
  Tensor whole = torch::stable::to(correlations, ScalarType::Double);
  for (int64_t k = 0; k < rank; ++k) whole.mutable_data_ptr<double>()[k * (rank + 1)] = 1.0;
  const auto [lower, failed] = cholesky(whole);
  if (failed) return std::nullopt;
  Tensor exact = torch::stable::to(cholesky_inverse(lower), ScalarType::Float);
  for (int64_t k = 0; k < rank; ++k) data_of(exact)[k * (rank + 1)] -= 1.0f;
  return exact;
}

class Fit {
 public:
  // All in order, but that the matrix may be the transpose of one that is.
  Fit(const Tensor& matrix, std::optional<Tensor> through, const Tensor& near, const Tensor& far,
      const float* sigma)
      : matrix_(matrix),
        through_(std::move(through)),
        near_(near),
        far_(far),
        rank_(near.size(0)),
        count_(far.size(1)),
        narrow_fit_(multiplies_bfloat16() && far.numel() >= kFew &&
                    evenness_of(near, sigma) < kEven && evenness_of(far, sigma) < kEven),
        narrow_gain_(narrow_fit_ && far.numel() >= kFewMeasured),
        narrow_(narrow_fit_ && !through_),
        padded_(narrow_fit_ ? (rank_ + kRankStep - 1) / kRankStep * kRankStep : rank_),
        norms_(static_cast<size_t>(rank_)),
        inverse_norms_(static_cast<size_t>(padded_)) {}

  // False where what is sent of the near side is not independent.
  bool round_near(const float* multiplier, const float* shrink) {
    const int64_t length = near_.size(1);
    sent = floats(rank_, length);
    Tensor off = floats(rank_, length);
    off_ = narrow_ ? halves(padded_, length, rank_) : off;
    const float* const near = data_of(near_);
    float *const whole = data_of(sent), *const rest = data_of(off);
    BFloat16* const narrowed = narrow_ ? halves_of(off_) : nullptr;
    for (int64_t k = 0; k < rank_; ++k) {
      const int64_t at = k * length;
      const double squares =
          cpu::round_vector(near + at, length, multiplier[k], shrink[k], whole + at, rest + at);
      // Of a sum of squares of integers: exact in any order.
      norms_[static_cast<size_t>(k)] = static_cast<float>(std::sqrt(squares));
      if (narrowed)
        cpu::narrow_by_dice(rest + at, length, kNearDice + static_cast<uint32_t>(at),
                            narrowed + at);
    }
    for (size_t k = 0; k < norms_.size(); ++k) {
      if (!(norms_[k] > 0.0f)) return false;
      inverse_norms_[k] = 1.0f / norms_[k];
    }
    if (through_) off_ = mm(off, mT(*through_));
    const Tensor rows = rounded(sent, narrow_fit_, padded_);
    correlations_ = floats(padded_, padded_);
    with_numbers(mm(rows, mT(rows)), [&](const auto* products) {
      cpu::correlate(products, inverse_norms_.data(), padded_, data_of(correlations_));
    });
    const std::optional<Tensor> inverse = inverse_of(correlations_, narrow_fit_);
    if (!inverse) return false;
    const float* const diagonal = data_of(*inverse);
    for (int64_t k = 0; k < padded_; ++k)
      if (!(1.0f + diagonal[k * (padded_ + 1)] < kMostInflation)) return false;
    inverse_ = rounded(*inverse, narrow_fit_, padded_);
    return true;
  }

  // Returns the gain. Once the near side is rounded.
  double fit_far(const float* sigma, const float* multiplier, const float* shrink,
                 const float* scale) {
    fitted = floats(rank_, count_);
    for (int64_t k = 0; k < rank_; ++k) {
      const auto i = static_cast<size_t>(k);
      known_.push_back(sigma[k] * multiplier[k] * inverse_norms_[i]);
      back_.push_back(scale[k] * norms_[i]);
      factor_.push_back(shrink[k] / back_[i]);
    }
    // X is an integer of the far side times `back`, which the correlations take on here.
    float* const weighted = data_of(correlations_);
    for (int64_t i = 0; i < rank_; ++i)
      for (int64_t j = 0; j < rank_; ++j)
        weighted[i * padded_ + j] *= back_[static_cast<size_t>(j)];
    correlations_ = narrow_gain_ ? rounded(correlations_, true, padded_)
                                 : part(part(correlations_, 0, 0, rank_), 1, 0, rank_);
    if (count_ == 0) return 0.0;
    const int64_t tiles = (count_ + kTile - 1) / kTile, width = (count_ + tiles - 1) / tiles;
    std::vector<int64_t> order(static_cast<size_t>(tiles));
    std::iota(order.begin(), order.end(), 0);
    std::vector<double> gains(order.size());
    const bool little = rank_ * count_ * near_.size(1) < kLittle;
    share_out(order, "tile", little, [&](size_t tile) {
      const int64_t begin = static_cast<int64_t>(tile) * width;
      gains[tile] = fit_tile(begin, std::min(width, count_ - begin));
    });
    return std::accumulate(gains.begin(), gains.end(), 0.0);
  }

  Tensor sent = floats(0, 0), fitted = sent;

 private:
  // Entries [begin, begin + cols) of the far side.
  double fit_tile(int64_t begin, int64_t cols) {
    Tensor images = floats(rank_, cols);
    Tensor images_narrow = narrow_fit_ ? halves(padded_, cols, rank_) : images;
    Tensor fitted_narrow = narrow_gain_ ? halves(padded_, cols, rank_) : images;
    const float* const far = data_of(far_) + begin;
    float *const image = data_of(images), *const out = data_of(fitted) + begin;
    BFloat16* const image_narrow = narrow_fit_ ? halves_of(images_narrow) : nullptr;
    BFloat16* const out_narrow = narrow_gain_ ? halves_of(fitted_narrow) : nullptr;
    with_numbers(mm(off_, mT(rows_of_matrix(begin, cols))), [&](const auto* products) {
      for (size_t k = 0; k < norms_.size(); ++k, products += cols)
        cpu::add_images(far + row(k, count_), known_[k], products, inverse_norms_[k], cols,
                        image + row(k, cols), image_narrow ? image_narrow + row(k, cols) : nullptr);
    });
    with_numbers(mm(inverse_, images_narrow), [&](const auto* products) {
      for (size_t k = 0; k < norms_.size(); ++k, products += cols)
        cpu::round_fit(image + row(k, cols), products, factor_[k], cols, out + row(k, count_),
                       out_narrow ? out_narrow + row(k, cols) : nullptr);
    });
    double gain = 0.0;
    const Tensor integers = narrow_gain_ ? fitted_narrow : part(fitted, 1, begin, cols);
    with_numbers(mm(correlations_, integers), [&](const auto* products) {
      for (size_t k = 0; k < norms_.size(); ++k, products += cols)
        gain +=
            cpu::sum_gains(out + row(k, count_), back_[k], image + row(k, cols), products, cols);
    });
    return gain;
  }

  static int64_t row(size_t k, int64_t length) { return static_cast<int64_t>(k) * length; }

  Tensor rows_of_matrix(int64_t begin, int64_t rows) const {
    if (!narrow_) return part(matrix_, 0, begin, rows);
    const bool by_rows = matrix_.stride(1) == 1;
    const int64_t outer = by_rows ? rows : matrix_.size(1),
                  inner = by_rows ? matrix_.size(1) : rows;
    const int64_t stride = by_rows ? matrix_.stride(0) : matrix_.stride(1);
    const int64_t first = by_rows ? begin * stride : begin;
    const float* const from = data_of(matrix_);
    Tensor tile = halves(outer, inner, outer);
    BFloat16* const to = halves_of(tile);
    for (int64_t i = 0; i < outer; ++i) {
      const int64_t place = first + i * stride;
      cpu::narrow_by_dice(from + place, inner, static_cast<uint32_t>(place), to + i * inner);
    }
    return by_rows ? tile : mT(tile);
  }

  const Tensor matrix_;
  const std::optional<Tensor> through_;
  const Tensor near_, far_;
  const int64_t rank_, count_;
  // Whether products of the fit, those of the gain and those with A are of bfloat16.
  const bool narrow_fit_, narrow_gain_, narrow_;
  const int64_t padded_;  // K, and the zeros beside it
  std::vector<float> norms_, inverse_norms_, known_, back_, factor_;
  Tensor off_ = sent, correlations_ = sent, inverse_ = sent;
};

void check_vector(const Tensor& vector, const char* name, int64_t rank) {
  check_tensor(vector, name, 1, ScalarType::Float);
  STD_TORCH_CHECK(vector.size(0) == rank, name, " must have a number for each row of near, ", rank,
                  ", got ", vector.size(0));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> fit_factors(const Tensor& matrix,
                                               const std::optional<Tensor>& through,
                                               const Tensor& near, const Tensor& far,
                                               const Tensor& sigma, const Tensor& multiplier,
                                               const Tensor& near_shrink, const Tensor& far_shrink,
                                               const Tensor& scale) {
  check_tensor(matrix, "matrix", 2, ScalarType::Float);
  check_tensor(near, "near", 2, ScalarType::Float);
  check_tensor(far, "far", 2, ScalarType::Float);
  if (through) check_tensor(*through, "through", 2, ScalarType::Float);
  const int64_t rank = near.size(0);
  STD_TORCH_CHECK(far.size(0) == rank && rank > 0,
                  "near and far must have the same number of rows (the rank), at least one, got ",
                  rank, " and ", far.size(0));
  STD_TORCH_CHECK(matrix.size(0) == far.size(1) &&
                      matrix.size(1) == (through ? through->size(0) : near.size(1)) &&
                      (!through || through->size(1) == near.size(1)),
                  "matrix, ", shape_text(matrix), through ? " times through, " : "",
                  through ? shape_text(*through) : "", ", must be (far, near), (", far.size(1),
                  ", ", near.size(1), ")");
  for (const auto& [vector, name] :
       {std::pair(&sigma, "sigma"), std::pair(&multiplier, "multiplier"),
        std::pair(&near_shrink, "near_shrink"), std::pair(&far_shrink, "far_shrink"),
        std::pair(&scale, "scale")})
    check_vector(*vector, name, rank);
  const bool by_rows = matrix.stride(1) == 1 || matrix.stride(0) == 1;
  const Tensor sigmas = in_order(sigma);
  Fit fit(by_rows ? matrix : in_order(matrix), through, in_order(near), in_order(far),
          data_of(sigmas));
  const Tensor factors = in_order(multiplier);
  Tensor gain = empty_on_host({}, ScalarType::Double);
  double& total = *gain.mutable_data_ptr<double>();
  total = -std::numeric_limits<double>::infinity();
  bool independent = false;
  share_out({0}, "near side", true, [&](size_t) {
    independent = fit.round_near(data_of(factors), data_of(in_order(near_shrink)));
  });
  if (!independent) {
    fit.fitted = floats(rank, far.size(1));
    std::fill_n(data_of(fit.fitted), fit.fitted.numel(), 0.0f);
    return {fit.sent, fit.fitted, gain};
  }
  total = fit.fit_far(data_of(sigmas), data_of(factors), data_of(in_order(far_shrink)),
                      data_of(in_order(scale)));
  return {fit.sent, fit.fitted, gain};
}

}  // namespace fedkd_fast::bind
