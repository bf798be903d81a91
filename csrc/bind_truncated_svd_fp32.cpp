// Leading factors of one matrix in fp32, on the CPU.
//
// X is the matrix or its transpose, M×N with M >= N. Two ways lead there:
//
// * subspace: B ← orth(XᵀX·B), then (XB)ᵀ(XB) = W Λ Wᵀ, V = B·W, U = X·V/σ (Halko, Martinsson,
//   Tropp 2011). What V captures of |X|² is |X·V|² exactly, so the last product alone, in fp32,
//   certifies the energy. Those before it only turn the subspace, which takes no more than 7 bits
//   of each factor: levels of one step a row, where the machine multiplies int8. A start from the
//   long-side vectors of an earlier matrix is worth half a pass more than one from its short side:
//   Xᵀ·U, then one whole pass. A cold start predicts its width from a narrow sketch.
// * Gram: XᵀX and all of its eigenvectors, where the subspace would be more than half of them. eigh
//   mixes vectors of small σ by eps·σ₁²/σ²; a Newton-Schulz step makes them orthogonal again.
//
// Cost for width L: three products of 2·M·N·L operations in int8 and one in fp32, two
// orthonormalisations of about 4·N·L², one eigenproblem of side L, 2·M·L² for its matrix and
// 2·(M+N)·L·K for the vectors. Components are rows here, as they leave: (L, M) and (L, N).

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "bind_rows.h"
#include "bind_truncated_svd.h"
#include "kernels.h"

namespace fedkd_fast::bind::on_cpu_half {
namespace {

// What rounding in fp32 can make of an energy, as a share of the total: products of vectors that
// are orthogonal to a few eps. K is chosen for that much more.
constexpr double kEnergySlack = 5e-6;
constexpr double kOversampling = 1.08;
constexpr int64_t kFewestSpare = 4;  // directions beyond those that are wanted
// Shares of the short side beyond which all eigenvectors are cheaper: where the long side is about
// as long, and where it is at least twice that.
constexpr double kMostDirections = 0.58, kMostDirectionsOfTall = 0.68;
// A short side up to which all eigenvectors are cheaper than a sketch, and than a subspace of more
// than this share of it.
constexpr int64_t kLittleSide = 128;
constexpr double kMostDirectionsOfLittle = 0.3;
constexpr int64_t kSketchShare = 12, kLeastSketch = 16;
// XᵀX - shift·I converges faster where the shift lies among the energies that are not wanted.
constexpr double kShift = 0.2;  // of the least energy that is wanted
// An earlier basis that holds less than this share of what is wanted gets a second pass.
constexpr double kGoodStart = 0.45;
constexpr int kMostWidenings = 4;
// The least energy wanted, in means of those wanted, and the share of energy that call for a second
// round.
constexpr double kFlat = 0.25, kRatherFlat = 0.1, kDelicateEnergy = 0.99;
constexpr int64_t kFewComponents = 8;  // whose least energy is never far from their mean

bool multiplies_int8() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool able = __builtin_cpu_supports("avx512vnni") != 0;
  return able;
#else
  return false;
#endif
}

// ---- products -----------------------------------------------------------------------------------

// Products with a matrix X, M×N, and its transpose: exact ones in fp32, and coarse ones.
class Products {
 public:
  explicit Products(const Tensor& matrix)
      : matrix_(matrix),
        transposed_(matrix.size(0) <= matrix.size(1)),
        coarse_(multiplies_int8() && matrix.size(0) < kMostInt8Terms &&
                matrix.size(1) < kMostInt8Terms) {
    if (!coarse_) return;
    const int64_t rows = matrix.size(0), cols = matrix.size(1);
    levels_ = empty_like_device(matrix, {rows, cols}, ScalarType::Char);
    row_steps_.resize(static_cast<size_t>(rows));
    ones_.assign(static_cast<size_t>(std::max(rows, cols)), 1.0f);
    cpu::quantise_rows(matrix.const_data_ptr<float>(), rows, cols, ones_.data(),
                       static_cast<int8_t*>(levels_->mutable_data_ptr()), row_steps_.data());
  }

  int64_t long_side() const { return std::max(matrix_.size(0), matrix_.size(1)); }
  int64_t short_side() const { return std::min(matrix_.size(0), matrix_.size(1)); }

  // rows (L, N) · Xᵀ
  Tensor to_long(const Tensor& rows) const { return mm(rows, transposed_ ? matrix_ : mT(matrix_)); }
  // XᵀX, its lower triangle.
  Tensor gram() const { return lower_gram(transposed_ ? matrix_ : mT(matrix_)); }

  Tensor roughly_to_long(const Tensor& rows) const { return rough(rows, transposed_, nullptr, 0); }
  // rows (L, M) · X - shift · basis
  Tensor roughly_to_short(const Tensor& rows, const Tensor* basis = nullptr,
                          float shift = 0.0f) const {
    return rough(rows, !transposed_, basis, shift);
  }

 private:
  // rows · matrix where they are as long as its columns, rows · matrixᵀ otherwise.
  Tensor rough(const Tensor& rows, bool along_columns, const Tensor* basis, float shift) const {
    const int64_t count = rows.size(0);
    if (!coarse_) {
      Tensor out = mm(rows, along_columns ? matrix_ : mT(matrix_));
      if (basis)
        cpu::subtract_scaled(out.mutable_data_ptr<float>(), basis->const_data_ptr<float>(), shift,
                             out.numel());
      return out;
    }
    Tensor levels = empty_like_device(rows, {count, rows.size(1)}, ScalarType::Char);
    std::vector<float> steps(static_cast<size_t>(count));
    cpu::quantise_rows(rows.const_data_ptr<float>(), count, rows.size(1),
                       along_columns ? row_steps_.data() : ones_.data(),
                       static_cast<int8_t*>(levels.mutable_data_ptr()), steps.data());
    const Tensor sums = int_mm(levels, along_columns ? *levels_ : mT(*levels_));
    Tensor out = empty_like_device(rows, {count, sums.size(1)}, ScalarType::Float);
    cpu::dequantise_rows(static_cast<const int32_t*>(sums.const_data_ptr()), count, sums.size(1),
                         steps.data(), along_columns ? ones_.data() : row_steps_.data(),
                         basis ? basis->const_data_ptr<float>() : nullptr, shift,
                         out.mutable_data_ptr<float>());
    return out;
  }

  const Tensor matrix_;
  const bool transposed_, coarse_;
  std::optional<Tensor> levels_;  // int8: matrix ≈ diag(row_steps) · levels
  std::vector<float> row_steps_, ones_;
};

// ---- the solver ---------------------------------------------------------------------------------

struct Subspace {
  Tensor start;        // (L, M): the next pass begins with it
  int64_t known = 0;   // rows of it that are not random
  double least = 0.0;  // the least energy that is wanted, as far as one knows
  int passes = 1;      // of the next refinement
  Tensor basis;        // (L, N), orthonormal
  Tensor images;       // (L, M): X·basis
  std::vector<double> energies;
  Tensor vectors;  // (L, L), ascending columns
};

class Solver {
 public:
  Solver(const Tensor& matrix, double total, const Goal& goal, uint64_t seed)
      : x_(matrix),
        total_(total),
        goal_(goal),
        seed_(seed),
        long_(x_.long_side()),
        side_(x_.short_side()),
        tall_(long_ >= 2 * side_),
        most_width_(static_cast<int64_t>((side_ <= kLittleSide ? kMostDirectionsOfLittle
                                          : tall_              ? kMostDirectionsOfTall
                                                               : kMostDirections) *
                                         static_cast<double>(side_))) {}

  std::optional<Found> solve(const Earlier& earlier) const {
    if (side_ <= kLittleSide && !earlier.shares) return by_gram();
    Subspace subspace;
    int64_t width = start(earlier, subspace);
    bool settled = false;
    for (int widening = 0; width <= most_width_ && widening < kMostWidenings; ++widening) {
      refine(subspace);
      subspace.images = x_.to_long(subspace.basis);
      decompose(subspace, tall_);
      const int64_t rank = goal_.choose(subspace.energies, total_, side_, kEnergySlack);
      if (rank >= 0 && !settled && is_delicate(subspace.energies, rank)) {
        settled = true;
        width = std::max(width, width_of(rank));
        if (width <= most_width_) widen(subspace, width);
        continue;
      }
      if (rank >= 0) {
        if (const auto found = finish(subspace, rank)) return found;
        decompose(subspace, true);
        return finish(subspace, rank);
      }
      width = std::max(width + width / 8,
                       width_of(goal_.predict(subspace.energies, width * 4 / 5, total_, side_)));
      if (width <= most_width_) widen(subspace, width);
    }
    return by_gram();
  }

 private:
  Tensor random_rows(int64_t rows, int64_t length) const {
    Tensor out = empty_like_device(anchor(), {rows, length}, ScalarType::Float);
    cpu::random_signs(seed_ + static_cast<uint64_t>(rows), rows * length,
                      out.mutable_data_ptr<float>());
    return out;
  }
  static Tensor anchor() { return torch::stable::empty({0}, ScalarType::Float); }

  // The rows, then images of random directions.
  Tensor extended(const Tensor& rows, int64_t width) const {
    const int64_t more = width - rows.size(0);
    return more > 0 ? stacked(rows, x_.roughly_to_long(random_rows(more, side_))) : rows;
  }

  int64_t width_of(int64_t rank) const { return std::min(side_, width_for(rank, kOversampling)); }

  // Where nearly the whole subspace is wanted, or energies hardly fall up to the last one wanted,
  // or hardly any may be lost, one that has not settled takes 5 % more components than suffice.
  bool is_delicate(const std::vector<double>& energies, int64_t rank) const {
    if (rank == 0) return false;
    if (rank + kFewestSpare > static_cast<int64_t>(energies.size())) return true;
    const double least = energy_at(energies, rank);
    const double captured = std::accumulate(energies.begin(), energies.begin() + rank, 0.0);
    const bool flat = least * static_cast<double>(rank) > kFlat * captured;
    return (rank >= kFewComponents && flat) || goal_.energy > kDelicateEnergy;
  }

  // The energy of component `rank`, counted from 1; 0 where it is not among them.
  static double energy_at(const std::vector<double>& energies, int64_t rank) {
    return rank >= 1 && rank <= static_cast<int64_t>(energies.size())
               ? energies[static_cast<size_t>(rank - 1)]
               : 0.0;
  }

  // Random directions need more than one pass where energies hardly fall.
  int passes_from_nothing(const std::vector<double>& energies, int64_t rank) const {
    const int64_t last = std::min(rank, static_cast<int64_t>(energies.size()));
    const double least = energy_at(energies, last);
    const bool flat =
        rank >= kFewComponents && least * static_cast<double>(rank) > kRatherFlat * total_;
    return goal_.by == StopBy::kEnergy && flat ? 2 : 1;
  }

  // What the first pass starts from; returns how wide it is, or has to be.
  int64_t start(const Earlier& earlier, Subspace& subspace) const {
    if (!earlier.shares) return sketch(subspace);
    const double* shares = earlier.shares->const_data_ptr<double>();
    std::vector<double> energies(shares, shares + earlier.shares->size(0));
    for (double& energy : energies) energy *= total_;
    const int64_t rank = goal_.predict(energies, earlier.shares->size(0), total_, side_);
    const int64_t width = width_of(rank);
    if (width > most_width_) return width;
    subspace.least = energy_at(energies, rank);
    const int64_t known = earlier.basis ? std::min(earlier.basis->size(0), width) : 0;
    if (known > 0) {
      // Of unit length, whatever they were: they may come from a file.
      Tensor rows =
          torch::stable::clone(torch::stable::contiguous(first_rows(*earlier.basis, known)));
      std::vector<double> norms(static_cast<size_t>(known));
      cpu::normalise_rows(rows.mutable_data_ptr<float>(), known, long_, norms.data());
      if (std::isfinite(cpu::squared_norm(rows.const_data_ptr<float>(), rows.numel()))) {
        subspace.known = known;
        // Random rows of the long side: that saves one product.
        subspace.start = stacked(rows, random_rows(width - known, long_));
        return width;
      }
    }
    subspace.start = x_.roughly_to_long(random_rows(width, side_));
    subspace.passes = passes_from_nothing(energies, rank);
    return width;
  }

  // A narrow subspace after one pass shows how fast the energies fall.
  int64_t sketch(Subspace& subspace) const {
    const int64_t width = std::min(side_, std::max(kLeastSketch, side_ / kSketchShare));
    const Tensor images = x_.roughly_to_long(random_rows(width, side_));
    subspace.basis = orthonormal(x_.roughly_to_short(images));
    subspace.images = x_.roughly_to_long(subspace.basis);
    decompose(subspace, false);
    // The last of them have not converged.
    const int64_t rank =
        goal_.predict(subspace.energies, std::max<int64_t>(1, width * 3 / 5), total_, side_);
    const int64_t wanted = width_of(rank);
    if (wanted > most_width_) return wanted;
    subspace.passes = passes_from_nothing(subspace.energies, rank);
    widen(subspace, wanted);
    return wanted;
  }

  // From images of the long side to an orthonormal basis of the short one.
  void refine(Subspace& subspace) const {
    const Tensor rows = x_.roughly_to_short(subspace.start);
    // Each is as large as the matrix where the subspace is wide.
    subspace.start = subspace.images = anchor();
    const float* data = rows.const_data_ptr<float>();
    double least = subspace.least;
    int passes = std::exchange(subspace.passes, 1);
    if (subspace.known > 0) {
      const double captured = cpu::squared_norm(data, subspace.known * side_);
      if (goal_.by == StopBy::kEnergy && captured < kGoodStart * goal_.energy * total_) passes = 2;
      least = std::min(least, cpu::squared_norm(data + (subspace.known - 1) * side_, side_));
    }
    Tensor basis = nearly_orthonormal(rows);
    for (int pass = 0; pass < passes; ++pass) {
      const Tensor images = x_.roughly_to_long(basis);
      const Tensor next = x_.roughly_to_short(images, &basis, static_cast<float>(kShift * least));
      basis = pass + 1 < passes ? nearly_orthonormal(next) : orthonormal(next);
    }
    subspace.basis = basis;
  }

  // In fp64, or in fp32 and straightened afterwards, which is cheaper where the images are short.
  void decompose(Subspace& subspace, bool finely) const {
    const Tensor gram = lower_gram(subspace.images);
    const auto [values, vectors] =
        eigh(finely ? torch::stable::to(gram, ScalarType::Double) : gram);
    subspace.energies = finely ? descending<double>(values) : descending<float>(values);
    subspace.vectors = vectors;
  }

  Tensor order(const Subspace& subspace, int64_t count) const {
    return subspace.vectors.scalar_type() == ScalarType::Double
               ? leading_rows<double>(subspace.vectors, count)
               : leading_rows<float>(subspace.vectors, count);
  }

  void widen(Subspace& subspace, int64_t width) const {
    const auto count = static_cast<int64_t>(subspace.energies.size());
    subspace.known = std::min(count, width);
    // Beyond what is known, energies may be far below the last one that is.
    subspace.least =
        width <= count + count / 4 ? energy_at(subspace.energies, subspace.known) : 0.0;
    subspace.start = extended(mm(order(subspace, subspace.known), subspace.images), width);
  }

  // The leading `rank` components, or nothing where fp32 cannot vouch for them.
  std::optional<Found> finish(const Subspace& subspace, int64_t rank) const {
    Found found;
    found.energies = subspace.energies;
    found.rank = rank;
    if (rank == 0 || rank > goal_.most_rank) return found;
    const auto count = static_cast<int64_t>(found.energies.size());
    for (;; ++found.rank) {
      const Tensor turn = order(subspace, found.rank);
      found.long_rows = mm(turn, subspace.images);
      found.short_rows = mm(turn, subspace.basis);
      if (normalise(found)) break;
      if (found.rank == count) return std::nullopt;
    }
    const bool fine = subspace.vectors.scalar_type() == ScalarType::Double;
    if (!fine && !straighten(found.long_rows)) return std::nullopt;
    return found;
  }

  // Gives the long rows unit length; whether they hold what is wanted.
  bool normalise(Found& found) const {
    found.norms.resize(static_cast<size_t>(found.rank));
    cpu::normalise_rows(found.long_rows.mutable_data_ptr<float>(), found.rank, long_,
                        found.norms.data());
    double captured = 0.0;
    for (const double norm : found.norms) captured += norm * norm;
    return goal_.by != StopBy::kEnergy || captured > (goal_.energy + kEnergySlack / 2) * total_;
  }

  std::optional<Found> by_gram() const {
    Found found;
    const Tensor gram = x_.gram();
    if (goal_.most_rank < side_) {
      found.energies = descending<float>(eigvalsh(gram));
      found.rank = goal_.choose(found.energies, total_, side_, kEnergySlack);
      if (found.rank > goal_.most_rank) return found;
    }
    const auto [values, vectors] = eigh(gram);
    found.energies = descending<float>(values);
    found.rank = goal_.choose(found.energies, total_, side_, kEnergySlack);
    if (found.rank < 0) return std::nullopt;
    if (found.rank == 0 || found.rank > goal_.most_rank) return found;
    for (;; ++found.rank) {
      found.short_rows = leading_rows<float>(vectors, found.rank);
      found.long_rows = x_.to_long(found.short_rows);
      if (normalise(found)) break;
      if (found.rank == side_) return std::nullopt;
    }
    if (!straighten(found.long_rows)) return std::nullopt;
    return found;
  }

  const Products x_;
  const double total_;
  const Goal goal_;
  const uint64_t seed_;
  const int64_t long_, side_;
  const bool tall_;
  const int64_t most_width_;
};

}  // namespace

std::optional<Found> solve_in_fp32(const Tensor& matrix, double total, const Goal& goal,
                                   const Earlier& earlier, uint64_t seed) {
  return Solver(matrix, total, goal, seed).solve(earlier);
}

}  // namespace fedkd_fast::bind::on_cpu_half
