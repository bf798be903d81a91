// Eigenvalues and eigenvectors of a tridiagonal matrix, for the subspaces of truncated_svd.
//
// Values by the sign changes of its Sturm sequence, 32 of them at once, some 20 sequences a value;
// vectors by twisted factorisations, one a lane, 2·n divisions a vector (Dhillon, Parlett 2004).
// Whoever wants vectors of the matrix that was reduced applies the reflections, which is GEMM.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/vectors.h"
#include "kernels.h"

namespace fedkd_fast {
namespace cpu {
namespace {

template <int kBytes>
using Doubles = typename VectorOf<double, kBytes>::Values;
template <int kBytes>
using Integers = typename VectorOf<double, kBytes>::Bits;
template <int kBytes>
constexpr int kDoubles = VectorOf<double, kBytes>::kLanes;

// ---- values -------------------------------------------------------------------------------------

constexpr int kAtOnce = 32;
constexpr double kEps = std::numeric_limits<double>::epsilon();

// What the characteristic polynomials of the leading parts say at a point: the last one's value,
// mantissa · 2^exponent, and how many eigenvalues are below.
struct Counts {
  double mantissa[kAtOnce];
  int64_t exponent[kAtOnce], below[kAtOnce];
};

// p_k = (d_k - x)·p_{k-1} - e_k²·p_{k-2} changes its sign once for each eigenvalue below x. Entries
// are at most 1, so that eight steps stay far inside fp64.
template <int kBytes>
FEDKD_INLINE void count(const double* diagonal, const double* squares, int64_t side,
                        const double* points, Counts* counts) {
  using Values = Doubles<kBytes>;
  using Bits = Integers<kBytes>;
  constexpr int kLanes = kDoubles<kBytes>, kPacks = kAtOnce / kLanes;
  constexpr int64_t kExponent = int64_t{0x7ff} << 52, kSign = int64_t{1} << 63;
  Values x[kPacks], p[kPacks], q[kPacks];
  Bits changes[kPacks], exponents[kPacks];
  for (int pack = 0; pack < kPacks; ++pack) {
    for (int lane = 0; lane < kLanes; ++lane) x[pack][lane] = points[pack * kLanes + lane];
    p[pack] = Values{};
    q[pack] = Values{} + 1.0;
    changes[pack] = exponents[pack] = Bits{};
  }
  for (int64_t k = 0; k < side; k += 8) {
    // Pack by pack: what all of them hold has no room in the registers.
    for (int pack = 0; pack < kPacks; ++pack) {
      const Values at = x[pack];
      Values before = p[pack], last = q[pack];
      Bits changed = changes[pack], negative = last < 0.0;
      for (int64_t i = k; i < std::min(k + 8, side); ++i) {
        const Values next = (diagonal[i] - at) * last - squares[i] * before;
        const Bits now = next < 0.0;
        changed += now ^ negative;
        negative = now;
        before = last;
        last = next;
      }
      const Values size = (Values)((Bits)last & ~kSign) + (Values)((Bits)before & ~kSign);
      const Bits power = (Bits)size & kExponent;
      const Values factor = (Values)((int64_t{2046} << 52) - power);
      p[pack] = before * factor;
      q[pack] = last * factor;
      changes[pack] = changed;
      exponents[pack] += (power >> 52) - 1023;
    }
  }
  for (int lane = 0; lane < kAtOnce; ++lane) {
    counts->mantissa[lane] = q[lane / kLanes][lane % kLanes];
    counts->exponent[lane] = exponents[lane / kLanes][lane % kLanes];
    counts->below[lane] = -changes[lane / kLanes][lane % kLanes];
  }
}

FEDKD_WIDE void count_below_wide(const double* diagonal, const double* squares, int64_t side,
                                 const double* points, Counts* counts) {
  count<kWideBytes>(diagonal, squares, side, points, counts);
}
FEDKD_CLONES
void count_below(const double* diagonal, const double* squares, int64_t side, const double* points,
                 Counts* counts) {
  count<kNarrowBytes>(diagonal, squares, side, points, counts);
}

// Where one eigenvalue is. Once it is alone there the polynomial has one zero. A secant finds it,
// pushed towards the middle so that both ends move, as in the ITP method (Oliveira, Takahashi
// 2020); after a step that gained less than a half comes one that halves.
struct Bracket {
  struct End {
    double at;
    int64_t below;
    double mantissa = 0.0;  // 0 where it is not known
    int64_t exponent = 0;
  };
  End low, high;
  double alone_width = 0.0, last_width = 0.0;

  double width() const { return high.at - low.at; }
  bool same(const Bracket& other) const {
    return low.at == other.low.at && high.at == other.high.at;
  }
  bool alone() const { return high.below - low.below == 1 && low.mantissa * high.mantissa < 0.0; }
  void learn(double at, int64_t below, double mantissa, int64_t exponent, int64_t index) {
    End& end = below <= index ? low : high;
    if (below <= index ? at > low.at : at < high.at) end = {at, below, mantissa, exponent};
  }
  double next(double tolerance) {
    const double middle = 0.5 * (low.at + high.at), before = std::exchange(last_width, width());
    if (alone_width == 0.0)
      alone_width = width();
    else if (width() > 0.5 * before)
      return middle;
    const int64_t apart = std::clamp<int64_t>(high.exponent - low.exponent, -900, 900);
    const double share =
        low.mantissa / (low.mantissa - std::ldexp(high.mantissa, static_cast<int>(apart)));
    const double secant = low.at + share * width(), away = middle - secant;
    const double step = std::min(0.2 * width() * width() / alone_width, std::abs(away));
    return secant + std::copysign(std::max(step, tolerance), away);
  }
};

// ---- vectors ------------------------------------------------------------------------------------

template <int kBytes>
FEDKD_INLINE Doubles<kBytes> magnitude(const Doubles<kBytes>& values) {
  return (Doubles<kBytes>)((Integers<kBytes>)values & std::numeric_limits<int64_t>::max());
}

// Pivots from above and from below meet in row r, where they leave the least: z_r = 1, and the rest
// by substitution upwards and downwards. One value a lane.
template <int kBytes, typename Real>
FEDKD_INLINE void twist(const double* diagonal, const double* beside, int64_t side,
                        const Doubles<kBytes>& value, double tiny, Doubles<kBytes>* scratch,
                        int64_t lanes, Real* rows) {
  using Values = Doubles<kBytes>;
  using Bits = Integers<kBytes>;
  Values *const from_above = scratch, *const pivots = scratch + side,
                *const from_below = scratch + 2 * side, *const z = scratch + 3 * side;
  const Values zero = Values{}, one = Values{} + 1.0, smallest = Values{} + tiny;
  Values pivot = diagonal[0] - value;
  for (int64_t i = 0;; ++i) {
    pivot = magnitude<kBytes>(pivot) < smallest ? smallest : pivot;
    pivots[i] = pivot;
    if (i + 1 == side) break;
    from_above[i] = beside[i] / pivot;
    pivot = (diagonal[i + 1] - value) - from_above[i] * beside[i];
  }
  Values least = magnitude<kBytes>(pivot);
  Bits meet = Bits{} + (side - 1);
  pivot = diagonal[side - 1] - value;
  for (int64_t i = side - 2; i >= 0; --i) {
    pivot = magnitude<kBytes>(pivot) < smallest ? smallest : pivot;
    from_below[i] = beside[i] / pivot;
    const Values taken = from_below[i] * beside[i];
    const Values left = magnitude<kBytes>(pivots[i] - taken);
    meet = left < least ? Bits{} + i : meet;
    least = left < least ? left : least;
    pivot = (diagonal[i] - value) - taken;
  }
  Values entry = zero, squares = zero;
  for (int64_t i = side - 1; i >= 0; --i) {
    if (i + 1 < side) entry *= -from_above[i];
    entry = meet == i ? one : entry;
    z[i] = entry;
    squares += entry * entry;
  }
  entry = zero;
  for (int64_t i = 0; i < side; ++i) {
    if (i > 0) entry *= -from_below[i - 1];
    z[i] = meet < i ? entry : z[i];
    squares += entry * entry;
    entry = meet == i ? one : entry;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const double inverse = 1.0 / std::sqrt(squares[lane]);
    for (int64_t i = 0; i < side; ++i)
      rows[lane * side + i] = static_cast<Real>(z[i][lane] * inverse);
  }
}

template <int kBytes, typename Real>
FEDKD_INLINE void all_vectors(const double* diagonal, const double* beside, int64_t side,
                              const double* values, int64_t count, Real* rows) {
  double size = 0.0;
  for (int64_t i = 0; i < side; ++i)
    size = std::max({size, std::abs(diagonal[i]), i + 1 < side ? std::abs(beside[i]) : 0.0});
  // On a boundary of cache lines.
  std::vector<double> space(static_cast<size_t>((4 * side + 1) * kDoubles<kBytes>));
  const auto address = reinterpret_cast<uintptr_t>(space.data());
  auto* const scratch = reinterpret_cast<Doubles<kBytes>*>(
      (address + sizeof(Doubles<kBytes>) - 1) / sizeof(Doubles<kBytes>) * sizeof(Doubles<kBytes>));
  for (int64_t first = 0; first < count; first += kDoubles<kBytes>) {
    Doubles<kBytes> value;
    for (int lane = 0; lane < kDoubles<kBytes>; ++lane)
      value[lane] = values[std::min(first + lane, count - 1)];
    twist<kBytes>(diagonal, beside, side, value, size * kEps * kEps, scratch,
                  std::min<int64_t>(kDoubles<kBytes>, count - first), rows + first * side);
  }
}

FEDKD_WIDE void float_vectors_wide(const double* diagonal, const double* beside, int64_t side,
                                   const double* values, int64_t count, float* rows) {
  all_vectors<kWideBytes>(diagonal, beside, side, values, count, rows);
}
FEDKD_CLONES
void float_vectors(const double* diagonal, const double* beside, int64_t side, const double* values,
                   int64_t count, float* rows) {
  all_vectors<kNarrowBytes>(diagonal, beside, side, values, count, rows);
}
FEDKD_WIDE void double_vectors_wide(const double* diagonal, const double* beside, int64_t side,
                                    const double* values, int64_t count, double* rows) {
  all_vectors<kWideBytes>(diagonal, beside, side, values, count, rows);
}
FEDKD_CLONES
void double_vectors(const double* diagonal, const double* beside, int64_t side,
                    const double* values, int64_t count, double* rows) {
  all_vectors<kNarrowBytes>(diagonal, beside, side, values, count, rows);
}

}  // namespace

void tridiagonal_values(const double* diagonal, const double* beside, int64_t side,
                        double* values) {
  double least = diagonal[0], most = diagonal[0];
  for (int64_t i = 0; i < side; ++i) {
    const double reach =
        (i > 0 ? std::abs(beside[i - 1]) : 0.0) + (i + 1 < side ? std::abs(beside[i]) : 0.0);
    least = std::min(least, diagonal[i] - reach);
    most = std::max(most, diagonal[i] + reach);
  }
  const double size = std::max(std::abs(least), std::abs(most));
  double sum = 0.0;  // not finite where an entry is not
  for (int64_t i = 0; i < side; ++i) sum += diagonal[i] + (i + 1 < side ? beside[i] : 0.0);
  if (size == 0.0 || !std::isfinite(sum)) {
    std::fill_n(values, side, sum);
    return;
  }
  // No sequence ends early where no entry beside the diagonal is 0.
  std::vector<double> scaled(static_cast<size_t>(2 * side));
  double* const squares = scaled.data() + side;
  for (int64_t i = 0; i < side; ++i) {
    scaled[static_cast<size_t>(i)] = diagonal[i] / size;
    const double entry = i > 0 ? beside[i - 1] / size : 0.0;
    squares[i] = std::max(entry * entry, kEps * kEps);
  }
  const auto count_changes = has_wide_vectors() ? count_below_wide : count_below;
  const double tolerance = 2.0 * kEps;
  const Bracket whole{{least / size - 4.0 * kEps, 0}, {most / size + 4.0 * kEps, side}};
  for (int64_t first = 0; first < side; first += kAtOnce) {
    const auto lanes = static_cast<int>(std::min<int64_t>(kAtOnce, side - first));
    std::vector<Bracket> brackets(static_cast<size_t>(lanes), whole);
    for (bool searching = true; searching;) {
      searching = false;
      double points[kAtOnce] = {};
      for (int begin = 0, end = 0; begin < lanes; begin = end) {
        // Those that share a bracket divide it among them.
        Bracket& bracket = brackets[static_cast<size_t>(begin)];
        while (end < lanes && bracket.same(brackets[static_cast<size_t>(end)])) ++end;
        searching |= bracket.width() > 2.0 * tolerance;
        const double part = bracket.width() / (end - begin + 1);
        for (int lane = begin; lane < end; ++lane)
          points[lane] = bracket.low.at + part * (lane - begin + 1);
        if (bracket.alone()) points[begin] = bracket.next(tolerance);
      }
      if (!searching) break;
      Counts counts;
      count_changes(scaled.data(), squares, side, points, &counts);
      for (int begin = 0, end = 0; begin < lanes; begin = end) {
        const Bracket before = brackets[static_cast<size_t>(begin)];
        while (end < lanes && before.same(brackets[static_cast<size_t>(end)])) ++end;
        for (int lane = begin; lane < end; ++lane)
          for (int i = begin; i < end; ++i)
            brackets[static_cast<size_t>(lane)].learn(
                points[i], counts.below[i], counts.mantissa[i], counts.exponent[i], first + lane);
      }
    }
    for (int lane = 0; lane < lanes; ++lane) {
      const Bracket& bracket = brackets[static_cast<size_t>(lane)];
      values[side - 1 - first - lane] = 0.5 * (bracket.low.at + bracket.high.at) * size;
    }
  }
  std::sort(values, values + side, std::greater<double>());
}

template <>
void tridiagonal_vectors<float>(const double* diagonal, const double* beside, int64_t side,
                                const double* values, int64_t count, float* rows) {
  const auto vectors = has_wide_vectors() ? float_vectors_wide : float_vectors;
  vectors(diagonal, beside, side, values, count, rows);
}
template <>
void tridiagonal_vectors<double>(const double* diagonal, const double* beside, int64_t side,
                                 const double* values, int64_t count, double* rows) {
  const auto vectors = has_wide_vectors() ? double_vectors_wide : double_vectors;
  vectors(diagonal, beside, side, values, count, rows);
}

}  // namespace cpu
}  // namespace fedkd_fast
