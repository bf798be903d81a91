// The step at which dense rows lose what they may.
//
// With N values and a loss D, a fine step is about √(12·D/N). From there the loss of a look at the
// rows, which is cheap, is followed to where it is D: logarithms of losses grow with that of the
// step, at most as its square does. Where values keep to a few numbers, losses jump, and coarser
// steps may lose less again.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/levels.h"
#include "common/rans.h"
#include "kernels_round_rows.h"

namespace fedkd_fast::cpu {
namespace {

// Values that tell the loss of all of them to about a per cent: so many, and one of so many; and
// rows that do, beside the largest ones, of which a few may have most of all there is.
constexpr int64_t kLook = 1 << 16, kLookShare = 64, kLeastRows = 32, kLargestRows = 16;
// The largest ones have so much of it, or are as many as the others that are looked at.
constexpr double kLargestShare = 0.9;
// Of what may be lost where some rows stand for all, which a look is sure to be off from.
constexpr double kCaution = 0.988;
// A loss of this share of what may be lost is near enough; aimed at is the other.
constexpr double kNear = 0.996, kAim = 0.9985;
constexpr double kSteepest = 2.0 * 0.6931471805599453 / 256.0;  // of log(loss), a step
constexpr int kTurns = 24;
constexpr double kStride = 256.0;  // an octave at most from one loss to the next
// Losses that grow so much faster than they should, or fall, keep to a few values.
constexpr double kJump = 1.25 * kSteepest;
// As few values as these do so whatever they are.
constexpr int64_t kFew = 1024;
constexpr int kProbe = 16, kProbes = 16;

class Look {
 public:
  Look(const float* values, const double* squares, int64_t rows, int64_t count, bool whole)
      : count_(count) {
    std::vector<int64_t> order(static_cast<size_t>(rows));
    std::iota(order.begin(), order.end(), 0);
    const int64_t apart =
        whole
            ? 1
            : std::max<int64_t>(1, std::min({rows * count / kLook, rows / kLeastRows, kLookShare}));
    // Those that stand for themselves come first, then one of each so many others. Of rows by size,
    // so that small and large ones are there in their shares.
    int64_t alone = rows;
    if (apart > 1) {
      std::sort(order.begin(), order.end(), [=](int64_t a, int64_t b) {
        return squares[a] != squares[b] ? squares[a] > squares[b] : a < b;
      });
      const double total = std::accumulate(squares, squares + rows, 0.0);
      double sum = 0.0;
      for (alone = 0; alone < rows / apart; ++alone) {
        if (alone >= kLargestRows && sum >= kLargestShare * total) break;
        sum += squares[order[static_cast<size_t>(alone)]];
      }
    }
    for (int64_t place = 0; place < alone; ++place) add(values, squares, order[place]);
    alone_ = rows_.size();
    for (int64_t place = alone + apart / 2; place < rows; place += apart)
      add(values, squares, order[place]);
    const size_t others = rows_.size() - alone_;
    if (others > 0) weight_ = static_cast<double>(rows - alone) / static_cast<double>(others);
    // The largest one is among them, and decides which rows are sent.
    largest_ = *std::max_element(heights_.begin(), heights_.end());
    levels_.resize(heights_.size());
    multipliers_.resize(heights_.size());
  }

  // Between these, some rows are sent, and none lies beyond the tables.
  int finest() const { return inside(std::ceil(16.0 * (largest_ - kRansMostLevel + kRowQuantum))); }
  int coarsest() const { return inside(std::floor(16.0 * (largest_ - kRansFirstLevel))); }

  // The steps of the largest magnitude, and of powers of two, that numbers may be multiples of.
  std::vector<int> likely() const {
    float most = 0.0f;
    for (const float* row : rows_) {
      float largest = 0.0f;
      measure_row(row, count_, &largest);
      most = std::max(most, largest);
    }
    std::vector<int> steps{inside(std::floor(256.0 * std::log2(static_cast<double>(most))))};
    for (int step = 0; step <= coarsest(); step += 256) steps.push_back(step);
    return steps;
  }

  // Of what may be lost, what a look is to say at most.
  double allowed(double most_lost) const {
    return alone_ < rows_.size() ? kCaution * most_lost : most_lost;
  }

  // What all rows lose at a step, as a look has it.
  double lost(int step) {
    row_levels(heights_.data(), static_cast<int64_t>(heights_.size()), step, levels_.data(),
               multipliers_.data());
    const auto scale = static_cast<float>(exp2_fixed(step));
    double sum = 0.0;
    for (size_t i = 0; i < rows_.size(); ++i)
      sum += (i < alone_ ? 1.0 : weight_) *
             (levels_[i] == kZeroLevel ? squares_[i]
                                       : rounding_loss(rows_[i], count_, multipliers_[i], scale));
    return sum;
  }

 private:
  static int inside(double step) {
    const double limit = kScaleLimit;
    return static_cast<int>(std::clamp(step, -limit, limit));
  }

  void add(const float* values, const double* squares, int64_t row) {
    rows_.push_back(values + row * count_);
    squares_.push_back(squares[row]);
    heights_.push_back(row_height(squares[row], count_));
  }

  const int64_t count_;
  double largest_ = 0.0, weight_ = 1.0;  // of each row that stands for others
  size_t alone_ = 0;                     // rows that stand for themselves
  std::vector<const float*> rows_;
  std::vector<double> squares_, heights_;
  std::vector<int16_t> levels_;
  std::vector<float> multipliers_;
};

// A step and its loss.
struct Tried {
  int step;
  double lost;
};

double log_ratio(double a, double b) { return std::log(std::max(a, 1e-300) / std::max(b, 1e-300)); }

// Between one that is fine enough and one that is too coarse: by their losses, by half where that
// did not halve what is between them.
int between(const Tried& fine, const Tried& coarse, double most, bool halve) {
  const double span = coarse.step - fine.step;
  const double part =
      log_ratio(kAim * most, fine.lost) / std::max(log_ratio(coarse.lost, fine.lost), 1e-9);
  const double ahead = halve ? 0.5 * span : span * std::clamp(part, 0.1, 0.9);
  return fine.step + static_cast<int>(std::clamp(std::round(ahead), 1.0, span - 1.0));
}

// The coarsest one that loses no more, within an octave, also beyond some that lose too much.
int beyond_jumps(Look& look, int step, double most) {
  int best = step;
  const auto attempt = [&](int coarser) {
    if (coarser > best && coarser <= look.coarsest() && look.lost(coarser) <= most) best = coarser;
  };
  for (int probe = 1; probe <= kProbes; ++probe) attempt(step + probe * kProbe);
  for (int ahead = kProbe / 2; ahead > 0; ahead /= 2) attempt(best + ahead);
  for (const int likely : look.likely()) attempt(likely);
  return best;
}

}  // namespace

int dense_step(const float* values, const double* squares, int64_t rows, int64_t count,
               double most_lost, bool whole) {
  Look look(values, squares, rows, count, whole);
  const double most = look.allowed(most_lost);
  const int finest = look.finest(), coarsest = look.coarsest();
  const double start = 128.0 * std::log2(12.0 * most_lost /
                                         (static_cast<double>(rows) * static_cast<double>(count)));
  // Not tried yet: whether the finest is fine enough.
  Tried fine{finest - 1, 0.0}, coarse{coarsest + 1, std::numeric_limits<double>::infinity()};
  double slope = 0.7 * kSteepest;
  bool jumps = rows * count < kFew;
  // At least so far, where all steps lose the same.
  double stride = 1.0;
  Tried before{0, 0.0};
  auto step = static_cast<int>(
      std::clamp(std::round(start), static_cast<double>(finest), static_cast<double>(coarsest)));
  for (int turn = 0; turn < kTurns; ++turn) {
    const Tried now{step, look.lost(step)};
    const int span = coarse.step - fine.step;
    (now.lost <= most ? fine : coarse) = now;
    if (turn > 0) {
      const double found = log_ratio(now.lost, before.lost) / (now.step - before.step);
      jumps = jumps || found < 0.0 || found > kJump;
      slope = std::clamp(found, 0.1 * kSteepest, kSteepest);
    }
    if (coarse.step - fine.step < 2 || (now.lost <= most && now.lost >= kNear * most)) break;
    before = now;
    if (fine.step >= finest && std::isfinite(coarse.lost)) {
      step = between(fine, coarse, most, 2 * (coarse.step - fine.step) > span);
    } else {
      const double wanted = log_ratio(kAim * most, now.lost) / slope;
      const double ahead = std::clamp(std::ceil(std::abs(wanted)), stride, kStride);
      const int next = now.step + static_cast<int>(now.lost > most ? -ahead : ahead);
      step = std::clamp(next, fine.step + 1, coarse.step - 1);
      stride = std::min(2.0 * stride, kStride);
    }
  }
  if (fine.step < finest) return finest;
  return jumps ? beyond_jumps(look, fine.step, most) : fine.step;
}

}  // namespace fedkd_fast::cpu
