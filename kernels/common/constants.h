// The numbers of the formulas, once for all kernels. Their Python twins are in lopt_fast/reference.py and
// spec.py.
#pragma once

namespace lopt {

constexpr double kRmsEpsilon = 1e-6;      // rsqrt(second moment + ...); m * rsqrt(v + ...) where not factored
constexpr double kSquareEpsilon = 1e-30;  // mean of g^2, + ...
constexpr double kRowMeanEpsilon = 1e-9;  // row / (mean of row + ...)
constexpr double kFactorFloor = 1e-9;     // rsqrt(max(factor, ...))
constexpr double kDiagonalEpsilon = 1e-9;    // g * rsqrt(v + ...) where not factored
constexpr double kFactorEpsilon = 1e-8;      // rsqrt(row + ...), rsqrt(column + ...)
constexpr double kNormaliserEpsilon = 1e-5;  // x * rsqrt(mean x^2 + ...)
constexpr double kLogEpsilon = 1e-8;         // log(|p| + ...)
constexpr double kGradientBound = 0.1;       // of the column clip_g
constexpr double kLaggedClip = 10.0;         // bound on a column that is normalised with lagged statistics
constexpr double kClipEpsilon = 1e-6;        // max_norm / (norm + ...), as torch.nn.utils.clip_grad_norm_

constexpr int kTimeColumns = 11;
constexpr double kTimescales[kTimeColumns] = {1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5};

// Decays of small_fc_lopt: momentum, second moment, factored accumulators.
constexpr int kMomenta = 3;
constexpr int kFactored = 3;

// Columns of the MLP's input, in order (lopt_fast.spec.Spec.normalised_columns), then the time columns.
enum Column {
  kG = 0,
  kP = 1,
  kM = 2,
  kV = 5,
  kMRsqrtV = 6,
  kRsqrtV = 9,
  kFacG = 10,
  kRow = 13,
  kCol = 16,
  kRsqrtRow = 19,
  kRsqrtCol = 22,
  kFacM = 25,
  kNormalised = 28,
  kInputs = kNormalised + kTimeColumns,
};

// Features: the columns that differ from parameter to parameter, in the order in which the kernels sum them.
// The last six exist only where the tensor is not factored; each stands for two equal columns.
enum Feature {
  fG = 0,
  fP = 1,
  fM = 2,
  fV = 5,
  fMRsqrtV = 6,
  fRsqrtV = 9,
  fFacG = 10,
  fFacM = 13,
  kFactoredFeatures = 16,
  fDiagonal = 16,
  fRsqrtDiagonal = 19,
  kFeatures = 22,
};

// Column that a feature shows; for the diagonal ones the first of the two.
constexpr int kColumnOfFeature[kFeatures] = {
    kG,           kP,       kM,       kM + 1,    kM + 2,        kV,           kMRsqrtV,  kMRsqrtV + 1,
    kMRsqrtV + 2, kRsqrtV,  kFacG,    kFacG + 1, kFacG + 2,     kFacM,        kFacM + 1, kFacM + 2,
    kRow,         kRow + 1, kRow + 2, kRsqrtRow, kRsqrtRow + 1, kRsqrtRow + 2};
// Distance from the first to the second column of a diagonal feature.
constexpr int kDiagonalTwin = kCol - kRow;

}  // namespace lopt
