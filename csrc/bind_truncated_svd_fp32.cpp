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
// * Gram: XᵀX and its leading eigenvectors, where the subspace would be more than a share of them,
//   and for short sides. Its rounding mixes images of small σ: where that may show, a Newton-Schulz
//   step makes them orthogonal again.
//
// Cost for width L: three products of 2·M·N·L operations in int8 and one in fp32, two
// orthonormalisations of about 2.5·N·L², one eigenproblem of side L, 1.25·M·L² for its matrix and
// 2·(M+N)·L·K for the vectors. Components are rows here, as they leave: (L, M) and (L, N).

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "bind_eigen.h"
#include "bind_products.h"
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
// Shares of the short side beyond which all eigenvectors are cheaper, from an earlier matrix and
// from nothing, for short sides up to these.
struct Limit {
  int64_t side;
  double warm, cold;
};
constexpr Limit kMostDirections[] = {{kGramSide, 0.0, 0.0},
                                     {128, 0.4, 0.0},
                                     {224, 0.4, 0.2},
                                     {512, 0.5, 0.25},
                                     {INT64_MAX, 0.5, 0.4}};
constexpr int64_t kSketchShare = 12, kLeastSketch = 16;
// XᵀX - shift·I converges faster where the shift lies among the energies that are not wanted.
constexpr double kShift = 0.2;  // of the least energy that is wanted
// An earlier basis that holds less than this share of what is wanted gets a second pass.
constexpr double kGoodStart = 0.6;
constexpr int kMostWidenings = 4;
// Of the largest energy: rounding of XᵀX, about an eps of that, does not show in images of larger
// ones.
constexpr double kSureEnergy = 0.1;
// By how much the rank may exceed the smallest that suffices.
constexpr double kMostExcess = 0.05;
// The least energy wanted, in means of those wanted, and the share of energy that call for a second
// round; and the flatness at which iterating does not tell the components apart.
constexpr double kFlat = 0.25, kRatherFlat = 0.1, kDelicateEnergy = 0.99;
constexpr double kHopelesslyFlat = 0.5;
constexpr int64_t kFewComponents = 8;  // whose least energy is never far from their mean

// ---- the solver ---------------------------------------------------------------------------------

struct Subspace {
  Tensor start;        // (L, M): the next pass begins with it
  int64_t known = 0;   // rows of it that are not random
  double least = 0.0;  // the least energy that is wanted, as far as one knows
  int passes = 1;      // of the next refinement
  Tensor basis;        // (L, N), orthonormal
  Tensor images;       // (L, M): X·basis
  std::vector<double> energies;
  std::optional<Tridiagonal<double>> eigen;  // of images·imagesᵀ
};

class Solver {
 public:
  Solver(Products matrix, double total, const Goal& goal, uint64_t seed)
      : x_(std::move(matrix)),
        total_(total),
        goal_(goal),
        seed_(seed),
        long_(x_.long_side()),
        side_(x_.short_side()),
        tall_(long_ >= 2 * side_) {}

  std::optional<Found> solve(const Earlier& earlier) {
    std::optional<Found> found = attempt(earlier);
    if (found && is_too_wide(*found)) return std::nullopt;
    return found;
  }

 private:
  std::optional<Found> attempt(const Earlier& earlier) {
    const Limit* limit = kMostDirections;
    while (side_ > limit->side) ++limit;
    const double share = earlier.shares ? limit->warm : limit->cold;
    if (share == 0.0) return by_gram();
    most_width_ = static_cast<int64_t>(share * static_cast<double>(side_));
    Subspace subspace;
    int64_t width = start(earlier, subspace);
    bool settled = false;
    for (int widening = 0; width <= most_width_ && widening < kMostWidenings; ++widening) {
      refine(subspace);
      subspace.images = x_.to_long(subspace.basis);
      decompose(subspace);
      const int64_t rank = goal_.choose(subspace.energies, total_, side_, kEnergySlack);
      if (rank >= 0 && flatness(subspace.energies, rank) > kHopelesslyFlat) return by_gram();
      if (rank >= 0 && !settled && is_delicate(subspace.energies, rank)) {
        settled = true;
        width = std::max(width, width_of(rank));
        if (width <= most_width_) widen(subspace, width);
        subspace.passes = 2;
        continue;
      }
      if (rank >= 0) return finish(subspace, rank);
      width = std::max(width + width / 8,
                       width_of(goal_.predict(subspace.energies, width * 4 / 5, total_, side_)));
      if (width <= most_width_) widen(subspace, width);
    }
    return by_gram();
  }

  // Whether the slack for rounding is worth more components than the rank may have too many.
  bool is_too_wide(const Found& found) const {
    const int64_t least = goal_.choose(found.energies, total_, side_);
    return least >= 0 && static_cast<double>(found.rank - least) >
                             std::max(1.0, kMostExcess * static_cast<double>(least));
  }

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
    return flatness(energies, rank) > kFlat || goal_.energy > kDelicateEnergy;
  }

  // The least of the energies that are wanted, in means of those; of few it says nothing.
  static double flatness(const std::vector<double>& energies, int64_t rank) {
    if (rank < kFewComponents) return 0.0;
    const double captured = std::accumulate(energies.begin(), energies.begin() + rank, 0.0);
    return energy_at(energies, rank) * static_cast<double>(rank) / captured;
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
  int64_t start(const Earlier& earlier, Subspace& subspace) {
    if (!earlier.shares) return sketch(subspace);
    const double* shares = earlier.shares->const_data_ptr<double>();
    std::vector<double> energies(shares, shares + earlier.shares->size(0));
    for (double& energy : energies) energy *= total_;
    const int64_t rank = goal_.predict(energies, earlier.shares->size(0), total_, side_);
    const int64_t width = width_of(rank);
    if (width > most_width_) return width;
    x_.prepare();
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
  int64_t sketch(Subspace& subspace) {
    x_.prepare();
    const int64_t width = std::min(side_, std::max(kLeastSketch, side_ / kSketchShare));
    const Tensor images = x_.roughly_to_long(random_rows(width, side_));
    subspace.basis = orthonormal<float>(x_.roughly_to_short(images));
    subspace.images = x_.roughly_to_long(subspace.basis);
    decompose(subspace);
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
    Tensor basis = orthonormal<float>(rows);
    for (int pass = 0; pass < passes; ++pass) {
      const Tensor next = x_.roughly_around(basis, static_cast<float>(kShift * least));
      basis = pass + 1 < passes ? orthonormal<float>(next) : orthonormal<double>(next);
    }
    subspace.basis = basis;
  }

  // In fp64: fp32 would mix the images of small σ.
  void decompose(Subspace& subspace) const {
    subspace.eigen.emplace(lower_gram(subspace.images));
    subspace.energies = subspace.eigen->energies();
  }

  void widen(Subspace& subspace, int64_t width) const {
    const auto count = static_cast<int64_t>(subspace.energies.size());
    subspace.known = std::min(count, width);
    // Beyond what is known, energies may be far below the last one that is.
    subspace.least =
        width <= count + count / 4 ? energy_at(subspace.energies, subspace.known) : 0.0;
    Tensor rows = mm(subspace.eigen->rows(subspace.known), subspace.images);
    std::vector<double> norms(static_cast<size_t>(subspace.known));
    cpu::normalise_rows(rows.mutable_data_ptr<float>(), subspace.known, long_, norms.data());
    subspace.start = extended(rows, width);
  }

  // The leading `rank` components, or nothing where fp32 cannot vouch for them.
  std::optional<Found> finish(const Subspace& subspace, int64_t rank) const {
    Found found;
    found.energies = subspace.energies;
    found.rank = rank;
    if (rank == 0 || rank > goal_.most_rank) return found;
    const auto count = static_cast<int64_t>(found.energies.size());
    for (;; ++found.rank) {
      const Tensor turn = subspace.eigen->rows(found.rank);
      found.long_rows = mm(turn, subspace.images);
      found.short_rows = mm(turn, subspace.basis);
      if (normalise(found)) break;
      if (found.rank == count) return std::nullopt;
    }
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
    return tall_ ? by_gram_in<double>() : by_gram_in<float>();
  }

  template <typename Real>
  std::optional<Found> by_gram_in() const {
    Found found;
    const Tridiagonal<Real> eigen(x_.gram());
    found.energies = eigen.energies();
    found.rank = goal_.choose(found.energies, total_, side_, kEnergySlack);
    if (found.rank < 0) return std::nullopt;
    if (found.rank == 0 || found.rank > goal_.most_rank) return found;
    for (;; ++found.rank) {
      found.short_rows = eigen.rows(found.rank);
      found.long_rows = x_.to_long(found.short_rows);
      if (normalise(found)) break;
      if (found.rank == side_) return std::nullopt;
    }
    const bool sure = std::is_same_v<Real, double> &&
                      energy_at(found.energies, found.rank) > kSureEnergy * found.energies.front();
    if (!sure && !straighten(found.long_rows)) return std::nullopt;
    return found;
  }

  Products x_;
  const double total_;
  const Goal goal_;
  const uint64_t seed_;
  const int64_t long_, side_;
  const bool tall_;
  int64_t most_width_ = 0;
};

}  // namespace

std::optional<Found> solve_in_fp32(Products matrix, double total, const Goal& goal,
                                   const Earlier& earlier, uint64_t seed) {
  return Solver(std::move(matrix), total, goal, seed).solve(earlier);
}

}  // namespace fedkd_fast::bind::on_cpu_half
