// row_squares, round_rows: one pass over the values each, rows shared out over threads.

#include <numeric>
#include <optional>
#include <vector>

#include "bind_torch.h"
#include "kernels.h"

namespace fedkd_fast::bind {
namespace {

// Values and what is taken off them, in order.
struct Rows {
  Rows(const Tensor& given, const std::optional<Tensor>& less)
      : values((check_tensor(given, "values", 2, ScalarType::Float), in_order(given))),
        count(given.size(0)),
        length(given.size(1)) {
    if (!less) return;
    check_tensor(*less, "minus", 2, ScalarType::Float);
    STD_TORCH_CHECK(less->size(0) == count && less->size(1) == length,
                    "minus must have the shape of values, ", shape_text(given), ", got ",
                    shape_text(*less));
    minus = in_order(*less);
  }

  // Calls with each row, its values and what is taken off them.
  template <typename Work>
  void visit(const Work& work) const {
    const float* const from = values.const_data_ptr<float>();
    const float* const less = minus ? minus->const_data_ptr<float>() : nullptr;
    torch::stable::parallel_for(0, count, row_grain(length), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        work(row, from + row * length, less ? less + row * length : nullptr);
    });
  }

  const Tensor values;
  std::optional<Tensor> minus;
  const int64_t count, length;
};

}  // namespace

Tensor row_squares(const Tensor& values, const std::optional<Tensor>& minus) {
  const Rows rows(values, minus);
  Tensor squares = empty_on_host({rows.count}, ScalarType::Double);
  double* const out = squares.mutable_data_ptr<double>();
  rows.visit([&](int64_t row, const float* from, const float* less) {
    out[row] = cpu::row_squares(from, less, rows.length);
  });
  return squares;
}

std::tuple<Tensor, Tensor> round_rows(const Tensor& values, const std::optional<Tensor>& minus,
                                      const Tensor& divisor, double step) {
  const Rows rows(values, minus);
  check_tensor(divisor, "divisor", 1, ScalarType::Float);
  STD_TORCH_CHECK(divisor.size(0) == rows.count, "divisor must have a number for each row, ",
                  rows.count, ", got ", divisor.size(0));
  const Tensor divisors = in_order(divisor);
  const float* const of_rows = divisors.const_data_ptr<float>();
  Tensor sent = empty_on_host({rows.count, rows.length}, ScalarType::Float);
  Tensor lost = empty_on_host({}, ScalarType::Double);
  float* const out = sent.mutable_data_ptr<float>();
  std::vector<double> parts(static_cast<size_t>(rows.count));
  rows.visit([&](int64_t row, const float* from, const float* less) {
    parts[static_cast<size_t>(row)] = cpu::round_row(
        from, less, rows.length, of_rows[row], static_cast<float>(step), out + row * rows.length);
  });
  *lost.mutable_data_ptr<double>() = std::accumulate(parts.begin(), parts.end(), 0.0);
  return {sent, lost};
}

}  // namespace fedkd_fast::bind
