// Torch's matrix products and factorisations, called through its dispatcher.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "bind_torch.h"

namespace fedkd_fast::bind {

template <size_t N>
void call_torch(const char* op, const char* overload, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
}

inline Tensor mT(const Tensor& matrix) {
  return torch::stable::transpose(matrix, matrix.dim() - 2, matrix.dim() - 1);
}

inline Tensor mm(const Tensor& left, const Tensor& right) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(left),
                                    torch::stable::detail::from(right)};
  call_torch("aten::mm", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Exact sums of products of int8; both sides are shorter than kMostInt8Terms.
inline Tensor int_mm(const Tensor& left, const Tensor& right) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(left),
                                    torch::stable::detail::from(right)};
  call_torch("aten::_int_mm", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}
constexpr int64_t kMostInt8Terms = (int64_t{1} << 31) / (127 * 127);

// Ascending eigenvalues and the eigenvectors, in columns, of symmetric matrices.
inline std::pair<Tensor, Tensor> eigh(const Tensor& symmetric) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(symmetric),
                                    torch::stable::detail::from(std::string("L"))};
  call_torch("aten::linalg_eigh", "", stack);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

inline std::tuple<Tensor, Tensor, Tensor> svd(const Tensor& matrix) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(matrix),
                                    torch::stable::detail::from(false),
                                    torch::stable::detail::from(std::optional<std::string>())};
  call_torch("aten::linalg_svd", "", stack);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

// Q of matrix = QR, (N, L) for (N, L), N >= L.
inline Tensor qr(const Tensor& matrix) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrix), StableIValue{}};
  call_torch("aten::geqrf", "", stack);
  call_torch("aten::linalg_householder_product", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// L of symmetric = LLᵀ; its second value is not zero where there is none.
inline std::pair<Tensor, int> cholesky(const Tensor& symmetric) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(symmetric),
                                    torch::stable::detail::from(false),
                                    torch::stable::detail::from(false)};
  call_torch("aten::linalg_cholesky_ex", "", stack);
  const Tensor info = torch::stable::detail::to<Tensor>(stack[1]);
  return {torch::stable::detail::to<Tensor>(stack[0]), info.const_data_ptr<int32_t>()[0]};
}

// (LLᵀ)⁻¹
inline Tensor cholesky_inverse(const Tensor& lower) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(lower),
                                    torch::stable::detail::from(false)};
  call_torch("aten::cholesky_inverse", "", stack);
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

// X of lower · X = rows, contiguous where the rows are.
inline Tensor solve_lower(const Tensor& lower, const Tensor& rows) {
  // Column-major is what LAPACK takes and gives: Xᵀ · lowerᵀ = rowsᵀ.
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(mT(lower)), torch::stable::detail::from(mT(rows)),
      torch::stable::detail::from(true), torch::stable::detail::from(false),
      torch::stable::detail::from(false)};
  call_torch("aten::linalg_solve_triangular", "", stack);
  return torch::stable::contiguous(mT(torch::stable::detail::to<Tensor>(stack[0])));
}

// (count, L): eigenvectors that stand ascending in columns, as rows, the last one first.
template <typename Real>
Tensor leading_rows(const Tensor& vectors, int64_t count) {
  const int64_t side = vectors.size(0);
  const Real* data = vectors.const_data_ptr<Real>();
  Tensor rows = empty_like_device(vectors, {count, side}, vectors.scalar_type());
  Real* out = rows.mutable_data_ptr<Real>();
  for (int64_t k = 0; k < count; ++k) {
    const Real* column = data + (side - 1 - k) * vectors.stride(1);
    for (int64_t i = 0; i < side; ++i) out[k * side + i] = column[i * vectors.stride(0)];
  }
  return rows;
}

}  // namespace fedkd_fast::bind
