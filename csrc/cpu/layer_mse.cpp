// Squared errors between layers of two models on the CPU, with both gradients in one pass.
//
// Two streams in, up to two out, a handful of operations a value: bound by memory. Gradients too
// large for the caches are written around them.

#include <algorithm>
#include <cstring>

#include "cpu/half_vectors.h"
#include "cpu/streaming.h"
#include "cpu/vectors.h"
// After what it is compiled with.
#include "common/half.h"
#include "common/layer_mse.h"
#include "kernels.h"

namespace fedkd_fast::cpu {
namespace {

constexpr int64_t kSegment = 1024;  // values whose squares lanes sum

// Values of one storage type, one a lane.
template <typename Storage, int kBytes>
struct Lanes {
  using Real = typename Compute<Storage>::type;
  using Vector = VectorOf<Real, kBytes>;
  static constexpr int kCount = Vector::kLanes;
  using Values = typename Vector::Values;
  using Bits = typename Vector::Bits;
  using Bytes = typename Vector::Bytes;
  static constexpr bool kHalves = sizeof(Storage) == 2;
  using Narrow = HalfVectors<kBytes / static_cast<int>(sizeof(float))>;

  static FEDKD_INLINE Values load(const Storage* from) {
    if constexpr (kHalves) {
      return Narrow::load(from);
    } else {
      Values values;
      std::memcpy(&values, from, sizeof(values));
      return values;
    }
  }

  // Zeros where the mask is 0.
  static FEDKD_INLINE Values keep(const Values& values, const uint8_t* mask) {
    Bytes bytes;
    std::memcpy(&bytes, mask, sizeof(bytes));
    // By way of 16 bits: at once, gcc takes lane by lane.
    const auto wider = __builtin_convertvector(bytes, typename Vector::Wider);
    return (Values)((Bits)values & (Bits)(__builtin_convertvector(wider, Bits) != Bits{}));
  }

  // As they are stored.
  static FEDKD_INLINE auto stored(const Values& values) {
    if constexpr (kHalves)
      return Narrow::narrow(static_cast<const Storage*>(nullptr), values);
    else
      return values;
  }

  // Cheaper than to round once more.
  template <typename Stored>
  static FEDKD_INLINE Stored opposite(const Stored& values) {
    if constexpr (kHalves)
      return values ^ static_cast<uint16_t>(0x8000);
    else
      return -values;
  }

  template <typename Stored>
  static FEDKD_INLINE void put(Storage* to, const Stored& values, bool streamed) {
    if (streamed)
      stream<sizeof(values)>(to, &values);
    else
      std::memcpy(to, &values, sizeof(values));
  }
};

// Neighbouring values of both models, and where their gradients go.
template <typename Storage>
struct Run {
  Run(const LayerMseArgs& args, int64_t first)
      : mentor(static_cast<const Storage*>(args.mentor) + first),
        mentee(static_cast<const Storage*>(args.mentee) + first),
        grad_mentor(args.grad_mentor ? static_cast<Storage*>(args.grad_mentor) + first : nullptr),
        grad_mentee(args.grad_mentee ? static_cast<Storage*>(args.grad_mentee) + first : nullptr) {}

  const Storage* mentor;
  const Storage* mentee;
  Storage* grad_mentor;
  Storage* grad_mentee;
};

template <typename Storage, int kBytes, bool kMasked>
FEDKD_INLINE typename Lanes<Storage, kBytes>::Values visit(
    const Run<Storage>& run, int64_t at, const uint8_t* mask,
    typename Lanes<Storage, kBytes>::Real factor, bool streamed) {
  using L = Lanes<Storage, kBytes>;
  typename L::Values difference = L::load(run.mentor + at) - L::load(run.mentee + at);
  if constexpr (kMasked) difference = L::keep(difference, mask + at);
  const auto gradient = L::stored(difference * factor);
  if (run.grad_mentor != nullptr) L::put(run.grad_mentor + at, gradient, streamed);
  if (run.grad_mentee != nullptr) L::put(run.grad_mentee + at, L::opposite(gradient), streamed);
  return difference * difference;
}

// The last values of a run, fewer than a vector of them.
template <typename Storage, int kBytes, bool kMasked>
FEDKD_INLINE typename Lanes<Storage, kBytes>::Values visit_rest(
    const Run<Storage>& run, int64_t at, int64_t count, const uint8_t* mask,
    typename Lanes<Storage, kBytes>::Real factor) {
  using L = Lanes<Storage, kBytes>;
  Storage values[4][L::kCount] = {};
  uint8_t bytes[L::kCount] = {};
  const size_t size = static_cast<size_t>(count) * sizeof(Storage);
  std::memcpy(values[0], run.mentor + at, size);
  std::memcpy(values[1], run.mentee + at, size);
  if constexpr (kMasked) std::memcpy(bytes, mask + at, static_cast<size_t>(count));
  Run<Storage> inside = run;
  inside.mentor = values[0];
  inside.mentee = values[1];
  if (run.grad_mentor != nullptr) inside.grad_mentor = values[2];
  if (run.grad_mentee != nullptr) inside.grad_mentee = values[3];
  const typename L::Values squares =
      visit<Storage, kBytes, kMasked>(inside, 0, bytes, factor, false);
  if (run.grad_mentor != nullptr) std::memcpy(run.grad_mentor + at, values[2], size);
  if (run.grad_mentee != nullptr) std::memcpy(run.grad_mentee + at, values[3], size);
  return squares;
}

// Squares of a block: fp32 in the lanes, emptied into fp64 before they have taken too many.
template <typename Storage, int kBytes>
struct Squares {
  using L = Lanes<Storage, kBytes>;

  FEDKD_INLINE void add(const typename L::Values& squares) { lanes += squares; }

  FEDKD_INLINE void took(int64_t values) {
    held += values;
    if (held >= kSegment) flush();
  }

  FEDKD_INLINE void flush() {
    for (int lane = 0; lane < L::kCount; ++lane) total += double{lanes[lane]};
    lanes = typename L::Values{};
    held = 0;
  }

  typename L::Values lanes{};
  int64_t held = 0;
  double total = 0.0;
};

// Gradients are `factor` times the differences.
template <typename Storage, int kBytes, bool kMasked>
FEDKD_INLINE void visit_run(const Run<Storage>& run, int64_t count, const uint8_t* mask,
                            typename Lanes<Storage, kBytes>::Real factor, bool streamed,
                            Squares<Storage, kBytes>* squares) {
  using L = Lanes<Storage, kBytes>;
  const bool around = streamed && can_stream(run.grad_mentor) && can_stream(run.grad_mentee);
  const int64_t whole = count / L::kCount * L::kCount;
  for (int64_t begin = 0; begin < whole; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, whole);
    for (int64_t at = begin; at < end; at += L::kCount)
      squares->add(visit<Storage, kBytes, kMasked>(run, at, mask, factor, around));
    squares->took(end - begin);
  }
  if (whole == count) return;
  squares->add(visit_rest<Storage, kBytes, kMasked>(run, whole, count - whole, mask, factor));
  squares->took(count - whole);
}

void clear(void* gradient, size_t size, bool streamed) {
  if (gradient == nullptr) return;
  alignas(kWideBytes) static constexpr char kZeros[kWideBytes] = {};
  size_t done = 0;
  if (streamed && can_stream(gradient))
    for (; done + kWideBytes <= size; done += kWideBytes)
      stream<kWideBytes>(static_cast<char*>(gradient) + done, kZeros);
  std::memset(static_cast<char*>(gradient) + done, 0, size - done);
}

int64_t counted_positions(const LayerMseArgs& args, int64_t sample) {
  if (args.mask == nullptr) return args.positions;
  const uint8_t* const mask = args.mask + sample * args.positions;
  return args.positions - std::count(mask, mask + args.positions, 0);
}

bool streams_gradients(const LayerMseArgs& args) {
  const auto in_place = [&](const void* gradient) {
    return gradient != nullptr && (gradient == args.mentor || gradient == args.mentee);
  };
  const int64_t bytes =
      2 * storage_bytes(args.type) * args.samples * args.groups * args.positions * args.values;
  return bytes > kStreamedBytes && !in_place(args.grad_mentor) && !in_place(args.grad_mentee);
}

template <typename Storage, int kBytes>
FEDKD_INLINE void visit_blocks(const LayerMseArgs& args, int64_t begin, int64_t end) {
  using Real = typename Compute<Storage>::type;
  const int64_t blocks = layer_mse_blocks(args), each = layer_mse_positions(args);
  const bool streamed = streams_gradients(args);
  const size_t row_bytes = static_cast<size_t>(args.values) * sizeof(Storage);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t group = index / blocks, sample = group / args.groups;
    const int64_t first = index % blocks * each;
    const int64_t count = std::min(each, args.positions - first);
    const Real weight = layer_mse_weight<Real>(args, counted_positions(args, sample));
    const Real factor = Real(2) * static_cast<const Real*>(args.scale)[sample] * weight;
    const int64_t start = (group * args.positions + first) * args.values;
    Squares<Storage, kBytes> squares;
    if (args.mask == nullptr) {
      visit_run<Storage, kBytes, false>(Run<Storage>(args, start), count * args.values, nullptr,
                                        factor, streamed, &squares);
    } else {
      const uint8_t* const mask = args.mask + sample * args.positions;
      for (int64_t i = 0; i < count; ++i) {
        const Run<Storage> run(args, start + i * args.values);
        if (mask[first + i] == 0) {
          clear(run.grad_mentor, row_bytes, streamed);
          clear(run.grad_mentee, row_bytes, streamed);
        } else if (args.masks_values) {
          visit_run<Storage, kBytes, true>(run, args.values, mask, factor, streamed, &squares);
        } else {
          visit_run<Storage, kBytes, false>(run, args.values, nullptr, factor, streamed, &squares);
        }
      }
    }
    squares.flush();
    args.sums[index] = squares.total;
  }
  if (streamed) finish_streaming();
}

// One for each type: a function that is compiled for several instruction sets is no template.
FEDKD_WIDE void visit_doubles_wide(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<double, kWideBytes>(args, begin, end);
}
FEDKD_CLONES void visit_doubles(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<double, kNarrowBytes>(args, begin, end);
}
FEDKD_WIDE void visit_floats_wide(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<float, kWideBytes>(args, begin, end);
}
FEDKD_CLONES void visit_floats(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<float, kNarrowBytes>(args, begin, end);
}
FEDKD_WIDE void visit_bfloat16s_wide(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<BFloat16, kWideBytes>(args, begin, end);
}
FEDKD_CLONES void visit_bfloat16s(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<BFloat16, kNarrowBytes>(args, begin, end);
}
FEDKD_WIDE void visit_float16s_wide(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<Float16, kWideBytes>(args, begin, end);
}
FEDKD_CLONES void visit_float16s(const LayerMseArgs& args, int64_t begin, int64_t end) {
  visit_blocks<Float16, kNarrowBytes>(args, begin, end);
}

template <typename Real>
void mean_blocks(const LayerMseArgs& args) {
  const int64_t blocks = args.groups * layer_mse_blocks(args);
  const auto* const scale = static_cast<const Real*>(args.scale);
  auto* const errors = static_cast<Real*>(args.errors);
  double total = 0.0;
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    double error = 0.0;
    for (int64_t block = 0; block < blocks; ++block) error += args.sums[sample * blocks + block];
    error *= layer_mse_weight<double>(args, counted_positions(args, sample));
    errors[sample] = static_cast<Real>(error);
    total += error * double{scale[sample]};
  }
  *static_cast<Real*>(args.total) = static_cast<Real>(total);
}

}  // namespace

void layer_mse(const LayerMseArgs& args, int64_t begin, int64_t end) {
  const bool wide = has_wide_vectors();
  switch (args.type) {
    case FloatType::kFloat64:
      return wide ? visit_doubles_wide(args, begin, end) : visit_doubles(args, begin, end);
    case FloatType::kFloat32:
      return wide ? visit_floats_wide(args, begin, end) : visit_floats(args, begin, end);
    case FloatType::kBFloat16:
      return wide ? visit_bfloat16s_wide(args, begin, end) : visit_bfloat16s(args, begin, end);
    case FloatType::kFloat16:
      return wide ? visit_float16s_wide(args, begin, end) : visit_float16s(args, begin, end);
  }
}

void mean_layer_mse(const LayerMseArgs& args) {
  args.type == FloatType::kFloat64 ? mean_blocks<double>(args) : mean_blocks<float>(args);
}

}  // namespace fedkd_fast::cpu
