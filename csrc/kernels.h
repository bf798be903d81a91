// The whole native API on one page: raw pointers, shapes, contracts.
//
// Kernels allocate nothing, throw nothing, start no thread and know no torch. Extents and strides
// are in elements unless a name says bytes. CPU kernels are serial over [begin, end) of their outer
// axis; the binding splits that axis over threads, so every result is the same for any thread
// count. CUDA launchers take the stream and return cudaError_t. Letters: B batch of matrices, P×Q
// matrix, M×N the same matrix oriented so that M >= N, K rank, R rows of logits, C classes.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/distill_loss.h"
#include "common/half.h"
#include "common/layer_mse.h"
#include "common/macros.h"
#include "common/truncated_svd.h"
#include "kernels_fit_factors.h"
#include "kernels_pack_factors.h"
#include "kernels_rans.h"
#include "kernels_round_rows.h"

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace fedkd_fast {

// ---- truncated_svd ------------------------------------------------------------------------------

struct MatrixScan {
  bool finite;     // no NaN, no Inf
  bool zero;       // every element is zero
  int exponent;    // 2^exponent <= max |a| < 2^(exponent+1); 0 for a zero matrix
  double squares;  // sum of a²; of float matrices only
};

// Vectors of one length; component k of vector entry i is data[i · row_stride + k · col_stride].
struct VectorsView {
  const double* data;
  int64_t length;
  int64_t row_stride, col_stride;
  double at(int64_t i, int64_t k) const { return data[i * row_stride + k * col_stride]; }
};

namespace cpu {

// Matrices are contiguous, row-major. Scalar is float or double.

// largest (rows): the largest magnitude of each row. levels (rows×cols), where it is not null: the
// rows in steps of level_step(largest); those of zeros are left as they are.
MatrixScan scan_matrix(const float* matrix, int64_t rows, int64_t cols, float* largest,
                       int8_t* levels);
MatrixScan scan_matrix(const double* matrix, int64_t rows, int64_t cols, double* largest);

// out (count×cols): the rows of a matrix that `ids` names (null: the first ones), times
// 2^-exponent, which is exact.
void gather_rows(const float* matrix, int64_t cols, const int64_t* ids, int64_t count, int exponent,
                 float* out);

// out = matrix · 2^-exponent: exact, and its squares stay inside the range of double.
template <typename Scalar>
void widen_matrix(const Scalar* matrix, int64_t count, int exponent, double* out);

double squared_norm(const float* values, int64_t count);
double squared_norm(const double* values, int64_t count);

// Rows (count×length), entry j of each times factors[j], become levels in -127..127 of a step of
// their own: row · factors ≈ levels · steps[row]. A row of zeros has step 0. `factors` may be null
// for ones; `largest`, where it is not null, has the largest magnitude of each row · factors.
void quantise_rows(const float* rows, int64_t count, int64_t length, const float* factors,
                   const float* largest, int8_t* levels, float* steps);

// Sums of products of levels, row k in steps of steps[k], become levels again, and `steps` theirs:
// as quantise_rows of sums · steps.
void requantise_rows(const int32_t* sums, int64_t count, int64_t length, const float* factors,
                     int8_t* levels, float* steps);

// out[k][j] = sums[k][j] · steps[k] · factors[j] - shift · basis[k][j]; factors and basis may be
// null.
void dequantise_rows(const int32_t* sums, int64_t count, int64_t length, const float* steps,
                     const float* factors, const float* basis, float shift, float* out);

// Pseudo-random signs, the same for the same seed: directions that no spectrum is aligned to.
void random_signs(uint64_t seed, int64_t count, float* out);

// How many components hold `energy` of the total, judged by the first `known` > 0 energies of a
// spectrum of `side`: beyond them it goes on from their level like exp(-b·√k), with the b that
// makes it hold the energy that is left.
int64_t predict_rank(const double* energies, int64_t known, int64_t side, double total,
                     double energy);

// rows (count×length) to unit length, norms in fp64; a row of zeros stays as it is.
void normalise_rows(float* rows, int64_t count, int64_t length, double* norms);

// rows (count×length) in another order: out[k] = rows[order[k]].
void permute_rows(const float* rows, int64_t length, const int64_t* order, int64_t count,
                  float* out);

// a -= factor · b.
void subtract_scaled(float* a, const float* b, float factor, int64_t count);

// Turns component k of both sides round where that of the left has its entry of largest magnitude
// (the first of equals) below zero.
void fix_signs(float* left, int64_t left_length, float* right, int64_t right_length, int64_t rank);

// out (count×height), zeros but for out[k][ids[i]] = rows[k][i].
void scatter_columns(const float* rows, int64_t count, const int64_t* ids, int64_t length,
                     int64_t height, float* out);

// K vectors on either side become factors: columns of unit length, component-major (left K×P, right
// K×Q), signs as by fix_signs. Two kinds of input:
//   singular == nullptr: long_vectors = X·V, whose norms times 2^exponent are the singular values;
//   singular != nullptr: unit long_vectors, and singular values still to be scaled by 2^exponent.
// `transposed` says that the matrix was P <= Q, that is, that long_vectors belong to the right
// side.
template <typename Scalar>
void finish_factors(const VectorsView& long_vectors, const VectorsView& short_vectors,
                    const double* singular, int64_t rank, int exponent, bool transposed,
                    Scalar* left, Scalar* sigma, Scalar* right);

// ---- truncated_svd: symmetric eigenproblems -----------------------------------------------------
// The largest entry of a matrix is far from the ends of the range of Real.

// Rows of a symmetric matrix are padded to a multiple of this, with zeros.
constexpr int64_t kSymmetricPad = 16;

// A (side×stride) = Q·T·Qᵀ with T tridiagonal: `diagonal` (side) and `beside` it (side - 1). The
// first product is H_{side-1} of Q = H_{side-1} ⋯ H_1, H_i = I - taus[i]·v_i·v_iᵀ: row i of the
// matrix becomes v_i, zeros from column i on, and taus[0] = 0.
template <typename Real>
void tridiagonalise(Real* matrix, int64_t side, int64_t stride, Real* taus, double* diagonal,
                    double* beside);

// factor (count×count) T, upper triangular, of H_1⋯H_count = I - Vᵀ·T·V, from products = V·Vᵀ.
template <typename Real>
void reflector_factor(const Real* products, const Real* taus, int64_t count, Real* factor);

// All eigenvalues, descending, each to a few eps of the largest.
void tridiagonal_values(const double* diagonal, const double* beside, int64_t side, double* values);

// rows (count×side): unit eigenvectors of these values. Two of them are orthogonal to about
// eps · |T| / the distance of their values.
template <typename Real>
void tridiagonal_vectors(const double* diagonal, const double* beside, int64_t side,
                         const double* values, int64_t count, Real* rows);

}  // namespace cpu

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
namespace cuda {

// Pointers are device pointers. What differs from matrix to matrix, places and goals, travels as an
// argument of the kernel, for at most kMostMatrices: nothing is copied to the device, and nothing
// waits for the host.

constexpr int kMostMatrices = 64;

enum class MatrixState : int { kUsable = 0, kZero = 1, kNotFinite = 2 };

// What cpu::scan_matrix says of a matrix. The exponent is 0 where it is not usable, and squares
// mean something for float matrices only.
struct MatrixFacts {
  double squares;
  int exponent;
  MatrixState state;
};

// Contiguous matrices; number i is at[i], has size[i] > 0 values, and its facts are
// facts[index[i]].
template <typename Scalar>
struct MatrixList {
  int count;
  const Scalar* at[kMostMatrices];
  int64_t size[kMostMatrices];
  int index[kMostMatrices];
};

// parts (2 · kScanParts · count) is scratch.
constexpr int kScanParts = 32;
template <typename Scalar>
cudaError_t scan_matrices(const MatrixList<Scalar>& matrices, double* parts, MatrixFacts* facts,
                          cudaStream_t stream);

// scaled (B, size), all of one size: matrices · 2^-exponent, and zeros for what is not finite.
// coarse, where it is not null: the same in bfloat16.
template <typename Scalar>
cudaError_t scale_matrices(const MatrixList<Scalar>& matrices, const MatrixFacts* facts,
                           double* scaled, BFloat16* coarse, cudaStream_t stream);

// Rows known from earlier matrices: rows[i] at at[i], contiguous, of unit length.
struct EarlierRows {
  int count;
  const float* at[kMostMatrices];
  int64_t rows[kMostMatrices];
};

// out (B, width, length): earlier rows, then rows of random signs; so are values that are not of a
// row of unit length.
cudaError_t start_rows(const EarlierRows& earlier, int64_t width, int64_t length, uint64_t seed,
                       BFloat16* out, cudaStream_t stream);

// (B, side, side), one block a matrix. inverses: T, lower triangular, with T·G·Tᵀ = I for
// G = R·Rᵀ, so that the rows of T·R are orthonormal. A row that hardly leaves the span of those
// before it becomes zero.
cudaError_t cholesky_inverse(const double* grams, int64_t batch, int64_t side, double* inverses,
                             cudaStream_t stream);

// Eigenvalues (B, side), ascending, and eigenvectors in rows (B, side, side), of symmetric matrices
// without negative eigenvalues; one block a matrix. scratch: jacobi_scratch(side) values a matrix.
int64_t jacobi_scratch(int64_t side);
cudaError_t jacobi_eigh(const double* symmetric, int64_t batch, int64_t side, double* scratch,
                        double* values, double* vectors, cudaStream_t stream);

// Leading components of B matrices, as a solver orders them: ascending energies, as of XᵀX, or
// descending singular values.
struct Spectra {
  const double* values;  // (B, count)
  int64_t count;
  bool singular;
  FEDKD_HD double value(int64_t b, int64_t k) const {
    const double found = values[b * count + (singular ? k : count - 1 - k)];
    return found > 0.0 ? found : 0.0;
  }
  FEDKD_HD double energy(int64_t b, int64_t k) const {
    return singular ? value(b, k) * value(b, k) : value(b, k);
  }
  FEDKD_HD double sigma(int64_t b, int64_t k) const {
    return singular ? value(b, k) : sqrt(value(b, k));
  }
};

struct SelectArgs {
  int count;  // matrices
  int index[kMostMatrices];
  StopBy by;
  double limit[kMostMatrices];
  double slack;  // of the total: what the energies have to exceed those wanted by
  Spectra spectra;
  int64_t side;  // components that there are
  const MatrixFacts* facts;
};

// One for each matrix, behind it the energies of its components, descending.
struct Report {
  double state;  // a MatrixState
  double rank;   // that is wanted; -1 where it takes more components
  double unfit;  // 1 where the last of them has at most kGramFloor of the first one's energy
  double total;  // Σσ² of the whole matrix
};
constexpr int64_t kReportHead = sizeof(Report) / sizeof(double);

// reports (B, kReportHead + spectra.count).
cudaError_t select_ranks(const SelectArgs& args, double* reports, cudaStream_t stream);

// Component k of matrix b; strides may be negative: eigensolvers return ascending order.
struct ComponentsView {
  const double* data;
  int64_t length;
  int64_t batch_stride, component_stride, entry_stride;
  FEDKD_HD double at(int64_t b, int64_t k, int64_t i) const {
    return data[b * batch_stride + k * component_stride + i * entry_stride];
  }
};

template <typename Scalar>
struct FinishArgs {
  int count;  // matrices
  int index[kMostMatrices];
  int rank[kMostMatrices];  // components that are wanted; may be none
  // Component-major: (K, P), (K,), (K, Q).
  Scalar* left_out[kMostMatrices];
  Scalar* sigma_out[kMostMatrices];
  Scalar* right_out[kMostMatrices];
  ComponentsView left, right;
  Spectra spectra;
  bool left_is_long;  // that of X·V, whose length is only known to be σ where spectra hold energies
  const MatrixFacts* facts;
};

// Factors as cpu::finish_factors makes them, with the singular values of the spectra.
template <typename Scalar>
cudaError_t finish_factors(const FinishArgs<Scalar>& args, cudaStream_t stream);

}  // namespace cuda
#endif

// ---- distill_loss -------------------------------------------------------------------------------
//
// One row of logits per sample: both cross entropies CE, both divergences KL at the temperature,
// D = CE_t + CE_s of a row or its weighted mean over all rows, at least kDenominatorFloor, or 1,
// and the gradient of
//   sum_i w_i [task·(CE_t + CE_s) + divergence·(KL(s||t) + KL(t||s)) / D + D·denominator_grad_i]
// with respect to the logits, of which what `mode` says is held constant. t mentor, s mentee;
// formulas and numerics stand in common/distill_loss.h.
//
// A row does not count where its label is ignore_index or its weight w_i is 0: then its statistics
// are 0, its D is 1 and its gradients are 0. A row whose label is out of [0, C), or whose weight is
// negative or not finite, becomes NaN. NaN or Inf among the logits makes statistics of that row NaN
// or Inf.

struct DistillLossArgs {
  FloatType type;             // of logits and gradients
  const void* mentor_logits;  // (R, C), unit stride along C
  const void* mentee_logits;
  const int64_t* labels;         // (R,)
  const void* weights;           // (R,) of Real, or null for ones
  const void* denominator_grad;  // (R,) of Real, or null for zeros, as where D is 1
  int64_t rows, classes;
  int64_t mentor_stride, mentee_stride;  // of rows
  int64_t label_stride;
  int64_t ignore_index;
  DistillMode mode;
  double gradient_scale;  // of all gradients
  void* statistics;       // (5, R) of Real: ce_mentor, ce_mentee, KL(s||t), KL(t||s), D
  // What rows leave for their gradients where these wait for the mean of D: (kRowStates, R) of
  // Real, else null.
  void* states;
  // (R, C), contiguous; null where no gradients are wanted. Each may be the logits themselves.
  void* grad_mentor;
  void* grad_mentee;
};

namespace cpu {

struct LabelScan {
  int64_t first_bad_label;   // neither ignore_index nor in [0, C); or -1
  int64_t first_bad_weight;  // negative or not finite; or -1
  double weight;             // sum over the rows that count
};

LabelScan scan_labels(const DistillLossArgs& args);

// Values that `scratch` of distill_loss has to hold; 0 where it may be null.
int64_t distill_loss_scratch(const DistillLossArgs& args);

// Statistics, and states or gradients.
void distill_loss(const DistillLossArgs& args, float* scratch, int64_t begin, int64_t end);

// Where D is the mean: also writes it into the statistics.
DistillMeans mean_distill_loss(const DistillLossArgs& args);

// Gradients from states and means.
void distill_loss_gradients(const DistillLossArgs& args, const DistillMeans& means, int64_t begin,
                            int64_t end);

}  // namespace cpu

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
namespace cuda {

// All of it. means: on the device, or null where D is of a row. total (1) and summary
// (kDistillSummary) of Real.
cudaError_t distill_loss(const DistillLossArgs& args, DistillMeans* means, void* total,
                         void* summary, cudaStream_t stream);

}  // namespace cuda
#endif

// ---- layer_mse: squared errors between layers, common/layer_mse.h -------------------------------

namespace cpu {

// Sums and gradients of blocks [begin, end) of N · G · blocks.
void layer_mse(const LayerMseArgs& args, int64_t begin, int64_t end);

// Errors and total from sums.
void mean_layer_mse(const LayerMseArgs& args);

}  // namespace cpu

#if defined(FEDKD_FAST_HAS_CUDA) || defined(__CUDACC__)
namespace cuda {

// All of it.
cudaError_t layer_mse(const LayerMseArgs& args, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace fedkd_fast
